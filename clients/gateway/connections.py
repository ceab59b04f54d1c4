"""Taking HTTP connections, as many as there are descriptors for and no more.

A process without a free descriptor does worse than to refuse clients: it cannot start a worker, and ZeroMQ ends it when
a worker tries to connect (an assertion in libzmq's ``ipc_listener.cpp``).  So clients are taken one by one, and leave
some descriptors free.  Where no more may be taken, the one that has been idle for longest makes room for the next.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Container

from aiohttp import web

__all__ = ["connection_limit", "take_connections"]

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
    listener: socket.socket, server: web.Server, busy: Container[object], limit: int
) -> None:
    """Hand all who connect to ``server``, for ever, at most ``limit`` at a time.

    Those that are not ``busy`` and have got all that was written to them, and only they, are hung up on for the sake of
    others.  While there are none the system keeps who comes next waiting.
    """
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    while True:
        while len(server.connections) >= limit:
            idle = next((one for one in server.connections if one not in busy and _has_got_all(one.transport)), None)
            if idle is not None:
                idle.force_close()
            await asyncio.sleep(0 if idle is not None else LOOK_ROUND_S)
        try:
            connection, _ = await loop.sock_accept(listener)
            await loop.connect_accepted_socket(server, connection)
        except ConnectionError as error:
            log.info("a client left before it was taken (%s)", error)
        except OSError as error:
            log.warning("a client could not be taken (%s)", error)
            await asyncio.sleep(RETRY_S)


def _has_got_all(transport: asyncio.Transport | None) -> bool:
    return transport is not None and not transport.is_closing() and transport.get_write_buffer_size() == 0
