"""The daemon's ends of all lifelines: who is alive, and the way that descriptors take to them.

What is said on a lifeline is ``expertd.protocol.lifeline``; what a death means is the core's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Collection, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

from expertd.protocol import PROTOCOL
from expertd.protocol.errors import MessageInvalid
from expertd.protocol.lifeline import GREETING, greet, peer_user, receive_handed, send_segment
from expertd.protocol.quick import STATUS_TOKEN

log = logging.getLogger("expertd.daemon")

GREETING_S = 10.0
"""A connection that has not said its token by then is closed."""
HANDED_S = 2.0
"""How long segments that are announced as handed back are waited for."""
ATTACH_S = 30.0
"""A connection that has handed segments back, and has said no Attach by then, is closed."""
HANDED_LIMIT = 1024
"""Segments that one session may hand back."""


@dataclass
class _Line:
    socket: socket.socket
    session: int | None = None
    attaching: bool = False  # an Attach came
    settled: bool = False  # and was answered: no more segments are taken
    handed: dict[int, tuple[int, int]] = field(default_factory=dict)  # by segment: size and descriptor
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def drop(self) -> None:
        for _, descriptor in self.handed.values():
            os.close(descriptor)
        self.handed.clear()


class Lifelines:
    """Owned by the daemon's loop."""

    def __init__(self, path: Path, ended: Callable[[int], None], state: Callable[[], bytes]) -> None:
        """Nothing is bound before ``listen``.

        Args:
            ended: called with a session once, when its lifeline ends.
            state: what is told to those who ask for the daemon's state (``expertd.protocol.quick``).
        """
        self._path = path
        self._ended = ended
        self._state = state
        self._lines: dict[bytes, _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Bind the socket and start accepting."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._path.chmod(0o600)
        self._listener.listen(128)
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    def attach(self, token: bytes) -> bool:
        """An Attach came from the owner of ``token``; whether its lifeline is open."""
        line = self._lines.get(token)
        if line is not None:
            line.attaching = True
        return line is not None

    def attached(self, token: bytes) -> None:
        """That Attach has been answered, well or not: what was handed back and nobody took goes."""
        line = self._lines.get(token)
        if line is not None:
            line.settled = True
            line.drop()

    async def end_of(self, token: bytes) -> None:
        """Wait for the end of a lifeline."""
        line = self._lines.get(token)
        if line is not None:
            await line.ended.wait()

    def bind(self, token: bytes, session: int) -> bool:
        """From now on this lifeline is that session's; False if it has ended, or is another's."""
        line = self._lines.get(token)
        if line is None or line.session is not None:
            return False
        line.session = session
        return True

    async def handed(self, token: bytes, segments: Collection[int]) -> dict[int, tuple[int, int]]:
        """The sizes and descriptors of ``segments`` that were handed back on this lifeline; the caller owns them.

        They were sent before whatever says so, and what has not come after a moment never will.
        """
        line = self._lines.get(token)
        if line is None:
            return {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HANDED_S):
                while not line.handed.keys() >= set(segments):
                    line.arrived.clear()
                    await line.arrived.wait()
        taken, line.handed = line.handed, {}
        return taken

    def _keep(self, token: bytes, segment: int, size: int, descriptor: int) -> None:
        line = self._lines.get(token)
        if line is None or line.settled or len(line.handed) >= HANDED_LIMIT or segment in line.handed:
            os.close(descriptor)
            return
        if not line.handed and not line.attaching:
            asyncio.get_running_loop().call_later(ATTACH_S, self._lose_patience, line)
        line.handed[segment] = size, descriptor
        line.arrived.set()

    def _lose_patience(self, line: _Line) -> None:
        if line.handed and not line.attaching:
            log.warning("hung up on a lifeline that handed %d segments back and said no more", len(line.handed))
            line.drop()
            with contextlib.suppress(OSError):
                line.socket.shutdown(socket.SHUT_RDWR)

    def send_segment(self, token: bytes, segment: int, size: int, descriptor: int) -> None:
        """Hand over a segment.  Raises OSError if the other end is gone or does not read."""
        line = self._lines.get(token)
        if line is None:
            raise BrokenPipeError("its lifeline has ended")
        send_segment(line.socket, segment, size, descriptor)

    def close_line(self, token: bytes) -> None:
        """Hang up on one session; ``ended`` is not called for it any more."""
        line = self._lines.pop(token, None)
        if line is not None:
            line.session = None
            line.drop()
            with contextlib.suppress(OSError):  # the other end may have hung up in this moment (macOS: ENOTCONN)
                line.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up on everybody."""
        for task in self._tasks:
            task.cancel()
        if self._listener is not None:
            self._listener.close()
        for line in self._lines.values():
            line.socket.close()
            line.drop()
        self._lines.clear()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the other end has gone already
                log.warning("a lifeline could not be accepted (%s)", error)
                await asyncio.sleep(0.1)
                continue
            accepted.setblocking(False)
            self._spawn(self._follow(accepted))

    async def _follow(self, accepted: socket.socket) -> None:
        """Greet one connection and wait for its end."""
        loop = asyncio.get_running_loop()
        token = b""
        try:
            if peer_user(accepted) != os.geteuid():
                log.warning("hung up on a lifeline of user %d", peer_user(accepted))
                return
            greeting = b""
            async with asyncio.timeout(GREETING_S):
                while len(greeting) < GREETING.size:
                    got = await loop.sock_recv(accepted, GREETING.size - len(greeting))
                    if not got:
                        return
                    greeting += got
            protocol, token = GREETING.unpack(greeting)
            if token == STATUS_TOKEN and protocol == PROTOCOL:
                token = b""
                async with asyncio.timeout(GREETING_S):
                    await loop.sock_sendall(accepted, self._state())
                return
            if protocol != PROTOCOL or token in self._lines:
                log.warning("hung up on a lifeline of protocol %d (this is %d)", protocol, PROTOCOL)
                token = b""
                return
            self._lines[token] = _Line(accepted)
            greet(accepted)
            while (packet := await _next_handed(loop, accepted)) is not None:
                self._keep(token, *packet)
                await asyncio.sleep(0)  # what is there already is received without a turn for anybody else
        except MessageInvalid as error:
            log.warning("hung up on a lifeline: %s", error)
        except (OSError, TimeoutError) as error:
            log.debug("a lifeline broke: %s", error)
        finally:
            line = self._lines.pop(token, None)
            accepted.close()
            if line is not None:
                line.drop()
                line.ended.set()
            if line is not None and line.session is not None:
                self._ended(line.session)


async def _next_handed(loop: asyncio.AbstractEventLoop, line: socket.socket) -> tuple[int, int, int] | None:
    """What comes next on ``line``; None at its end.  asyncio itself receives no descriptors."""
    number = line.fileno()
    while True:
        try:
            return receive_handed(line)
        except BlockingIOError:
            ready = loop.create_future()
            loop.add_reader(number, _wake, ready)
            try:
                await ready
            finally:
                loop.remove_reader(number)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
