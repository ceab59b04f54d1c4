"""``POST /generate``: a prompt in, text out, for scripts and curl.  Pure, as ``chat``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from expertd.clients.gateway.answers import DONE, KEEPALIVE, Told, error_body, sse
from expertd.clients.gateway.chat import SAMPLING, check_names
from expertd.clients.gateway.fields import body_object, boolean, invalid, whole
from expertd.clients.gateway.wanted import ANY_MODEL, Wanted, model_name, sampling_of, stops
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Delta, Finished

__all__ = ["Rendering", "parse"]

DEFAULT_TOKENS = 256
"""As many as ``expertd generate`` makes."""

_HONOURED = SAMPLING | {"model", "prompt", "max_tokens", "stop", "stream"}


def parse(body: object) -> Wanted:
    """What a decoded JSON body wants.  Its prompt is used as it is: no template is put around it.

    Raises:
        RequestInvalid, ParameterUnsupported: as in ``chat.parse``.
    """
    body = body_object(body)
    check_names(body, _HONOURED, {})
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        invalid("prompt", "a string")
    sampling = sampling_of(body if body.get("temperature") is not None else {**body, "temperature": 0})
    return Wanted(
        model=ANY_MODEL if body.get("model") is None else model_name(body),
        text=prompt,
        max_tokens=whole(body, "max_tokens", 1) or DEFAULT_TOKENS,
        stop=stops(body.get("stop")),
        sampling=sampling,
        stream=boolean(body, "stream"),
    )


class Rendering:
    """Text, and at the end how it ended and how many tokens it was."""

    keepalive = KEEPALIVE

    def __init__(self, model: str) -> None:
        """``model``: the name of what answers."""
        self._model = model
        self._end: dict[str, Any] = {}

    def whole(self, answers: Sequence[Told]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        (told,) = answers
        return {"text": told.reasoning + told.text, **self._counts(told.end)}

    def begin(self) -> Iterator[bytes]:
        """A stream begins with the first text."""
        yield from ()

    def event(self, place: int, event: Delta | Finished) -> Iterator[bytes]:
        """What an event is in a stream."""
        if isinstance(event, Finished):
            self._end = self._counts(event)
        elif text := event.reasoning + event.text:
            yield sse({"text": text})

    def end(self) -> Iterator[bytes]:
        """What follows when the answer has ended."""
        yield sse(self._end)
        yield DONE

    def failed(self, error: ExpertdError) -> Iterator[bytes]:
        """As in ``completions``."""
        yield sse(error_body(error))

    def _counts(self, end: Finished) -> dict[str, Any]:
        return {
            "model": self._model,
            "reason": end.reason,
            "prompt_tokens": end.prompt_tokens,
            "cached_tokens": end.cached_tokens,
            "completion_tokens": end.completion_tokens,
        }
