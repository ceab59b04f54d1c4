"""What answers consist of; a stream tells the same parts in the same order as a whole answer, in each API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tool_parsers import json_tools, mistral

from expertd.clients.gateway import anthropic, chat, responses
from expertd.clients.gateway.answers import Part, Told
from expertd.protocol.messages import Delta, Finished, TokenLogprob
from expertd.worker.channels import Channels
from expertd.worker.written import Written

TOOL = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}


class Marks:
    """What a tokenizer says of its marks."""

    def __init__(self, parser: Any = json_tools, thinks: bool = True) -> None:
        self.has_tool_calling = True
        self.tool_parser = parser.parse_tool_call
        self.tool_call_start, self.tool_call_end = parser.tool_call_start, parser.tool_call_end
        self.has_thinking = thinks
        self.think_start, self.think_end = "<think>", "</think>"
        self.response_transitions: dict[str, Any] = {}
        self.structural_markers = ()

    def rfind_think_start(self, tokens: list[int], start: int) -> int:
        return -1

    rfind_think_end = rfind_think_start


def call(at: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': 'look', 'arguments': {'at': at}})}\n</tool_call>"


def deltas(
    text: str, size: int = 1, cut: bool = False, marks: Marks | None = None, tools: Any = TOOLS, enforced: bool = False
) -> list[Delta]:
    """The text as events, so many characters at a time; each character is a token."""
    channels = Channels(marks or Marks(), [1], tools, enforced=enforced)
    found: list[Delta] = []
    texts = [text[place : place + size] for place in range(0, len(text), size)]
    for place, piece in enumerate(texts):
        parts = channels.feed(piece)
        if place == len(texts) - 1:
            parts += channels.finish(cut)
        tokens = [TokenLogprob(token=one.encode(), logprob=-1.0) for one in piece]
        first = True
        for part in parts or [None]:
            told = {} if part is None else {"reasoning": part.reasoning, "calls": part.calls}
            found.append(
                Delta(request=1, text=part.text if part else "", tokens=len(piece) if first else 0,
                      logprobs=tokens if first else [], **told)
            )  # fmt: skip
            first = False
    return found


def end(reason: Any) -> Finished:
    return Finished(request=1, reason=reason, prompt_tokens=3, completion_tokens=9)


def told(events: Sequence[Delta], reason: Any = "stop") -> Told:
    found = Told()
    for event in (*events, end(reason)):
        found.add(event)
    return found


def parts(events: Sequence[Delta]) -> list[tuple[str, ...]]:
    """The parts of an answer: kind and text."""
    return [(part.kind, part.text) for part in told(events).parts]


# -- an answer's parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hi <there>", [("text", "hi <there>")]),
        ("<think>hm</think>\n\nhi", [("reasoning", "hm"), ("text", "\n\nhi")]),
        (f"{call('a')}\n{call('b')}\n", [("call", '{"at": "a"}'), ("call", '{"at": "b"}')]),
        (f"<think>hm</think>\n\n{call('a')}", [("reasoning", "hm"), ("call", '{"at": "a"}')]),
        (f"First\n{call('a')}\nthen\n", [("text", "First\n"), ("call", '{"at": "a"}'), ("text", "\nthen\n")]),
        (f"{call('a')}\n{call('b')[:15]}", [("call", '{"at": "a"}'), ("text", '\n\n{"n')]),
        (f"{call('a')}\n{call('b')[:-16]}", [("call", '{"at": "a"}'), ("call", '{"at": "b')]),
        ("<tool_call>look</tool_call> ok", [("text", "look ok")]),
        ("<tool_call> </tool_call>", []),
        ("\n \n", [("text", "\n \n")]),
    ],
)
def test_parts_come_in_the_order_in_which_they_were_written(text: str, expected: Any, size: int) -> None:
    assert parts(deltas(text, size, cut=True)) == expected


TRICKY = "x</tool_call>y<think>"


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": "<tool_call>y</tool_call><think>"}', [("text", '{"a": "<tool_call>y</tool_call><think>"}')]),
        (f"\n{call(TRICKY)}\n{call('b')}\n", [("call", json.dumps({"at": TRICKY})), ("call", '{"at": "b"}')]),
        (f"{call('a')}\n<tool", [("call", '{"at": "a"}'), ("text", "\n<tool")]),
        (call(TRICKY)[:-17], [("call", json.dumps({"at": TRICKY})[:-3])]),
        (call("a").removesuffix("_call>"), [("call", '{"at": "a"}')]),
        ("<tool", [("text", "<tool")]),
    ],
)
def test_what_keeps_to_a_grammar_is_told_apart_by_its_structure(text: str, expected: Any, size: int) -> None:
    assert parts(deltas(text, size, cut=True, enforced=True)) == expected


def test_a_grammar_begins_where_the_reasoning_ends_and_that_is_no_call() -> None:
    class Thinking(Marks):
        def rfind_think_start(self, tokens: list[int], start: int) -> int:
            return 0

    text = f"hm {call('a')}</think>\n{call('b')}"
    found = parts(deltas(text, marks=Thinking(), enforced=True))
    assert found == [("reasoning", f"hm {call('a')}"), ("call", '{"at": "b"}')]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_what_follows_the_only_call_is_nobody_s(size: int) -> None:
    text = f"hi {call('a')}\n{call('b')}[more]"
    written = Written(Channels(Marks(), [1], TOOLS), [], one_call=True)
    told: list[tuple[str, str]] = []
    for place in range(0, len(text), size):
        for piece in written.feed(text[place : place + size], last=False):
            told += [("text", piece.text)] if piece.text else []
            told += [("call", one.arguments) for one in piece.calls]
        if written.ended:
            break
    assert "".join(text for kind, text in told if kind == "text") == "hi "
    assert "".join(text for kind, text in told if kind == "call") == '{"at": "a"}'


def test_without_tools_white_space_and_marks_of_calls_are_text() -> None:
    text = f"\n{call('a')}"
    found = deltas(text, tools=[])
    assert parts(found) == [("text", text)]
    assert found[0].text == "\n", "nothing is held back"


def test_a_call_has_come_to_its_end_where_its_mark_is_or_its_arguments_end() -> None:
    channels = Channels(Marks(), [1], TOOLS)
    channels.feed(call("a").removesuffix("</tool_call>"))
    assert not channels.call_ended
    channels.feed("</tool_call>")
    assert channels.call_ended
    channels = Channels(Marks(mistral, thinks=False), [1], TOOLS)
    channels.feed('[TOOL_CALLS]look[ARGS]{"at": "a"')
    assert not channels.call_ended
    channels.feed("}")
    assert channels.call_ended


def test_a_delta_tells_no_more_than_one_piece_of_a_call() -> None:
    for size in (1, 5, 1000):
        for event in deltas(call("a long way"), size):
            assert len(event.calls) <= 1
    (event,) = deltas(call("a") + call("b"), 1000)
    assert [piece.arguments for piece in event.calls] == ['{"at": "a"}', '{"at": "b"}']


# -- streams and whole answers -----------------------------------------------------------------------------------------


def of_chat(events: Sequence[Delta], reason: Any) -> tuple[Any, Any]:
    """The message of a stream, and that of a whole answer."""
    wanted = chat.parse(ASK | {"tools": TOOLS, "stream": True})
    stream, whole = chat.Rendering(wanted, "m", 1), chat.Rendering(wanted, "m", 1)
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": []}
    for event in (*events, end(reason)):
        for data in stream.event(0, event):
            choice = json.loads(data.removeprefix(b"data: "))["choices"][0]
            for name in ("content", "reasoning_content"):
                message[name] += choice["delta"].get(name, "")
            for piece in choice["delta"].get("tool_calls", []):
                if "id" in piece:
                    assert piece["index"] == len(message["calls"])
                    message["calls"].append([piece["id"], piece["function"]["name"], ""])
                assert piece["index"] == len(message["calls"]) - 1
                message["calls"][-1][2] += piece["function"]["arguments"]
    (choice,) = whole.whole([told(events, reason)])["choices"]
    said = choice["message"]
    calls = [
        [one["id"], one["function"]["name"], one["function"]["arguments"]] for one in said.get("tool_calls", [])
    ]
    return message, {
        "content": said["content"] or "", "reasoning_content": said.get("reasoning_content", ""), "calls": calls,
    }  # fmt: skip


def of_responses(events: Sequence[Delta], reason: Any) -> tuple[Any, Any]:
    """The output of a stream, as its events tell it and as its end does, and that of a whole answer."""
    body = {"model": "m", "input": "?", "tools": [{"type": "function", **TOOL}], "stream": True}
    request = responses.parse(body | {"include": ["message.output_text.logprobs"]})
    stream, whole = responses.Rendering(request, "m", 1), responses.Rendering(request, "m", 1)
    output: list[Any] = []
    open_items = 0
    last: Any = None
    for written in (*(stream.event(0, event) for event in (*events, end(reason))), stream.end()):
        for data in written:
            last = json.loads(data.split(b"data: ")[1])
            match last["type"].removeprefix("response."):
                case "output_item.added":
                    open_items += 1
                    assert last["output_index"] == len(output)
                    output.append([last["item"]["type"], "", []])
                case "output_item.done":
                    open_items -= 1
                    assert last["output_index"] == len(output) - 1
                case "reasoning_text.delta" | "function_call_arguments.delta":
                    output[last["output_index"]][1] += last["delta"]
                case "output_text.delta":
                    output[last["output_index"]][1] += last["delta"]
                    output[last["output_index"]][2] += [bytes(one["bytes"]) for one in last["logprobs"]]
    assert open_items == 0

    def items(response: dict[str, Any]) -> list[Any]:
        found = []
        for item in response["output"]:
            part = (item.get("content") or [{}])[0]
            logprobs = [bytes(one["bytes"]) for one in part.get("logprobs", [])]
            found.append([item["type"], item["arguments"] if "arguments" in item else part["text"], logprobs])
            assert item["status"] in ("completed", "incomplete")
        return found

    told_whole = whole.whole([told(events, reason)])
    assert items(last["response"]) == output
    assert [item["status"] for item in last["response"]["output"]] == [item["status"] for item in told_whole["output"]]
    return output, items(told_whole)


def of_messages(events: Sequence[Delta], reason: Any) -> tuple[Any, Any]:
    """The blocks of a stream, and those of a whole answer."""
    stream, whole = anthropic.Rendering("m"), anthropic.Rendering("m")
    blocks: list[Any] = []
    is_open = False
    for written in (*(stream.event(0, event) for event in (*events, end(reason))), stream.end()):
        for data in written:
            event = json.loads(data.split(b"data: ")[1])
            match event["type"]:
                case "content_block_start":
                    assert not is_open
                    assert event["index"] == len(blocks)
                    is_open = True
                    blocks.append([event["content_block"]["type"], ""])
                case "content_block_delta":
                    assert is_open
                    assert event["index"] == len(blocks) - 1
                    delta = event["delta"]
                    blocks[-1][1] += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
                case "content_block_stop":
                    is_open = False
    assert not is_open

    def said(block: dict[str, Any]) -> str:
        if block["type"] == "tool_use":
            return msgspec.json.encode(block["input"]).decode()
        return str(block[block["type"]])

    for block in blocks:
        if block[0] == "tool_use":
            try:
                json.loads(block[1])
            except ValueError:
                block[1] = "{}"  # cut off
    return blocks, [[block["type"], said(block)] for block in whole.whole([told(events, reason)])["content"]]


WRITTEN = st.lists(
    st.sampled_from(["<think>hm</think>", "text ", "\n", call("a"), call("b\n"), "<tool_call>no</tool_call>"]),
    max_size=5,
).map("".join)
COMPARED = pytest.mark.parametrize("compare", [of_chat, of_responses, of_messages])


@COMPARED
@settings(max_examples=60)
@given(WRITTEN, st.integers(1, 40), st.integers(0, 60))
def test_a_stream_tells_what_a_whole_answer_tells(compare: Any, text: str, size: int, lost: int) -> None:
    cut = text[: len(text) - lost] or "x"
    stream, whole = compare(deltas(cut, size, cut=True), "length")
    assert stream == whole


@COMPARED
def test_thoughts_calls_and_text_in_turn(compare: Any) -> None:
    text = f"<think>hm</think>\nLet me look.\n{call('a')}\n{call('b')}\nDone."
    stream, whole = compare(deltas(text), "tool_calls")
    assert stream == whole
    if compare is of_messages:
        kinds = [kind for kind, _ in stream]
        assert kinds == ["thinking", "text", "tool_use", "tool_use", "text"]


def test_log_probabilities_are_those_of_the_text() -> None:
    events = deltas(f"<think>hm</think>Let me{call('a')}ok")
    stream, whole = of_responses(events, "stop")
    assert stream == whole
    assert [kind for kind, _, _ in stream] == ["reasoning", "message", "function_call", "message"]
    assert [b"".join(tokens).decode() for _, _, tokens in stream] == ["", "Let me", "", "ok"]
    assert "".join(one.token.decode() for one in told(events).logprobs).startswith("<think>hm"), "chat tells all"


def test_a_character_of_two_tokens_has_both_log_probabilities() -> None:
    halves = ["é".encode()[:1], "é".encode()[1:]]
    events = [
        Delta(request=1, text=text, tokens=1, logprobs=[TokenLogprob(token=half, logprob=-1.0)])
        for text, half in zip(("", "é"), halves, strict=True)
    ]
    stream, whole = of_responses(events, "stop")
    assert stream == whole == [["message", "é", halves]]


def test_a_call_that_was_cut_off_is_incomplete_and_has_no_input() -> None:
    request = responses.parse({"model": "m", "input": "?"})
    cut = told(deltas(call("abc")[:-16], cut=True), "length")
    written = responses.Rendering(request, "m", 1).whole([cut])
    assert (written["status"], written["output"][0]["status"]) == ("incomplete", "incomplete")
    assert written["output"][0]["arguments"] == '{"at": "abc'
    (block,) = anthropic.Rendering("m").whole([cut])["content"]
    assert (block["type"], block["input"]) == ("tool_use", {})
    whole = told(deltas(call("abc").removesuffix("</tool_call>"), cut=True), "length")
    assert responses.Rendering(request, "m", 1).whole([whole])["output"][0]["status"] == "completed"


@pytest.mark.parametrize(
    "written", ["123456789012345678901234", "1" * 5000, "0.1000000000000000055", "1e400", "1.50", '"\\u00e4"']
)
def test_an_input_is_written_as_the_model_wrote_it(written: str) -> None:
    text = call("a").replace('"a"', written)
    answer = anthropic.Rendering("m").whole([told(deltas(text), "tool_calls")])
    assert b'"input":{"at": %s}}' % written.encode() in msgspec.json.encode(answer)


@pytest.mark.parametrize("arguments", ["", '{"at": ', "[1]", "null"])
def test_an_input_is_an_object(arguments: str) -> None:
    answer = Told([Part("call", arguments, "c1", "look")])
    assert anthropic.Rendering("m").whole([answer])["content"][0]["input"] == {}


def test_a_whole_number_of_any_size_comes_back() -> None:
    block = {"input": msgspec.json.decode(b'{"at": 123456789012345678901234}')}
    said = {"type": "tool_use", "id": "c1", "name": "look", "input": block["input"]}
    again = anthropic.parse(ASK | {"max_tokens": 1, "messages": [{"role": "assistant", "content": [said]}]})
    assert (again.messages or [])[0]["tool_calls"][0]["function"]["arguments"] == '{"at": 123456789012345678901234}'
