"""OpenAI's older completions as data: raw prompts, as text or tokens, and their answers.  Pure, as ``chat``."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from expertd.clients.gateway.answers import DONE, KEEPALIVE, Told, error_body, sse
from expertd.clients.gateway.chat import SAMPLING, check_names, include_usage, usage
from expertd.clients.gateway.fields import body_object, boolean, invalid, unsupported, whole
from expertd.clients.gateway.wanted import MOST_ANSWERS, Wanted, model_name, sampling_of, stops
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Delta, Finished, TokenLogprob

__all__ = ["NEUTRAL", "Rendering", "parse"]

DEFAULT_TOKENS = 16
"""OpenAI's default of ``max_tokens``."""
MOST_LOGPROBS = 20
"""OpenAI allows 5."""

NEUTRAL = {
    "best_of": lambda value: value == 1,
    "echo": lambda value: value is False,
    "suffix": lambda value: value == "",
}
"""Parameters that are not supported, each with the test of the value that changes nothing."""

_HONOURED = SAMPLING | {"model", "prompt", "max_tokens", "stop", "stream", "stream_options", "n", "logprobs"}


def parse(body: object) -> list[Wanted]:
    """What is wanted for each of the prompts in a decoded JSON body.

    Raises:
        RequestInvalid, ParameterUnsupported: as in ``chat.parse``.
    """
    body = body_object(body)
    check_names(body, _HONOURED, NEUTRAL)
    stream = boolean(body, "stream")
    wanted = Wanted(
        model=model_name(body),
        max_tokens=whole(body, "max_tokens", 1) or DEFAULT_TOKENS,
        stop=stops(body.get("stop")),
        sampling=sampling_of(body),
        top_logprobs=whole(body, "logprobs", 0, MOST_LOGPROBS),
        answers=whole(body, "n", 1, MOST_ANSWERS) or 1,
        stream=stream,
        include_usage=include_usage(body.get("stream_options"), stream),
    )
    prompts = _prompts(body.get("prompt"))
    if len(prompts) * wanted.answers > MOST_ANSWERS:
        unsupported("prompt", f"asks for more than {MOST_ANSWERS} answers at once; send several requests")
    return [wanted.with_prompt(prompt) for prompt in prompts]


def _prompts(value: object) -> list[str | list[int]]:
    """One prompt or several, each of text or of tokens."""
    if isinstance(value, str):
        return [value]
    several = [value] if _is_tokens(value) else value
    if not isinstance(several, list) or not several:
        invalid("prompt", "a string, a list of tokens, or a list of such")
    if not all(isinstance(one, str) or _is_tokens(one) for one in several):
        invalid("prompt", "a string, a list of tokens, or a list of such")
    return several


def _is_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 1 << 32 for token in value)
    )


class Rendering:
    """How completions write answers: those to the first prompt come first."""

    keepalive = KEEPALIVE

    def __init__(self, wanted: Sequence[Wanted], model: str, created: int) -> None:
        """``model``: the name of what answers; ``created``: in seconds since 1970."""
        self._wanted = wanted[0]
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": created, "model": model,
        }  # fmt: skip
        self._ends: dict[int, Finished] = {}
        self._offsets = [0] * (len(wanted) * self._wanted.answers)

    def whole(self, answers: Sequence[Told]) -> dict[str, Any]:
        """The body of answers that are not streamed."""
        choices = [self._choice(place, told.text, told.logprobs, told.end.reason) for place, told in enumerate(answers)]
        return {**self._head, "choices": choices, "usage": self._usage({n: told.end for n, told in enumerate(answers)})}

    def begin(self) -> Iterator[bytes]:
        """A stream begins with the first text."""
        yield from ()

    def event(self, place: int, event: Delta | Finished) -> Iterator[bytes]:
        """What an event is in a stream."""
        if isinstance(event, Finished):
            self._ends[place] = event
            yield sse({**self._head, "choices": [self._choice(place, "", (), event.reason)]})
        elif event.text or event.reasoning or event.logprobs:
            text = event.reasoning + event.text  # a raw prompt has a raw answer
            yield sse({**self._head, "choices": [self._choice(place, text, event.logprobs, None)]})

    def end(self) -> Iterator[bytes]:
        """What a stream ends with."""
        if self._wanted.include_usage:
            yield sse({**self._head, "choices": [], "usage": self._usage(self._ends)})
        yield DONE

    def failed(self, error: ExpertdError) -> Iterator[bytes]:
        """The status is sent already: an event says that this is not an answer's end, and no [DONE] follows."""
        yield sse(error_body(error))

    def _choice(self, place: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        told = None if self._wanted.top_logprobs is None else self._logprobs(place, logprobs)
        return {"index": place, "text": text, "logprobs": told, "finish_reason": reason}

    def _logprobs(self, place: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        tokens = [told.token.decode("utf-8", "replace") for told in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[place])
            self._offsets[place] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [told.logprob for told in logprobs],
            "top_logprobs": [
                {top.token.decode("utf-8", "replace"): top.logprob for top in told.top} for told in logprobs
            ],
            "text_offset": offsets,
        }

    def _usage(self, ends: dict[int, Finished]) -> dict[str, Any]:
        """The sum over all prompts."""
        each = self._wanted.answers
        places = sorted(ends)
        found = [usage([ends[n] for n in places[first : first + each]]) for first in range(0, len(places), each)]
        return {
            "prompt_tokens": sum(one["prompt_tokens"] for one in found),
            "completion_tokens": sum(one["completion_tokens"] for one in found),
            "total_tokens": sum(one["total_tokens"] for one in found),
            "prompt_tokens_details": {
                "cached_tokens": sum(one["prompt_tokens_details"]["cached_tokens"] for one in found)
            },
        }
