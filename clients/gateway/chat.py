"""OpenAI chat completions as data: a request's body into what is wanted, events into response bodies.

Pure: no sockets, no clock, no worker.  A parameter is honoured, or refused with an error that names it; ``IGNORED`` is
the whole list of those that are accepted without effect, and ``NEUTRAL`` of those accepted at the one value that asks
for nothing.  What chat completions have in common with other APIs is in ``wanted``.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from expertd.clients.gateway.answers import DONE, KEEPALIVE, Told, error_body, sse
from expertd.clients.gateway.conversation import Messages, arguments_of, call_of, texts
from expertd.clients.gateway.fields import body_object, boolean, invalid, string, unsupported, whole
from expertd.clients.gateway.tools import entries, function_of, of_type_function, refuse_unknown, tool_choice
from expertd.clients.gateway.wanted import (
    MOST_ANSWERS,
    MOST_TOP_LOGPROBS,
    Wanted,
    json_schema,
    model_name,
    sampling_of,
    stops,
)
from expertd.protocol.errors import ExpertdError, ParameterUnsupported, RequestInvalid
from expertd.protocol.messages import Delta, Finished, TokenLogprob, ToolCall

__all__ = ["HONOURED", "IGNORED", "NEUTRAL", "Rendering", "check_names", "parse", "usage"]

IGNORED = frozenset(
    {"user", "store", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
)
"""Parameters that only mean something to OpenAI's own service."""

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "modalities": lambda value: value == ["text"],
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "verbosity": lambda value: value == "medium",
    "audio": lambda value: False,
    "prediction": lambda value: False,
    "web_search_options": lambda value: False,
}
"""Parameters that are not supported, each with the test of the value that changes nothing.  Null is always such one."""

SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "seed", "logit_bias", "presence_penalty", "frequency_penalty"}
) | {"repetition_penalty"}

HONOURED = SAMPLING | {
    "model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options", "n", "logprobs",
    "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_effort",
    "chat_template_kwargs",
}  # fmt: skip
"""The parameters that are honoured."""

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")

_IDLE = frozenset({"parsed", "annotations"})
_EMPTY = frozenset({"function_call", "refusal", "audio"})
"""What OpenAI's own library sends back with an assistant's message: what says nothing to a model, and what says nothing
as long as it is empty.  ``parsed`` is the content once more."""
_PARTS = {"text": "text", "refusal": "refusal"}


def parse(body: object) -> Wanted:
    """The request in a decoded JSON body.

    Raises:
        RequestInvalid: a field is missing, of the wrong type or out of range; ``param`` names it.
        ParameterUnsupported: a parameter asks for what is not offered; ``param`` names it.
    """
    body = body_object(body)
    check_names(body, HONOURED)
    stream = boolean(body, "stream")
    given = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(entries(body.get("tools")))]
    tools, choice = tool_choice(body.get("tool_choice"), given)
    template, names = _template(body)
    if body.get("max_completion_tokens") is not None:
        names["max_tokens"] = "max_completion_tokens"
    return Wanted(
        model=model_name(body),
        messages=_messages(body.get("messages")),
        tools=tools,
        tool_choice=choice,
        parallel_calls=boolean(body, "parallel_tool_calls", True),
        template=template,
        max_tokens=_max_tokens(body),
        stop=stops(body.get("stop")),
        sampling=sampling_of(body),
        schema=_response_format(body.get("response_format")),
        top_logprobs=_top_logprobs(body),
        answers=whole(body, "n", 1, MOST_ANSWERS) or 1,
        stream=stream,
        include_usage=include_usage(body.get("stream_options"), stream),
        names=names,
    )


def check_names(body: Mapping[str, Any], honoured: Iterable[str], neutral: Mapping[str, Any] = NEUTRAL) -> None:
    """Refuse what is neither honoured nor known to change nothing."""
    for name, value in body.items():
        if name in honoured or name in IGNORED:
            continue
        test = neutral.get(name)
        if test is None:
            raise ParameterUnsupported(f"the parameter '{name}' is not known here; leave it out", param=name)
        if value is not None and not test(value):
            unsupported(name)


def include_usage(value: object, stream: bool) -> bool:
    """Whether ``stream_options`` asks for usage."""
    if value is None:
        return False
    if not stream:
        raise RequestInvalid("'stream_options' is only allowed when 'stream' is true", param="stream_options")
    if not isinstance(value, dict):
        invalid("stream_options", "an object")
    for name, option in value.items():
        if name == "include_obfuscation" and (option is None or option is False):
            continue
        if name != "include_usage":
            unsupported(f"stream_options.{name}")
        if option is not None and not isinstance(option, bool):
            invalid("stream_options.include_usage", "true or false")
    return bool(value.get("include_usage"))


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    found = {name: whole(body, name, 1) for name in ("max_completion_tokens", "max_tokens")}
    given = {value for value in found.values() if value is not None}
    if len(given) > 1:
        raise RequestInvalid("give either 'max_tokens' or 'max_completion_tokens', not two values", param="max_tokens")
    return next(iter(given), None)


def _top_logprobs(body: Mapping[str, Any]) -> int | None:
    top = whole(body, "top_logprobs", 0, MOST_TOP_LOGPROBS)
    if boolean(body, "logprobs"):
        return top or 0
    if top:
        raise RequestInvalid("'top_logprobs' is only allowed when 'logprobs' is true", param="top_logprobs")
    return None


def _response_format(value: object) -> str | None:
    """The schema that the answer has to fit, if it has to fit one."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str):
        invalid("response_format", "an object with a type")
    if kind == "text":
        return None
    if kind == "json_object":
        return json.dumps({"type": "object"})
    if kind != "json_schema":
        unsupported("response_format", f"of type {kind!r} is not supported; 'json_schema' is")
    holder = value.get("json_schema")
    if not isinstance(holder, dict):
        invalid("response_format.json_schema", "an object with a name and a schema")
    return json_schema(holder.get("schema"), "response_format.json_schema.schema")


def _template(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Variables for the chat template, and what the client calls them."""
    given = body.get("chat_template_kwargs")
    if given is not None and not isinstance(given, dict):
        invalid("chat_template_kwargs", "an object")
    found = dict(given or {})
    names = {name: f"chat_template_kwargs.{name}" for name in found}
    effort = body.get("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            invalid("reasoning_effort", f"one of {', '.join(EFFORTS)}")
        name, value = ("enable_thinking", False) if effort == "none" else ("reasoning_effort", effort)
        if found.get(name, value) != value:
            raise RequestInvalid(
                f"'reasoning_effort' and '{names[name]}' contradict each other; leave one of them out",
                param=names[name],
            )
        found[name], names[name] = value, "reasoning_effort"
    return found, names


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    of_type_function(tool, param)
    refuse_unknown(tool, {"function"}, param)
    function = tool.get("function")
    if not isinstance(function, dict):
        invalid(f"{param}.function", "an object")
    return function_of(function, f"{param}.function")


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        invalid("messages", "a list of at least one message")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(value)]


def _message(value: object, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        invalid(param, "an object with a role and content")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        invalid(f"{param}.role", f"one of {', '.join(ROLES)}")
    calls = _calls(value.get("tool_calls"), f"{param}.tool_calls") if role == "assistant" else []
    content = value.get("content")
    if content is None and calls:
        content = ""
    if content == []:
        invalid(f"{param}.content", "a string or a list of at least one part of text")
    # Parts follow each other with nothing in between, as in mlx-lm's server.
    message: dict[str, Any] = {"role": ROLES[role], "content": "".join(texts(content, f"{param}.content", _PARTS))}
    if calls:
        message["tool_calls"] = calls
    for name, field in value.items():
        if name in ("role", "content") or field is None or (name == "tool_calls" and role == "assistant"):
            continue
        thought = name in ("reasoning_content", "reasoning") and role == "assistant"
        if name == "name" or thought or (name == "tool_call_id" and role == "tool"):
            message["reasoning_content" if thought else name] = string(value, name, param)
        elif role != "assistant" or not (name in _IDLE or (name in _EMPTY and field == [])):
            raise ParameterUnsupported(
                f"the field '{param}.{name}' is not supported; leave it out", param=f"{param}.{name}"
            )
    return message


def _calls(value: object, param: str) -> list[dict[str, Any]]:
    """Earlier calls of tools; their arguments stay JSON, in which numbers may be of any size."""
    if value is None:
        return []
    if not isinstance(value, list):
        invalid(param, "a list of calls")
    found = []
    for place, call in enumerate(value):
        here = f"{param}[{place}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            invalid(here, "an object with a function that has a name")
        arguments = arguments_of(function.get("arguments"), f"{here}.function.arguments")
        found.append(call_of(str(call.get("id", "")), function["name"], arguments))
    return found


# -- answers -----------------------------------------------------------------------------------------------------------


class Rendering:
    """How chat completions write answers."""

    keepalive = KEEPALIVE

    def __init__(self, wanted: Wanted, model: str, created: int) -> None:
        """``model``: the name of what answers; ``created``: in seconds since 1970."""
        self._wanted = wanted
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": created, "model": model}
        self._calls = [0] * wanted.answers
        self._ends: list[Finished] = []

    def whole(self, answers: Sequence[Told]) -> dict[str, Any]:
        """The body of answers that are not streamed."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(place, told) for place, told in enumerate(answers)],
            "usage": usage([told.end for told in answers]),
        }

    def begin(self) -> Iterator[bytes]:
        """What a stream begins with."""
        for place in range(self._wanted.answers):
            yield self._chunk(place, {"role": "assistant", "content": ""})

    def event(self, place: int, event: Delta | Finished) -> Iterator[bytes]:
        """What an event is in a stream."""
        if isinstance(event, Finished):
            self._ends.append(event)
            yield self._chunk(place, {}, event.reason)
            return
        delta: dict[str, Any] = {}
        if event.text:
            delta["content"] = event.text
        if event.reasoning:
            delta["reasoning_content"] = event.reasoning
        if event.calls:
            delta["tool_calls"] = [self._piece(place, call) for call in event.calls]
        if delta or event.logprobs:
            yield self._chunk(place, delta, logprobs=event.logprobs)

    def end(self) -> Iterator[bytes]:
        """What a stream ends with."""
        if self._wanted.include_usage:
            yield sse({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(self._ends)})
        yield DONE

    def failed(self, error: ExpertdError) -> Iterator[bytes]:
        """The status is sent already: an event says that this is not an answer's end, and no [DONE] follows."""
        yield sse(error_body(error))

    def _choice(self, place: int, told: Told) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": told.text, "refusal": None}
        if told.calls:
            calls = [_call(call.id, call.name, call.text) for call in told.calls]
            message |= {"content": told.text or None, "tool_calls": calls}
        if told.reasoning:
            message["reasoning_content"] = told.reasoning
        return {
            "index": place,
            "message": message,
            "logprobs": None if self._wanted.top_logprobs is None else _logprobs(told.logprobs),
            "finish_reason": told.end.reason,
        }

    def _piece(self, place: int, call: ToolCall) -> dict[str, Any]:
        if not call.id:
            return {"index": self._calls[place] - 1, "function": {"arguments": call.arguments}}
        self._calls[place] += 1
        return {"index": self._calls[place] - 1, **_call(call.id, call.name, call.arguments)}

    def _chunk(
        self, place: int, delta: Mapping[str, Any], reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> bytes:
        told = _logprobs(logprobs) if logprobs else None
        choice = {"index": place, "delta": delta, "logprobs": told, "finish_reason": reason}
        return sse({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


def usage(ends: Sequence[Finished]) -> dict[str, Any]:
    """OpenAI's usage object, in tokens, of all answers to one prompt."""
    prompt, said = ends[0].prompt_tokens, sum(end.completion_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": said,
        "total_tokens": prompt + said,
        "prompt_tokens_details": {"cached_tokens": ends[0].cached_tokens},
    }


def _call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _logprobs(logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    def one(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    content = [
        one(told.token, told.logprob) | {"top_logprobs": [one(top.token, top.logprob) for top in told.top]}
        for told in logprobs
    ]
    return {"content": content, "refusal": None}
