"""What sessions hold of a daemon that has ended is not lost to the default budget of the next one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.daemon.holders import Held, Holders
from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonNotRunning
from expertd.protocol.messages import BudgetSet, SetBudget
from expertd.protocol.paths import Home
from tests.conftest import wait_for
from tests.programs import Program
from tools.factory import write_checkpoint
from tools.stage import ask_status, end

MB = 10**6
MINE = (os.getpid(),)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "holders"


def note(path: Path, **models: Held) -> None:
    holders = Holders(path)
    assert holders.changed(models)
    holders.write()


@contextmanager
def process() -> Iterator[int]:
    """One that lives inside the body."""
    one = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        yield one.pid
    finally:
        one.communicate()


def test_nobody_holds_anything_of_a_daemon_that_never_was(path: Path) -> None:
    assert Holders(path).before == 0


def test_what_living_processes_hold_counts(path: Path) -> None:
    with process() as other:
        note(path, a=Held(5 * MB, (*MINE, other)), b=Held(7 * MB, (other,)))
        assert Holders(path).before == 12 * MB
    assert Holders(path).before == 5 * MB


def test_a_process_that_began_later_is_another_one(path: Path) -> None:
    note(path, a=Held(5 * MB, MINE))
    told = json.loads(path.read_bytes())
    told["at"] -= 1e6
    path.write_text(json.dumps(told))
    assert Holders(path).before == 0


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"at": 1, "models": []}', '{"at": "x", "models": {}}', "\xff"])
def test_a_note_that_is_none_tells_nothing(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    assert Holders(path).before == 0


def test_numbers_that_are_no_processes_tell_nothing(path: Path) -> None:
    path.write_text('{"at": 1e300, "models": {"a": {"size": 1, "pids": [-1, 9999999999999999999, 999999999]}}}')
    assert Holders(path).before == 0


def test_what_came_over_is_counted_once_and_the_rest_is_not_forgotten(path: Path) -> None:
    note(path, a=Held(5 * MB, MINE), b=Held(7 * MB, MINE))
    second = Holders(path)
    assert second.changed({"a": Held(6 * MB, MINE)})
    assert second.before == 7 * MB
    second.write()
    assert Holders(path).before == 13 * MB


def test_only_a_change_is_worth_writing(path: Path) -> None:
    holders = Holders(path)
    assert not holders.changed({})
    assert holders.changed({"a": Held(1, MINE)})
    assert not holders.changed({"a": Held(1, MINE)})
    assert holders.changed({})


def test_where_it_cannot_be_written_nothing_happens(path: Path) -> None:
    note(path / "no such folder" / "holders", a=Held(1, MINE))


# -- real daemons ------------------------------------------------------------------------------------------------------

AVAILABLE = """
import sys
from types import SimpleNamespace
from expertd.daemon import __main__, machine
memory = SimpleNamespace(total=8_000_000_000, available=int(sys.argv.pop()))
machine.psutil = SimpleNamespace(virtual_memory=lambda: memory)
machine.cgroup_room = lambda root: None
sys.exit(__main__.main())
"""


@contextmanager
def daemon_with(home: Home, available: int) -> Iterator[subprocess.Popen[bytes]]:
    """One that finds so many bytes available."""
    command = [sys.executable, "-c", AVAILABLE, "--idle-exit", "600", str(available)]
    with home.daemon_log.open("ab") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
    try:
        wait_for(lambda: answers(home))
        yield started
    finally:
        end(started)


def answers(home: Home) -> bool:
    try:
        Connection(home.daemon_socket, "test", handshake_s=1.0).close()
    except DaemonNotRunning:
        return False
    return True


def auto(home: Home) -> int:
    with Connection(home.daemon_socket, "test") as connection:
        return connection.ask(SetBudget(budget=None), BudgetSet).budget


def test_a_daemon_that_comes_after_one_that_was_killed_finds_the_same_budget(home: Home, tmp_path: Path) -> None:
    model, available = write_checkpoint(tmp_path / "model", "qwen3_moe", hidden=128, expert_width=256), 3400 * MB
    with daemon_with(home, available) as first:
        assert ask_status(home).budget_bytes == 400 * MB
        with Program(model) as program:
            tokens = program.run(8)
            held = ask_status(home).used_bytes
            assert held > MB
            wait_for(lambda: Holders(home.daemon_holders).before == held)
            first.send_signal(signal.SIGKILL)
            first.wait()
            with daemon_with(home, available - held):
                assert ask_status(home).budget_bytes == 400 * MB
                wait_for(lambda: len(ask_status(home).models) == 1)
                wait_for(lambda: auto(home) == 400 * MB)  # until it has been copied it is there twice
                assert program.run(8) == tokens
        with daemon_with(home, available - held):
            assert ask_status(home).budget_bytes == 400 * MB - held
