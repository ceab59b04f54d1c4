"""Answers as they come, and how they are written: what all APIs have in common.

Who sends events is ``expertd.clients.gateway.workers``; each API has a module of its own with a ``Rendering``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Delta, Finished, TokenLogprob, ToolCall

__all__ = ["DONE", "KEEPALIVE", "Renderer", "Told", "error_body", "sse"]

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
"""A comment, which no client takes for an event."""

_NOT_ENDED = Finished(request=0, reason="length", prompt_tokens=0, completion_tokens=0)


@dataclass
class Told:
    """One whole answer; ``thoughts`` are the tokens of its reasoning."""

    text: str = ""
    reasoning: str = ""
    thoughts: int = 0
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: Finished = _NOT_ENDED

    def add(self, event: Delta | Finished) -> None:
        """Take the next event in."""
        if isinstance(event, Finished):
            self.end = event
            return
        self.text += event.text
        self.reasoning += event.reasoning
        self.thoughts += event.tokens if event.reasoning else 0
        self.calls += event.calls
        self.logprobs += event.logprobs


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
