"""What a request wants, whatever API it came by; and what all APIs have in common in reading it.

Pure: no sockets, no clock, no worker.  A parameter is honoured, or refused with an error that names it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

import msgspec

from expertd.clients.gateway.conversation import with_one_system
from expertd.protocol.errors import ParameterUnsupported, RequestInvalid
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
WHOLE_LIMIT = (1 << 63) - 1
GREEDY = Sampling()
ToolsWanted = tuple[list[dict[str, Any]], Literal["auto", "required"]]
"""What may be called, and whether something has to be."""


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
        schema: a JSON schema, itself JSON, that the answer has to fit.
        top_logprobs: how many of the likeliest tokens to tell with each; None: no log-probabilities.
        count: whether the prompt's tokens are only to be counted.
        answers: how many.
        stream: whether the answer is wanted piece by piece; with ``include_usage`` how many tokens it was at the end.
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

    def with_prompt(self, prompt: str | list[int]) -> Wanted:
        """The same of another raw prompt."""
        if isinstance(prompt, str):
            return replace(self, messages=None, text=prompt, tokens=None)
        return replace(self, messages=None, text=None, tokens=prompt)


# -- reading a body ----------------------------------------------------------------------------------------------------


def body_object(body: object) -> dict[str, Any]:
    """A decoded JSON body, which has to be an object.  All that follows raise RequestInvalid, which names ``param``."""
    if not isinstance(body, dict):
        raise RequestInvalid("the body has to be a JSON object")
    return body


def invalid(param: str, rule: str) -> NoReturn:
    """Refuse the value of ``param``, which has to be ``rule``."""
    raise RequestInvalid(f"'{param}' has to be {rule}", param=param)


def unsupported(param: str, why: str = "is not supported; leave it out") -> NoReturn:
    """Refuse a parameter that asks for what is not offered."""
    raise ParameterUnsupported(f"the parameter '{param}' {why}", param=param)


def is_number(value: object) -> bool:
    """Whether ``value`` is a number of JSON; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def boolean(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A truth value; ``default`` where there is none."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        invalid(name, "true or false")
    return value


def within(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A number from ``low`` to ``high``; ``default`` where there is none."""
    value = body.get(name)
    if value is None:
        return default
    if not is_number(value) or not low <= value <= high:
        invalid(name, f"a number from {low:g} to {high:g}")
    return float(value)


def whole(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """A whole number of at least ``low`` and at most ``high``, or None."""
    value = body.get(name)
    if value is None:
        return None
    good = isinstance(value, int) and not isinstance(value, bool) and value >= low
    most = WHOLE_LIMIT if high is None else high
    if not good or value > most:
        invalid(name, f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}")
    return int(value)


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


def function_tools(value: object) -> list[Any]:
    """The entries of ``tools``, each an object with a type."""
    if value is None:
        return []
    if not isinstance(value, list):
        invalid("tools", "a list of tools")
    for place, tool in enumerate(value):
        if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
            invalid(f"tools[{place}]", "an object with a type")
        if tool["type"] != "function":
            unsupported(f"tools[{place}]", f"is of type {tool['type']!r}; only functions are supported")
    return value


def tool_choice(value: object, tools: list[dict[str, Any]]) -> ToolsWanted:
    """Which of ``tools`` may be called, and whether one has to be, as both of OpenAI's APIs say it.

    In chat completions a function's name, and a list of tools that are allowed, lie one object deeper.
    """
    if value is None or value in ("auto", "none", "required"):
        return choose(tools, str(value or "auto"))
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(value, dict) and kind == "allowed_tools":
        holder = value.get("allowed_tools", value)
        allowed = holder.get("tools") if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or not isinstance(allowed, list):
            invalid("tool_choice.allowed_tools", "an object with a mode and tools")
        names = [_named(tool, "tool_choice.allowed_tools.tools") for tool in allowed]
        mode = holder.get("mode", "auto")
        if mode not in ("auto", "required"):
            invalid("tool_choice.allowed_tools.mode", "'auto' or 'required'")
        return choose(tools, mode, names, "tool_choice.allowed_tools.tools")
    return choose(tools, "required", [_named(value, "tool_choice")])


def choose(
    tools: list[dict[str, Any]], mode: str, names: Sequence[object] | None = None, param: str = "tool_choice"
) -> ToolsWanted:
    """``tools`` that may be called in ``mode`` ("auto", "none" or "required"); with ``names`` only those."""
    if names is not None:
        known = [tool["function"]["name"] for tool in tools]
        for name in names:
            if name not in known:
                raise RequestInvalid(f"'{param}' names {name!r}, which is none of the tools", param=param)
        tools = [tool for tool in tools if tool["function"]["name"] in names]
    if mode == "required" and not tools:
        raise RequestInvalid(f"'{param}' wants a tool to be called, but there are no tools", param=param)
    return ([], "auto") if mode == "none" else (tools, "required" if mode == "required" else "auto")


def _named(value: object, param: str) -> object:
    """The name in an object that names a function."""
    if not isinstance(value, dict) or value.get("type") != "function":
        invalid(param, "'none', 'auto', 'required', or an object that names a function")
    function = value.get("function", value)
    return function.get("name") if isinstance(function, dict) else None


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
