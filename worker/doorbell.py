"""Wakes a thread that waits on sockets."""

from __future__ import annotations

import contextlib
import socket

import zmq


class Doorbell:
    """Anybody rings it, from any thread; one thread waits for it, alone or among other descriptors."""

    def __init__(self) -> None:
        self._ringer, self._bell = socket.socketpair()
        self._ringer.setblocking(False)
        self._bell.setblocking(False)

    def ring(self) -> None:
        """Wake whoever waits, or will."""
        with contextlib.suppress(BlockingIOError, OSError):  # it is awake, or has ended
            self._ringer.send(b"x")

    def fileno(self) -> int:
        """Readable when somebody has rung."""
        return self._bell.fileno()

    def answer(self) -> None:
        """Forget all rings until now."""
        with contextlib.suppress(BlockingIOError):
            while self._bell.recv(64):
                pass

    def wait(self, timeout_s: float) -> None:
        """Sleep until somebody rings, at most so long."""
        poller = zmq.Poller()
        poller.register(self._bell.fileno(), zmq.POLLIN)
        if poller.poll(round(timeout_s * 1000)):
            self.answer()

    def close(self) -> None:
        """Give the sockets up."""
        self._ringer.close()
        self._bell.close()
