"""What an answer's text consists of: what is said, what was thought before, and calls of tools.

The markers between them are the tokenizer's, as mlx-lm knows them, and its parsers read what calls say.  Works on text
alone; a marker that arrives in pieces is held back until it is whole.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from expertd.protocol.messages import ToolCall

__all__ = ["Channels", "Piece"]

log = logging.getLogger(__name__)

TAIL_TOKENS = 16
"""A chat template that opens the reasoning itself does so at the very end of the prompt."""


@dataclass
class Piece:
    """More of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class Channels:
    """One answer's text, taken apart as it comes."""

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        tools: list[dict[str, Any]],
        *,
        raw: bool = False,
        enforced: bool = False,
    ) -> None:
        """Begin an answer to ``prompt`` (tokens).

        Args:
            tools: calls are only looked for where there are some.
            raw: all is text, whatever it looks like.
            enforced: what follows the reasoning is kept to a grammar, in which markers mean nothing.
        """
        self._parse = tokenizer.tool_parser if tools and tokenizer.has_tool_calling else None
        self._tools = tools
        self._tool_text = ""
        self.called = False
        """Whether a tool was called."""
        self.thinking = not raw and bool(tokenizer.has_thinking) and _opens(tokenizer, prompt)
        """Whether the answer begins with reasoning."""
        begin = "reasoning" if self.thinking else "normal"
        self._state = _machine(tokenizer, raw, enforced, self._parse is not None).make_state(begin)

    def feed(self, text: str) -> Piece:
        """Take the next text."""
        self._state, segments = TextStateMachine.split(self._state, text)
        return self._piece(segments)

    def finish(self) -> Piece:
        """What was held back, and a call that was not closed."""
        self._state, rest, state = TextStateMachine.flush(self._state)
        piece = self._piece([(state, rest)])
        self._close_call(piece)
        return piece

    def _piece(self, segments: list[tuple[str, str]]) -> Piece:
        piece = Piece()
        for state, text in segments:
            if state == "tool" and self._parse is not None:
                self._tool_text += text
                continue
            self._close_call(piece)
            if state == "reasoning":
                piece.reasoning += text
            else:
                piece.text += text
        return piece

    def _close_call(self, piece: Piece) -> None:
        said, self._tool_text = self._tool_text, ""
        if not said.strip() or self._parse is None:
            return
        try:
            found = self._parse(said, self._tools)
            calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        except Exception as error:
            # A parser is a program of others, and what the model wrote may be anything: nothing of it is lost.
            log.info("a tool call could not be read (%s); it is passed on as text", type(error).__name__)
            piece.text += said
        else:
            piece.calls += calls
            self.called = True


def _call(found: dict[str, Any]) -> ToolCall:
    arguments = found.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=str(found.get("id") or f"call_{uuid.uuid4().hex[:24]}"), name=str(found["name"]), arguments=text)


def _opens(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends inside reasoning."""
    begin = max(0, len(prompt) - TAIL_TOKENS)
    opened = tokenizer.rfind_think_start(list(prompt), start=begin)
    closed = tokenizer.rfind_think_end(list(prompt), start=begin)
    return bool(opened >= 0 and opened > closed)


def _machine(tokenizer: Any, raw: bool, enforced: bool, with_tools: bool) -> TextStateMachine:
    if raw:
        return TextStateMachine({"normal": []})
    if with_tools:
        return make_text_state_machine(tokenizer)
    transitions: dict[str, list[tuple[str, str]]] = {"normal": []}
    if tokenizer.has_thinking:
        if not enforced:
            transitions["normal"].append((tokenizer.think_start, "reasoning"))
        transitions["reasoning"] = [(tokenizer.think_end, "normal")]
    return TextStateMachine(transitions)
