"""Find a home's daemon, or start one on demand as tmux and adb do.

What a daemon does once it runs is ``expertd.daemon``; handing it to launchd or systemd is ``expertd.launchd``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonAlreadyRunning, DaemonNotRunning, DaemonStartFailed
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
) -> Connection:
    """A connection to the home's daemon; if there is none, start one in a process group of its own and say so.

    Args:
        budget: size for a daemon that has to be started; one that runs keeps its own.
        announce: called with one sentence when a daemon was started.
    Raises:
        DaemonStartFailed: the daemon ended or did not answer in time; the message quotes its last words.
    """
    home.prepare()
    try:
        return Connection(home.daemon_socket, role)
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
        if announce is not None and process.poll() is None:
            announce(
                f"started a daemon (process {process.pid}); it ends after {IDLE_EXIT_S // 60} idle minutes, "
                "or with: expertd daemon stop"
            )
        return connection
    with home.daemon_log.open("rb") as log:
        log.seek(said_before)
        words = log.read().decode(errors="replace").strip().splitlines()
    last = words[-1] if words else "it said nothing"
    raise DaemonStartFailed(f"the daemon did not come up ({last}); its log is {home.daemon_log}")

