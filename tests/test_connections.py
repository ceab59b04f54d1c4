"""Taking connections where no more may be taken than there are: who is hung up on, and who is not."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

from aiohttp import web

from expertd.clients.gateway.connections import SILENT_S, Busy, take_connections

LIMIT = 4
CLIENTS = 10


def test_idle_is_who_has_had_a_request_or_has_long_been_silent() -> None:
    now = 0.0
    busy = Busy(lambda: now)
    everybody: list[Any] = ["silent", "asked", "asks", "asked again", "gone"]
    for one in everybody:
        busy.greet(one)
    for one in ("asks", "asked again", "asked"):
        busy.add(one)
    now = 1.0
    for one in ("asked again", "asked"):
        busy.discard(one)
    assert busy.idle(everybody) == ["asked", "asked again"]
    now = 2.0
    busy.add("asked again")
    busy.greet("asked again")
    assert busy.idle(everybody) == ["asked"]
    busy.discard("asked again")
    now = SILENT_S
    assert busy.idle(everybody) == ["asked", "asked again", "silent", "gone"]
    busy.forget_all_but(everybody[:-1])
    assert busy.idle(everybody) == ["asked", "asked again", "silent"]
    assert len(busy) == 4


def test_more_clients_than_there_is_room_for_all_get_their_answer() -> None:
    busy = Busy()

    async def handle(request: web.Request) -> web.Response:
        busy.add(request.protocol)
        try:
            await asyncio.sleep(0.05)
            return web.Response(text="here")
        finally:
            busy.discard(request.protocol)

    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)  # it was taken, and has not asked yet
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = await reader.readuntil(b"here")
        assert not await reader.read(), "it makes room for the next"
        writer.close()
        return answer

    async def run() -> list[bytes]:
        app = web.Application()
        app.router.add_get("/", handle)
        runner = web.AppRunner(app, keepalive_timeout=0.5)  # for the last ones
        await runner.setup()
        assert runner.server is not None
        with socket.create_server(("127.0.0.1", 0)) as listener:
            taking = asyncio.create_task(take_connections(listener, runner.server, busy, LIMIT))
            try:
                return await asyncio.gather(*(ask(listener.getsockname()[1]) for _ in range(CLIENTS)))
            finally:
                taking.cancel()
                with suppress(asyncio.CancelledError):
                    await taking
                await runner.cleanup()

    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in asyncio.run(run()))
