"""Find a home's daemon, or start one on demand as tmux and adb do.

What a daemon does once it runs is ``expertd.daemon``; handing it to launchd or systemd is ``expertd.launchd``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonAlreadyRunning, DaemonBusy, DaemonLost, DaemonNotRunning, DaemonStartFailed
from expertd.protocol.messages import Stop, Stopping
from expertd.protocol.paths import Home

IDLE_EXIT_S = 900
"""An on-demand daemon ends by itself after so many seconds without a session."""


def connect_or_start(
    home: Home,
    role: str,
    *,
    budget: str | None = None,
    announce: Callable[[str], None] | None = None,
    start_s: float = 20.0,
) -> tuple[Connection, bool]:
    """A connection to the home's daemon, and whether it had to be started (in a process group of its own).

    Whoever started one and then cannot use it owes the user a ``stop_if_idle``.

    Args:
        budget: size for a daemon that has to be started; one that runs keeps its own.
        announce: called with one sentence when a daemon was started.
    Raises:
        DaemonStartFailed: the daemon ended or did not answer in time; the message quotes its last words.
    """
    home.prepare()
    try:
        return Connection(home.daemon_socket, role), False
    except DaemonNotRunning:
        pass
    command = [sys.executable, "-m", "expertd.daemon", "--idle-exit", str(IDLE_EXIT_S)]
    if budget is not None:
        command += ["--budget", budget]
    environment = {**os.environ, "EXPERTD_HOME": str(home.root)}
    with home.daemon_log.open("ab") as log:
        said_before = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
            cwd="/",
        )
    deadline = time.monotonic() + start_s
    while time.monotonic() < deadline:
        try:
            connection = Connection(home.daemon_socket, role, handshake_s=1.0)
        except DaemonNotRunning:
            if process.poll() not in (None, DaemonAlreadyRunning.exit_status):
                break
            time.sleep(0.02)
            continue
        started = process.poll() is None
        if announce is not None and started:
            announce(
                f"started a daemon (process {process.pid}); it ends after {IDLE_EXIT_S // 60} idle minutes, "
                "or with: expertd daemon stop"
            )
        return connection, started
    process.terminate()
    with home.daemon_log.open("rb") as log:
        log.seek(said_before)
        words = log.read().decode(errors="replace").strip().splitlines()
    last = words[-1] if words else "it said nothing"
    raise DaemonStartFailed(f"the daemon did not come up ({last}); its log is {home.daemon_log}")



def stop_daemon(home: Home, role: str, *, if_idle: bool = False, timeout_s: float = 30.0) -> int:
    """End the home's daemon, and return its process id when it is gone and its memory is free.

    Raises:
        DaemonNotRunning: there is none.
        DaemonBusy: it was to end only if idle, and has sessions.
        DaemonLost: it did not end in time.
    """
    with Connection(home.daemon_socket, role) as connection:
        pid = connection.daemon.pid
        connection.ask(Stop(if_idle=if_idle), Stopping)
    deadline = time.monotonic() + timeout_s
    while _runs(pid):
        if time.monotonic() > deadline:
            raise DaemonLost(f"the daemon (process {pid}) did not end in {timeout_s:.0f} s; end it with: kill {pid}")
        time.sleep(0.02)
    return pid


def stop_if_idle(home: Home, role: str) -> None:
    """End the home's daemon unless somebody has a session, or it has ended already."""
    try:
        stop_daemon(home, role, if_idle=True)
    except (DaemonBusy, DaemonNotRunning):
        return


def _runs(pid: int) -> bool:
    """Whether the process runs; one that has ended and was not waited for by its parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
