"""Chat requests as data: what is honoured, what is refused and under which name, what answers look like."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from expertd.clients.gateway import chat, completions
from expertd.clients.gateway.answers import Told
from expertd.clients.gateway.wanted import Wanted
from expertd.protocol.errors import ParameterUnsupported, RequestInvalid, WorkerUnavailable
from expertd.protocol.messages import Delta, Finished, Sampling, TokenLogprob, ToolCall, TopToken

END = Finished(request=1, reason="length", prompt_tokens=5, completion_tokens=3)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields


def message(**fields: Any) -> dict[str, Any]:
    return body(messages=[{"role": "user", "content": "hi"} | fields])


def test_the_defaults_are_those_of_openai() -> None:
    assert chat.parse(body()) == Wanted(
        model="m", messages=[{"role": "user", "content": "hi"}], sampling=Sampling(temperature=1.0)
    )


def test_null_is_the_default_of_everything_optional() -> None:
    names = [*chat.HONOURED - {"model", "messages"}, *chat.NEUTRAL, *chat.IGNORED]
    assert chat.parse(body(**dict.fromkeys(names))) == chat.parse(body())


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"name": "add", "description": "adds", "parameters": SCHEMA}
TOOL = {"type": "function", "function": ADD}
OTHER = {"type": "function", "function": {"name": "other"}}


def format_of(schema: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}}


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
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
        ({"n": 3}, "answers", 3),
        ({"logprobs": True}, "top_logprobs", 0),
        ({"logprobs": True, "top_logprobs": 5}, "top_logprobs", 5),
        ({"response_format": {"type": "json_object"}}, "schema", '{"type": "object"}'),
        (format_of(SCHEMA), "schema", json.dumps(SCHEMA)),
        ({"tools": [TOOL]}, "tools", [TOOL]),
        ({"tools": [TOOL], "tool_choice": "none"}, "tools", []),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "required"),
        ({"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "tools", [TOOL]),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_calls", False),
        ({"reasoning_effort": "low"}, "template", {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, "template", {"enable_thinking": False}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "template", {"enable_thinking": False}),
    ],
    ids=str,
)
def test_a_parameter_is_honoured(given: dict[str, Any], field: str, value: object) -> None:
    assert getattr(chat.parse(body(**given)), field) == value


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"temperature": 0.0}),
        ({"top_k": 5}, {"top_k": 5}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"seed": 5}, {"seed": 5}),
        ({"seed": -1}, {"seed": (1 << 63) - 1}),
        ({"logit_bias": {"5": -100, "6": 1.5}}, {"logit_bias": {5: -100.0, 6: 1.5}}),
        ({"presence_penalty": 0.5}, {"presence_penalty": 0.5}),
        ({"frequency_penalty": -2}, {"frequency_penalty": -2.0}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
    ids=str,
)
def test_sampling_is_honoured(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat.parse(body(**given)).sampling == Sampling(**({"temperature": 1.0} | expected))


def test_answers_have_seeds_of_their_own() -> None:
    wanted = chat.parse(body(n=2, seed=5))
    assert [wanted.generate(1, answer).sampling.seed for answer in (0, 1)] == [5, 6]


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
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"verbosity": "low"}, "verbosity"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
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
        ({"stop": ["a"] * 17}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"presence_penalty": False}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (format_of(None), "response_format.json_schema.schema"),
        ({"tools": 5}, "tools"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
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


def test_calls_come_back_with_their_arguments_as_they_were() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    given = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"}
    (found,) = chat.parse(body(messages=[given])).messages or []
    assert found["content"] == ""
    assert found["reasoning_content"] == "hm"
    assert found["tool_calls"] == [call]


@pytest.mark.parametrize("arguments", ['{"id": 123456789012345678901234}', '{"text": "half of it'])
def test_numbers_of_any_size_and_calls_that_were_cut_off_come_back(arguments: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    (found,) = chat.parse(body(messages=[{"role": "assistant", "tool_calls": [call]}])).messages or []
    assert found["tool_calls"][0]["function"]["arguments"] == arguments


def test_arguments_that_are_no_text_are_refused() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": 5}}
    with pytest.raises(RequestInvalid) as caught:
        chat.parse(body(messages=[{"role": "assistant", "tool_calls": [call]}]))
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize("field", [{"tool_calls": [{"id": "1"}]}, {"thing": 1}], ids=str)
def test_a_message_field_without_effect_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(ParameterUnsupported) as caught:
        chat.parse(message(**field))
    assert caught.value.param == f"messages[0].{next(iter(field))}"


# -- answers -----------------------------------------------------------------------------------------------------------

HEAD = {"created": 99, "model": "m"}
CALL = ToolCall(id="c1", name="add", arguments='{"a": 1}')
HI = TokenLogprob(token=b"hi", logprob=-0.5, top=[TopToken(token=b"\xff", logprob=-1.5)])


def said(text: str) -> Delta:
    return Delta(request=1, text=text, tokens=1)


def told(*events: Delta | Finished) -> Told:
    found = Told()
    for event in events:
        found.add(event)
    return found


def rendering(**given: Any) -> chat.Rendering:
    return chat.Rendering(chat.parse(body(**given)), "m", 99)


def events(written: Iterable[bytes]) -> list[Any]:
    """What was written, without ids."""
    found = []
    for event in written:
        data = event.removeprefix(b"data: ").strip()
        found.append("[DONE]" if data == b"[DONE]" else json.loads(data))
        if isinstance(found[-1], dict):
            assert found[-1].pop("id").startswith("chatcmpl-")
    return found


def test_a_completion() -> None:
    found = rendering().whole([told(said("text"), END)])
    assert found.pop("id").startswith("chatcmpl-")
    assert found == HEAD | {
        "object": "chat.completion",
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


def test_calls_reasoning_and_log_probabilities_in_a_completion() -> None:
    end = Finished(request=1, reason="tool_calls", prompt_tokens=5, completion_tokens=3, cached_tokens=4)
    thought = Delta(request=1, text="", tokens=1, reasoning="hm", logprobs=[HI])
    called = Delta(request=1, text="", tokens=1, calls=[CALL])
    found = rendering(logprobs=True, top_logprobs=1, n=2).whole([told(thought, called, end), told(said("b"), END)])
    first, second = found["choices"]
    assert first["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        "reasoning_content": "hm",
    }
    assert first["finish_reason"] == "tool_calls"
    assert first["logprobs"]["content"] == [
        {
            "token": "hi",
            "logprob": -0.5,
            "bytes": [104, 105],
            "top_logprobs": [{"token": "\ufffd", "logprob": -1.5, "bytes": [255]}],
        }
    ]
    assert (second["index"], second["message"]["content"], second["logprobs"]["content"]) == (1, "b", [])
    assert found["usage"]["completion_tokens"] == 6
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


def test_a_stream() -> None:
    written = rendering(stream=True, stream_options={"include_usage": True})

    def chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return HEAD | {"object": "chat.completion.chunk", "choices": [choice]}

    assert events(written.begin()) == [chunk({"role": "assistant", "content": ""})]
    assert events(written.event(0, Delta(request=1, text="a", tokens=1))) == [chunk({"content": "a"})]
    assert events(written.event(0, Delta(request=1, text="", tokens=1))) == []
    thought = Delta(request=1, text="", tokens=1, reasoning="hm")
    assert events(written.event(0, thought)) == [chunk({"reasoning_content": "hm"})]
    for index in (0, 1):
        (found,) = events(written.event(0, Delta(request=1, text="", tokens=1, calls=[CALL])))
        assert found["choices"][0]["delta"]["tool_calls"][0]["index"] == index
    more = Delta(request=1, text="", tokens=1, calls=[ToolCall(arguments="}")])
    assert events(written.event(0, more)) == [chunk({"tool_calls": [{"index": 1, "function": {"arguments": "}"}}]})]
    assert events(written.event(0, END)) == [chunk({}, "length")]
    last, done = events(written.end())
    assert (last["choices"], last["usage"], done) == ([], chat.usage([END]), "[DONE]")


def test_a_stream_that_fails_does_not_say_that_it_is_done() -> None:
    (written,) = rendering(stream=True).failed(WorkerUnavailable("gone"))
    assert json.loads(written.removeprefix(b"data: "))["error"]["code"] == "worker_unavailable"


# -- completions -------------------------------------------------------------------------------------------------------


def test_raw_prompts_of_text_and_of_tokens() -> None:
    def prompts(prompt: object) -> list[tuple[str | None, list[int] | None]]:
        return [(one.text, one.tokens) for one in completions.parse({"model": "m", "prompt": prompt})]

    assert prompts("a") == [("a", None)]
    assert prompts([1, 2]) == [(None, [1, 2])]
    assert prompts(["a", [1]]) == [("a", None), (None, [1])]
    (wanted,) = completions.parse({"model": "m", "prompt": "a"})
    assert (wanted.max_tokens, wanted.messages, wanted.top_logprobs) == (16, None, None)


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, "a"], [-1], 5, [True]], ids=str)
def test_prompts_that_are_none(prompt: object) -> None:
    with pytest.raises(RequestInvalid) as caught:
        completions.parse({"model": "m", "prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("given", [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"tools": []}], ids=str)
def test_what_completions_do_not_offer(given: dict[str, Any]) -> None:
    with pytest.raises(ParameterUnsupported) as caught:
        completions.parse({"model": "m", "prompt": "a"} | given)
    assert caught.value.param == next(iter(given))


def test_more_answers_than_are_given_at_once() -> None:
    with pytest.raises(ParameterUnsupported, match="send several requests"):
        completions.parse({"model": "m", "prompt": ["a"] * 9, "n": 2})


def test_a_text_completion_of_two_prompts() -> None:
    wanted = completions.parse({"model": "m", "prompt": ["a", "b"], "logprobs": 1})
    hi = Delta(request=1, text="hi", tokens=2, logprobs=[HI, HI])
    found = completions.Rendering(wanted, "m", 99).whole([told(hi, END), told(said("ho"), END)])
    assert found["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in found["choices"]] == [(0, "hi"), (1, "ho")]
    assert found["choices"][0]["logprobs"] == {
        "tokens": ["hi", "hi"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"\ufffd": -1.5}, {"\ufffd": -1.5}],
        "text_offset": [0, 2],
    }
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (10, 6)
