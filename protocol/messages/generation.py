"""Generation: what a gateway asks of its worker, and what comes of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from expertd.protocol.messages.base import Count, Message, Name, Routing, Text


class WorkerReady(Message):
    """A worker has loaded its model and takes requests.

    ``context`` is the longest prompt and answer, in tokens; ``at_once``: answers that it computes at a time.
    """

    pid: Count
    model: Name
    context: Count
    at_once: Count


class WorkerFailed(Message):
    """A worker cannot load its model, and ends."""

    pid: Count
    code: Name
    message: Text


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of an answer are chosen.  The defaults: the likeliest token, whatever came before.

    ``seed`` None: another answer each time, where ``temperature`` is above 0.  ``logit_bias``: added to the logits of
    these tokens.  Presence and frequency penalties look at the answer, the repetition penalty at the prompt too.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0)] | None = None
    logit_bias: dict[Count, float] = {}
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0


class Generate(Message):
    """Start generating.

    Exactly one of the three is given: ``messages``, chat messages as the tokenizer's template takes them (with
    ``tools``, and ``template`` and ``hints`` for its further variables: an unknown one of ``template`` is an error, of
    ``hints`` it is left out); ``text``, a prompt as it is; ``tokens``, one in tokens.
    ``tool_choice`` required: one of the tools has to be called; without ``parallel_calls`` a call ends the answer.
    ``goes_on``: the answer is the rest of the last message, which the assistant has begun.

    ``max_tokens`` None: as many as fit into the context behind the prompt.  ``schema``: a JSON schema, itself JSON,
    that the answer has to fit, unless it is calls of tools; None: no such.  ``top_logprobs``: so many of the likeliest
    tokens are told with each token of the answer, and its own log-probability; None: neither.  ``count``: nothing is
    generated, and Finished tells how long the prompt is.
    """

    request: Count
    messages: list[dict[str, Any]] | None = None
    text: Text | None = None
    tokens: list[Count] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "required"] = "auto"
    parallel_calls: bool = True
    template: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    goes_on: bool = False
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: list[Name] = []
    sampling: Sampling = Sampling()
    schema: Text | None = None
    count: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, lt=21)] | None = None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool, or a piece of one.

    The first piece of a call has its ``id`` and ``name``, the others have none; their ``arguments`` together are JSON.
    """

    id: Name = ""
    name: Text = ""
    arguments: Text = ""


class TopToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token that might have been: its bytes and log-probability."""

    token: Routing
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of an answer: its bytes, its log-probability, and the likeliest that might have stood there."""

    token: Routing
    logprob: float
    top: list[TopToken] = []


class Cancel(Message):
    """Stop generating; no further message about the request follows."""

    request: Count


class Delta(Message):
    """More of an answer (no text while a character is incomplete); ``tokens`` counts those since the last.

    ``reasoning``: what comes before the answer itself, without its markers; ``calls``: tools that it calls, as far as
    they have been written.  In the answer reasoning comes first, then text, then calls: another order takes several.
    ``prompt_tokens`` and ``cached_tokens`` are told once, in the first of an answer, and are 0 in all others.
    """

    request: Count
    text: Text
    tokens: Count
    reasoning: Text = ""
    calls: list[ToolCall] = []
    logprobs: list[TokenLogprob] = []
    prompt_tokens: Count = 0
    cached_tokens: Count = 0


class Finished(Message):
    """An answer is complete: ``reason`` is OpenAI's.

    ``cached_tokens`` of the prompt were not computed, because an earlier request had; ``stop``: the stop string that
    ended the answer, if one did.
    """

    request: Count
    reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0
    stop: Name | None = None


class Refused(Message):
    """A request cannot be served or failed on the way."""

    request: Count
    code: Name
    message: Text
    param: Name | None = None


class Shutdown(Message):
    """The gateway ends its worker."""
