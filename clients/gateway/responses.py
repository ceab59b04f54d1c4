"""OpenAI's responses as data: a request's body into what is wanted, events into response objects and streams.

Pure, as ``chat``: no sockets, no clock, no worker.  A response may go on from an earlier one, whose items come first;
those are kept by ``stored``.  What a conversation holds is turned into the messages that chat templates take.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from expertd.clients.gateway.answers import KEEPALIVE, Part, TextLogprobs, Told, error_body, sse
from expertd.clients.gateway.chat import EFFORTS, ROLES
from expertd.clients.gateway.conversation import Messages, arguments_of, call_of, not_supported, texts
from expertd.clients.gateway.fields import body_object, boolean, invalid, string, unsupported, whole
from expertd.clients.gateway.tools import entries, function_of, of_type_function, tool_choice
from expertd.clients.gateway.wanted import (
    ANY_MODEL,
    MOST_TOP_LOGPROBS,
    Wanted,
    json_schema,
    model_name,
    sampling_of,
)
from expertd.protocol.errors import ExpertdError, ResponseNotFound
from expertd.protocol.messages import Delta, Finished, TokenLogprob, ToolCall

__all__ = ["Items", "Rendering", "Request", "parse"]

Items = list[dict[str, Any]]
"""What a conversation consists of, as OpenAI's input and output items."""

IGNORED = frozenset(
    {"user", "metadata", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}
) | {"client_metadata"}
"""Parameters that only mean something to OpenAI's own service; ``metadata`` is told again."""

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
             "repetition_penalty"}  # fmt: skip
_HONOURED = _SAMPLING | {
    "model", "input", "instructions", "max_output_tokens", "stream", "stream_options", "store", "tools", "tool_choice",
    "parallel_tool_calls", "text", "reasoning", "previous_response_id", "top_logprobs", "include",
}  # fmt: skip
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "prompt": (),
    "conversation": (),
    "context_management": ([],),
}
_INCLUDE = {"reasoning.encrypted_content", "message.output_text.logprobs"}
"""What may be asked to be included.  Reasoning is told in plain text, and nothing of it is encrypted."""
_NAMES = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "enable_thinking": "reasoning.effort",
}
"""What this API calls parameters that have other names elsewhere."""
_PARTS = dict.fromkeys(("input_text", "output_text", "text", "reasoning_text"), "text") | {"refusal": "refusal"}
"""Types of the parts of a content, each with the field that has its text."""


@dataclass(frozen=True)
class Request:
    """A valid request.

    Attributes:
        wanted: what is to be computed; without the items of earlier responses.
        given: the items of ``input``.
        previous: the response that it goes on from.
        store: whether it is to be kept.
        echo: parameters that a response tells again.
    """

    wanted: Wanted
    given: Items
    instructions: str | None
    previous: str | None
    store: bool
    with_logprobs: bool
    echo: Mapping[str, Any] = field(default_factory=dict)

    def with_messages(self, earlier: Items) -> Wanted:
        """What is to be computed, after the items of earlier responses."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        return replace(self.wanted, messages=[*messages, *_messages([*earlier, *self.given])])


def parse(body: object, find: Callable[[str], dict[str, Any] | None] = lambda id: None) -> Request:
    """The request in a decoded JSON body.

    Args:
        find: the item that has an id, of a response that is kept.

    Raises:
        ResponseNotFound: an item is referred to that is not kept; ``param`` names the reference.
        RequestInvalid: a field is missing, of the wrong type or out of range; ``param`` names it.
        ParameterUnsupported: a parameter asks for what is not offered; ``param`` names it.
    """
    body = body_object(body)
    for name, value in body.items():
        known = name in _HONOURED or name in IGNORED or name in _NEUTRAL
        if not known or (name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]):
            unsupported(name)
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        invalid("instructions", "a string")
    given_tools = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(entries(body.get("tools")))]
    tools, choice = tool_choice(body.get("tool_choice"), given_tools)
    included = _included(body.get("include"))
    top = whole(body, "top_logprobs", 0, MOST_TOP_LOGPROBS)
    with_logprobs = "message.output_text.logprobs" in included
    previous = body.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        invalid("previous_response_id", "the id of a response")
    given = _given(body.get("input"), previous, find)
    _messages(given)  # now, so that what is wrong is told before anything is looked up
    options = body.get("stream_options")
    if options is not None and (not isinstance(options, dict) or options.keys() - {"include_obfuscation"}):
        unsupported("stream_options")
    wanted = Wanted(
        model=ANY_MODEL if body.get("model") is None else model_name(body),
        messages=[],
        tools=tools,
        tool_choice=choice,
        parallel_calls=boolean(body, "parallel_tool_calls", True),
        template=_reasoning(body.get("reasoning")),
        max_tokens=whole(body, "max_output_tokens", 1),
        sampling=sampling_of(body),
        schema=_format(body.get("text")),
        top_logprobs=(top or 0) if with_logprobs else None,
        stream=boolean(body, "stream"),
        names=_NAMES,
    )
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        invalid("metadata", "an object of strings")
    for name, value in (metadata or {}).items():
        if not isinstance(value, str):
            invalid(f"metadata.{name}", "a string")
    echo = {
        "instructions": instructions,
        "max_output_tokens": wanted.max_tokens,
        "metadata": metadata or {},
        "parallel_tool_calls": wanted.parallel_calls,
        "previous_response_id": previous,
        "reasoning": {"effort": (body.get("reasoning") or {}).get("effort"), "summary": None},
        "store": boolean(body, "store", True),
        "temperature": wanted.sampling.temperature,
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": wanted.sampling.top_p,
        "top_logprobs": top or 0,
        "truncation": "disabled",
        "background": False,
        "service_tier": "default",
        "presence_penalty": wanted.sampling.presence_penalty,
        "frequency_penalty": wanted.sampling.frequency_penalty,
    }
    if isinstance(body.get("user"), str):
        echo["user"] = body["user"]
    return Request(wanted, given, instructions, previous, bool(echo["store"]), with_logprobs, echo)


def _tool(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    of_type_function(tool, param)
    return function_of(tool, param)


def _included(value: object) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        invalid("include", "a list of strings")
    for one in value:
        if one not in _INCLUDE:
            unsupported("include", f"asks for {one!r}, which is not offered; leave it out")
    return value


def _reasoning(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        invalid("reasoning", "an object")
    for name, part in value.items():
        if name not in ("effort", "summary", "generate_summary") and part is not None:
            unsupported(f"reasoning.{name}")
    effort = value.get("effort")
    if effort is None:
        return {}
    if effort not in EFFORTS:
        invalid("reasoning.effort", f"one of {', '.join(EFFORTS)}")
    return {"enable_thinking": False} if effort == "none" else {"reasoning_effort": effort}


def _format(value: object) -> str | None:
    """The schema that the answer has to fit."""
    if value is None:
        return None
    if not isinstance(value, dict):
        invalid("text", "an object")
    if value.get("verbosity") not in (None, "medium"):
        unsupported("text.verbosity")
    form = value.get("format")
    kind = form.get("type") if isinstance(form, dict) else None
    if form is None or kind == "text":
        return None
    if not isinstance(form, dict) or not isinstance(kind, str):
        invalid("text.format", "an object with a type")
    if kind == "json_object":
        return json.dumps({"type": "object"})
    if kind != "json_schema":
        unsupported("text.format", f"of type {kind!r} is not supported; 'json_schema' is")
    return json_schema(form.get("schema"), "text.format.schema")


# -- the conversation --------------------------------------------------------------------------------------------------


def _given(value: object, previous: str | None, find: Callable[[str], dict[str, Any] | None]) -> Items:
    """The input as items, each with an id.  Without one the model goes on from ``previous``, or from no words."""
    if value is None:
        if previous is not None:
            return []
        value = ""
    if isinstance(value, str):
        value = [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        invalid("input", "a string or a list of at least one item")
    return [_item(item, f"input[{place}]", find) for place, item in enumerate(value)]


def _item(item: object, param: str, find: Callable[[str], dict[str, Any] | None]) -> dict[str, Any]:
    """One item as it is kept, or the one that it refers to."""
    if not isinstance(item, dict):
        invalid(param, "an object")
    bare = "id" in item and not item.keys() - {"id", "type"}
    kind = item.get("type") or ("message" if "role" in item else "item_reference" if bare else None)
    if not isinstance(kind, str):
        invalid(f"{param}.type", "a string")
    if item.get("id") is not None or kind == "item_reference":
        string(item, "id", param)
    if kind == "item_reference":
        found = find(item["id"])
        if found is None:
            raise ResponseNotFound(
                f"no response that is kept has an item '{item['id']}'; send the item itself, as the gateway keeps the "
                "latest responses only, until it ends, and none with 'store' false",
                param=f"{param}.id",
            )
        return found
    made = _id({"message": "msg", "function_call": "fc"}.get(kind, "item"))
    item = {**item, "id": item.get("id") or made, "type": kind}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        item["content"] = [{"type": part, "text": item["content"]}]
    return item


def _messages(items: Items) -> Messages:
    """Items as the messages of a chat template; thoughts and calls belong to the assistant's turn beside them."""
    found: Messages = []

    def turn() -> dict[str, Any]:
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        return found[-1]

    for place, item in enumerate(items):
        param = f"input[{place}]"
        match item["type"]:
            case "message":
                role = item.get("role")
                if not isinstance(role, str) or role not in ROLES or role == "tool":
                    invalid(f"{param}.role", "one of system, developer, user, assistant")
                text = _content(item.get("content"), f"{param}.content")
                if role == "assistant":
                    turn()["content"] += text
                else:
                    found.append({"role": ROLES[role], "content": text})
            case "function_call":
                id, name = string(item, "call_id", param), string(item, "name", param)
                call = call_of(id, name, arguments_of(item.get("arguments"), f"{param}.arguments"))
                turn().setdefault("tool_calls", []).append(call)
            case "function_call_output":
                text = _content(item.get("output"), f"{param}.output")
                found.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": text})
            case "reasoning":
                text = _content(item.get("content") or "", f"{param}.content")
                if text:
                    message = turn()
                    message["reasoning_content"] = message.get("reasoning_content", "") + text
            case kind:
                raise not_supported(kind, param)
    return found


def _content(value: object, param: str) -> str:
    return "".join(texts(value, param, _PARTS))


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


# -- answers -----------------------------------------------------------------------------------------------------------


class Rendering:
    """How a response is written: reasoning, a message, and calls of functions, each an item of its output."""

    keepalive = KEEPALIVE

    def __init__(self, request: Request, model: str, created: int) -> None:
        """``model``: the name of what answers; ``created``: in seconds since 1970."""
        self._request = request
        self._created = created
        self._head = {"id": _id("resp"), "object": "response", "created_at": created, "model": model}
        self._sequence = 0
        self.output: Items = []
        """What has been said so far."""
        self._open: Literal["reasoning", "message", "call"] | None = None
        self._logprobs = TextLogprobs()
        self._end: Finished | None = None
        self._thoughts = 0

    @property
    def id(self) -> str:
        """The response's."""
        return str(self._head["id"])

    @property
    def ended(self) -> bool:
        """Whether the answer has come to its end."""
        return self._end is not None

    def whole(self, answers: Sequence[Told]) -> dict[str, Any]:
        """The response object of an answer that is not streamed."""
        (told,) = answers
        self._thoughts = told.thoughts
        events: list[Delta | Finished] = [*map(_event_of, told.parts), told.end]
        for event in events:
            for _ in self.event(0, event):
                pass
        return self.response()

    def response(self, status: str | None = None, error: ExpertdError | None = None) -> dict[str, Any]:
        """The response object as it is now."""
        end = self._end
        incomplete = end is not None and end.reason == "length"
        if status is None:
            status = "incomplete" if incomplete else "completed"
        done = status in ("completed", "incomplete", "failed")
        usage = {} if end is None else {"usage": self._usage(end)}
        return {
            **self._head,
            **self._request.echo,
            "status": status,
            "completed_at": self._created if status == "completed" else None,
            "error": None if error is None else {"code": "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self.output if done else [],
            **usage,
        }

    def begin(self) -> Iterator[bytes]:
        """What a stream begins with."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def event(self, place: int, event: Delta | Finished) -> Iterator[bytes]:
        """What an event is in a stream."""
        if isinstance(event, Finished):
            self._end = event
            yield from self._close("incomplete" if event.reason == "length" else "completed")
            return
        if event.reasoning:
            yield from self._in("reasoning")
            self.output[-1]["content"][0]["text"] += event.reasoning
            self._thoughts += event.tokens
            yield self._event("response.reasoning_text.delta", **self._here(), delta=event.reasoning)
        of_text = self._logprobs.of(event)
        if event.text:
            yield from self._in("message")
            part = self.output[-1]["content"][0]
            part["text"] += event.text
            logprobs = [_logprob(told) for told in of_text] if self._request.with_logprobs else []
            part["logprobs"] += logprobs
            yield self._event("response.output_text.delta", **self._here(), delta=event.text, logprobs=logprobs)
        for call in event.calls:
            yield from self._call(call)

    def end(self) -> Iterator[bytes]:
        """What a stream ends with."""
        response = self.response()
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: ExpertdError) -> Iterator[bytes]:
        """The status is sent already: an event says that this is not an answer's end."""
        yield self._event("response.failed", response=self.response("failed", error))
        told = error_body(error)["error"]
        yield self._event("error", code=told["code"], message=told["message"], param=told["param"])

    def _in(self, kind: Literal["reasoning", "message"]) -> Iterator[bytes]:
        """Have an item of ``kind`` be open."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        if kind == "reasoning":
            item: dict[str, Any] = {"id": _id("rs"), "type": "reasoning", "summary": [], "status": "in_progress"}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.output.append(item | {"content": []})
        place = len(self.output) - 1
        yield self._event("response.output_item.added", output_index=place, item=self.output[-1])
        self.output[-1] = item | {"content": [part]}
        yield self._event("response.content_part.added", **self._here(), part=part)

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        kind, self._open = self._open, None
        if kind is None:
            return
        item = self.output[-1]
        if kind == "call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            status = "completed" if _is_json(item["arguments"]) else "incomplete"
            yield self._event("response.function_call_arguments.done", **self._item(), **told)
        else:
            part = item["content"][0]
            text = part["text"]
            if kind == "reasoning":
                yield self._event("response.reasoning_text.done", **self._here(), text=text)
            else:
                logprobs = part["logprobs"]
                yield self._event("response.output_text.done", **self._here(), text=text, logprobs=logprobs)
            yield self._event("response.content_part.done", **self._here(), part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        """A piece of a call; the first opens its item."""
        if call.id:
            yield from self._close()
            self._open = "call"
            item = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
            self.output.append(item | {"arguments": "", "status": "in_progress"})
            yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=self.output[-1])
        if call.arguments:
            self.output[-1]["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", **self._item(), delta=call.arguments)

    def _item(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _here(self) -> dict[str, Any]:
        return self._item() | {"content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._sequence += 1
        return sse({"type": kind, "sequence_number": self._sequence - 1, **fields}, kind)

    def _usage(self, end: Finished) -> dict[str, Any]:
        return {
            "input_tokens": end.prompt_tokens,
            "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": end.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._thoughts},
            "total_tokens": end.prompt_tokens + end.completion_tokens,
        }


def _event_of(part: Part) -> Delta:
    """A whole part as it might have come at once."""
    match part.kind:
        case "reasoning":
            return Delta(request=0, text="", tokens=0, reasoning=part.text)
        case "text":
            return Delta(request=0, text=part.text, tokens=0, logprobs=part.logprobs)
    return Delta(request=0, text="", tokens=0, calls=[ToolCall(id=part.id, name=part.name, arguments=part.text)])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _logprob(told: TokenLogprob) -> dict[str, Any]:
    def one(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token)}

    return one(told.token, told.logprob) | {"top_logprobs": [one(top.token, top.logprob) for top in told.top]}
