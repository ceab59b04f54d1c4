"""Where expertd keeps things: everything is under EXPERTD_HOME, by default ``~/.expertd``.

Two homes never meet: sockets, lock, logs and state of one are invisible to the other.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path

from expertd.protocol.errors import HomeError, HomeTooLong, PathInvalid

SOCKET_PATH_BYTES = 103
"""Longest path of a Unix socket that works everywhere (macOS: 104 with the final zero; Linux: 108)."""

_LONGEST_SOCKET = "run/gateway-4194304-99.sock"


def expanded(path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` or ``~user`` at its beginning replaced by that user's folder.

    Raises:
        PathInvalid: there is no such folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~")
        why = f"there is no user {user!r} here" if user else "this user has no home folder, and HOME is not set"
        raise PathInvalid(f"{os.fspath(path)!r}: {why}; write the whole path, or ./ before a name with ~") from None


def lasting(python: str) -> str:
    """The path of an interpreter by which it is still found after an upgrade.

    Homebrew installs each version into a folder of its own, removes the last one, and keeps a link to the newest.
    """
    link = re.sub(r"/Cellar/([^/]+)/[^/]+/", r"/opt/\1/", python)
    return link if Path(link).exists() else python


@dataclass(frozen=True)
class Home:
    """The paths of one home.  Making the object touches nothing; ``prepare`` creates the folders."""

    root: Path

    @classmethod
    def current(cls) -> Home:
        """The home that EXPERTD_HOME names, else ``~/.expertd``.

        Raises:
            PathInvalid: see ``expanded``.
        """
        return cls(expanded(os.environ.get("EXPERTD_HOME") or "~/.expertd").absolute())

    @property
    def run(self) -> Path:
        """Private folder (0700) of sockets and locks."""
        return self.root / "run"

    @property
    def log(self) -> Path:
        """Folder of what daemons, gateways and workers write down (``protocol.logs``)."""
        return self.root / "log"

    @property
    def config(self) -> Path:
        """The user's settings (``protocol.config``); it need not exist."""
        return self.root / "config.toml"

    @property
    def daemon_socket(self) -> Path:
        return self.run / "daemon.sock"

    @property
    def lifeline_socket(self) -> Path:
        return self.run / "lifeline.sock"

    @property
    def daemon_lock(self) -> Path:
        """Locked by the home's daemon for as long as it lives; holds its process id."""
        return self.run / "daemon.lock"

    @property
    def daemon_holders(self) -> Path:
        """Which processes hold how much of the daemon's memory (``daemon.holders``)."""
        return self.run / "daemon.holders"

    @property
    def start_lock(self) -> Path:
        """Locked by the one process that starts a daemon on demand, until that answers."""
        return self.run / "start.lock"

    @property
    def daemon_log(self) -> Path:
        return self.log / "daemon.log"

    @property
    def packed(self) -> Path:
        """Folder of packed stores, or of links to them; ``expertd pack`` creates it."""
        return self.root / "packed"

    @property
    def service_gateway_log(self) -> Path:
        """The last words of a gateway that a service manager keeps."""
        return self.log / "service-gateway.log"

    @property
    def service(self) -> Path:
        """What the home knows of its service (``protocol.service``); there only while one is installed."""
        return self.root / "service.json"

    def service_starts(self, name: str) -> Path:
        """Count of the bad ends of the service's ``daemon`` or ``gateway`` (``protocol.quick_deaths``)."""
        return self.run / f"starts-{name}.json"

    @property
    def pace(self) -> Path:
        """Folder of what workers measure of models' speed (``protocol.pace``); they create it."""
        return self.root / "pace"

    @property
    def warmth(self) -> Path:
        """Folder of what daemons keep for those that come after them (``daemon.warm_record``); they create it."""
        return self.root / "warmth"

    def warm_record(self, model: str) -> Path:
        """What was worth keeping of the model with that key."""
        return self.warmth / f"{model}.warm"

    @property
    def profiles(self) -> Path:
        """Folder of profiles (``protocol.profiles``); ``expertd profile`` creates it."""
        return self.root / "profiles"

    @property
    def profiles_in_use(self) -> Path:
        """Which model uses which profile."""
        return self.root / "profiles.json"

    @property
    def traces(self) -> Path:
        """Folder in which ``expertd plan`` looks for routing traces; whoever records one there creates it."""
        return self.root / "traces"

    def gateway_socket(self, pid: int, number: int = 0) -> Path:
        """Where a worker of the gateway with that process id connects: the one with that ``number``."""
        return self.run / (f"gateway-{pid}-{number}.sock" if number else f"gateway-{pid}.sock")

    def gateway_log(self, pid: int) -> Path:
        """Log of the gateway with that process id."""
        return self.log / f"gateway-{pid}.log"

    def worker_log(self, pid: int) -> Path:
        """Log of the worker with that process id."""
        return self.log / f"worker-{pid}.log"

    def check(self) -> None:
        """Refuse a home whose sockets could not be bound, or where others could put their own.  Changes nothing.

        What does not exist yet is in order.  A folder may be a symbolic link: its target is what is judged.

        Raises:
            HomeTooLong: the longest socket path exceeds ``SOCKET_PATH_BYTES``.
            HomeError: the home or a folder in it is a file, belongs to somebody else, or can be written by others.
        """
        length = len(os.fsencode(self.root / _LONGEST_SOCKET))
        if length > SOCKET_PATH_BYTES:
            room = SOCKET_PATH_BYTES - len(_LONGEST_SOCKET) - 1
            raise HomeTooLong(
                f"EXPERTD_HOME {self.root} is too long for a socket ({length - SOCKET_PATH_BYTES} bytes over); "
                f"set EXPERTD_HOME to a path of at most {room} bytes"
            )
        try:
            for folder in self._folders:
                _check_private(folder)
        except OSError as error:
            raise self._unusable(error) from error

    def prepare(self) -> None:
        """Create the folders, private to this user.  A home that is refused stays as it is.

        Raises:
            HomeTooLong, HomeError: see ``check``; or the home cannot be written.
        """
        self.check()
        try:
            for folder in self._folders:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _check_private(folder)  # somebody may have been quicker than our mkdir
            if stat.S_IMODE(self.run.stat().st_mode) & 0o077:
                self.run.chmod(0o700)
        except OSError as error:
            raise self._unusable(error) from error

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.root, self.run, self.log

    def _unusable(self, error: OSError) -> HomeError:
        return HomeError(
            f"EXPERTD_HOME {self.root} cannot be used ({error.strerror}); set EXPERTD_HOME to a folder "
            "that you can write to"
        )


def _check_private(folder: Path) -> None:
    """Raise HomeError unless nobody but this user can put anything into ``folder``, if it exists.

    Whoever can write there could take the place of the daemon, or name any process to be ended in its lock.  Root is
    held to the same: what runs as root has no business in the home of somebody else.
    """
    try:
        found = folder.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(None, "Not a directory", str(folder))
    if found.st_uid != os.geteuid():
        raise HomeError(f"{folder} belongs to another user; set EXPERTD_HOME to a folder of your own")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise HomeError(
            f"{folder} can be written by other users; change that with: chmod go-w {shlex.quote(str(folder))}, "
            "or set EXPERTD_HOME to another folder"
        )
