"""Chat requests as data: what is honoured, what is refused and under which name, what answers look like."""

from __future__ import annotations

from typing import Any

import pytest

from expertd.clients.gateway import chat
from expertd.protocol.errors import ParameterUnsupported, RequestInvalid
from expertd.protocol.messages import Finished

END = Finished(request=1, reason="length", prompt_tokens=5, completion_tokens=3)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields


def message(**fields: Any) -> dict[str, Any]:
    return body(messages=[{"role": "user", "content": "hi"} | fields])


def test_the_defaults_are_those_of_openai() -> None:
    assert chat.parse(body()) == chat.ChatRequest(
        model="m",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=None,
        temperature=1.0,
        top_p=1.0,
        stop=[],
        stream=False,
        include_usage=False,
    )


def test_null_is_the_default_of_everything_optional() -> None:
    honoured = ["temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options"]
    names = [*honoured, *chat.NEUTRAL, *chat.IGNORED]
    assert chat.parse(body(**dict.fromkeys(names))) == chat.parse(body())


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_p": 0}, "temperature", 0.0),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 7, "max_tokens": 7}, "max_tokens", 7),
        ({"stop": "END"}, "stop", ["END"]),
        ({"stop": ["a", "b", "c", "d"]}, "stop", ["a", "b", "c", "d"]),
        ({"stop": []}, "stop", []),
        ({"stream": True}, "stream", True),
        ({"stream": True, "stream_options": {}}, "include_usage", False),
        ({"stream": True, "stream_options": {"include_usage": True}}, "include_usage", True),
        ({"stream": True, "stream_options": {"include_obfuscation": False}}, "include_usage", False),
    ],
)
def test_a_parameter_is_honoured(given: dict[str, Any], field: str, value: object) -> None:
    assert getattr(chat.parse(body(**given)), field) == value


@pytest.mark.parametrize(
    "given",
    [
        {"n": 1},
        {"presence_penalty": 0},
        {"frequency_penalty": 0.0},
        {"logprobs": False},
        {"logit_bias": {}},
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto"},
        {"prompt_cache_key": "k", "safety_identifier": "s"},
    ],
    ids=str,
)
def test_what_asks_for_nothing_changes_nothing(given: dict[str, Any]) -> None:
    assert chat.parse(body(**given)) == chat.parse(body())


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"seed": 1}, "seed"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"no_such_thing": 1}, "no_such_thing"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ParameterUnsupported) as caught:
        chat.parse(body(**given))
    assert caught.value.param == param
    assert param in caught.value.message
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop": "x" * 4097}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": 5}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "boss", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": "hi", "name": 3}]}, "messages[0].name"),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        chat.parse(body(**given))
    assert caught.value.param == param
    assert caught.value.http_status == 400


@pytest.mark.parametrize("nothing", [[], "text", 5, None])
def test_a_body_that_is_no_object_is_refused(nothing: object) -> None:
    with pytest.raises(RequestInvalid):
        chat.parse(nothing)


@pytest.mark.parametrize(
    ("role", "seen"),
    [("system", "system"), ("developer", "system"), ("user", "user"), ("assistant", "assistant"), ("tool", "tool")],
)
def test_roles(role: str, seen: str) -> None:
    assert chat.parse(message(role=role)).messages[0]["role"] == seen


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert chat.parse(message(content=parts)).messages == [{"role": "user", "content": "one two"}]


def test_parts_that_are_not_text_are_refused() -> None:
    with pytest.raises(ParameterUnsupported) as caught:
        chat.parse(message(content=[{"type": "image_url", "image_url": {"url": "data:"}}]))
    assert caught.value.param == "messages[0].content[0]"


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    given: dict[str, Any] = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None}
    given["annotations"] = []
    assert chat.parse(body(messages=[given])).messages == [{"role": "assistant", "content": "hi"}]


def test_names_reach_the_template() -> None:
    given = [{"role": "tool", "content": "4", "tool_call_id": "c1"}, {"role": "user", "content": "hi", "name": "Ann"}]
    assert chat.parse(body(messages=given)).messages == given


@pytest.mark.parametrize("field", [{"tool_calls": [{"id": "1"}]}, {"thing": 1}], ids=str)
def test_a_message_field_without_effect_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ParameterUnsupported) as caught:
        chat.parse(message(**field))
    assert caught.value.param == f"messages[0].{next(iter(field))}"


def test_a_completion() -> None:
    assert chat.completion("chatcmpl-1", 99, "m", "text", END) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 99,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "text", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_chunk_names_no_usage_and_the_usage_chunk_no_choice() -> None:
    assert chat.chunk("chatcmpl-1", 99, "m", {"content": "a"}) == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 99,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}],
    }
    last = chat.usage_chunk("chatcmpl-1", 99, "m", END)
    assert (last["choices"], last["usage"]) == ([], chat.usage(END))
