"""What is told of an answer: stop strings end what is said and nothing else, and one call is one call."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
from mlx_lm.tool_parsers import json_tools, mistral, pythonic

from expertd.worker.channels import Channels
from expertd.worker.written import Written

TOOLS = [{"type": "function", "function": {"name": "a", "parameters": {}}}]


class Tokenizer:
    """One that knows reasoning, which its prompts open, and tools."""

    has_thinking = has_tool_calling = True
    think_start, think_end = "<think>", "</think>"
    tool_parser = staticmethod(json_tools.parse_tool_call)
    tool_call_start, tool_call_end = "<tool_call>", "</tool_call>"
    response_transitions = MappingProxyType[str, str]({})
    structural_markers = ()

    def rfind_think_start(self, prompt: list[int], start: int = 0) -> int:
        return 1

    def rfind_think_end(self, prompt: list[int], start: int = 0) -> int:
        return -1


class Plain(Tokenizer):
    """One that thinks nothing."""

    has_thinking = False


class Pythonic(Plain):
    """One whose calls come in lists."""

    tool_parser = staticmethod(pythonic.parse_tool_call)
    tool_call_start, tool_call_end = "<|tool_call_start|>", "<|tool_call_end|>"


class Mistral(Plain):
    """One whose calls follow each other, and have no mark where they end."""

    tool_parser = staticmethod(mistral.parse_tool_call)
    tool_call_start, tool_call_end = mistral.tool_call_start, mistral.tool_call_end


class Told:
    """What was told of an answer, and how many characters of it were taken until it was over."""

    def __init__(
        self, tokenizer: Any, said: str, cut: int, stops: tuple[str, ...] = (), one_call: bool = False
    ) -> None:
        written = Written(Channels(tokenizer, [1, 2], TOOLS), stops, one_call)
        self.text = self.reasoning = ""
        self.calls: list[str] = []
        self.order: list[str] = []
        for place in range(0, len(said), cut):
            for piece in written.feed(said[place : place + cut], last=place + cut >= len(said)):
                self.text += piece.text
                self.reasoning += piece.reasoning
                self.order += [piece.text] if piece.text else []
                for call in piece.calls:
                    if call.id:
                        self.calls.append("")
                        self.order.append("CALL")
                    self.calls[-1] += call.arguments
            if written.ended:
                break
        self.taken, self.stop, self.called = place + cut, written.stop, written.called


CALL = '<tool_call>{"name": "a", "arguments": {"x": "\\n\\n"}}</tool_call>'


@pytest.mark.parametrize("cut", [1, 2, 5, 1000])
def test_a_stop_string_among_the_thoughts_ends_nothing(cut: int) -> None:
    said = "Let me think.\n\nFirst</think>The answer.\n\nMore"
    told = Told(Tokenizer(), said, cut, ("\n\n",))
    assert told.reasoning == "Let me think.\n\nFirst"
    assert told.text == "The answer."
    assert told.stop == "\n\n"
    assert told.taken <= len("Let me think.\n\nFirst</think>The answer.\n\n") + cut - 1


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_a_stop_string_in_a_call_ends_nothing(cut: int) -> None:
    told = Told(Plain(), f"I ask.{CALL}", cut, ("\\n", "{"))
    assert told.text == "I ask."
    assert told.calls == ['{"x": "\\n\\n"}']
    assert (told.stop, told.called) == (None, True)


@pytest.mark.parametrize("cut", [1, 2, 7])
def test_what_may_begin_a_stop_string_is_told_before_the_call_that_follows(cut: int) -> None:
    told = Told(Plain(), f"I ask EN{CALL}", cut, ("END",))
    assert "".join(told.order) == "I ask ENCALL"


@pytest.mark.parametrize("cut", [1, 4, 1000])
def test_nothing_is_lost_that_only_began_a_stop_string_or_a_marker(cut: int) -> None:
    assert Told(Plain(), "The end is <tool", cut, ("is <toolbox",)).text == "The end is <tool"
    assert Told(Plain(), "nearly EN", cut, ("END",)).text == "nearly EN"


@pytest.mark.parametrize("cut", [1, 4, 1000])
def test_nothing_comes_after_a_stop_string(cut: int) -> None:
    told = Told(Plain(), f"one END two <tool{'x' * 20}", cut, ("END",))
    assert (told.text, told.stop) == ("one ", "END")


@pytest.mark.parametrize("cut", [1, 6, 1000])
@pytest.mark.parametrize(("one_call", "calls"), [(True, ['{"x": 1}']), (False, ['{"x": 1}', '{"x": 2}'])])
def test_of_calls_that_come_at_once_one_is_taken_where_one_is_allowed(
    cut: int, one_call: bool, calls: list[str]
) -> None:
    said = "<|tool_call_start|>[a(x=1), a(x=2)]<|tool_call_end|>"
    assert Told(Pythonic(), said, cut, one_call=one_call).calls == calls
    assert Told(Pythonic(), said.removesuffix("<|tool_call_end|>"), cut, one_call=one_call).calls == calls


def test_the_only_call_ends_the_answer() -> None:
    told = Told(Plain(), f"{CALL}\n{CALL}and more", 1, one_call=True)
    assert told.taken == len(CALL)
    assert (told.calls, told.text) == (['{"x": "\\n\\n"}'], "")


@pytest.mark.parametrize("cut", [1, 2, 1000])
def test_the_only_call_ends_where_its_arguments_do_if_it_has_no_mark(cut: int) -> None:
    said = '[TOOL_CALLS]a[ARGS]{"x": 1}a[ARGS]{"x": 2}'
    told = Told(Mistral(), said, cut, one_call=True)
    assert told.calls == ['{"x": 1}']
    assert told.taken <= said.index("}") + cut
    assert Told(Mistral(), said, cut).calls == ['{"x": 1}', '{"x": 2}']


@pytest.mark.parametrize("cut", [1, 1000])
def test_no_call_comes_after_a_stop_string(cut: int) -> None:
    told = Told(Plain(), f"one END{CALL}", cut, ("END",))
    assert ("".join(told.order), told.called, told.stop) == ("one ", False, "END")
