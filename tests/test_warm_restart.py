"""What a restart of the daemon costs: real daemons that end in order or are killed, and programs that go on.

Files and their moments are ``test_warm_record``'s.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from expertd.protocol.messages import ModelStatus
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tests.conftest import StartDaemon, wait_for
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
