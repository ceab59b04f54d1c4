"""Fixtures that several test modules share: a home of one's own, real daemons in it, and small checkpoints."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from hypothesis import HealthCheck, settings

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonNotRunning
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon
from tools.factory import write_checkpoint
from tools.stage import end, launch_daemon, temporary_home

DEADLINE_S = 20.0
"""How long a test waits for anything before it fails."""

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # how fast this machine is, and what else runs on it, is nothing that a test asserts

signal.signal(signal.SIGINT, signal.default_int_handler)
"""A shell that runs the tests in the background (``make test &``) has them ignore it; some tests interrupt programs."""


class StartDaemon(Protocol):
    """The factory that ``start_daemon`` gives: a daemon that already answers, as ``subprocess.Popen``."""

    def __call__(self, budget: str = "64MiB", *options: str) -> subprocess.Popen[bytes]: ...


def wait_for(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; fail after the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def answers(home: Home) -> bool:
    """Whether a daemon answers in ``home``."""
    try:
        Connection(home.daemon_socket, "test", handshake_s=1.0).close()
    except DaemonNotRunning:
        return False
    return True


@pytest.fixture
def home() -> Iterator[Home]:
    """A prepared home at a short path (sockets need one); EXPERTD_HOME names it, for subprocesses too."""
    with temporary_home() as prepared:
        yield prepared


@pytest.fixture
def own_home(home: Home) -> Iterator[Home]:
    """A home whose daemon, whoever starts it and of whatever version, is stopped afterwards."""
    yield home
    try:
        stop_daemon(home, "test")
    except DaemonNotRunning:
        return


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
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "stacked": write_checkpoint(folder / "stacked", "qwen3_moe"),
        "per_expert": write_checkpoint(folder / "per_expert", "qwen3_moe", experts="float32", names="per_expert"),
        "sharded": write_checkpoint(
            folder / "sharded", "qwen3_moe", experts="float32", names="per_expert", shards=3
        ),
    }
