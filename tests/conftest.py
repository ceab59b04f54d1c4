"""Fixtures that several test modules share: a home of one's own, real daemons in it, and small checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonNotRunning
from expertd.protocol.paths import Home

DEADLINE_S = 20.0
"""How long a test waits for anything before it fails."""


def launch_daemon(home: Home, budget: str = "64MiB", *options: str) -> subprocess.Popen[bytes]:
    """A daemon in ``home`` that already answers; ``options`` go to ``python -m expertd.daemon``.

    What it says is in ``home.daemon_log``.  The caller sees to it that it ends (``end``).
    """
    command = [sys.executable, "-m", "expertd.daemon", "--budget", budget, *options]
    environment = {**os.environ, "EXPERTD_HOME": str(home.root)}
    with home.daemon_log.open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", env=environment
        )
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            Connection(home.daemon_socket, "test", handshake_s=1.0).close()
            return process
        except DaemonNotRunning:
            said = home.daemon_log.read_text(encoding="utf-8", errors="replace")
            if process.poll() is not None:
                raise AssertionError(f"the daemon ended with status {process.returncode}: {said}") from None
            if time.monotonic() > deadline:
                end(process)
                raise AssertionError(f"the daemon did not answer in {DEADLINE_S:.0f} s: {said}") from None
            time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, in order if it can."""
    process.terminate()
    try:
        process.wait(10.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class StartDaemon(Protocol):
    """The factory that ``start_daemon`` gives: a daemon that already answers, as ``subprocess.Popen``."""

    def __call__(self, budget: str = "64MiB", *options: str) -> subprocess.Popen[bytes]: ...


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A prepared home at a short path (sockets need one); EXPERTD_HOME names it, for subprocesses too."""
    root = Path(tempfile.mkdtemp(prefix="xd-", dir="/tmp"))
    monkeypatch.setenv("EXPERTD_HOME", str(root))
    prepared = Home.current()
    prepared.prepare()
    yield prepared
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def start_daemon(home: Home) -> Iterator[StartDaemon]:
    """Start daemons in ``home`` (see ``launch_daemon``); each of them has ended when the test is over."""
    started: list[subprocess.Popen[bytes]] = []

    def start(budget: str = "64MiB", *options: str) -> subprocess.Popen[bytes]:
        started.append(launch_daemon(home, budget, *options))
        return started[-1]

    yield start
    for process in started:
        end(process)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small real checkpoints by name; tests must not change them (copy one first)."""
    from tools.factory import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "stacked": write_checkpoint(folder / "stacked", "qwen3_moe"),
        "per_expert": write_checkpoint(folder / "per_expert", "qwen3_moe", experts="float32", names="per_expert"),
        "sharded": write_checkpoint(
            folder / "sharded", "qwen3_moe", experts="float32", names="per_expert", shards=3
        ),
    }
