"""What a request wants, whatever API it came by, and the parameters that several APIs have.

Pure: no sockets, no clock, no worker.  A parameter is honoured, or refused with an error that names it.  What was
said is read by ``conversation``, what may be called by ``tools``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from expertd.clients.gateway.conversation import with_one_system
from expertd.clients.gateway.fields import invalid, is_number, whole, within
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Generate, Sampling

MOST_STOPS = 16
LONGEST_STOP = 4096
HOTTEST = 2.0
MOST_TOP_LOGPROBS = 20
MOST_ANSWERS = 16
"""Answers to one prompt that a request may want."""
SEED_LIMIT = 1 << 63
ANY_MODEL = ""
"""The model of a request that names none, where the API lets it: whatever is served."""
GREEDY = Sampling()


@dataclass(frozen=True)
class Wanted:
    """A valid request.

    Attributes:
        model: the name that the client gave, or ``ANY_MODEL``.
        messages, text, tokens: the prompt, in one of three forms (``messages.Generate``).
        tools: what may be called, as OpenAI describes tools; empty: nothing.
        tool_choice: "auto", or "required": one has to be; ``parallel_calls``: several may be, one after the other.
        template: further variables of the chat template; ``hints``: those that matter only if it knows them.
        goes_on: whether the answer is the rest of the last message, which the assistant has begun.
        max_tokens: None: as many as fit into the context.
        schema: a JSON schema, itself JSON, that the answer has to fit, unless it is calls of tools.
        top_logprobs: how many of the likeliest tokens to tell with each; None: no log-probabilities.
        count: whether the prompt's tokens are only to be counted.
        answers: how many.
        stream: whether the answer is wanted piece by piece; with ``include_usage`` how many tokens it was at the end.
        names: what the client calls the parameters, by the names that errors of workers have for them.
    """

    model: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    tokens: list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Literal["auto", "required"] = "auto"
    parallel_calls: bool = True
    template: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    goes_on: bool = False
    max_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    sampling: Sampling = GREEDY
    schema: str | None = None
    top_logprobs: int | None = None
    count: bool = False
    answers: int = 1
    stream: bool = False
    include_usage: bool = False
    names: Mapping[str, str] = field(default_factory=dict, compare=False)

    def generate(self, request: int, answer: int = 0) -> Generate:
        """The message to a worker for one of its answers; each has a seed of its own."""
        sampling = self.sampling
        if sampling.seed is not None and answer:
            sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + answer) % SEED_LIMIT)
        return Generate(
            request=request,
            messages=None if self.messages is None else with_one_system(self.messages),
            text=self.text,
            tokens=self.tokens,
            tools=self.tools,
            tool_choice=self.tool_choice,
            parallel_calls=self.parallel_calls,
            template=self.template,
            hints=self.hints,
            goes_on=self.goes_on,
            max_tokens=self.max_tokens,
            stop=self.stop,
            sampling=sampling,
            schema=self.schema,
            count=self.count,
            top_logprobs=self.top_logprobs,
        )

    def renamed(self, error: ExpertdError) -> ExpertdError:
        """A worker's error with the names that the client knows, in its sentence too."""
        message = error.message
        if names := [re.escape(name) for name in self.names if name in message]:
            # Only what is quoted, or has an underscore, is a name and not a word.
            message = re.sub(
                rf"'({'|'.join(names)})'|(?<![\w.])({'|'.join(names)})(?!\w)",
                lambda found: f"'{self.names[found[1]]}'" if found[1] else self._in_words(found[2]),
                message,
            )
        return type(error)(message, param=None if error.param is None else self._name(error.param))

    def _name(self, name: str) -> str:
        return self.names.get(name, name)

    def _in_words(self, word: str) -> str:
        return self._name(word) if "_" in word else word

    def with_prompt(self, prompt: str | list[int]) -> Wanted:
        """The same of another raw prompt."""
        if isinstance(prompt, str):
            return replace(self, messages=None, text=prompt, tokens=None)
        return replace(self, messages=None, text=None, tokens=prompt)


# -- what several APIs have --------------------------------------------------------------------------------------------


def model_name(body: Mapping[str, Any]) -> str:
    """The model that is asked for."""
    value = body.get("model")
    if not isinstance(value, str) or not value:
        invalid("model", "the name of the model; GET /v1/models tells it")
    return value


def stops(value: object, name: str = "stop") -> list[str]:
    """Strings that end an answer."""
    if value is None:
        return []
    found = [value] if isinstance(value, str) else value
    if (
        not isinstance(found, list)
        or len(found) > MOST_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in found)
    ):
        invalid(name, f"a string or a list of at most {MOST_STOPS} strings, each of 1 to {LONGEST_STOP} characters")
    return found


def sampling_of(body: Mapping[str, Any]) -> Sampling:
    """How tokens are chosen, from the parameters that OpenAI and its kin have for that."""
    temperature = within(body, "temperature", 0.0, HOTTEST, 1.0)
    top_p = within(body, "top_p", 0.0, 1.0, 1.0)
    if top_p == 0.0:
        # A nucleus of no mass is the likeliest token alone.
        temperature, top_p = 0.0, 1.0
    repetition = within(body, "repetition_penalty", 0.0, 100.0, 1.0)
    if repetition == 0.0:
        invalid("repetition_penalty", "a number above 0")
    top_k = body.get("top_k")
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=0 if top_k == -1 else whole(body, "top_k", 0) or 0,
        min_p=within(body, "min_p", 0.0, 1.0, 0.0),
        seed=_seed(body.get("seed")),
        logit_bias=_logit_bias(body.get("logit_bias")),
        presence_penalty=within(body, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=within(body, "frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=repetition,
    )


def json_schema(value: object, name: str) -> str:
    """A JSON schema as text."""
    if not isinstance(value, dict):
        invalid(name, "an object, a JSON schema")
    return json.dumps(value)


def _seed(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not -SEED_LIMIT <= value < SEED_LIMIT:
        invalid("seed", "a whole number of 64 bits")
    return value % SEED_LIMIT


def _logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    biases: dict[Any, Any] = value if isinstance(value, dict) else {None: None}
    for token, bias in biases.items():
        known = isinstance(token, str) and token.isdecimal() and len(token) < 10
        if not (known and is_number(bias) and -100 <= bias <= 100):
            invalid("logit_bias", "an object of token numbers, each with a number from -100 to 100")
    return {int(token): float(bias) for token, bias in biases.items()}
