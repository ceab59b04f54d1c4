"""The daemon's ends of lifelines alone: what is handed back, and what is none of a lifeline's business.

With a whole daemon: ``test_daemon_process`` and ``test_warm_restart``.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from expertd.daemon import lifelines
from expertd.daemon.lifelines import Lifelines
from expertd.protocol import lifeline
from expertd.protocol.paths import Home

TOKEN = secrets.token_bytes(16)


@asynccontextmanager
async def opened(home: Home) -> AsyncIterator[tuple[Lifelines, socket.socket]]:
    """The daemon's ends, and the other end of one line."""
    home.prepare()
    ends = Lifelines(home.lifeline_socket, lambda _: None, bytes)
    ends.listen()
    try:
        with await asyncio.to_thread(lifeline.connect, home.lifeline_socket, TOKEN) as line:
            yield ends, line
    finally:
        ends.close()


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/dev/fd").iterdir()))


async def hung_up(line: socket.socket) -> None:
    """Wait until the daemon has hung up."""

    def wait() -> bytes:
        try:
            return line.recv(1)
        except ConnectionResetError:  # it had not read everything
            return b""

    assert await asyncio.to_thread(wait) == b""


@pytest.mark.parametrize("length", [1, 16, 65536])
def test_plain_bytes_are_hung_up_on(home: Home, length: int) -> None:
    async def run() -> None:
        async with opened(home) as (ends, line):
            line.sendall(bytes(length))
            await hung_up(line)
            assert not ends.attach(TOKEN)

    asyncio.run(run())


def test_two_descriptors_at_once_are_hung_up_on_and_closed(home: Home) -> None:
    async def run() -> None:
        async with opened(home) as (_, line):
            before = descriptors()
            with Path(os.devnull).open("rb") as file:
                socket.send_fds(line, [bytes(16)], [file.fileno()] * 2)
            await hung_up(line)
            assert descriptors() == before - 1  # the daemon's end of the line

    asyncio.run(run())


def test_what_was_handed_back_is_there_for_an_attach_and_then_no_more(home: Home) -> None:
    async def run() -> None:
        async with opened(home) as (ends, line):
            before = descriptors()
            with Path(os.devnull).open("rb") as file:
                for segment in (5, 6):
                    lifeline.hand_back(line, segment, 4096, file.fileno())
                assert ends.attach(TOKEN)
                came = await ends.handed(TOKEN, [5, 6])
                assert {segment: size for segment, (size, _) in came.items()} == {5: 4096, 6: 4096}
                for _, descriptor in came.values():
                    os.close(descriptor)
                ends.attached(TOKEN)
                lifeline.hand_back(line, 7, 4096, file.fileno())
                await asyncio.sleep(0.05)
            assert descriptors() == before

    asyncio.run(run())


def test_whoever_hands_back_and_never_attaches_is_hung_up_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifelines, "ATTACH_S", 0.1)

    async def run() -> None:
        async with opened(home) as (ends, line):
            before = descriptors()
            with Path(os.devnull).open("rb") as file:
                lifeline.hand_back(line, 5, 4096, file.fileno())
            await hung_up(line)
            async with asyncio.timeout(10):
                while ends.attach(TOKEN):
                    await asyncio.sleep(0.01)
            assert descriptors() == before - 1

    asyncio.run(run())
