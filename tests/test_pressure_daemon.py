"""A running daemon under memory pressure that a script plays: what it gives back, says and refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import expertd
from expertd.protocol.connection import Connection
from expertd.protocol.errors import ModelInUse, ModelNotLoaded
from expertd.protocol.layout import base_layout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import BudgetSet, SetBudget, Unload, Unloaded
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tests.conftest import wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon

PROMPT = list(range(3, 20))
SLOTS = 48


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pressure") / "model", "qwen3_moe", hidden=128, expert_width=256)


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> Manifest:
    return load_lazily(model_path).manifest


@pytest.fixture(scope="module")
def base(manifest: Manifest) -> int:
    """What base weights take, which is not given back while a session has them."""
    return base_layout(manifest.base)[1]


def said(model: Any, tokens: int) -> list[int]:
    """The tokens that ``model`` says."""
    return [int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=tokens)]


def plain(model_path: Path, tokens: int) -> list[int]:
    from mlx_lm.utils import load_model

    model, _ = load_model(model_path)
    return said(model, tokens)


@dataclass
class Scripted:
    """A daemon whose machine is as a script says, with a model loaded from it in this process."""

    script: Path
    budget: int
    model: Any

    def say(self, level: str) -> None:
        """From now on the machine is at ``level``."""
        self.script.write_text(f"0 {level} played by a test\n")


@pytest.fixture
def scripted(home: Home, model_path: Path, manifest: Manifest, tmp_path: Path) -> Iterator[Scripted]:
    """One that is at ease so far, with room for SLOTS blocks."""
    script, budget = tmp_path / "script", budget_for(manifest, SLOTS)
    script.write_text("0 normal\n")
    with running_daemon(home, budget, "--simulate-pressure", str(script)):
        model, _ = expertd.load(model_path)
        yield Scripted(script, budget, model)


def test_what_is_given_back_at_critical_is_gone_and_tokens_stay_right(
    home: Home, model_path: Path, scripted: Scripted, base: int
) -> None:
    expected = plain(model_path, 60)
    assert said(scripted.model, 60) == expected
    before = ask_status(home)
    assert (before.pressure, before.limit_bytes, before.journal) == ("normal", scripted.budget, [])
    scripted.say("critical")
    wait_for(lambda: ask_status(home).pressure == "critical")
    assert said(scripted.model, 60) == expected
    wait_for(lambda: ask_status(home).used_bytes == ask_status(home).limit_bytes)
    after = ask_status(home)
    assert after.limit_bytes - base < (before.used_bytes - base) / 4
    assert after.budget_bytes == scripted.budget
    (entry,) = after.journal
    assert (entry.pressure, entry.before_bytes, entry.after_bytes) == ("critical", scripted.budget, after.limit_bytes)
    assert "played by a test" in entry.why
    assert abs(entry.at - time.time()) < 600
    assert said(scripted.model, 60) == expected


@pytest.mark.parametrize("tokens", [0, 20])
def test_a_worker_that_has_nothing_to_do_gives_back_too(
    home: Home, model_path: Path, scripted: Scripted, base: int, tokens: int
) -> None:
    """Nobody asks it anything, before or after its first answer; but the daemon asks whether it lives."""
    said(scripted.model, tokens)
    scripted.say("critical")
    wait_for(lambda: ask_status(home).pressure == "critical")
    wait_for(lambda: ask_status(home).used_bytes == ask_status(home).limit_bytes)
    assert ask_status(home).limit_bytes - base < (scripted.budget - base) / 4
    assert said(scripted.model, 20) == plain(model_path, 20)


def test_at_a_warning_it_gives_back_a_step_and_copies_what_stays(
    home: Home, model_path: Path, scripted: Scripted
) -> None:
    said(scripted.model, 60)
    scripted.say("warning")
    wait_for(lambda: bool(ask_status(home).journal))
    scripted.say("normal")
    wait_for(lambda: ask_status(home).pressure == "normal")
    assert said(scripted.model, 60) == plain(model_path, 60)
    wait_for(lambda: ask_status(home).used_bytes <= ask_status(home).limit_bytes)
    status = ask_status(home)
    assert scripted.budget / 2 < status.limit_bytes < scripted.budget
    assert status.models[0].blocks_copied > 0


def test_at_critical_a_model_can_be_loaded_with_the_least_that_it_needs(
    home: Home, model_path: Path, manifest: Manifest, base: int, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("0 critical played by a test\n")
    with running_daemon(home, budget_for(manifest, SLOTS), "--simulate-pressure", str(script)):
        wait_for(lambda: ask_status(home).limit_bytes == 0)
        model, _ = expertd.load(model_path)
        assert said(model, 20) == plain(model_path, 20)
        wait_for(lambda: ask_status(home).limit_bytes > 0)
        status = ask_status(home)
        assert status.used_bytes == status.limit_bytes < base + (budget_for(manifest, SLOTS) - base) / 4
        assert status.models[0].slots == manifest.layers[0].top_k


def test_a_model_that_nobody_uses_can_be_unloaded_and_one_in_use_not(
    home: Home, model_path: Path, manifest: Manifest
) -> None:
    with running_daemon(home, budget_for(manifest, SLOTS)), Connection(home.daemon_socket, "test") as connection:
        with pytest.raises(ModelNotLoaded, match="what it holds: none"):
            connection.ask(Unload(model="model"), Unloaded)
        model, _ = expertd.load(model_path)
        said(model, 4)
        with pytest.raises(ModelInUse, match="is used by process"):
            connection.ask(Unload(model="model"), Unloaded)
        expertd.unload(model)
        wait_for(lambda: not ask_status(home).models[0].sessions)
        held = ask_status(home).used_bytes
        assert held > 0
        answer = connection.ask(Unload(model=str(model_path.resolve())), Unloaded)
        assert answer.bytes == held
        wait_for(lambda: ask_status(home).used_bytes == 0)
        assert ask_status(home).models == []


def test_a_model_that_nobody_uses_goes_after_its_time(home: Home, model_path: Path, manifest: Manifest) -> None:
    with running_daemon(home, budget_for(manifest, SLOTS), "--keep-alive", "0.5"):
        model, _ = expertd.load(model_path)
        mx.eval(model.parameters())
        expertd.unload(model)
        wait_for(lambda: ask_status(home).models == [])


def test_a_budget_of_nothing_named_is_what_the_machine_can_spare(home: Home) -> None:
    with running_daemon(home, "auto"), Connection(home.daemon_socket, "test") as connection:
        found = ask_status(home).budget_bytes
        assert found >= 256_000_000
        connection.ask(SetBudget(budget=300_000_000), BudgetSet)
        assert ask_status(home).budget_bytes == ask_status(home).limit_bytes == 300_000_000
        answer = connection.ask(SetBudget(budget=None), BudgetSet)
        assert answer.before == 300_000_000
        assert answer.budget == ask_status(home).budget_bytes >= 256_000_000
