"""SIGTERM to each process while streams are under way: it ends with status 0, and nothing of it is left.

What the others make of it is in ``test_recovery`` and ``test_gateway_recovery``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from expertd.clients.gateway.lifetime import DRAIN_S
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import lock_holder
from expertd.protocol.segments import segment_name
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tests.gateway_stage import ENDLESS, Served, say, serving
from tools.stage import ask_status

STREAMS = 3


class Stream(threading.Thread):
    """One client that reads a stream to its end."""

    def __init__(self, served: Served, max_tokens: int) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.finished: str | None = None
        self.error = ""
        self._served = served
        self._max_tokens = max_tokens
        self.start()

    def run(self) -> None:
        try:
            with self._served.client() as client:
                for chunk in say(client, self._served, stream=True, max_tokens=self._max_tokens):
                    self.text += chunk.choices[0].delta.content or ""
                    self.finished = chunk.choices[0].finish_reason
        except openai.APIError as error:
            self.error = str(error)


@contextmanager
def load(served: Served, max_tokens: int) -> Iterator[list[Stream]]:
    """Streams under way, each of which has said something."""
    streams = [Stream(served, max_tokens) for _ in range(STREAMS)]
    wait_for(lambda: all(stream.text or stream.error for stream in streams))
    yield streams
    for stream in streams:
        stream.join(DEADLINE_S + DRAIN_S)
        assert not stream.is_alive()


@pytest.fixture
def tight(start_daemon: StartDaemon) -> Any:
    """A daemon with room for half of the blocks, so that the streams read all the time, from a disk that is slow."""
    return start_daemon("212992", "--simulate-ssd", "20MB,1ms")


def reads(home: Home) -> bool:
    """Whether the streams have missed blocks."""
    return any(model.misses for model in ask_status(home).models)


def names_in_shared_memory(home: Home) -> list[str]:
    """What the home's daemon has left under a name; only Linux can list it."""
    folder = Path("/dev/shm")
    return [path.name for path in folder.glob(segment_name(home.root).strip("/") + "*")] if folder.is_dir() else []


def descriptors(pid: int) -> int:
    return psutil.Process(pid).num_fds()


def test_a_gateway_ends_its_streams_with_a_word_and_leaves_nothing(
    home: Home, checkpoints: dict[str, Path], tight: Any
) -> None:
    before = descriptors(tight.pid)
    with serving(home, checkpoints["stacked"]) as served:
        worker = served.worker
        with load(served, ENDLESS) as streams:
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(DEADLINE_S) == 0
        assert all("being stopped" in stream.error for stream in streams)
        assert not worker.is_running()
        assert not list(home.run.glob("gateway-*"))
    wait_for(lambda: not any(model.sessions for model in ask_status(home).models))
    assert tight.poll() is None, "the daemon is not the gateway's to end"
    assert names_in_shared_memory(home) == []
    # What it keeps warm costs it the model's file and its pools; what belonged to the session is gone.
    pools = sum(1 for _ in ask_status(home).models) * 4
    wait_for(lambda: descriptors(tight.pid) <= before + pools)


def test_a_gateway_lets_short_answers_come_to_their_end(home: Home, checkpoints: dict[str, Path], tight: Any) -> None:
    with serving(home, checkpoints["stacked"]) as served:
        with load(served, 16) as streams:
            served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(DEADLINE_S) == 0
        assert [(stream.error, stream.finished) for stream in streams] == [("", "length")] * STREAMS


def test_a_daemon_under_load_ends_and_the_streams_go_on_with_the_next(
    own_home: Home, checkpoints: dict[str, Path], tight: Any
) -> None:
    with serving(own_home, checkpoints["stacked"]) as served:
        with load(served, 200) as streams:
            assert reads(own_home)
            tight.send_signal(signal.SIGTERM)
            assert tight.wait(DEADLINE_S) == 0
        assert [(stream.error, stream.finished) for stream in streams] == [("", "length")] * STREAMS
        assert len({stream.text for stream in streams}) == 1, "and say the same as each other"
        wait_for(lambda: lock_holder(own_home) not in (None, 0, tight.pid))
    log = own_home.daemon_log.read_text()
    assert f"daemon[{tight.pid}] the daemon has ended: why=SIGTERM" in log
    assert "Traceback" not in log
    assert names_in_shared_memory(own_home) == []


def test_a_daemon_alone_leaves_no_socket_behind(home: Home, tight: Any) -> None:
    tight.send_signal(signal.SIGTERM)
    assert tight.wait(DEADLINE_S) == 0
    assert not list(home.run.glob("*.sock"))
    assert lock_holder(home) is None


def test_a_worker_under_load_ends_with_status_0_and_is_replaced(
    home: Home, checkpoints: dict[str, Path], tight: Any
) -> None:
    with serving(home, checkpoints["stacked"]) as served:
        worker = served.worker
        with load(served, ENDLESS) as streams:
            os.kill(worker.pid, signal.SIGTERM)
            wait_for(lambda: not worker.is_running())
        assert all("the worker ended with status 0" in stream.error for stream in streams)
        wait_for(lambda: served.request("GET", "/health/ready")[0] == 200)
        assert served.worker.pid != worker.pid
        with served.client() as client:
            assert say(client, served, max_tokens=4).usage.completion_tokens == 4
        (model,) = ask_status(home).models
        assert [session.pid for session in model.sessions] == [served.worker.pid]


def test_a_worker_that_loads_ends_with_status_0_too(home: Home, checkpoints: dict[str, Path], tight: Any) -> None:
    command = [sys.executable, "-m", "expertd.clients.cli", "worker", str(checkpoints["stacked"])]
    address = f"ipc://{home.run}/gateway-1.sock"  # nobody listens: it loads, and its words wait
    with subprocess.Popen([*command, "--gateway", address], stderr=subprocess.PIPE) as process:
        try:
            wait_for(lambda: "mlx" in _mapped(process.pid))
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def _mapped(pid: int) -> str:
    """Names of the libraries and files that a process has in its memory."""
    return " ".join(mapped.path for mapped in psutil.Process(pid).memory_maps())
