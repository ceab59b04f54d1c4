"""Where expertd keeps things: everything is under EXPERTD_HOME, by default ``~/.expertd``.

Two homes never meet: sockets, lock, logs and state of one are invisible to the other.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from expertd.protocol.errors import HomeError, HomeTooLong

SOCKET_PATH_BYTES = 103
"""Longest path of a Unix socket that works everywhere (macOS: 104 with the final zero; Linux: 108)."""

_LONGEST_SOCKET = "run/gateway-4194304.sock"


@dataclass(frozen=True)
class Home:
    """The paths of one home.  Making the object touches nothing; ``prepare`` creates the folders."""

    root: Path

    @classmethod
    def current(cls) -> Home:
        """The home that EXPERTD_HOME names, else ``~/.expertd``."""
        named = os.environ.get("EXPERTD_HOME")
        return cls(Path(named).expanduser().absolute() if named else Path.home() / ".expertd")

    @property
    def run(self) -> Path:
        """Private folder (0700) of sockets and the lock."""
        return self.root / "run"

    @property
    def daemon_socket(self) -> Path:
        return self.run / "daemon.sock"

    @property
    def lifeline_socket(self) -> Path:
        return self.run / "lifeline.sock"

    @property
    def daemon_lock(self) -> Path:
        return self.run / "daemon.lock"

    @property
    def daemon_log(self) -> Path:
        return self.root / "log" / "daemon.log"

    def gateway_socket(self, pid: int) -> Path:
        """Where the workers of the gateway with that process id connect."""
        return self.run / f"gateway-{pid}.sock"

    def worker_log(self, pid: int) -> Path:
        """Log of the worker that the gateway with that process id started."""
        return self.root / "log" / f"worker-{pid}.log"

    def check(self) -> None:
        """Refuse a home whose sockets could not be bound.

        Raises:
            HomeTooLong: the longest socket path exceeds ``SOCKET_PATH_BYTES``.
        """
        length = len(os.fsencode(self.root / _LONGEST_SOCKET))
        if length > SOCKET_PATH_BYTES:
            room = SOCKET_PATH_BYTES - len(_LONGEST_SOCKET) - 1
            raise HomeTooLong(
                f"EXPERTD_HOME {self.root} is too long for a socket ({length - SOCKET_PATH_BYTES} bytes over); "
                f"set EXPERTD_HOME to a path of at most {room} bytes"
            )

    def prepare(self) -> None:
        """Create the folders, private to this user.

        Raises:
            HomeTooLong: see ``check``.
            HomeError: the home is a file, belongs to somebody else, or cannot be written.
        """
        self.check()
        try:
            for folder in (self.root, self.run, self.root / "log"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = self.run.stat()
            if owner.st_uid != os.geteuid():
                raise HomeError(f"{self.run} belongs to another user; set EXPERTD_HOME to a folder of your own")
            if stat.S_IMODE(owner.st_mode) & 0o077:
                self.run.chmod(0o700)
        except OSError as error:
            raise HomeError(
                f"EXPERTD_HOME {self.root} cannot be used ({error.strerror}); set EXPERTD_HOME to a folder "
                "that you can write to"
            ) from error
