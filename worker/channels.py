"""What an answer's text consists of: what is said, what was thought before, and calls of tools.

The markers between them are the tokenizer's, as mlx-lm knows them; what stands between those of a call is read by
``expertd.worker.calls``, and what is kept to a grammar is told apart by ``expertd.worker.structured``.  Works on text
alone; a marker that arrives in pieces is held back until it is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from expertd.protocol.messages import ToolCall
from expertd.worker.calls import Calls
from expertd.worker.structured import Structured

__all__ = ["Channels", "Piece"]

TAIL_TOKENS = 16
"""A chat template that opens the reasoning itself does so at the very end of the prompt."""


@dataclass
class Piece:
    """More of an answer: reasoning, then text, then calls (or pieces of them)."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.calls)


class Channels:
    """One answer's text, taken apart as it comes, in the order in which it was written.

    Where there are tools, white space alone is no text: between calls, and between the reasoning and a call, it
    separates them.
    """

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
            enforced: what follows the reasoning is kept to a grammar, in which markers mean nothing by themselves.
        """
        self._parse = tokenizer.tool_parser if tools and tokenizer.has_tool_calling else None
        self._marked = self._parse is not None and bool(tokenizer.tool_call_end)  # whether calls have an end marker
        self._tools = tools
        self._calls: Calls | None = None
        self._space: str | None = ""  # since the last that was no text; None: text follows text
        self._after_call = False
        self.call_ended = False
        """Whether a call has come to its end."""
        self.thinking = not raw and bool(tokenizer.has_thinking) and _opens(tokenizer, prompt)
        """Whether the answer begins with reasoning."""
        begin = "reasoning" if self.thinking else "normal"
        self._state = _machine(tokenizer, raw, enforced, self._parse is not None).make_state(begin)
        self._structured: Structured | None = None
        if enforced and self._parse is not None:
            self._structured = Structured(tokenizer.tool_call_start, tokenizer.tool_call_end)

    def feed(self, text: str, one_call: bool = False) -> list[Piece]:
        """Take the next text; with ``one_call`` what follows the end of a call is left out."""
        self._state, segments = TextStateMachine.split(self._state, text)
        return _joined(self._until_call(segments) if one_call else self._all(segments))

    def _until_call(self, segments: Iterable[tuple[str, str]]) -> Iterator[Piece]:
        for piece in self._all(segments):
            yield piece
            if self.call_ended:
                return

    def _all(self, segments: Iterable[tuple[str, str]]) -> Iterator[Piece]:
        for state, text in segments:
            if self._structured is None or state != "normal":
                yield from self._pieces(state, text)
            else:
                for inner, more in self._structured.feed(text):
                    yield from self._pieces(inner, more)

    def finish(self, cut: bool = False) -> list[Piece]:
        """What was held back, and a call that was not closed; ``cut``: it was not the model that ended the answer."""
        self._state, rest, state = TextStateMachine.flush(self._state)
        pieces = [*self._all([(state, rest)])]
        if self._structured is not None and self._calls is None:
            pieces += [piece for inner, more in self._structured.flush() for piece in self._pieces(inner, more)]
        pieces += self._close_call(cut)
        if self._space and not self._after_call:
            pieces.append(Piece(text=self._space))
        return _joined(pieces)

    def _pieces(self, state: str, text: str) -> Iterator[Piece]:
        if state == "tool" and self._parse is not None:
            if self._calls is None:
                self._calls = Calls(self._parse, self._tools)
            called = self._called(self._calls.feed(text))
            if not self._marked and self._calls.begun and self._calls.complete:
                self.call_ended = True
            yield called
            return
        yield from self._close_call()
        if state != "reasoning":
            yield Piece(text=self._text(text))
        elif text:
            self._space, self._after_call = "", False
            yield Piece(reasoning=text)

    def _close_call(self, cut: bool = False) -> Iterator[Piece]:
        calls, self._calls = self._calls, None
        if calls is None:
            return
        more, text = calls.close(cut)
        self.call_ended |= calls.begun
        yield self._called(more)
        if text.strip():
            yield Piece(text=self._text(text))

    def _called(self, calls: list[ToolCall]) -> Piece:
        if calls:
            self._after_call = True
            self._space = ""
        return Piece(calls=calls)

    def _text(self, text: str) -> str:
        """What of ``text`` is to be told now."""
        if self._parse is None or self._space is None:
            return text
        text, self._space = self._space + text, None
        if text.strip():
            return text
        self._space = text
        return ""


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """As few as there can be: each tells reasoning, then text, then calls."""
    found: list[Piece] = []
    for piece in filter(None, pieces):
        last = found[-1] if found else None
        if last is None or (last.calls and not piece.calls) or (last.text and piece.reasoning):
            found.append(piece)
        else:
            last.text += piece.text
            last.reasoning += piece.reasoning
            last.calls += piece.calls
    return found


def _opens(tokenizer: Any, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends inside reasoning."""
    begin = max(0, len(prompt) - TAIL_TOKENS)
    opened = tokenizer.rfind_think_start(list(prompt), start=begin)
    closed = tokenizer.rfind_think_end(list(prompt), start=begin)
    return bool(opened >= 0 and opened > closed)


def _machine(tokenizer: Any, raw: bool, enforced: bool, with_tools: bool) -> TextStateMachine:
    if raw:
        return TextStateMachine({"normal": []})
    if with_tools and not enforced:
        return make_text_state_machine(tokenizer)
    transitions: dict[str, list[tuple[str, str]]] = {"normal": []}
    if tokenizer.has_thinking:
        if not enforced:
            transitions["normal"].append((tokenizer.think_start, "reasoning"))
        transitions["reasoning"] = [(tokenizer.think_end, "normal")]
    return TextStateMachine(transitions)
