"""Anthropic's messages as data: a request's body into what is wanted, events into response bodies.

Pure, as ``chat``: no sockets, no clock, no worker.  What a conversation holds is turned into the messages that chat
templates take; results of tools become messages of their own, before the rest of the turn that brought them.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from expertd.clients.gateway.answers import Part, Told, sse
from expertd.clients.gateway.conversation import Messages, call_of, json_of, kind_of, not_supported, text_of, texts
from expertd.clients.gateway.fields import body_object, boolean, invalid, string, unsupported, whole, within
from expertd.clients.gateway.tools import choose, entries, function_of
from expertd.clients.gateway.wanted import (
    HOTTEST,
    Wanted,
    json_schema,
    model_name,
    stops,
)
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Delta, Finished, Sampling

__all__ = ["IGNORED", "PING", "Rendering", "error_body", "parse", "parse_count"]

IGNORED = frozenset(
    {"metadata", "service_tier", "cache_control", "inference_geo", "user_profile_id", "workspace_id"}
)
"""Parameters that only mean something to Anthropic's own service.  Prompts are cached without being told to."""

_HONOURED = {
    "model", "max_tokens", "messages", "system", "stop_sequences", "stream", "temperature", "top_k", "top_p", "tools",
    "tool_choice", "thinking", "output_config",
}  # fmt: skip

PING = sse({"type": "ping"}, "ping")
"""What keeps a silent stream open."""

BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n?", re.MULTILINE)
"""A line that Claude Code puts in front of each request's system prompt, another one each time: nothing that a model
should read, and with it no two prompts would begin alike."""

_NEUTRAL: Mapping[str, Callable[[Any], bool]] = {
    "speed": lambda value: value == "standard",
    "context_management": lambda value: isinstance(value, dict) and _keep_all(value.get("edits")),
}
"""Parameters that are not supported, each with the test of the value that changes nothing."""

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip
EFFORTS = ("low", "medium", "high", "xhigh", "max")
_MODES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
_NAMES = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "enable_thinking": "thinking",
}
"""What this API calls parameters that have other names elsewhere."""
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def parse(body: object) -> Wanted:
    """The request in a decoded JSON body.

    Raises:
        RequestInvalid: a field is missing, of the wrong type or out of range; ``param`` names it.
        ParameterUnsupported: a parameter asks for what is not offered; ``param`` names it.
    """
    body = body_object(body)
    max_tokens = whole(body, "max_tokens", 1)
    if max_tokens is None:
        invalid("max_tokens", "a whole number of at least 1")
    return _parse(body, max_tokens)


def parse_count(body: object) -> Wanted:
    """The request whose tokens are to be counted."""
    return _parse(body_object(body), None)


def error_body(error: ExpertdError) -> dict[str, Any]:
    """``error`` as Anthropic writes errors, which have no field for what of the request is at fault."""
    message = error.message
    if error.param is not None and error.param not in message:
        message = f"{error.param}: {message}"
    kind = _KINDS.get(error.http_status, "api_error" if error.http_status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": f"{message} [{error.code}]"}}


def _parse(body: Mapping[str, Any], max_tokens: int | None) -> Wanted:
    for name, value in body.items():
        neutral = value is None or (name in _NEUTRAL and _NEUTRAL[name](value))
        if name not in _HONOURED and name not in IGNORED and not neutral:
            unsupported(name)
    temperature = within(body, "temperature", 0.0, HOTTEST, 1.0)
    top_p = within(body, "top_p", 0.0, 1.0, 1.0)
    if top_p == 0.0:
        temperature, top_p = 0.0, 1.0
    tools, choice, several = _tools(body.get("tools"), body.get("tool_choice"))
    messages = [*_system(body.get("system")), *_messages(body.get("messages"))]
    return Wanted(
        model=model_name(body),
        messages=messages,
        goes_on=messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"),
        tools=tools,
        tool_choice=choice,
        parallel_calls=several,
        template=_thinking(body.get("thinking")),
        hints=_effort(body.get("output_config")),
        max_tokens=max_tokens,
        stop=stops(body.get("stop_sequences"), "stop_sequences"),
        sampling=Sampling(temperature=temperature, top_p=top_p, top_k=whole(body, "top_k", 0) or 0),
        schema=_output_config(body.get("output_config")),
        stream=boolean(body, "stream"),
        include_usage=True,
        names=_NAMES,
    )


def _keep_all(edits: object) -> bool:
    """Whether edits of the context leave all in it, as the one does that Claude Code asks for."""
    if edits is None:
        return True
    return isinstance(edits, list) and all(
        isinstance(edit, dict) and edit.get("type") == "clear_thinking_20251015" and edit.get("keep") == "all"
        for edit in edits
    )


def _thinking(value: object) -> dict[str, Any]:
    """What the template is told; a budget is for Anthropic's own models, ``max_tokens`` bounds all."""
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("enabled", "disabled", "adaptive"):
        invalid("thinking", "an object of type 'enabled', 'disabled' or 'adaptive'")
    return {} if kind == "adaptive" else {"enable_thinking": kind == "enabled"}


def _output_config(value: object) -> str | None:
    """The schema that the answer has to fit."""
    if value is None:
        return None
    if not isinstance(value, dict):
        invalid("output_config", "an object")
    for name, part in value.items():
        if name not in ("format", "effort") and part is not None:
            unsupported(f"output_config.{name}")
    form = value.get("format")
    if form is None:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        invalid("output_config.format", "an object of type 'json_schema'")
    return json_schema(form.get("schema"), "output_config.format.schema")


def _effort(value: object) -> dict[str, Any]:
    """What the template is told if it knows of effort.  If not it means nothing: Claude Code always sends one."""
    effort = value.get("effort") if isinstance(value, dict) else None
    if effort is None:
        return {}
    if effort not in EFFORTS:
        invalid("output_config.effort", f"one of {', '.join(EFFORTS)}")
    return {"reasoning_effort": effort}


def _tools(value: object, choice: object) -> tuple[list[dict[str, Any]], Literal["auto", "required"], bool]:
    """The tools that may be called, whether one has to be, and whether several may be."""
    tools = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(entries(value))]
    if choice is None:
        return tools, "auto", True
    if not isinstance(choice, dict):
        invalid("tool_choice", "an object with a type")
    several = not boolean(choice, "disable_parallel_tool_use")
    kind = choice.get("type")
    if not isinstance(kind, str) or kind not in _MODES:
        invalid("tool_choice.type", f"one of {', '.join(_MODES)}")
    return *choose(tools, _MODES[kind], [choice.get("name")] if kind == "tool" else None), several


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        unsupported(param, f"is of type {tool['type']!r}; only tools of your own are supported")
    if not isinstance(tool.get("input_schema"), dict):
        invalid(f"{param}.input_schema", "an object, a JSON schema")
    return function_of(tool, param, schema="input_schema")


# -- the conversation --------------------------------------------------------------------------------------------------


def _system(value: object) -> Messages:
    if value is None:
        return []
    text = BILLING.sub("", "\n".join(texts(value, "system"))).strip("\n")
    return [{"role": "system", "content": text}] if text else []


def _messages(value: object) -> Messages:
    if not isinstance(value, list) or not value:
        invalid("messages", "a list of at least one message")
    found: Messages = []
    for place, message in enumerate(value):
        param = f"messages[{place}]"
        if not isinstance(message, dict):
            invalid(param, "an object with a role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            invalid(f"{param}.role", "'user' or 'assistant'")
        if isinstance(content, str):
            found.append({"role": role, "content": content})
        elif not isinstance(content, list) or not content:
            invalid(f"{param}.content", "a string or a list of blocks")
        elif role == "assistant":
            found.append(_said(content, f"{param}.content"))
        else:
            found += _asked(role, content, f"{param}.content")
    return found


def _said(content: Sequence[Any], param: str) -> dict[str, Any]:
    """An assistant's turn."""
    said, thoughts, calls = [], [], []
    for place, block in enumerate(content):
        here = f"{param}[{place}]"
        match kind_of(block, here):
            case "text":
                said.append(text_of(block, here))
            case "thinking":
                thoughts.append(string(block, "thinking", here))
            case "redacted_thinking":
                continue  # nobody but Anthropic can read it
            case "tool_use":
                arguments = json_of(block.get("input"), f"{here}.input")
                calls.append(call_of(string(block, "id", here), string(block, "name", here), arguments))
            case kind:
                raise not_supported(kind, here)
    message: dict[str, Any] = {"role": "assistant", "content": "".join(said)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _asked(role: str, content: Sequence[Any], param: str) -> Messages:
    """A user's turn: results of tools, then what the user says."""
    results: Messages = []
    said = []
    for place, block in enumerate(content):
        here = f"{param}[{place}]"
        kind = kind_of(block, here)
        if kind == "text":
            said.append(text_of(block, here))
        elif kind == "tool_result":
            text = "\n".join(texts(block.get("content") or "", f"{here}.content"))
            failed = "Error: " if block.get("is_error") is True else ""
            call = string(block, "tool_use_id", here)
            results.append({"role": "tool", "tool_call_id": call, "content": failed + text})
        else:
            raise not_supported(kind, here)
    return [*results, {"role": role, "content": "\n".join(said)}] if said or not results else results


# -- answers -----------------------------------------------------------------------------------------------------------


class Rendering:
    """How messages write an answer: blocks of thinking, text, and uses of tools, one after the other."""

    keepalive = PING

    def __init__(self, model: str) -> None:
        """``model``: the name of what answers."""
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._begun = False
        self._place = -1
        self._open: str | None = None
        self._end: Finished | None = None

    def whole(self, answers: Sequence[Told]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        (told,) = answers
        content = [_block(part) for part in told.parts] or [{"type": "text", "text": ""}]
        return {**self._head, "content": content, **_stop(told.end), "usage": _usage_of(told.end)}

    def begin(self) -> Iterator[bytes]:
        """Nothing yet: a stream begins with how long the prompt is, which the first event tells."""
        yield from ()

    def event(self, place: int, event: Delta | Finished) -> Iterator[bytes]:
        """What an event is in a stream."""
        if not self._begun:
            self._begun = True
            usage = _usage(event.prompt_tokens, event.cached_tokens, 0)
            end = {"stop_reason": None, "stop_sequence": None}
            yield _event("message_start", message={**self._head, "content": [], **end, "usage": usage})
        if isinstance(event, Finished):
            self._end = event
            return
        if event.reasoning:
            yield from self._in("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": event.reasoning})
        if event.text:
            yield from self._in("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": event.text})
        for call in event.calls:
            if call.id:
                yield from self._close()
                yield from self._in("tool_use", {**_use(call.id, call.name), "input": {}})
            if call.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})

    def end(self) -> Iterator[bytes]:
        """What a stream ends with."""
        if self._place < 0:
            yield from self._in("text", {"type": "text", "text": ""})
        yield from self._close()
        assert self._end is not None
        yield _event("message_delta", delta=_stop(self._end), usage=_usage_of(self._end))
        yield _event("message_stop")

    def failed(self, error: ExpertdError) -> Iterator[bytes]:
        """The status is sent already: an event says that this is not an answer's end."""
        yield sse(error_body(error), "error")

    def _in(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        """Have a block of ``kind`` be open."""
        if self._open == kind:
            return
        yield from self._close()
        self._place += 1
        self._open = kind
        yield _event("content_block_start", index=self._place, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._place, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._place)


def _event(kind: str, **fields: Any) -> bytes:
    return sse({"type": kind, **fields}, kind)


def _block(part: Part) -> dict[str, Any]:
    match part.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        case "text":
            return {"type": "text", "text": part.text}
    return {**_use(part.id, part.name), "input": _input(part.text)}


def _use(id: str, name: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name}


def _input(arguments: str) -> Any:
    """Arguments as an object, written as the model wrote them: there are numbers that no type of Python's holds.

    An empty one if the call was cut off, which the reason of the end says.
    """
    try:
        whole = isinstance(json.loads(arguments, parse_int=str), dict)  # An int may have too many digits.
    except (ValueError, RecursionError):
        whole = False
    return msgspec.Raw(arguments.encode()) if whole else {}


def _stop(end: Finished) -> dict[str, Any]:
    reason = "stop_sequence" if end.stop is not None else _REASONS[end.reason]
    return {"stop_reason": reason, "stop_sequence": end.stop}


def _usage_of(end: Finished) -> dict[str, Any]:
    return _usage(end.prompt_tokens, end.cached_tokens, end.completion_tokens)


def _usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached_tokens,
        "output_tokens": completion_tokens,
    }
