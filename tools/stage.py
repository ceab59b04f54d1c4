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
from expertd.protocol.errors import DaemonNotRunning
from expertd.protocol.layout import pool_layout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.paths import Home


@contextmanager
def temporary_home() -> Iterator[Home]:
    """A prepared home that EXPERTD_HOME names inside the body; removed afterwards, with the daemon that runs in it."""
    folder = Path(tempfile.mkdtemp(prefix="expertd-"))  # short, because of the limit on sockets' paths
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


@contextmanager
def running_daemon(home: Home, budget: int | str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon of ``budget`` in ``home``, ready; ended afterwards.  Its log is the home's."""
    command = [sys.executable, "-m", "expertd.daemon", "--budget", str(budget), *arguments]
    with home.daemon_log.open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "EXPERTD_HOME": str(home.root)})
    try:
        wait_for_daemon(home, process)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(20)


def wait_for_daemon(home: Home, process: subprocess.Popen[bytes], timeout_s: float = 20.0) -> None:
    """Return when the daemon answers.

    Raises:
        DaemonNotRunning: it ended or did not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            Connection(home.daemon_socket, "stage", handshake_s=1.0).close()
            return
        except DaemonNotRunning:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def ask_status(home: Home) -> Status:
    """The state of the home's daemon."""
    with Connection(home.daemon_socket, "stage") as connection:
        return connection.ask(AskStatus(), Status)


def budget_for(manifest: Manifest, slots: int) -> int:
    """The budget that gives ``manifest`` (whose layers have one shape) a pool of ``slots`` blocks."""
    first = manifest.layers[0]
    return pool_layout(len(manifest.layers), first.experts, first.parts, slots).size
