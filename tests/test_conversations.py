"""What was said and what may be called, as each API's clients send it: one conversation for the model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from expertd.clients.gateway import anthropic, chat, responses
from expertd.clients.gateway.stored import Stored
from expertd.protocol.errors import ParameterUnsupported, RequestInvalid, ResponseNotFound

HI = {"role": "user", "content": "hi"}


def of_chat(messages: list[Any], **more: Any) -> Any:
    return chat.parse({"model": "m", "messages": messages} | more)


def of_responses(items: list[Any], **more: Any) -> Any:
    return responses.parse({"model": "m", "input": items} | more).with_messages([])


def of_claude(messages: list[Any], **more: Any) -> Any:
    return anthropic.parse({"model": "m", "max_tokens": 5, "messages": messages} | more)


def said(wanted: Any) -> list[dict[str, Any]]:
    """What a worker is told."""
    return list(wanted.generate(1).messages)


@pytest.mark.parametrize("parsed", [
    of_chat([{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, HI]),
    of_responses([{"role": "developer", "content": "b"}, HI], instructions="a"),
    of_claude([{"role": "system", "content": "b"}, HI], system="a"),
])  # fmt: skip
def test_system_messages_at_the_beginning_are_one(parsed: Any) -> None:
    assert said(parsed) == [{"role": "system", "content": "a\n\nb"}, HI]


def test_a_system_message_that_comes_later_stays_there() -> None:
    messages = [HI, {"role": "system", "content": "a"}, {"role": "system", "content": "b"}]
    assert said(of_chat(messages)) == messages


# -- answers that are sent back ----------------------------------------------------------------------------------------


def test_a_message_that_was_parsed_comes_back_with_what_was_parsed() -> None:
    # What openai's chat.completions.parse() adds.
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}", "parsed_arguments": {}}}
    answer = {"role": "assistant", "content": "{}", "parsed": {}, "annotations": [{"type": "url_citation"}],
              "tool_calls": [call], "refusal": None, "audio": None, "function_call": None}  # fmt: skip
    (message,) = said(of_chat([answer]))
    assert message == {"role": "assistant", "content": "{}", "tool_calls": [{**call, "function": {
        "name": "f", "arguments": "{}"}}]}  # fmt: skip
    with pytest.raises(ParameterUnsupported, match=r"'messages\[0\]\.parsed' is not supported"):
        of_chat([HI | {"parsed": {}}])


TOLD = {"text": "yes", "annotations": [], "logprobs": [], "type": "output_text"}


@pytest.mark.parametrize("parsed", [
    of_chat([HI, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}]),
    of_chat([HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "yes"}]}]),
    of_responses([HI, {"type": "message", "id": "m", "role": "assistant", "content": [TOLD], "status": "completed"}]),
    of_claude([HI, {"role": "assistant", "content": [{"type": "text", "text": "yes", "citations": None}]}]),
])  # fmt: skip
def test_parts_of_an_answer_come_back(parsed: Any) -> None:
    assert said(parsed) == [HI, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(("parse", "kind", "param"), [
    (of_chat, "text", "messages[0].content[0].tone"),
    (of_responses, "input_text", "input[0].content[0].tone"),
    (of_claude, "text", "messages[0].content[0].tone"),
])  # fmt: skip
def test_what_is_said_of_a_part_is_not_ignored(parse: Any, kind: str, param: str) -> None:
    with pytest.raises(ParameterUnsupported) as caught:
        parse([{"role": "user", "content": [{"type": kind, "text": "hi", "tone": "loud"}]}])
    assert caught.value.param == param


def response(number: int, *output: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"resp_{number}", "output": list(output)}


ANSWER = {"id": "msg_a", "type": "message", "role": "assistant", "content": [TOLD]}
CALLED = {"id": "fc_a", "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}


def test_items_of_kept_responses_are_referred_to_by_their_ids() -> None:
    stored = Stored()
    asked = responses.parse({"model": "m", "input": "hi"})
    stored.keep(response(1, CALLED, ANSWER), asked.given, [])
    references = [{"type": "item_reference", "id": asked.given[0]["id"]}, {"id": "fc_a", "type": None},
                  {"type": "function_call_output", "call_id": "c", "output": "4"},
                  {"type": "item_reference", "id": "msg_a"}]  # fmt: skip
    again = responses.parse({"model": "m", "input": references}, stored.item)
    assert [message["role"] for message in said(again.with_messages([]))] == ["user", "assistant", "tool", "assistant"]
    assert again.given[1] == CALLED
    with pytest.raises(ResponseNotFound, match="no response that is kept has an item 'msg_b'") as caught:
        responses.parse({"model": "m", "input": [HI, {"type": "item_reference", "id": "msg_b"}]}, stored.item)
    assert (caught.value.http_status, caught.value.param) == (404, "input[1].id")


def test_an_item_is_there_as_long_as_a_response_that_it_came_with() -> None:
    stored = Stored(most=2)
    stored.keep(response(1, ANSWER), [], [])
    stored.keep(response(2, CALLED), [ANSWER], [])  # the client has sent it back
    stored.forget("resp_1")
    assert stored.item("msg_a") == ANSWER
    for number in (3, 4):
        stored.keep(response(number), [], [])
    assert (stored.item("msg_a"), stored.item("fc_a")) == (None, None)


def test_an_id_that_two_responses_have_is_the_latest_s_and_each_takes_its_own_words_with_it() -> None:
    stored = Stored()
    first, second = ({"type": "message", "id": "mine", "role": "user", "content": text} for text in ("one", "two"))
    stored.keep(response(1), [first, first], [])
    stored.keep(response(2), [second], [first])
    assert stored.item("mine") == second
    stored.forget("resp_2")
    assert stored.item("mine") == first
    stored.keep(response(3), [second], [])
    stored.forget("resp_1")
    assert stored.item("mine") == second
    stored.forget("resp_3")
    assert (stored.item("mine"), stored.size) == (None, 0)


@pytest.mark.parametrize("item", [{"id": 5}, {"type": "item_reference"}, HI | {"id": []}], ids=str)
def test_an_id_that_is_none_is_refused_by_name(item: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        of_responses([item])
    assert caught.value.param == "input[0].id"


# -- what may be called ------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "adds", "parameters": SCHEMA}}
FORMAT = {"type": "json_schema", "name": "n", "schema": SCHEMA}


def chat_with(extra: dict[str, Any], **more: Any) -> Any:
    return of_chat([HI], tools=[{**TOOL, "function": {**TOOL["function"], **extra}}], **more)  # type: ignore[dict-item]


def responses_with(extra: dict[str, Any], **more: Any) -> Any:
    return of_responses([HI], tools=[{"type": "function", **TOOL["function"], **extra}], **more)  # type: ignore[dict-item]


def claude_with(extra: dict[str, Any], **more: Any) -> Any:
    return of_claude([HI], tools=[{"name": "f", "description": "adds", "input_schema": SCHEMA, **extra}], **more)


EACH = pytest.mark.parametrize(
    ("parse", "param"), [(chat_with, "tools[0].function"), (responses_with, "tools[0]"), (claude_with, "tools[0]")]
)


@EACH
@pytest.mark.parametrize(
    "extra", [{}, {"strict": True}, {"strict": None}, {"cache_control": {}, "defer_loading": False}], ids=str
)
def test_a_tool_is_the_same_by_every_api(parse: Any, param: str, extra: dict[str, Any]) -> None:
    assert parse(extra).tools == [TOOL]


@EACH
@pytest.mark.parametrize(
    "extra", [{"strict": 1}, {"foo": 1}, {"defer_loading": True}, {"allowed_callers": ["code"]}, {"description": 5}],
    ids=str,
)  # fmt: skip
def test_what_a_tool_says_beside_is_refused_by_name(parse: Any, param: str, extra: dict[str, Any]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse(extra)
    assert caught.value.param == f"{param}.{next(iter(extra))}"


def test_what_lies_beside_a_function_is_refused_by_name() -> None:
    with pytest.raises(ParameterUnsupported, match=r"'tools\[0\]\.foo'"):
        of_chat([HI], tools=[{**TOOL, "foo": 1}])


@pytest.mark.parametrize(("parse", "given"), [
    (chat_with, {"response_format": {"type": "json_schema", "json_schema": FORMAT}}),
    (responses_with, {"text": {"format": FORMAT}}),
    (claude_with, {"output_config": {"format": FORMAT}}),
])  # fmt: skip
def test_a_format_may_stand_beside_tools(parse: Any, given: dict[str, Any]) -> None:
    message = parse({}, **given).generate(1)
    assert json.loads(message.schema) == SCHEMA
    assert [tool["function"]["name"] for tool in message.tools] == ["f"]


# -- errors of workers -------------------------------------------------------------------------------------------------

UNKNOWN = "this model's chat template knows no '{}'; leave it out"


@pytest.mark.parametrize(("parsed", "name", "param"), [
    (of_chat([HI], reasoning_effort="low"), "reasoning_effort", "reasoning_effort"),
    (of_chat([HI], reasoning_effort="none"), "enable_thinking", "reasoning_effort"),
    (of_chat([HI], chat_template_kwargs={"message": 1}), "message", "chat_template_kwargs.message"),
    (of_chat([HI], max_completion_tokens=5), "max_tokens", "max_completion_tokens"),
    (of_chat([HI], max_tokens=5), "max_tokens", "max_tokens"),
    (of_responses([HI], reasoning={"effort": "low"}), "reasoning_effort", "reasoning.effort"),
    (of_responses([HI], text={"format": FORMAT}), "response_format", "text.format"),
    (of_claude([HI], thinking={"type": "enabled"}), "enable_thinking", "thinking"),
])  # fmt: skip
def test_an_error_names_what_the_client_sent(parsed: Any, name: str, param: str) -> None:
    error = parsed.renamed(ParameterUnsupported(UNKNOWN.format(name), param=name))
    assert (type(error), error.param, error.message) == (ParameterUnsupported, param, UNKNOWN.format(param))


def test_words_that_are_no_names_stay() -> None:
    sentence = "the messages are too long for max_tokens of 5; lower max_tokens (a_max_tokens, .max_tokens)"
    error = of_responses([HI]).renamed(RequestInvalid(sentence, param="messages"))
    assert error.param == "input"
    assert error.message == (
        "the messages are too long for max_output_tokens of 5; lower max_output_tokens (a_max_tokens, .max_tokens)"
    )


@pytest.mark.parametrize("effort", ["low", "none"])
def test_two_words_on_how_to_think_are_refused_where_they_differ(effort: str) -> None:
    name, value = ("enable_thinking", True) if effort == "none" else ("reasoning_effort", "high")
    with pytest.raises(RequestInvalid, match="contradict each other") as caught:
        of_chat([HI], reasoning_effort=effort, chat_template_kwargs={name: value})
    assert caught.value.param == f"chat_template_kwargs.{name}"
