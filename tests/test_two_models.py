"""Two models in use at once under a budget for one, in a real daemon: both say what plain mlx-lm says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import expertd
from expertd.protocol.errors import BudgetTooSmall
from expertd.protocol.layout import base_layout
from expertd.protocol.messages import BudgetSet, SetBudget
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect
from expertd.worker.manifest import load_lazily
from tests.conftest import wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon

PROMPT = list(range(3, 20))
TOKENS = 40
SLOTS = 48


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("two")
    sizes = {"hidden": 128, "expert_width": 256}
    return [write_checkpoint(folder / name, "qwen3_moe", seed=seed, **sizes) for seed, name in enumerate("ab")]


@pytest.fixture
def budget(home: Home, paths: list[Path]) -> Iterator[int]:
    """A daemon with room for SLOTS blocks of either model, and the base weights of both."""
    manifest = load_lazily(paths[0]).manifest
    size = budget_for(manifest, SLOTS) + base_layout(manifest.base)[1]
    with running_daemon(home, size):
        yield size


def tokens(model: object) -> Iterator[int]:
    return (int(token) for token, _ in generate_step(mx.array(PROMPT), model, max_tokens=TOKENS))


def plain(path: Path) -> list[int]:
    return list(tokens(load_model(path)[0]))


def test_the_second_one_comes_while_the_first_has_everything_and_both_speak_in_turns(
    home: Home, paths: list[Path], budget: int
) -> None:
    expected = [plain(path) for path in paths]
    assert expected[0] != expected[1]
    first, _ = expertd.load(paths[0])
    assert list(tokens(first)) == expected[0]
    assert ask_status(home).models[0].slots == SLOTS
    began = tokens(first)
    said: list[list[int]] = [[next(began)], []]
    second, _ = expertd.load(paths[1])
    for here, there in zip_longest(began, tokens(second)):
        said[0] += [] if here is None else [here]
        said[1] += [] if there is None else [there]
    assert said == expected
    wait_for(lambda: ask_status(home).used_bytes <= budget)
    slots = [model.slots for model in ask_status(home).models]
    assert max(slots) - min(slots) <= 2 and sum(slots) >= SLOTS - 4
    assert list(tokens(first)) == expected[0] and list(tokens(second)) == expected[1]


def test_one_that_does_not_fit_beside_the_first_says_what_would_help_and_does_no_harm(
    home: Home, paths: list[Path], budget: int
) -> None:
    first, _ = expertd.load(paths[0])
    with connect(home, "cli") as connection:
        connection.ask(SetBudget(budget=budget_for(load_lazily(paths[0]).manifest, 4)), BudgetSet)
    assert list(tokens(first)) == plain(paths[0])
    before = ask_status(home)
    with pytest.raises(BudgetTooSmall, match="models in use need at least"):
        expertd.load(paths[1])
    assert [model.slots for model in ask_status(home).models] == [model.slots for model in before.models]
    assert list(tokens(first)) == plain(paths[0])
