"""The daemon's state, as the gateway sees it: asked for off the loop, and what it was in the last minutes.

For the status page and ``/metrics``; nothing that answers requests depends on it.  A daemon that is away or does not
answer is a sentence here, never an error.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import zmq

from expertd.clients.terminal.programs import programs
from expertd.clients.terminal.rates import Rates, Window
from expertd.protocol.connection import Connection
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.paths import Home

__all__ = ["DaemonWatch", "Found", "History", "Point"]

ANSWER_S = 2.0
"""A daemon that answers later than that is away."""
FRESH_S = 0.5
"""An answer may be so old: whoever asks meanwhile gets the same."""
WINDOW_S = 5.0
"""Live figures are of so many seconds."""
KEPT_S = 300.0
SPACING_S = 0.9
LOOK_S = 5.0
"""How often to look while there is something to see, if nobody asks."""
LOOKED_S = 60.0
"""Somebody who has asked within this time is still there."""


@dataclass(frozen=True)
class Point:
    """What happened in the seconds before ``at``, by the watch's clock; ``hit_rate`` is from 0 to 1, or None."""

    at: float
    hit_rate: float | None
    read_bytes_per_s: float
    tokens_per_s: float


@dataclass(frozen=True)
class Found:
    """The daemon's answer; without one, ``trouble`` says why.  ``names`` are those of programs, by process id."""

    status: Status | None
    rates: Rates | None
    names: dict[int, str]
    trouble: str


class History:
    """The last minutes, a point every second at most.  Pure."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque()
        self._window = Window(WINDOW_S)

    def add(self, found: Status, at: float) -> Rates | None:
        """Take one more answer; what has happened in the last seconds, None after the first answer of a daemon."""
        rates = self._window.add(found)
        if rates is not None and (not self._points or at - self._points[-1].at >= SPACING_S):
            tokens = rates.tokens_per_s + rates.prompt_tokens_per_s
            self._points.append(Point(at, rates.hit_rate, rates.read_bytes_per_s, tokens))
        self._forget(at)
        return rates

    def points(self, at: float) -> list[Point]:
        """What is kept, the oldest first."""
        self._forget(at)
        return list(self._points)

    def _forget(self, at: float) -> None:
        while self._points and at - self._points[0].at > KEPT_S:
            self._points.popleft()


class DaemonWatch:
    """Owned by the gateway's loop; the daemon is asked in one thread, by one question at a time."""

    def __init__(self, home: Home, clock: Callable[[], float] = time.monotonic) -> None:
        self._home = home
        self.clock = clock
        self.history = History()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="daemon-watch")
        self._connection: Connection | None = None
        self._names: dict[int, str] = {}
        self._asking: asyncio.Task[Found] | None = None
        self._last = Found(None, None, {}, "the daemon was not asked yet")
        self._last_at = self._looked_at = -float("inf")

    async def look(self) -> Found:
        """The daemon's state now, or within half a second; waits two seconds at most."""
        self._looked_at = self.clock()
        return await self._look()

    async def keep_looking(self, is_busy: Callable[[], bool]) -> None:
        """Have the history go on while requests run or somebody looks; for ever."""
        while True:
            if is_busy() or self.clock() - self._looked_at < LOOKED_S:
                await self._look()
            await asyncio.sleep(LOOK_S)

    async def close(self) -> None:
        """Hang up."""
        if self._asking is not None:
            await asyncio.wait([self._asking])
        await asyncio.get_running_loop().run_in_executor(self._thread, self._hang_up)
        self._thread.shutdown(wait=False)

    async def _look(self) -> Found:
        if self.clock() - self._last_at < FRESH_S:
            return self._last
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)  # others may wait for it, too

    async def _ask(self) -> Found:
        try:
            status, names = await asyncio.get_running_loop().run_in_executor(self._thread, self._in_thread)
        except ExpertdError as error:
            self._last = Found(None, None, {}, error.message)
        except (OSError, zmq.ZMQError) as error:  # no descriptor is free, for example
            self._last = Found(None, None, {}, f"the daemon cannot be asked now ({error})")
        else:
            self._last = Found(status, self.history.add(status, self.clock()), names, "")
        self._last_at = self.clock()
        return self._last

    def _in_thread(self) -> tuple[Status, dict[int, str]]:
        try:
            if self._connection is None:
                self._home.check()
                self._connection = Connection(self._home.daemon_socket, "gateway", handshake_s=ANSWER_S)
            found = self._connection.ask(AskStatus(), Status, timeout_s=ANSWER_S)
        except BaseException:
            self._hang_up()
            raise
        pids = {session.pid for model in found.models for session in model.sessions}
        self._names = {pid: name for pid, name in self._names.items() if pid in pids}
        self._names |= programs(pids - set(self._names))
        return found, dict(self._names)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
