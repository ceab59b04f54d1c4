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

from expertd.clients.cli.budget import cache_holds
from expertd.daemon.holders import Held, Holders
from expertd.protocol.connection import Connection
from expertd.protocol.messages import BudgetSet, SetBudget
from expertd.protocol.paths import Home
from expertd.protocol.segments import Segment, create
from tests.conftest import answers, wait_for
from tests.programs import Program
from tools.factory import write_checkpoint
from tools.stage import ask_status, end

MB = 10**6
MINE = (os.getpid(),)


@pytest.fixture(autouse=True)
def held() -> Iterator[Segment]:
    """A segment that this process has mapped."""
    segment = create(f"/expertd-test-{os.getpid()}", 20 * MB)
    yield segment
    segment.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "holders"


def note(path: Path, **models: Held) -> None:
    holders = Holders(path)
    assert holders.changed(models)
    holders.write()


HOLDS = """
import os, sys
from expertd.protocol.segments import create
segment, small = (create(f"/expertd-test-{os.getpid()}", size) for size in (20_000_000, 4096))
print(flush=True)
for one in (segment, small):
    if input() != "let go":
        break
    one.close()
    print(flush=True)
sys.stdin.read()
"""


@contextmanager
def process() -> Iterator[subprocess.Popen[str]]:
    """One that lives inside the body, with a segment mapped until it is told to let go of it."""
    one = subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        tell(one, "")
        yield one
    finally:
        one.communicate("\n")


def tell(one: subprocess.Popen[str], what: str) -> None:
    """Say it, if it is anything, and wait for the answer."""
    assert one.stdin is not None and one.stdout is not None
    if what:
        one.stdin.write(f"{what}\n")
        one.stdin.flush()
    assert one.stdout.readline() == "\n"


def test_nobody_holds_anything_of_a_daemon_that_never_was(path: Path) -> None:
    assert Holders(path).before == 0


def test_what_living_processes_hold_counts(path: Path) -> None:
    with process() as other:
        note(path, a=Held(5 * MB, (*MINE, other.pid)), b=Held(7 * MB, (other.pid,)))
        holders = Holders(path)
        assert (holders.before, holders.awaited("b", but=MINE[0])) == (12 * MB, True)
    assert (holders.before, holders.awaited("b", but=MINE[0])) == (5 * MB, False)
    assert Holders(path).before == 5 * MB
    assert holders.changed({}), "worth noting"
    assert not holders.changed({})


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what others have mapped")
def test_what_a_process_has_let_go_counts_no_more(path: Path) -> None:
    with process() as other:
        note(path, b=Held(7 * MB, (other.pid,)))
        holders = Holders(path)
        assert (holders.before, holders.awaited("b", but=MINE[0])) == (7 * MB, True)
        tell(other, "let go")
        assert (holders.before, holders.awaited("b", but=MINE[0])) == (4096, True)
        tell(other, "let go")
        assert (holders.before, holders.awaited("b", but=MINE[0])) == (0, False)
        holders.write()
        assert json.loads(path.read_bytes()) == {"models": {}}


def test_nobody_is_waited_for_by_himself(path: Path) -> None:
    note(path, a=Held(5 * MB, MINE))
    assert not Holders(path).awaited("a", but=MINE[0])
    assert Holders(path).awaited("a", but=1)
    assert not Holders(path).awaited("b", but=1)


def test_what_is_noted_again_keeps_its_moment(path: Path) -> None:
    note(path, a=Held(5 * MB, MINE))
    told = json.loads(path.read_bytes())
    second = Holders(path)
    assert second.changed({"b": Held(1, MINE)})
    second.write()
    now = json.loads(path.read_bytes())
    assert now["models"]["a"] == told["models"]["a"]
    assert now["models"]["b"]["at"] > told["models"]["a"]["at"]


def test_a_process_that_began_later_is_another_one(path: Path) -> None:
    note(path, a=Held(5 * MB, MINE))
    told = json.loads(path.read_bytes())
    told["models"]["a"]["at"] -= 1e6
    path.write_text(json.dumps(told))
    assert Holders(path).before == 0


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"models": []}', '{"models": {"a": {"at": "x"}}}', "\xff"])
def test_a_note_that_is_none_tells_nothing(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    assert Holders(path).before == 0


def test_numbers_that_are_no_processes_tell_nothing(path: Path) -> None:
    held = {"size": 1, "pids": [-1, 9999999999999999999, 999999999]}
    path.write_text(json.dumps({"models": {"a": {"at": 1e300, "held": held}}}))
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
            assert cache_holds(home) == held > MB
            wait_for(lambda: Holders(home.daemon_holders).before == held)
            assert cache_holds(home) == held
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert cache_holds(home) == held
            with daemon_with(home, available - held):
                assert ask_status(home).budget_bytes == 400 * MB
                wait_for(lambda: len(ask_status(home).models) == 1)
                wait_for(lambda: auto(home) == 400 * MB)  # until it has been copied it is there twice
                assert program.run(8) == tokens
        with daemon_with(home, available - held):
            assert ask_status(home).budget_bytes == 400 * MB - held


def test_commands_count_what_the_daemon_counts(home: Home) -> None:
    home.prepare()
    note(home.daemon_holders, gone=Held(20 * MB, MINE))
    with daemon_with(home, 3380 * MB):
        assert (ask_status(home).budget_bytes, ask_status(home).used_bytes) == (400 * MB, 0)
        assert auto(home) == 400 * MB
        assert cache_holds(home) == 20 * MB
