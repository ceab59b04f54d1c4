"""Find a home's daemon, or start one on demand as tmux and adb do.

Where a service manager keeps the daemon, that is asked to start it (``protocol.service``).  What a daemon does once it
runs is ``expertd.daemon``; handing it to launchd or systemd is ``expertd.launchd``.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from expertd.protocol import PROTOCOL
from expertd.protocol.connection import Connection, ask_any_version
from expertd.protocol.errors import (
    DaemonAlreadyRunning,
    DaemonBusy,
    DaemonLost,
    DaemonNotRunning,
    DaemonStartFailed,
    ProtocolMismatch,
)
from expertd.protocol.messages import Stop, Stopping
from expertd.protocol.paths import Home, lasting

if TYPE_CHECKING:
    import subprocess

    import psutil

    from expertd.protocol.service import Service

IDLE_EXIT_S = 900
"""An on-demand daemon ends by itself after so many seconds without a session, if its user has set nothing else."""

_POLL_S = 0.02

_started: list[subprocess.Popen[bytes]] = []
"""Daemons that this process is the parent of: it has to take note of their end, or they stay as zombies."""


def connect(home: Home, role: str) -> Connection:
    """A connection to the home's daemon.

    Raises:
        HomeError: the home is not this user's own, so neither is what answers there.
        DaemonNotRunning: there is none.
        ProtocolMismatch: it speaks another version.
    """
    home.check()
    return Connection(home.daemon_socket, role)


def connect_or_start(
    home: Home,
    role: str,
    *,
    budget: str | None = None,
    announce: Callable[[str], None] | None = None,
    start_s: float = 20.0,
) -> tuple[Connection, bool]:
    """A connection to the home's daemon, and whether it had to be started (in a process group of its own).

    Of all processes that call this at once, one starts a daemon and the others connect to that.  A daemon of another
    version is replaced if nobody uses it.  Whoever started one and then cannot use it owes the user a ``stop_if_idle``.
    One that the service manager has started at our wish is not ours.

    Args:
        budget: size for a daemon that has to be started; one that runs keeps its own.
        announce: called with one sentence when a daemon was started.
        start_s: longest wait for a daemon that starts, whoever starts it, and for one that ends before.
    Raises:
        HomeError: the home cannot be used.
        ConfigInvalid: a daemon has to be started, and its settings cannot be used.
        ProtocolMismatch: a daemon of another version has sessions, or does not understand that it should end; or
            expertd was upgraded under this process, so that what it starts is of another version.
        DaemonStartFailed: the daemon ended or did not answer in time; the message quotes its last words.  Or it is the
            service's, and has died so often that it is not started any more.
    """
    home.prepare()
    try:
        return Connection(home.daemon_socket, role), False
    except (DaemonNotRunning, ProtocolMismatch):
        return _start(home, role, budget, announce, start_s)


def _start(
    home: Home, role: str, budget: str | None, announce: Callable[[str], None] | None, start_s: float
) -> tuple[Connection, bool]:
    # Late, as below: who asks a daemon that runs needs none of it.
    from expertd.protocol.config import read_config
    from expertd.protocol.quick_deaths import why_refused
    from expertd.protocol.service import ask_to_start

    idle_exit_s = read_config(home, default_idle_exit_s=IDLE_EXIT_S).idle_exit.value
    process: subprocess.Popen[bytes] | None = None
    refusal: ProtocolMismatch | None = None
    replacing = False
    service = _service(home)
    asked: str | None = None  # the service manager; its name
    said_before = home.daemon_log.stat().st_size if home.daemon_log.exists() else 0
    deadline = time.monotonic() + start_s
    with _turns(home) as is_our_turn:
        while time.monotonic() < deadline:
            # Asked before connecting: when the turn is ours and nobody answers, nobody is starting a daemon either.
            ours = is_our_turn()
            try:
                connection = Connection(home.daemon_socket, role, handshake_s=1.0)
            except ProtocolMismatch as error:
                if process is not None and process.poll() is None:
                    raise ProtocolMismatch(
                        f"expertd was changed while this process ran: the daemon (process {process.pid}) that it "
                        f"started does not speak protocol {PROTOCOL}; start this program again"
                    ) from error
                if asked is not None:
                    raise ProtocolMismatch(
                        f"{error.message}; it is the service's: upgrade that with 'expertd service install'"
                    ) from error
                refusal = error
                if ours and not replacing:
                    if not isinstance(ask_any_version(home.daemon_socket, Stop(if_idle=True)), Stopping):
                        raise
                    replacing = True
            except DaemonNotRunning:
                refusal = None
                if process is not None and process.poll() not in (None, DaemonAlreadyRunning.exit_status):
                    break
                # While an old daemon is on its way out, a new one could only fail.
                if ours and (process is None or process.returncode is not None) and lock_holder(home) is None:
                    if service is None:
                        process = _spawn(home, budget, idle_exit_s)
                    elif asked is None:
                        asked = service.manager
                        if why_not := ask_to_start(service):
                            _say(announce, f"{asked} did not start the service's daemon ({why_not})")
                            service = asked = None
                    elif why := why_refused(home, "daemon"):
                        raise DaemonStartFailed(why) from None
            else:
                started = process is not None and connection.daemon.pid == process.pid
                instead = " in place of one of another version" if replacing else ""
                if started:
                    _say(
                        announce,
                        f"started a daemon (process {connection.daemon.pid}){instead}; it ends "
                        f"{_after(idle_exit_s)}with: expertd daemon stop",
                    )
                elif asked is not None:
                    _say(announce, f"{asked} started the service's daemon (process {connection.daemon.pid}){instead}")
                return connection, started
            time.sleep(_POLL_S)
    if refusal is not None:
        raise refusal
    if process is not None:
        if process.poll() is None:
            process.terminate()
        last = last_words(home, said_before)
        raise DaemonStartFailed(f"the daemon did not come up ({last}); its log is {home.daemon_log}")
    holder = lock_holder(home)
    if holder is None and asked is not None:
        last = last_words(home, said_before)
        raise DaemonStartFailed(
            f"the service's daemon did not come up ({last}); its log is {home.daemon_log}, and its state is told by: "
            "expertd service status"
        )
    if holder is None:
        raise DaemonStartFailed(f"another process started no daemon in {home.root} within {start_s:.0f} s; try again")
    raise DaemonStartFailed(
        f"the daemon in {home.root} (process {holder or 'unknown'}) neither answers nor ends; "
        "end it with: expertd daemon stop"
    )


def _service(home: Home) -> Service | None:
    """The service that is to start the home's daemon, if there is one and its user has not stopped it.

    Raises:
        DaemonStartFailed: it rests, because its daemon has died too often.
    """
    from expertd.protocol.quick_deaths import why_refused
    from expertd.protocol.service import read_service

    service = read_service(home)
    if service is None or service.stopped:
        return None
    if why := why_refused(home, "daemon"):
        raise DaemonStartFailed(why)
    return service


def _say(announce: Callable[[str], None] | None, line: str) -> None:
    if announce is not None:
        announce(line)


@contextmanager
def _turns(home: Home) -> Iterator[Callable[[], bool]]:
    """Who starts the daemon: what is yielded says whether it is our turn, and never waits.

    The kernel passes the turn on if its owner is killed.  No daemon inherits it: Python's descriptors close on exec.
    """
    with home.start_lock.open("a") as file:

        def is_our_turn() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        try:
            yield is_our_turn
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough if somebody forked meanwhile


def _after(idle_exit_s: float | None) -> str:
    if idle_exit_s is None:
        return ""
    minutes, seconds = divmod(idle_exit_s, 60)
    length = f"{idle_exit_s:.12g} idle seconds" if seconds or minutes < 2 else f"{minutes:.12g} idle minutes"
    return f"after {length}, or "


def _spawn(home: Home, budget: str | None, idle_exit_s: float | None) -> subprocess.Popen[bytes]:
    import subprocess

    # Its own interpreter first, which is of its own version.
    python = sys.executable if Path(sys.executable).exists() else lasting(sys.executable)
    command = [python, "-m", "expertd.daemon"]  # it reads the other settings itself
    if idle_exit_s is not None:
        command += ["--idle-exit", str(idle_exit_s)]
    if budget is not None:
        command += ["--budget", budget]
    environment = {**os.environ, "EXPERTD_HOME": str(home.root)}
    _started[:] = [child for child in _started if child.poll() is None]
    with home.daemon_log.open("ab") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment,
                cwd="/",
            )  # fmt: skip
        except OSError as error:
            raise DaemonStartFailed(
                f"no daemon can be started with {python or 'this program'} ({error.strerror}); if expertd was upgraded "
                "or removed while this program ran, start it again"
            ) from error
    _started.append(process)
    return process


def last_words(home: Home, since: int = 0) -> str:
    """The last line of the daemon's log behind the byte ``since``; a sentence's part that says so if there is none."""
    try:
        with home.daemon_log.open("rb") as log:
            log.seek(since if since <= home.daemon_log.stat().st_size else 0)  # a new file may have begun meanwhile
            words = log.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        words = []
    return words[-1] if words else "it said nothing"


def stop_daemon(home: Home, role: str, *, if_idle: bool = False, timeout_s: float = 30.0) -> int:
    """End the home's daemon, and return its process id when it is gone and its memory is free.

    One that does not answer, or speaks another version, is ended by SIGTERM, unless it should end only if idle.

    Raises:
        DaemonNotRunning: there is none.
        DaemonBusy: it was to end only if idle, and has sessions.
        ProtocolMismatch: it was to end only if idle, and speaks another version.
        DaemonLost: it did not end in time.
    """
    try:
        with connect(home, role) as connection:
            pid = connection.daemon.pid
            connection.ask(Stop(if_idle=if_idle), Stopping)
    except (DaemonNotRunning, ProtocolMismatch):
        owner = None if if_idle else _owner(home)
        if owner is None:
            raise
        pid = owner.pid
        if not _terminate(owner):
            return pid
    deadline = time.monotonic() + timeout_s
    while _runs(pid):
        if time.monotonic() > deadline:
            raise DaemonLost(
                f"the daemon (process {pid}) did not end in {timeout_s:.0f} s; end it with: kill -KILL {pid}"
            )
        time.sleep(_POLL_S)
    return pid


def stop_if_idle(home: Home, role: str) -> None:
    """End the home's daemon unless somebody has a session, or it has ended already."""
    try:
        stop_daemon(home, role, if_idle=True)
    except (DaemonBusy, DaemonNotRunning):
        return


def lock_holder(home: Home) -> int | None:
    """Process id of the daemon that owns the home, whether it answers or not; 0 if it has not written it yet.

    None if no daemon lives.  To look is to hold the lock for an instant, in which a daemon that starts would end.
    """
    try:
        with home.daemon_lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                written = file.read()
                return int(written) if written.isdecimal() else 0
    except FileNotFoundError:
        pass
    return None


def _owner(home: Home) -> psutil.Process | None:
    """The process that owns the home.  It must have the lock's file open, so that no stale number names another."""
    pid = lock_holder(home)
    if not pid:
        return None
    import psutil

    lock = str(home.daemon_lock.resolve())
    try:
        owner = psutil.Process(pid)
        return owner if any(file.path == lock for file in owner.open_files()) else None
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _terminate(owner: psutil.Process) -> bool:
    """Send SIGTERM; whether there was a process to send it to."""
    import psutil

    try:
        owner.terminate()
    except psutil.NoSuchProcess:
        return False
    return True


def _runs(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for by its parent does not."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
