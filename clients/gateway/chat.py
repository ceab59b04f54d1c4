"""OpenAI chat completions as data: a request's body into what to generate, events into response bodies.

Pure: no sockets, no clock, no worker.  A parameter is honoured, or refused with an error that names it; ``IGNORED`` is
the whole list of those that are accepted without effect, and ``NEUTRAL`` of those accepted at the one value that asks
for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from expertd.protocol.errors import ParameterUnsupported, RequestInvalid
from expertd.protocol.messages import Finished

__all__ = ["IGNORED", "NEUTRAL", "ChatRequest", "chunk", "completion", "parse", "usage", "usage_chunk"]

IGNORED = frozenset({"user", "store", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"})
"""Parameters that only mean something to OpenAI's own service."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_STOPS = 4
LONGEST_STOP = 4096
HOTTEST = 2.0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(neutral: float) -> Callable[[object], bool]:
    return lambda value: _is_number(value) and value == neutral


NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "n": _number(1),
    "presence_penalty": _number(0),
    "frequency_penalty": _number(0),
    "repetition_penalty": _number(1),
    "min_p": _number(0),
    "top_k": _number(0),
    "logprobs": lambda value: value is False,
    "top_logprobs": _number(0),
    "logit_bias": lambda value: value == {},
    "seed": lambda value: False,
    "response_format": lambda value: value == {"type": "text"},
    "modalities": lambda value: value == ["text"],
    "tools": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "reasoning_effort": lambda value: False,
    "verbosity": lambda value: value == "medium",
    "audio": lambda value: False,
    "prediction": lambda value: False,
    "web_search_options": lambda value: False,
}
"""Parameters that are not supported, each with the test of the value that changes nothing.  Null is always such one."""

_HONOURED = frozenset(
    {"model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "stream"}
) | {"stream_options"}

_IDLE_MESSAGE_FIELDS = frozenset({"tool_calls", "function_call", "refusal", "audio", "annotations"})
"""What OpenAI's own library sends back empty with an assistant's message."""


@dataclass(frozen=True)
class ChatRequest:
    """A valid request.  ``max_tokens`` None means as many as fit into the context."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int | None
    temperature: float
    top_p: float
    stop: list[str]
    stream: bool
    include_usage: bool


def parse(body: object) -> ChatRequest:
    """The request in a decoded JSON body.

    Raises:
        RequestInvalid: a field is missing, of the wrong type or out of range; ``param`` names it.
        ParameterUnsupported: a parameter asks for what is not offered; ``param`` names it.
    """
    if not isinstance(body, dict):
        raise RequestInvalid("the body has to be a JSON object")
    for name, value in body.items():
        if name not in _HONOURED and name not in IGNORED:
            _check_neutral(name, value)
    stream = _boolean(body, "stream")
    temperature = _within(body, "temperature", 0.0, HOTTEST)
    top_p = _within(body, "top_p", 0.0, 1.0)
    if top_p == 0.0:
        # A nucleus of no mass is the likeliest token alone.
        temperature, top_p = 0.0, 1.0
    return ChatRequest(
        model=_model(body.get("model")),
        messages=_messages(body.get("messages")),
        max_tokens=_max_tokens(body),
        temperature=temperature,
        top_p=top_p,
        stop=_stop(body.get("stop")),
        stream=stream,
        include_usage=_include_usage(body.get("stream_options"), stream),
    )


def _check_neutral(name: str, value: object) -> None:
    test = NEUTRAL.get(name)
    if test is None:
        raise ParameterUnsupported(f"the parameter '{name}' is not known here; leave it out", param=name)
    if value is not None and not test(value):
        raise ParameterUnsupported(f"the parameter '{name}' is not supported; leave it out", param=name)


def _invalid(param: str, rule: str) -> NoReturn:
    raise RequestInvalid(f"'{param}' has to be {rule}", param=param)


def _boolean(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        _invalid(name, "true or false")
    return value


def _within(body: dict[str, Any], name: str, low: float, high: float) -> float:
    """A number from ``low`` to ``high``; 1.0, OpenAI's default for both of them, where there is none."""
    value = body.get(name)
    if value is None:
        return 1.0
    if not _is_number(value) or not low <= value <= high:
        _invalid(name, f"a number from {low:g} to {high:g}")
    return float(value)


def _model(value: object) -> str:
    if not isinstance(value, str) or not value:
        _invalid("model", "the name of the model; GET /v1/models tells it")
    return value


def _max_tokens(body: dict[str, Any]) -> int | None:
    found: dict[str, int] = {}
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            _invalid(name, "a whole number of at least 1")
        found[name] = value
    if len(set(found.values())) > 1:
        raise RequestInvalid("give either 'max_tokens' or 'max_completion_tokens', not two values", param="max_tokens")
    return next(iter(found.values()), None)


def _stop(value: object) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    ):
        _invalid("stop", f"a string or a list of at most {MOST_STOPS} strings, each of 1 to {LONGEST_STOP} characters")
    return stops


def _include_usage(value: object, stream: bool) -> bool:
    if value is None:
        return False
    if not stream:
        raise RequestInvalid("'stream_options' is only allowed when 'stream' is true", param="stream_options")
    if not isinstance(value, dict):
        _invalid("stream_options", "an object")
    for name, option in value.items():
        if name == "include_obfuscation" and (option is None or option is False):
            continue
        if name != "include_usage":
            param = f"stream_options.{name}"
            raise ParameterUnsupported(f"the parameter '{param}' is not supported; leave it out", param=param)
        if option is not None and not isinstance(option, bool):
            _invalid("stream_options.include_usage", "true or false")
    return bool(value.get("include_usage"))


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        _invalid("messages", "a list of at least one message")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(value: object, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _invalid(param, "an object with a role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        _invalid(f"{param}.role", f"one of {', '.join(ROLES)}")
    message = {"role": ROLES[role], "content": _content(value.get("content"), f"{param}.content")}
    for name, field in value.items():
        if name in ("role", "content") or field is None:
            continue
        if name == "name" or (name == "tool_call_id" and role == "tool"):
            if not isinstance(field, str):
                _invalid(f"{param}.{name}", "a string")
            message[name] = field
        elif name not in _IDLE_MESSAGE_FIELDS or field != []:
            raise ParameterUnsupported(
                f"the field '{param}.{name}' is not supported; leave it out", param=f"{param}.{name}"
            )
    return message


def _content(value: object, param: str) -> str:
    """A message's text; parts follow each other with nothing in between, as in mlx-lm's server."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        _invalid(param, "a string or a list of text parts")
    texts = []
    for place, part in enumerate(value):
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            _invalid(f"{param}[{place}]", "an object with a type")
        if part["type"] != "text" or part.keys() - {"type", "text"}:
            raise ParameterUnsupported(
                f"'{param}[{place}]' is not supported; only parts of type 'text' with a 'text' are",
                param=f"{param}[{place}]",
            )
        if not isinstance(part.get("text"), str):
            _invalid(f"{param}[{place}].text", "a string")
        texts.append(part["text"])
    return "".join(texts)


def completion(id: str, created: int, model: str, text: str, end: Finished) -> dict[str, Any]:
    """The body of an answer that is not streamed; ``created`` is in seconds since 1970."""
    return {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": end.reason,
            }
        ],
        "usage": usage(end),
    }


def chunk(id: str, created: int, model: str, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """One chunk of a streamed answer."""
    return {
        "id": id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
    }


def usage_chunk(id: str, created: int, model: str, end: Finished) -> dict[str, Any]:
    """The chunk after the last one, for those who asked for it."""
    return chunk(id, created, model, {}) | {"choices": [], "usage": usage(end)}


def usage(end: Finished) -> dict[str, Any]:
    """OpenAI's usage object, in tokens.  No prompt cache exists yet, so nothing ever comes out of one."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
