"""Wakes a thread that waits on sockets."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import zmq

LOOK_S = 0.1
"""So often it is looked whether there is another file."""


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

    def wait(self, timeout_s: float, door: Path | None = None) -> None:
        """Sleep until somebody rings, or another file is at ``door`` than before; at most so long."""
        poller = zmq.Poller()
        poller.register(self._bell.fileno(), zmq.POLLIN)
        before = _file_at(door)
        while timeout_s > 0 and _file_at(door) == before:
            turn_s = timeout_s if door is None else min(timeout_s, LOOK_S)
            timeout_s -= turn_s
            if poller.poll(round(turn_s * 1000)):
                self.answer()
                return

    def close(self) -> None:
        """Give the sockets up."""
        self._ringer.close()
        self._bell.close()


def _file_at(path: Path | None) -> tuple[int, int] | None:
    """What tells a file from one that was there before it; None if there is none."""
    if path is None:
        return None
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
