"""The HTTP side: routes and OpenAI-shaped errors.

Turns requests into calls of ``expertd.clients.gateway.served``; what each API reads and writes is in a module of its
own (``chat``, ``completions``, ``responses``, ``anthropic``), and ``expertd.clients.gateway.streaming`` writes streams.
It starts and stops nothing: see ``expertd.clients.gateway.lifetime``.  Who may use it is
``expertd.clients.gateway.access``; what whoever runs it can see is ``expertd.clients.gateway.operations``.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec
from aiohttp import web

from expertd.clients.gateway import anthropic, chat, completions, plain, responses
from expertd.clients.gateway.access import Access, challenges
from expertd.clients.gateway.answers import Renderer, Told, error_body
from expertd.clients.gateway.connections import Busy
from expertd.clients.gateway.discreet import failure
from expertd.clients.gateway.observe import Observer, Seen
from expertd.clients.gateway.operations import Operations
from expertd.clients.gateway.served import Models, Served
from expertd.clients.gateway.stored import Stored
from expertd.clients.gateway.streaming import Stream
from expertd.clients.gateway.wanted import Wanted
from expertd.clients.gateway.watch import DaemonWatch
from expertd.protocol import VERSION
from expertd.protocol.errors import (
    ExpertdError,
    KeyInvalid,
    MemoryPressure,
    MethodNotAllowed,
    ParameterUnsupported,
    QueueFull,
    RequestInvalid,
    RequestTooLarge,
    RouteNotFound,
    WorkerUnavailable,
)
from expertd.protocol.logs import Log
from expertd.protocol.messages import Finished, Pressure

__all__ = ["BODY_LIMIT", "STALL_S", "Gateway", "error_body"]

log = Log(__name__)

BODY_LIMIT = 64 << 20
"""Longest HTTP body, in bytes; aiohttp's own limit of 1 MiB is less than an agent's prompt."""
KEEPALIVE_S = 10.0
"""A stream is never silent for longer, however long a prompt takes."""
STALL_S = 30.0
"""How long a client may leave a full buffer unread before its request is cancelled."""
LEVELS = ("normal", "warning", "critical")
RETRY_QUEUE_S, RETRY_S, RETRY_MEMORY_S = 1, 5, 10

FACTS: ContextVar[dict[str, Any]] = ContextVar("facts")
"""What the log will say of the request that is being answered; nothing, if it asks for no text."""
SEEN: ContextVar[Seen | None] = ContextVar("seen")
"""The same request for the metrics and the status page; None, if it asks for no text."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Gateway:
    """The application over ``models``."""

    def __init__(
        self,
        models: Models,
        access: Access,
        watch: DaemonWatch,
        *,
        keepalive_s: float = KEEPALIVE_S,
        stall_s: float = STALL_S,
    ) -> None:
        """Let in whom ``access`` does; ``watch`` tells of the daemon, for whoever looks."""
        self.app = web.Application(client_max_size=BODY_LIMIT, middlewares=[self._guard])
        self.app.add_routes(
            [
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._complete),
                web.post("/v1/responses", self._respond),
                web.post("/v1/responses/compact", self._not_offered),
                web.post("/v1/responses/input_tokens", self._not_offered),
                web.get("/v1/responses/{id}", self._response),
                web.delete("/v1/responses/{id}", self._forget),
                web.post("/v1/responses/{id}/cancel", self._cancel),
                web.get("/v1/responses/{id}/input_items", self._input_items),
                web.post("/generate", self._generate),
                web.post("/v1/messages", self._message),
                web.post("/v1/messages/count_tokens", self._count),
                web.get("/v1/models", self._list),
                web.get("/v1/models/{id:.+}", self._model),
                web.get("/health", self._health),
                web.get("/health/live", self._live),
                web.get("/health/ready", self._ready),
            ]
        )
        self.observer = Observer()
        self.app.add_routes(Operations(models, self.observer, watch).routes())
        self.app.on_response_prepare.append(access.add_headers)
        self._access = access
        self._models = models
        self._keepalive_s = keepalive_s
        self._stall_s = stall_s
        self._created = int(time.time())
        self._stored = Stored()
        self.busy = Busy()

    # -- routes --------------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        wanted = chat.parse(await self._body(request))
        served = self._served(wanted.model)
        return await self._compute(request, served, [wanted], chat.Rendering(wanted, served.name, int(time.time())))

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        wanted = completions.parse(await self._body(request))
        served = self._served(wanted[0].model)
        rendering = completions.Rendering(wanted, served.name, int(time.time()))
        return await self._compute(request, served, wanted, rendering)

    async def _respond(self, request: web.Request) -> web.StreamResponse:
        wanted = responses.parse(await self._body(request), self._stored.item)
        served = self._served(wanted.wanted.model)
        earlier = self._stored.items(wanted.previous)
        rendering = responses.Rendering(wanted, served.name, int(time.time()))
        answer = await self._compute(request, served, [wanted.with_messages(earlier)], rendering)
        if wanted.store and rendering.ended and "error" not in FACTS.get():
            try:
                self._stored.keep(rendering.response(), wanted.given, earlier)
            except Exception as error:
                if not answer.prepared:
                    raise
                FACTS.get()["error"] = failure(request, error).code  # The client has all of its answer already.
        return answer

    async def _response(self, request: web.Request) -> web.Response:
        response = self._stored.response(request.match_info["id"])
        if request.query.get("stream") == "true":
            raise ParameterUnsupported("a response that has ended cannot be streamed again", param="stream")
        return _json(response)

    async def _forget(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        self._stored.forget(id)
        return _json({"id": id, "object": "response", "deleted": True})

    async def _cancel(self, request: web.Request) -> web.Response:
        self._stored.response(request.match_info["id"])
        raise RequestInvalid("only a response in the background can be cancelled; to end a stream, hang up")

    async def _input_items(self, request: web.Request) -> web.Response:
        return _json(_page(self._stored.given(request.match_info["id"]), request.query))

    async def _not_offered(self, request: web.Request) -> web.Response:
        """What would else be taken for the id of a response."""
        raise _no_route(request.path)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        wanted = plain.parse(await self._body(request))
        served = self._served(wanted.model)
        return await self._compute(request, served, [wanted], plain.Rendering(served.name))

    async def _message(self, request: web.Request) -> web.StreamResponse:
        wanted = anthropic.parse(await self._body(request))
        served = self._served(wanted.model)
        return await self._compute(request, served, [wanted], anthropic.Rendering(served.name))

    async def _count(self, request: web.Request) -> web.Response:
        wanted = replace(anthropic.parse_count(await self._body(request)), count=True, stream=False)
        with self._served(wanted.model).open(_client(request), wanted) as answers:
            while (received := await answers.receive(self._keepalive_s)) is None or not isinstance(
                received[1], Finished
            ):
                continue
        return _json({"input_tokens": received[1].prompt_tokens})

    async def _body(self, request: web.Request) -> Any:
        """The decoded body of a request for text, which the log has a line of."""
        FACTS.get()["model"] = None
        SEEN.set(self.observer.begin(request.path, FACTS.get().get("key")))
        return _decode(await request.read())

    def _served(self, name: str) -> Served:
        """The model that is asked for, which the log tells."""
        served = self._models.find(name)
        FACTS.get()["model"] = served.name
        if (seen := SEEN.get()) is not None:
            seen.of(served.name)
        return served

    async def _compute(
        self, request: web.Request, served: Served, wanted: Sequence[Wanted], rendering: Renderer
    ) -> web.StreamResponse:
        """Have ``wanted`` computed by ``served``, and write it as ``rendering`` says."""
        with served.open(_client(request), *wanted) as answers:
            told = [Told() for _ in range(answers.count)]
            if (seen := SEEN.get()) is not None:
                answers.watch(seen.event)
            if wanted[0].stream:
                stream = Stream(
                    request, answers, rendering, told, FACTS.get(), keepalive_s=self._keepalive_s, stall_s=self._stall_s
                )
                response: web.StreamResponse = await stream.run()
            else:
                while not answers.ended:
                    if (received := await answers.receive(self._keepalive_s)) is not None:
                        told[received[0]].add(received[1])
                response = _json(rendering.whole(told))
            if answers.ended:
                FACTS.get().update(_counts(told))
            return response

    async def _list(self, request: web.Request) -> web.Response:
        names = [name for served in self._models.all for name in served.names]
        return _json({"object": "list", "data": [self._model_object(name) for name in names]})

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        served = self._models.find(name)
        return _json(self._model_object(name if name in served.names else served.name))

    async def _health(self, request: web.Request) -> web.Response:
        """All that is known of how it goes; says nothing by its status."""
        models = {
            one.name: {"state": one.state, "running": one.running, "waiting": one.waiting} for one in self._models.all
        }
        told = self._pressure()
        status = {"status": "ok", "version": VERSION, "pressure": told.level, "figure": told.figure, "models": models}
        try:
            self._check_ready()
        except ExpertdError as error:
            status |= {"status": "not ready", "error": error_body(error)["error"]}
        return _json(status)

    async def _live(self, request: web.Request) -> web.Response:
        return _json({"status": "live"})

    async def _ready(self, request: web.Request) -> web.Response:
        told = self._pressure()
        pressure = {"pressure": told.level, "figure": told.figure}
        try:
            self._check_ready()
        except ExpertdError as error:
            return _error_response(error, self._retry_after_s(error), {"status": "not ready"} | pressure)
        return _json({"status": "ready"} | pressure)

    def _check_ready(self) -> None:
        """Whether any model would take a request.

        Raises:
            ExpertdError: why the first one does not.
        """
        errors = []
        for served in self._models.all:
            try:
                return served.check_ready()
            except ExpertdError as error:
                errors.append(error)
        raise errors[0]

    def _pressure(self) -> Pressure:
        """How short of memory the machine is: as the worker tells who finds it worst."""
        return max((served.pressure for served in self._models.all), key=lambda told: LEVELS.index(told.level))

    # -- what all routes share -----------------------------------------------------------------------------------------

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note who is busy, and write a line of each request that asks for text, however it ends."""
        self.busy.add(request.protocol)
        began = time.monotonic()
        status: int | None = None
        facts: dict[str, Any] = {}
        FACTS.set(facts)
        SEEN.set(None)
        try:
            response = await self._answer(request, handler)
            status = response.status
            return response
        except (ConnectionError, asyncio.CancelledError):
            facts["ended"] = "the client left"
            raise
        finally:
            self.busy.discard(request.protocol)
            if (seen := SEEN.get()) is not None:
                seen.end(status, facts.get("error", ""), left="ended" in facts)
            if "model" in facts:
                log.info("request finished", status=status, seconds=round(time.monotonic() - began, 2), **facts)

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What the route answers, or its error."""
        try:
            if (answer := self._access.preflight(request)) is not None:
                return answer
            FACTS.get()["key"] = self._access.check(request)
            return await handler(request)
        except ExpertdError as error:
            return self._refuse(request, error)
        except web.HTTPNotFound:
            return self._refuse(request, _no_route(request.path))
        except web.HTTPMethodNotAllowed as error:
            response = self._refuse(request, MethodNotAllowed(f"{request.path} does not take {request.method}"))
            response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
            return response
        except web.HTTPRequestEntityTooLarge:
            return self._refuse(
                request, RequestTooLarge(f"the body is longer than the {BODY_LIMIT} bytes that are allowed")
            )
        except web.HTTPException as error:
            return self._refuse(request, RequestInvalid(f"the request was not understood ({error.reason})"))
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            return self._refuse(request, failure(request, error))

    def _refuse(self, request: web.Request, error: ExpertdError) -> web.Response:
        """``error`` as the API writes it that was called."""
        FACTS.get()["error"] = error.code
        body = anthropic.error_body if request.path.startswith("/v1/messages") else error_body
        response = _error_response(error, self._retry_after_s(error), body=body)
        if isinstance(error, KeyInvalid):
            response.headers.update(challenges(request.path))
        return response

    def _retry_after_s(self, error: ExpertdError) -> float:
        if isinstance(error, QueueFull):
            return RETRY_QUEUE_S
        if isinstance(error, MemoryPressure):
            return RETRY_MEMORY_S
        if isinstance(error, WorkerUnavailable):
            # Of the one that was asked for, or else of who is there soonest.
            asked = FACTS.get().get("model")
            return min(one.retry_after_s() for one in self._models.all if asked in (None, one.name))
        return RETRY_S

    def _model_object(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "expertd"}


NOT_OFFERED = ("embeddings", "images", "audio", "moderations", "files", "batches", "fine_tuning", "assistants",
               "threads", "vector_stores", "uploads", "realtime", "evals", "containers", "conversations")  # fmt: skip
"""What OpenAI's API has beside."""


def _no_route(path: str) -> ExpertdError:
    first = path.removeprefix("/v1/").split("/")[0]
    if path.startswith("/v1/chat/completions/"):
        return RouteNotFound(f"there is nothing at {path}; chat completions are not kept, responses are")
    if path.startswith("/v1/") and first in (*NOT_OFFERED, "responses"):
        return RouteNotFound(f"{path} is not offered here; chat, completions, responses, messages and models are")
    return RouteNotFound(f"there is nothing at {path}; the API begins with /v1")


def _page(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of a list, as OpenAI has such: the newest first unless ``order`` is asc."""
    found = list(items) if query.get("order") == "asc" else list(reversed(items))
    limit = query.get("limit", "20")
    if not limit.isdecimal() or len(limit) > 3 or not 1 <= int(limit) <= 100:
        raise RequestInvalid("'limit' has to be a whole number from 1 to 100", param="limit")
    ids = [item["id"] for item in found]
    if (after := query.get("after")) in ids:
        found = found[ids.index(after) + 1 :]
    page = found[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(found) > len(page),
    }


def _counts(told: Sequence[Told]) -> dict[str, object]:
    """What the log says of answers: never a word of them."""
    ends = [one.end for one in told]
    return {
        "prompt_tokens": ends[0].prompt_tokens,
        "cached_tokens": ends[0].cached_tokens or None,
        "tokens": sum(end.completion_tokens for end in ends),
        "reason": ends[0].reason,
    }


def _error_response(
    error: ExpertdError,
    retry_after_s: float = RETRY_S,
    beside: Mapping[str, str] = MappingProxyType({}),
    body: Callable[[ExpertdError], dict[str, Any]] = error_body,
) -> web.Response:
    """``error`` as a response, with ``beside`` next to it in the body."""
    response = _json({**beside, **body(error)}, status=error.http_status)
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


def _client(request: web.Request) -> str:
    """Whose request it is, to be fair between clients: a key's, or else a program's, which its name tells."""
    if (key := FACTS.get().get("key")) is not None:
        return f"key {key}"
    headers = request.headers
    said = headers.get("Authorization") or headers.get("x-api-key") or ""
    return f"{request.remote} {hash(said)} {headers.get('User-Agent', '')}"
