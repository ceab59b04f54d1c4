"""The HTTP side: routes, OpenAI-shaped errors, streaming.

Turns requests into calls of ``expertd.clients.gateway.workers`` with ``expertd.clients.gateway.chat`` in between.  It
starts and stops nothing: see ``expertd.clients.gateway.lifetime``.  No CORS headers are sent, and a ``Host`` that is
not this machine's is refused, so that a web page cannot reach the API through a name of its own (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from expertd.clients.gateway import awake, chat
from expertd.clients.gateway.workers import Answer, Worker
from expertd.protocol.errors import (
    ExpertdError,
    MemoryPressure,
    MethodNotAllowed,
    ModelNotFound,
    QueueFull,
    RequestInvalid,
    RequestTooLarge,
    RouteNotFound,
    WorkerUnavailable,
)
from expertd.protocol.logs import Log
from expertd.protocol.messages import Delta, Finished
from expertd.protocol.model_names import shown_name

__all__ = ["BODY_LIMIT", "STALL_S", "Gateway", "error_body"]

log = Log(__name__)

BODY_LIMIT = 64 << 20
"""Longest HTTP body, in bytes; aiohttp's own limit of 1 MiB is less than an agent's prompt."""
KEEPALIVE_S = 10.0
"""A stream is never silent for longer, however long a prompt takes."""
STALL_S = 30.0
"""How long a client may leave a full buffer unread before its request is cancelled."""
RETRY_QUEUE_S, RETRY_S, RETRY_MEMORY_S = 1, 5, 10

FACTS: ContextVar[dict[str, Any]] = ContextVar("facts")
"""What the log will say of the request that is being answered; nothing, if it asks for no text."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """The application for one model."""

    def __init__(
        self, worker: Worker, model: Path, host: str, *, keepalive_s: float = KEEPALIVE_S, stall_s: float = STALL_S
    ) -> None:
        """Serve ``model`` by its hub id, or else its folder's name.

        ``host`` is what the gateway listens on, and so a ``Host`` that it takes.
        """
        self.name = shown_name(model.resolve())
        self.app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._guard])
        self.app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id:.+}", self._model),
                web.get("/health/live", self._live),
                web.get("/health/ready", self._ready),
            ]
        )
        self._worker = worker
        self._names = {self.name, self.name.rpartition("/")[2], str(model), str(model.resolve())}
        self._hosts = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._any_address = _is_wildcard(host)
        self._keepalive_s = keepalive_s
        self._stall_s = stall_s
        self._created = int(time.time())
        self.busy: set[object] = set()
        """Connections with a request under way, as their aiohttp protocols."""

    # -- routes --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        facts = FACTS.get()
        facts["model"] = self.name
        wanted = chat.parse(_decode(await request.read()))
        self._check_model(wanted.model)
        id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        with self._worker.open(wanted) as answer:
            if wanted.stream:
                return await self._stream(request, answer, id, created, wanted.include_usage)
            texts: list[str] = []
            while True:
                event = await answer.receive(self._keepalive_s)
                if isinstance(event, Finished):
                    facts |= _counts(event)
                    return _json(chat.completion(id, created, self.name, "".join(texts), event))
                if event is not None:
                    texts.append(event.text)

    async def _stream(
        self, request: web.Request, answer: Answer, id: str, created: int, include_usage: bool
    ) -> web.StreamResponse:
        # Until the worker has taken the request, or the client has waited long, an error can still be a status.
        event = await answer.receive(self._keepalive_s)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        try:
            await response.prepare(request)
            async for data in self._events(answer, event, id, created, include_usage):
                async with awake.timeout(self._stall_s):
                    await response.write(data)
        except ConnectionError:
            FACTS.get()["ended"] = "the client left"
        except TimeoutError:
            FACTS.get()["ended"] = f"the client read nothing for {self._stall_s:.0f} s"
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _events(
        self, answer: Answer, event: Delta | Finished | None, id: str, created: int, include_usage: bool
    ) -> AsyncIterator[bytes]:
        """What a stream consists of; ``event`` is the first, received already."""
        yield _event(chat.chunk(id, created, self.name, {"role": "assistant", "content": ""}))
        try:
            while not isinstance(event, Finished):
                if event is None:
                    yield b": keepalive\n\n"
                elif event.text:
                    yield _event(chat.chunk(id, created, self.name, {"content": event.text}))
                event = await self._receive_in_time(answer)
        except ExpertdError as error:
            # The status is sent already: an event says that this is not an answer's end, and no [DONE] follows.
            FACTS.get()["error"] = error.code
            yield _event(error_body(error))
            return
        FACTS.get().update(_counts(event))
        yield _event(chat.chunk(id, created, self.name, {}, event.reason))
        if include_usage:
            yield _event(chat.usage_chunk(id, created, self.name, event))
        yield b"data: [DONE]\n\n"

    async def _receive_in_time(self, answer: Answer) -> Delta | Finished | None:
        """The next event with something to write, or None when it is time for a keepalive."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._keepalive_s
        while True:
            event = await answer.receive(max(0.0, deadline - loop.time()))
            if event is None or isinstance(event, Finished) or event.text:
                return event
            if loop.time() >= deadline:
                return None

    async def _models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["id"])
        return _json(self._model_object())

    async def _live(self, request: web.Request) -> web.Response:
        return _json({"status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        told = self._worker.pressure
        pressure = {"pressure": told.level, "figure": told.figure}
        try:
            self._worker.check()
        except ExpertdError as error:
            return _error_response(error, self._retry_after_s(error), {"status": "not ready"} | pressure)
        return _json({"status": "ready"} | pressure)

    # -- what all routes share -----------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note who is busy, and write a line of each request that asks for text, however it ends."""
        self.busy.add(request.protocol)
        began = time.monotonic()
        status: int | None = None
        facts: dict[str, Any] = {}
        FACTS.set(facts)
        try:
            response = await self._answer(request, handler)
            status = response.status
            return response
        except (ConnectionError, asyncio.CancelledError):
            facts["ended"] = "the client left"
            raise
        finally:
            self.busy.discard(request.protocol)
            if "model" in facts:
                log.info("request finished", status=status, seconds=round(time.monotonic() - began, 2), **facts)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What the route answers, or its error."""
        try:
            self._check_host(request.headers.get("Host", ""))
            return await handler(request)
        except ExpertdError as error:
            FACTS.get()["error"] = error.code
            return _error_response(error, self._retry_after_s(error))
        except web.HTTPNotFound:
            return _error_response(RouteNotFound(f"there is nothing at {request.path}; the API begins with /v1"))
        except web.HTTPMethodNotAllowed as error:
            response = _error_response(MethodNotAllowed(f"{request.path} does not take {request.method}"))
            response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            return response
        except web.HTTPRequestEntityTooLarge:
            return _error_response(RequestTooLarge(f"the body is longer than the {BODY_LIMIT} bytes that are allowed"))
        except web.HTTPException as error:
            return _error_response(RequestInvalid(f"the request was not understood ({error.reason})"))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("a request failed", method=request.method, path=request.path)
            return _error_response(ExpertdError("the gateway failed; its log says where"))

    def _retry_after_s(self, error: ExpertdError) -> float:
        if isinstance(error, QueueFull):
            return RETRY_QUEUE_S
        if isinstance(error, MemoryPressure):
            return RETRY_MEMORY_S
        return self._worker.retry_after_s() if isinstance(error, WorkerUnavailable) else RETRY_S

    def _check_host(self, header: str) -> None:
        host = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
        if host.lower() in self._hosts or (self._any_address and _is_address(host)):
            return
        raise RequestInvalid(f"the Host '{header}' is not this gateway's; use the address that it printed at its start")

    def _check_model(self, name: str) -> None:
        if name not in self._names:
            raise ModelNotFound(f"the model '{name}' is not served here; '{self.name}' is", param="model")

    def _model_object(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "expertd"}


def _counts(finished: Finished) -> dict[str, object]:
    """What the log says of an answer: never a word of it."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "tokens": finished.completion_tokens,
        "reason": finished.reason,
    }


def error_body(error: ExpertdError) -> dict[str, Any]:
    """``error`` as OpenAI writes errors."""
    kind = "invalid_request_error"
    if error.http_status >= 500:
        kind = "server_error"
    elif error.http_status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def _error_response(
    error: ExpertdError, retry_after_s: float = RETRY_S, beside: Mapping[str, str] = MappingProxyType({})
) -> web.Response:
    """``error`` as a response, with ``beside`` next to it in the body."""
    response = _json({**beside, **error_body(error)}, status=error.http_status)
    if error.retryable:
        response.headers["Retry-After"] = str(math.ceil(retry_after_s))
    else:
        # OpenAI's libraries retry by status; this one says that it cannot help.
        response.headers["x-should-retry"] = "false"
    return response


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestInvalid(f"the body is not valid JSON ({error})") from error


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_wildcard(host: str) -> bool:
    """Whether ``host`` means all of the machine's addresses.  A numeric Host cannot be rebound, a name can."""
    return _is_address(host) and ipaddress.ip_address(host).is_unspecified
