"""``expertd`` in a pseudo-terminal of so many columns, as a user has it: keys in, what it shows out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time

CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-Za-z]|\x1b[=>]|\r")
WAIT_S = 60.0
"""How long anything is waited for."""
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """``expertd`` with ``arguments``; a context manager, after which it has ended, killed if it must be."""

    def __init__(self, *arguments: str, columns: int = 80, rows: int = 40) -> None:
        self._command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
        self._size = struct.pack("HHHH", rows, columns, 0, 0)
        self.raw = ""
        self.status: int | None = None

    def __enter__(self) -> Terminal:
        # Not forkpty: a process with threads (MLX's, ZeroMQ's) had better not run Python in its child.
        self._end, other = pty.openpty()
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, self._size)
        self.modes = termios.tcgetattr(other)
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", _LEAD, os.ttyname(other), *self._command],
            environment,
        )
        self._other = other  # open until the end, or what is read would end with the child
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is None:
            try:
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
        os.close(self._other)
        os.close(self._end)

    @property
    def text(self) -> str:
        """What was shown so far, without what steers the terminal."""
        return CONTROL.sub("", self.raw)

    def send(self, keys: str) -> None:
        """Press ``keys``; a newline is Enter."""
        os.write(self._end, keys.replace("\n", "\r").encode())

    def expect(self, text: str, since: int = 0) -> str:
        """Wait until ``text`` is shown; returns what was shown before it, from the place ``since`` in ``text``."""
        deadline = time.monotonic() + WAIT_S
        while text not in self.text[since:]:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.text[since:]!r}"
            self._read()
        return self.text[since:].split(text)[0]

    def ended(self) -> int:
        """Wait for its end; its exit status."""
        deadline = time.monotonic() + WAIT_S
        while self.status is None:
            assert time.monotonic() < deadline, f"it does not end: {self.text!r}"
            self._read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        self._read()
        return self.status

    def modes_now(self) -> list[object]:
        """The terminal's modes, as termios gives them."""
        return termios.tcgetattr(self._other)

    def _read(self) -> None:
        while select.select([self._end], [], [], 0.05)[0]:
            self.raw += os.read(self._end, 65536).decode(errors="replace")


_LEAD = """
import os, sys
os.setsid()
place = os.open(sys.argv[1], os.O_RDWR)  # it becomes the terminal of the new session
for number in (0, 1, 2):
    os.dup2(place, number)
os.close(place)
os.execv(sys.argv[2], sys.argv[2:])
"""
