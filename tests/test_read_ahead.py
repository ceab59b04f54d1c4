"""Reading ahead, end to end: real daemons, workers and files.  Whatever is read when, the numbers are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import expertd
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import AheadStatus
from expertd.protocol.paths import Home
from expertd.worker.attach import Session
from expertd.worker.load import events_of, session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.routers import Foresight
from tests.conftest import StartDaemon
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

DEMO = Path(__file__).parents[1] / "models" / "demo"
SIZES: dict[str, Any] = {"hidden": 128, "expert_width": 256, "layers": 4, "n_experts": 32, "top_k": 4}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("ahead") / "model", "qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> Manifest:
    found: Manifest = load_lazily(model_path).manifest
    return found


def prompt(number: int, length: int = 200) -> Any:
    return mx.array(np.random.default_rng(number).integers(3, 512, (1, length)))


@pytest.fixture(scope="module")
def plain(model_path: Path) -> Any:
    return load_model(model_path)[0]


def of(kind: str, home: Home) -> AheadStatus:
    (model,) = ask_status(home).models
    return next(status for status in model.ahead if status.kind == kind)


class Watched:
    """What a session fetches: for each Fetch how many blocks, and how many follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fetches: list[tuple[int, int]] = []
        fetch = Session.fetch

        def watched(session: Session, pool: Any, layer: int, experts: Any, then: Any = (), *rest: Any) -> Any:
            self.fetches.append((len(experts), len(then)))
            return fetch(session, pool, layer, experts, then, *rest)

        monkeypatch.setattr(Session, "fetch", watched)


def test_a_prompt_is_computed_in_groups_while_the_rest_is_read_and_is_bit_equal(
    model_path: Path, manifest: Manifest, plain: Any, home: Home, start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    start_daemon(str(budget_for(manifest, 32)))
    model, _ = expertd.load(model_path)
    watched = Watched(monkeypatch)
    for number in range(3):
        assert mx.array_equal(model(prompt(number)), plain(prompt(number)))
    assert any(then for _, then in watched.fetches)
    assert of("prompt", home).useful > 0.8
    assert of("prompt", home).useful_bytes > 0
    expertd.unload(model)


def test_a_daemon_that_does_not_read_ahead_has_events_fetched_whole(
    model_path: Path, manifest: Manifest, plain: Any, home: Home, start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    start_daemon(str(budget_for(manifest, 32)), "--no-read-ahead")
    model, _ = expertd.load(model_path)
    watched = Watched(monkeypatch)
    assert mx.array_equal(model(prompt(1)), plain(prompt(1)))
    assert watched.fetches
    assert not any(then for _, then in watched.fetches)
    (status,) = ask_status(home).models
    assert not any(kind.announced for kind in status.ahead)
    expertd.unload(model)


@pytest.mark.parametrize("slots", [4, 9, 20])
def test_groups_that_must_share_a_small_pool_are_bit_equal(
    slots: int, model_path: Path, manifest: Manifest, plain: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, slots)))
    model, _ = expertd.load(model_path)
    assert mx.array_equal(model(prompt(1)), plain(prompt(1)))
    expertd.unload(model)


def test_an_event_that_is_left_between_its_groups_spoils_nothing(
    model_path: Path, manifest: Manifest, plain: Any, home: Home, start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A Ctrl-C between two groups: the daemon must not go on to believe that the session reads its leases only."""
    start_daemon(str(budget_for(manifest, 16)))
    model, _ = expertd.load(model_path)
    session = session_of(model)
    fetch = Session.fetch
    left = 0

    def interrupted(session: Session, pool: Any, layer: int, experts: Any, then: Any = (), *rest: Any) -> Any:
        nonlocal left
        found = fetch(session, pool, layer, experts, then, *rest)
        if then and left < 3:
            left += 1
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Session, "fetch", interrupted)
    for number in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(prompt(number))
        assert session.leases_only
    for number in range(3):
        assert mx.array_equal(model(prompt(number, 3)), plain(prompt(number, 3)))
        assert not session.leases_only
    expertd.unload(model)


@pytest.mark.parametrize("tokens", [1, 100])
def test_after_a_promise_to_read_leases_only_the_next_event_is_fetched_though_all_is_resident(
    tokens: int, model_path: Path, manifest: Manifest, plain: Any, home: Home, start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Only then the daemon knows that tables are looked up again: until then it may fill slots without an ack."""
    start_daemon(str(budget_for(manifest, 4 * 32 - 1)))
    model, _ = expertd.load(model_path)
    text = mx.array([[7] * tokens])  # which needs few experts
    for _ in range(3):
        mx.eval(model(text))  # all that it needs is resident now, and the last promise has ended
    session = session_of(model)
    watched = Watched(monkeypatch)
    mx.eval(model(text))
    assert watched.fetches == []
    session.leases_only = True
    assert mx.array_equal(model(text), plain(text))
    assert len(watched.fetches) >= 1
    expertd.unload(model)


def test_a_guess_that_cannot_be_made_is_not_made(
    model_path: Path, manifest: Manifest, plain: Any, home: Home, start_daemon: StartDaemon
) -> None:
    """Some models have their experts work on a projection of what their routers are given."""
    start_daemon(str(budget_for(manifest, 32)))
    model, _ = expertd.load(model_path)
    for parts in events_of(model).layers:
        parts.foresight = Foresight(nn.Linear(48, 32), None, 4)
    assert mx.array_equal(model(prompt(1)), plain(prompt(1)))
    assert of("prompt", home).announced == 0
    expertd.unload(model)


def test_the_next_layers_routers_foresee_what_a_trained_model_uses(home: Home, start_daemon: StartDaemon) -> None:
    """Several times better than a predictor without knowledge, and the answer is that of plain mlx-lm."""
    demo = load_lazily(DEMO).manifest
    start_daemon(str(budget_for(demo, 48)))
    model, tokenizer = expertd.load(DEMO)
    text = (DEMO / "held_out" / "prose.txt").read_text(encoding="utf-8")
    start = mx.array(tokenizer.encode(text[:300]))
    answer = [token for token, _ in generate_step(start, model, max_tokens=120)]
    found = {kind.kind: kind for kind in ask_status(home).models[0].ahead}
    expertd.unload(model)
    assert answer == [token for token, _ in generate_step(start, load_model(DEMO)[0], max_tokens=120)]
    for kind in ("next layer", "second next layer"):
        assert found[kind].announced > 64
        assert found[kind].useful > 2 * found[kind].shuffled
