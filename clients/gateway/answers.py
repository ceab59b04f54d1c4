"""Answers as they come, and how they are written: what all APIs have in common.

Who sends events is ``expertd.clients.gateway.workers``; each API has a module of its own with a ``Rendering``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import msgspec

from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Delta, Finished, TokenLogprob

__all__ = ["DONE", "KEEPALIVE", "Part", "Renderer", "TextLogprobs", "Told", "error_body", "sse"]

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
"""A comment, which no client takes for an event."""

_NOT_ENDED = Finished(request=0, reason="length", prompt_tokens=0, completion_tokens=0)


Kind = Literal["reasoning", "text", "call"]


@dataclass
class Part:
    """What stands together in an answer: reasoning, text, or one call, whose ``text`` are its arguments.

    ``logprobs`` are those of the tokens of text; ``id`` and ``name`` a call's.
    """

    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)


class TextLogprobs:
    """Which log-probabilities belong to the text of an answer: not those of reasoning, of calls, or of their marks.

    A token may come before the text that it is a part of: until a character is complete, or cannot be a mark's.
    """

    def __init__(self) -> None:
        self._held: list[TokenLogprob] = []
        self._last: Kind | None = None

    def of(self, event: Delta) -> list[TokenLogprob]:
        """Those of the event's text."""
        if event.text:
            found, self._held = [*self._held, *event.logprobs], []
        elif event.reasoning or event.calls or self._last not in (None, "text"):
            found, self._held = [], []
        else:
            found = []
            self._held += event.logprobs
        if event.reasoning or event.text or event.calls:
            self._last = "call" if event.calls else "text" if event.text else "reasoning"
        return found


@dataclass
class Told:
    """One whole answer, part by part in the order in which they came; ``thoughts`` are the tokens of its reasoning."""

    parts: list[Part] = field(default_factory=list)
    thoughts: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Finished = _NOT_ENDED
    _of_text: TextLogprobs = field(default_factory=TextLogprobs)

    @property
    def text(self) -> str:
        """All that is said, without reasoning and calls."""
        return "".join(part.text for part in self.parts if part.kind == "text")

    @property
    def reasoning(self) -> str:
        """All that was thought."""
        return "".join(part.text for part in self.parts if part.kind == "reasoning")

    @property
    def calls(self) -> list[Part]:
        """The calls of tools."""
        return [part for part in self.parts if part.kind == "call"]

    def add(self, event: Delta | Finished) -> None:
        """Take the next event in."""
        if isinstance(event, Finished):
            self.end = event
            return
        if event.reasoning:
            self._part("reasoning").text += event.reasoning
            self.thoughts += event.tokens
        of_text = self._of_text.of(event)
        if event.text:
            part = self._part("text")
            part.text += event.text
            part.logprobs += of_text
        for call in event.calls:
            if call.id:
                self.parts.append(Part("call", id=call.id, name=call.name))
            self.parts[-1].text += call.arguments
        self.logprobs += event.logprobs

    def _part(self, kind: Kind) -> Part:
        """The last part, if it is of this kind; else a new one."""
        if not self.parts or self.parts[-1].kind != kind:
            self.parts.append(Part(kind))
        return self.parts[-1]


class Renderer(Protocol):
    """How one API writes the answers to one request: whole, or as a stream of ``begin``, ``event``s, and ``end``.

    Pure; each method yields what is to be written, in order.  ``keepalive`` is what keeps a silent stream open.
    """

    keepalive: bytes

    def whole(self, answers: Sequence[Told]) -> dict[str, Any]:
        """The body of a response that is not streamed."""

    def begin(self) -> Iterable[bytes]:
        """What a stream begins with; nothing has been computed yet."""

    def event(self, place: int, event: Delta | Finished) -> Iterable[bytes]:
        """What one of the answers has come to: the one at ``place``."""

    def end(self) -> Iterable[bytes]:
        """What follows when all answers have ended."""

    def failed(self, error: ExpertdError) -> Iterable[bytes]:
        """What follows instead of all that was still to come."""


def sse(body: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event, with a name where the API has such."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + msgspec.json.encode(body) + b"\n\n"


def error_body(error: ExpertdError) -> dict[str, Any]:
    """``error`` as OpenAI writes errors."""
    kind = "invalid_request_error"
    if error.http_status >= 500:
        kind = "server_error"
    elif error.http_status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
