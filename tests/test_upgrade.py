"""Old and new side by side: every pair works, or says one sentence after which a retry works.

Another version is this one with another number: a process whose environment ``other`` names speaks that, and so does
every process that it starts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from expertd.protocol import PROTOCOL, lifeline
from expertd.protocol.connection import package_version
from expertd.protocol.errors import DaemonBusy, DaemonLost, MessageInvalid, ProtocolMismatch
from expertd.protocol.messages import Error, Hello, Stop, decode, encode
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect_or_start, stop_daemon
from tests.conftest import DEADLINE_S
from tests.test_homes import CONNECT, eventually, expertd, hear, python, tell

OLDER, NEWER = PROTOCOL - 1, PROTOCOL + 1

Environment = dict[str, str]


@pytest.fixture
def other(tmp_path: Path) -> Callable[[int], Environment]:
    """The environment of processes that speak another version."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, expertd.protocol\nexpertd.protocol.PROTOCOL = int(os.environ['TEST_PROTOCOL'])\n"
    )
    return lambda version: {"PYTHONPATH": str(tmp_path), "TEST_PROTOCOL": str(version)}


@contextmanager
def daemon_of(home: Home, environment: Environment) -> Iterator[subprocess.Popen[bytes]]:
    """A daemon of another version."""
    command = [sys.executable, "-m", "expertd.daemon", "--budget", "64MiB"]
    with (
        home.daemon_log.open("ab") as log,
        subprocess.Popen(command, stderr=log, env={**os.environ, **environment}) as daemon,
    ):
        try:
            eventually(home.daemon_socket.exists, "the start")
            yield daemon
        finally:
            daemon.kill()


def connected(environment: Environment | None = None) -> tuple[dict[str, int], str]:
    """What ``connect_or_start`` gives in a process of its own, and what it announces."""
    with python(CONNECT, **environment or {}) as asker:
        assert hear(asker) == "waiting\n"
        tell(asker)
        said, announced = asker.communicate("\n", timeout=DEADLINE_S)
        return json.loads(said), announced


def refusal(pid: int, daemon: int, role: str, client: int) -> str:
    """The sentence of a daemon that meets another version."""
    version = package_version()
    return (
        f"this daemon (process {pid}, expertd {version}) speaks protocol {daemon}, the {role} (expertd {version}) "
        f"speaks {client}; end it with 'expertd daemon stop' or 'kill {pid}' and try again"
    )


@pytest.mark.parametrize("version", [OLDER, NEWER])
def test_an_idle_daemon_of_another_version_is_replaced(
    version: int, own_home: Home, other: Callable[[int], Environment]
) -> None:
    with daemon_of(own_home, other(version)) as foreign:
        answer, announced = connected()
        assert foreign.wait(DEADLINE_S) == 0
    assert answer["started"]
    assert announced == (
        f"started a daemon (process {answer['pid']}) in place of one of another version; "
        "it ends after 15 idle minutes, or with: expertd daemon stop\n"
    )
    assert expertd("status").returncode == 0


def test_a_daemon_of_another_version_that_is_in_use_stays_until_it_is_stopped(
    own_home: Home, other: Callable[[int], Environment], checkpoints: dict[str, Path]
) -> None:
    old = other(OLDER)
    hold = "import runpy; runpy.run_module('tools.hold', run_name='__main__')"
    with daemon_of(own_home, old) as foreign, python(hold, str(checkpoints["stacked"]), "2", **old) as user:
        assert hear(user)
        with pytest.raises(ProtocolMismatch) as caught:
            connect_or_start(own_home, "test")
        assert caught.value.message == refusal(foreign.pid, OLDER, "test", PROTOCOL)
        with pytest.raises(ProtocolMismatch):
            stop_daemon(own_home, "test", if_idle=True)
        assert foreign.poll() is None

        assert expertd("daemon", "stop").stdout == f"stopped the daemon (process {foreign.pid})\n"
        assert foreign.wait(DEADLINE_S) == 0
        assert connected()[0]["started"]


def test_stop_ends_a_newer_daemon(own_home: Home, other: Callable[[int], Environment]) -> None:
    with daemon_of(own_home, other(NEWER)) as foreign:
        asked = expertd("status")
        assert (asked.returncode, asked.stdout) == (ProtocolMismatch.exit_status, "")
        assert asked.stderr == f"expertd: {refusal(foreign.pid, NEWER, 'cli', PROTOCOL)} [protocol_mismatch]\n"
        stopped = expertd("daemon", "stop")
        assert (stopped.returncode, stopped.stderr) == (0, "")
        assert stopped.stdout == f"stopped the daemon (process {foreign.pid})\n"
        assert foreign.wait(DEADLINE_S) == 0


def test_an_old_client_stops_a_new_daemon_and_its_retry_works(
    own_home: Home, other: Callable[[int], Environment]
) -> None:
    old = other(OLDER)
    new = connected()[0]["pid"]
    asked = expertd("status", **old)
    assert asked.returncode == ProtocolMismatch.exit_status
    assert asked.stderr == f"expertd: {refusal(new, PROTOCOL, 'cli', OLDER)} [protocol_mismatch]\n"
    assert expertd("daemon", "stop", **old).stdout == f"stopped the daemon (process {new})\n"
    assert not own_home.daemon_socket.exists()
    assert connected(old)[0]["started"]
    assert expertd("status", **old).returncode == 0


def test_a_program_that_outlives_an_upgrade_says_that_it_has_to_be_started_again(own_home: Home) -> None:
    upgraded_under_us = f"import expertd.protocol; expertd.protocol.PROTOCOL = {OLDER}\n{CONNECT}"
    with python(upgraded_under_us) as asker:
        assert hear(asker) == "waiting\n"
        tell(asker)
        said = asker.communicate(timeout=DEADLINE_S)[1].splitlines()[-1]
    assert re.search(rf"the daemon .* started does not speak protocol {OLDER}; start this program again$", said)
    assert not connected()[1]


def test_a_lifeline_of_another_version_is_hung_up_on(home: Home, other: Callable[[int], Environment]) -> None:
    with daemon_of(home, other(OLDER)):
        with pytest.raises(DaemonLost, match="hung up; restart it with: expertd daemon stop"):
            lifeline.connect(home.lifeline_socket, bytes(16))
        said = home.daemon_log.read_text(encoding="utf-8")
        assert re.search(rf"hung up on a lifeline of protocol {PROTOCOL} \(this is {OLDER}\)", said)


@contextmanager
def stranger(home: Home, answer: bytes) -> Iterator[None]:
    """Something that refuses every Hello and gives ``answer`` to everything else."""
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(f"ipc://{home.daemon_socket}")
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            if router.poll(50):
                sender, frame = router.recv_multipart()
                hello = isinstance(decode(frame), Hello)
                router.send_multipart([sender, encode(Error.of(ProtocolMismatch("go away"))) if hello else answer])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        router.close(linger=0)


@pytest.mark.parametrize(
    "answer",
    [b"\xc1", encode(Error.of(MessageInvalid("what?"))), encode(Error.of(DaemonBusy("in use"))), encode(Stop())],
    ids=["garbage", "not understood", "in use", "nonsense"],
)
def test_a_stranger_that_does_not_end_is_left_alone(answer: bytes, home: Home) -> None:
    with stranger(home, answer), pytest.raises(ProtocolMismatch, match="go away"):
        connect_or_start(home, "test")
    assert not home.daemon_log.exists()
