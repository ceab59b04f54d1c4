"""A throw-away home with its own daemon process, for tests, benchmarks and demos.

Everything is real: a process, sockets, shared memory.  What it adds is that they are gone afterwards, however the body
ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonNotRunning, DaemonStartFailed
from expertd.protocol.layout import base_layout, pool_layout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.paths import Home

START_S = 20.0
END_S = 10.0
IDLE_EXIT_S = "600"  # should whoever has started a daemon here be killed


@contextmanager
def temporary_home() -> Iterator[Home]:
    """A prepared home that EXPERTD_HOME names inside the body; removed afterwards, with the daemon that runs in it."""
    folder = Path(tempfile.mkdtemp(prefix="expertd-", dir="/tmp"))  # short, because of the limit on sockets' paths
    before = os.environ.get("EXPERTD_HOME")
    os.environ["EXPERTD_HOME"] = str(folder)
    home = Home(folder)
    home.prepare()
    try:
        yield home
    finally:
        if before is None:
            del os.environ["EXPERTD_HOME"]
        else:
            os.environ["EXPERTD_HOME"] = before
        shutil.rmtree(folder)


def launch_daemon(home: Home, budget: int | str, *options: str) -> subprocess.Popen[bytes]:
    """A daemon in ``home`` that already answers; ``options`` go to ``python -m expertd.daemon``.

    What it says is in ``home.daemon_log``.  The caller sees to it that it ends (``end``).

    Raises:
        DaemonStartFailed: it ended or did not answer in time; with what it said.
    """
    command = [sys.executable, "-m", "expertd.daemon", "--budget", str(budget), "--idle-exit", IDLE_EXIT_S, *options]
    environment = {**os.environ, "EXPERTD_HOME": str(home.root)}
    with home.daemon_log.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment
        )
    deadline = time.monotonic() + START_S
    while True:
        try:
            Connection(home.daemon_socket, "stage", handshake_s=1.0).close()
            return process
        except DaemonNotRunning:
            if process.poll() is not None or time.monotonic() > deadline:
                end(process)
                said = home.daemon_log.read_text(encoding="utf-8", errors="replace")
                raise DaemonStartFailed(f"the daemon did not come up (status {process.returncode}): {said}") from None
            time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, in order if it can."""
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def running_daemon(home: Home, budget: int | str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon as ``launch_daemon`` starts it, ended afterwards."""
    process = launch_daemon(home, budget, *options)
    try:
        yield process
    finally:
        end(process)


def ask_status(home: Home) -> Status:
    """The state of the home's daemon."""
    with Connection(home.daemon_socket, "stage") as connection:
        return connection.ask(AskStatus(), Status)


def budget_for(manifest: Manifest, slots: int) -> int:
    """The budget that gives ``manifest`` (whose layers have one shape) a pool of ``slots`` blocks, and base weights."""
    first = manifest.layers[0]
    base = base_layout(manifest.base)[1] if manifest.base else 0
    return base + pool_layout(len(manifest.layers), first.experts, first.parts, slots).size
