"""What a restart of the daemon costs: real daemons that end in order or are killed, and programs that go on.

Files and their moments are ``test_warm_record``'s.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from expertd.daemon.core.slots import BACKGROUND_READS
from expertd.protocol.layout import base_layout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import ModelStatus, Ping, Pong, Released
from expertd.protocol.paths import Home
from expertd.worker.link import Link, MappedPool
from expertd.worker.manifest import load_lazily
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tests.programs import Program
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, end

SIZES: dict[str, Any] = {"hidden": 128, "expert_width": 256, "layers": 4, "n_experts": 16, "top_k": 2}
BLOCKS, SLOTS, TOKENS = 4 * 16, 32, 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("warm") / "model", "qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> Any:
    return load_lazily(model_path).manifest


def held(home: Home) -> ModelStatus:
    (model,) = ask_status(home).models
    return model


def test_after_a_restart_what_was_there_is_there_again_before_it_is_needed(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    budget = budget_for(manifest, SLOTS)
    daemon = start_daemon(str(budget))
    with Program(model_path, budget) as program:
        first = program.run(TOKENS)
        cold = held(home).misses
        program.run(TOKENS)
        before = held(home)
        assert before.misses > cold > 0
    end(daemon)
    start_daemon(str(budget))
    with Program(model_path, budget) as program:
        wait_for(lambda: held(home).resident_blocks == before.resident_blocks)
        there = held(home)
        assert there.recalled is not None
        assert there.recalled.back == there.recalled.blocks == before.resident_blocks
        assert there.bytes_read == before.resident_blocks * there.block_bytes
        assert (there.misses, there.evictions) == (0, 0)
        assert program.run(TOKENS) == first
        missed, warm = held(home).misses, before.misses - cold
        assert missed - warm < cold - missed, "it is nearer to what it was than to a cold start"
        wait_for(lambda: f"warm again: {SLOTS} of {SLOTS} blocks from the record of" in home.daemon_log.read_text())


def test_a_damaged_record_a_smaller_budget_and_no_wish_to_remember(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(str(budget_for(manifest, SLOTS)))
    with Program(model_path) as program:
        first = program.run(TOKENS)
    end(daemon)
    (kept,) = home.warmth.iterdir()
    whole = kept.read_bytes()

    daemon = start_daemon(str(budget_for(manifest, 12)))
    with Program(model_path) as program:
        wait_for(lambda: held(home).resident_blocks == 12)
        assert (held(home).evictions, held(home).warming) == (0, 0)
        assert program.run(TOKENS) == first
    end(daemon)

    kept.write_bytes(whole[:-9])
    daemon = start_daemon(str(budget_for(manifest, SLOTS)))
    with Program(model_path) as program:
        assert (held(home).resident_blocks, held(home).recalled) == (0, None)
        assert program.run(TOKENS) == first
    assert "the record of what was warm is not used: its checksum does not fit" in home.daemon_log.read_text()
    end(daemon)
    assert kept.read_bytes() != whole[:-9], "a good record takes the damaged one's place"

    kept.write_bytes(whole)
    daemon = start_daemon(str(budget_for(manifest, SLOTS)), "--no-remember")
    with Program(model_path) as program:
        assert program.run(TOKENS) == first
        assert held(home).recalled is None
    end(daemon)
    assert kept.read_bytes() == whole


def test_a_model_whose_files_were_changed_begins_cold(tmp_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", **SIZES)
    daemon = start_daemon()
    with Program(path) as program:
        program.run(TOKENS)
    end(daemon)
    (path / "model.safetensors").touch()
    start_daemon()
    with Program(path):
        assert held(home).recalled is None


def kill(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()
    daemon.wait()


def test_the_pool_of_a_killed_daemon_is_adopted_without_reading_a_byte(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    budget = budget_for(manifest, SLOTS)
    daemon = start_daemon(str(budget), "--no-remember")
    with Program(model_path, budget) as one, Program(model_path, budget) as two:
        first = one.run(TOKENS)
        assert two.run(TOKENS) == first
        there = held(home).resident_blocks
        for _ in range(2):  # what was adopted can be adopted again
            kill(daemon)
            daemon = start_daemon(str(budget), "--no-remember")
            wait_for(lambda: [len(model.sessions) for model in ask_status(home).models] == [2])
            wait_for(lambda: held(home).resident_blocks >= there)
            found = held(home)
            assert (found.resident_blocks, found.bytes_read, found.misses) == (there, 0, 0)
            assert found.recalled is not None and found.recalled.adopted == there
            # What was copied from counts until both have left it, and base weights are the old ones, which count.
            wait_for(lambda: held(home).pool_bytes <= budget - held(home).base_bytes < budget)
            assert found.base_read == 0
        assert (one.run(TOKENS), two.run(TOKENS)) == (first, first)


def test_killed_in_the_middle_of_traffic_nothing_is_read_but_what_is_asked_for_and_was_not_there(
    model_path: Path, manifest: Any, own_home: Home, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the answers are the same."""
    home = own_home
    # For the next daemon too, which the programs start if they are first.
    monkeypatch.setenv("EXPERTD_BUDGET", str(budget_for(manifest, BLOCKS - 8)))
    monkeypatch.setenv("EXPERTD_READ_AHEAD", "false")
    daemon = start_daemon(str(budget_for(manifest, BLOCKS - 8)))
    with Program(model_path) as one, Program(model_path) as two:
        expected = one.run(10 * TOKENS)
        assert two.run(TOKENS) == expected[:TOKENS]
        there = held(home).resident_blocks
        one.ask(10 * TOKENS)
        two.ask(10 * TOKENS)
        wait_for(lambda: any(session.decode_tokens for model in ask_status(home).models for session in model.sessions))
        kill(daemon)
        start_daemon(str(budget_for(manifest, BLOCKS - 8)))
        assert (one.answer(), two.answer()) == (expected, expected)
        found = held(home)
        assert found.recalled is not None
        assert there - found.misses <= found.recalled.adopted <= there
        assert found.bytes_read <= found.misses * found.block_bytes


def test_a_session_that_was_stopped_when_its_daemon_died_disturbs_nobody(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    budget = budget_for(manifest, SLOTS)
    daemon = start_daemon(str(budget))
    with Program(model_path, budget) as one, Program(model_path, budget) as two:
        first = one.run(TOKENS)
        assert two.run(TOKENS) == first
        os.kill(two.pid, signal.SIGSTOP)
        kill(daemon)
        start_daemon(str(budget))
        assert one.run(TOKENS) == first
        assert held(home).recalled is not None
        os.kill(two.pid, signal.SIGCONT)
        assert two.run(TOKENS) == first


@contextmanager
def stopped(program: Program) -> Iterator[None]:
    os.kill(program.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(program.pid, signal.SIGCONT)


def test_a_program_that_comes_before_those_that_outlive_the_daemon_does_not_cost_them_what_they_hold(
    tmp_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    """It has had base weights read for it when the other looks for a daemon; those that are there twice count twice."""
    model_path = write_checkpoint(tmp_path / "model", "qwen3_moe", **{**SIZES, "n_experts": 2 * SIZES["n_experts"]})
    manifest = load_lazily(model_path).manifest
    base = base_layout(manifest.base)[1]
    budget = budget_for(manifest, SLOTS) + base
    daemon = start_daemon(str(budget), "--no-remember")
    with ExitStack() as stack:
        one = stack.enter_context(Program(model_path, budget))
        first = one.run(TOKENS)
        there = held(home).resident_blocks
        with stopped(one):
            kill(daemon)
            start_daemon(str(budget), "--no-remember")
            two = stack.enter_context(Program(model_path, budget))
            assert (held(home).resident_blocks, held(home).base_bytes) == (0, base)
        wait_for(lambda: len(held(home).sessions) == 2)
        wait_for(lambda: held(home).pool_bytes <= budget - 2 * base)
        found = held(home)
        assert (found.base_bytes, found.bytes_read, found.misses) == (2 * base, 0, 0)
        assert [session.shares_base for session in found.sessions] == [True, False]
        # The pool has moved meanwhile, because of the base weights; what was on its way then is not there.
        assert min(there, SLOTS) - 2 * BACKGROUND_READS <= found.resident_blocks
        assert found.recalled is not None and found.recalled.adopted >= found.resident_blocks
        assert (one.run(TOKENS), two.run(TOKENS)) == (first, first)


@contextmanager
def attached(home: Home, manifest: Manifest, held: Sequence[MappedPool] = ()) -> Iterator[Link]:
    """A session that computes nothing, with experts alone, which hands ``held`` back."""
    link = Link(home, msgspec.structs.replace(manifest, base=()), "shm", held)
    try:
        yield link
    finally:
        link.hang_up()
        link.data.close()


def test_a_daemon_that_lives_does_not_take_its_own_pools(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    """A session that was cut off hands them back; what they hold changes, so nothing may be copied from them."""
    start_daemon(str(budget_for(manifest, SLOTS)), "--no-remember")
    with attached(home, manifest) as one, attached(home, manifest, one.pools) as again:
        assert [pool.segment for pool in again.pools] == [pool.segment for pool in one.pools]
        assert again.handed == set()
        found = held(home)
        assert found.recalled is None
        assert found.pool_bytes == sum(pool.layout.size for pool in one.pools)
    assert "handed back" not in home.daemon_log.read_text()


def test_what_two_sessions_hand_back_is_there_until_both_have_released_it(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(str(budget_for(manifest, SLOTS)), "--no-remember")
    with attached(home, manifest) as one:
        kill(daemon)
        start_daemon(str(budget_for(manifest, SLOTS)), "--no-remember")
        with attached(home, manifest, one.pools) as two, attached(home, manifest, one.pools) as three:
            old, new = (sum(pool.layout.size for pool in link.pools) for link in (one, two))
            assert two.handed == three.handed == {pool.segment for pool in one.pools}
            assert held(home).pool_bytes == old + new
            for link, there in ((two, old + new), (three, new)):
                for segment in link.handed:
                    link.control.send(Released(session=link.number, segment=segment))
                link.control.send(Ping(session=link.number))  # it is answered when they have been heard
                assert isinstance(link.control.receive(DEADLINE_S), Pong)
                assert held(home).pool_bytes == there


@pytest.mark.skipif(sys.platform != "linux", reason="another process's limits")
def test_where_there_is_no_memory_for_two_pools_programs_come_back_all_the_same(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    """The limit on a file's size stands for a full /dev/shm."""
    budget = budget_for(manifest, SLOTS)
    pool = budget - base_layout(manifest.base)[1]
    daemon = start_daemon(str(budget), "--no-remember")
    with Program(model_path, budget) as one:
        first = one.run(TOKENS)
        there = held(home).resident_blocks
        with stopped(one):
            kill(daemon)
            daemon = start_daemon(str(budget), "--no-remember")
            before = resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (pool - 1, before[1]))
        wait_for(lambda: bool(ask_status(home).models) and bool(held(home).sessions))
        small = held(home)
        assert 2 <= small.slots <= SLOTS // 2 < there
        wait_for(lambda: held(home).resident_blocks == small.slots)
        assert held(home).bytes_read == 0
        assert one.run(TOKENS) == first
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, before)
        with Program(model_path, budget) as two:
            wait_for(lambda: held(home).slots == SLOTS)
            assert (one.run(TOKENS), two.run(TOKENS)) == (first, first)


def test_with_a_smaller_budget_a_part_is_adopted(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(str(budget_for(manifest, SLOTS)))
    with Program(model_path) as program:
        first = program.run(TOKENS)
        kill(daemon)
        start_daemon(str(budget_for(manifest, 12)))
        wait_for(lambda: [model.resident_blocks for model in ask_status(home).models] == [12])
        assert held(home).bytes_read == 0
        assert program.run(TOKENS) == first
