"""Taking HTTP connections, as many as there are descriptors for and no more.

A process without a free descriptor does worse than to refuse clients: it cannot start a worker, and ZeroMQ ends it when
a worker tries to connect (an assertion in libzmq's ``ipc_listener.cpp``).  So clients are taken one by one, and leave
some descriptors free.  Where no more may be taken, the one that has been idle for longest makes room for the next:
since its last request ended, or, if it has had none, since it could have sent one.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import time
from collections.abc import Callable, Iterable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

__all__ = ["Busy", "connection_limit", "take_connections"]

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 512
LEAST_CONNECTIONS = 8
RESERVED_FILES = 64
"""Descriptors for everything but clients: the loop, ZeroMQ, a worker that is being started."""
WANTED_FILES = 8192
"""Descriptors to ask the system for.  macOS gives a process 256 unless it asks."""
LOOK_ROUND_S = 0.05
"""How often to look whether one of too many busy clients has left."""
RETRY_S = 1.0
"""How long to wait after the system could not give a connection."""
SILENT_S = 3.0
"""How long a new client may take until it asks for something, before it counts as idle."""


class Busy:
    """Which connections have a request under way, and since when the others have none.

    They are aiohttp's protocols.  Not thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: in seconds, of any beginning."""
        self._clock = clock
        self._busy: set[object] = set()
        self._idle_from: dict[object, float] = {}

    def greet(self, connection: object) -> None:
        """Note one that has just been made, and may have asked already."""
        if connection not in self._busy:
            self._idle_from.setdefault(connection, self._clock() + SILENT_S)

    def add(self, connection: object) -> None:
        """A request has begun on it."""
        self._busy.add(connection)
        self._idle_from.pop(connection, None)

    def discard(self, connection: object) -> None:
        """Its request has ended."""
        self._busy.discard(connection)
        self._idle_from[connection] = self._clock()

    def idle(self, connections: Iterable[RequestHandler]) -> list[RequestHandler]:
        """Those of ``connections`` that are idle, for longest first."""
        now, since = self._clock(), self._idle_from
        return sorted((one for one in connections if since.get(one, now + 1) <= now), key=since.__getitem__)

    def forget_all_but(self, connections: Iterable[object]) -> None:
        """Those that are idle and none of ``connections`` have gone."""
        self._idle_from = {one: self._idle_from[one] for one in connections if one in self._idle_from}

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle_from)


def connection_limit() -> int:
    """How many clients may be connected at a time, after asking the system for more descriptors if there are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError) as error:
            log.info("the limit of %d open files stays as it is (%s)", soft, error)
    if soft == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(LEAST_CONNECTIONS, min(MOST_CONNECTIONS, soft - RESERVED_FILES))


async def take_connections(
    listener: socket.socket, server: web.Server, busy: Busy, limit: int
) -> None:
    """Hand all who connect to ``server``, for ever, at most ``limit`` at a time.

    Those that are idle and have got all that was written to them, and only they, are hung up on for the sake of others.
    While there are none the system keeps who comes next waiting.
    """
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        while len(server.connections) >= limit:
            idle = next((one for one in busy.idle(server.connections) if _has_got_all(one.transport)), None)
            if idle is not None:
                idle.force_close()
            await asyncio.sleep(0 if idle is not None else LOOK_ROUND_S)
        try:
            connection, _ = await loop.sock_accept(listener)
            _, protocol = await loop.connect_accepted_socket(server, connection)
            busy.greet(protocol)
            if len(busy) > 2 * limit:
                busy.forget_all_but(server.connections)
        except ConnectionError as error:
            log.info("a client left before it was taken (%s)", error)
        except OSError as error:
            log.warning("a client could not be taken (%s)", error)
            await asyncio.sleep(RETRY_S)


def _has_got_all(transport: asyncio.Transport | None) -> bool:
    return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() == 0
