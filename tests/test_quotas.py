"""Pools that give each other memory (``daemon.core.quotas``), and the core that carries it out."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policy.simulator import even_pools, replay
from benchmarks.policy.traffic import Event
from expertd.daemon.core import events, quotas
from expertd.daemon.core.plan import largest, plan_pools, smallest
from expertd.daemon.core.quotas import COPYING, STEP, WINDOW, Quotas, Size, step
from expertd.daemon.policy import EWMA, Forecast
from expertd.daemon.status import model_status
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import Layer, Manifest, Part
from tests.core_runner import Runner, model_of

LAYERS = 4


def step_of(quota: Quotas) -> tuple[int, int, int] | None:
    """The step between two pools of 100 bytes, which is made if it is due."""
    decided = step({number: Size(100, 10, 200, quota.saved(number)) for number in range(2)})
    if decided is not None:
        quota.begin_again()
    return decided


def fill(quota: Quotas, windows: int, **chances: float) -> None:
    """So many windows in which ``a`` and ``b`` (pools 0 and 1) evicted blocks of these chances."""
    for _ in range(windows):
        for number, chance in enumerate(chances.values()):
            if chance:
                quota.evicted(number, chance)
        assert quota.ran(WINDOW * LAYERS)


def test_time_to_ask_comes_once_a_window() -> None:
    quota = Quotas(LAYERS)
    assert [quota.ran(LAYERS) for _ in range(2 * WINDOW)] == 2 * ([False] * (WINDOW - 1) + [True])


def test_memory_goes_where_what_is_evicted_is_likely_to_be_used_and_only_when_that_has_paid_for_the_copies() -> None:
    quota = Quotas(LAYERS)
    size = int(STEP * 100)
    saved_in_a_window = size * 0.01 * WINDOW * LAYERS
    windows = int(COPYING * 200 / saved_in_a_window)
    fill(quota, windows, a=0.0, b=0.01)
    assert step_of(quota) is None
    fill(quota, 1, a=0.0, b=0.01)
    assert step_of(quota) == (0, 1, size)
    assert step_of(quota) is None, "what paid for one step pays for another"


def test_nothing_moves_between_pools_that_need_about_the_same_however_long_it_lasts() -> None:
    quota = Quotas(LAYERS)
    chance = random.Random(0)
    for _ in range(5000):
        fill(quota, 1, a=chance.uniform(0.001, 0.01), b=chance.uniform(0.001, 0.01))
        assert step_of(quota) is None


def test_a_policy_that_estimates_nothing_moves_nothing() -> None:
    quota = Quotas(LAYERS)
    fill(quota, 10_000, a=0.0, b=0.0)
    assert step_of(quota) is None


@settings(deadline=None, derandomize=True)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 50), st.integers(0, 200), st.integers(0, 200)).map(
            lambda three: Size(three[0] + three[1], three[0], sum(three))
        ),
        max_size=4,
    ),
    needs=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_a_step_leaves_everybody_within_bounds_and_takes_from_another(sizes: list[Size], needs: list[float]) -> None:
    quota = Quotas(LAYERS)
    for _ in range(50):
        for number, chance in enumerate(needs):
            quota.evicted(number, chance)
        quota.ran(WINDOW * LAYERS)
    sizes = [replace(size, saved=quota.saved(number)) for number, size in enumerate(sizes)]
    decided = step(dict(enumerate(sizes)))
    if decided is None:
        return
    giver, taker, size = decided
    assert giver != taker and size > 0
    assert needs[taker] > needs[giver]
    assert sizes[giver].now - size >= sizes[giver].fewest
    assert sizes[taker].now + size <= sizes[taker].most


# -- in the simulator --------------------------------------------------------------------------------------------------


def uneven(passes: int) -> list[list[Event]]:
    """Layers 0 and 1 use 24 experts as it comes, layers 2 and 3 the same four."""
    chance = random.Random(5)
    return [
        [Event(1, layer, chance.sample(range(24), 4) if layer < 2 else [0, 1, 2, 3]) for layer in range(LAYERS)]
        for _ in range(passes)
    ]


def test_slots_go_to_the_layers_that_need_them() -> None:
    traffic = uneven(3000)
    pools = even_pools(LAYERS, 2, 48)
    still = replay(traffic, Forecast(LAYERS, 32, 4), pools)
    moving = replay(traffic, Forecast(LAYERS, 32, 4), pools, experts=32)
    assert still.slots == [24, 24] and still.steps == 0
    assert moving.slots[0] >= 36 and sum(moving.slots) == 48
    assert moving.misses < 0.7 * still.misses
    assert moving.slots[0] - 24 <= moving.steps < 2 * (moving.slots[0] - 24), "steps went to and fro"


def test_no_step_is_made_by_policies_without_estimates() -> None:
    assert replay(uneven(500), EWMA(LAYERS, 32, 4), even_pools(LAYERS, 2, 48), experts=32).steps == 0


# -- in the core -------------------------------------------------------------------------------------------------------


def test_the_core_carries_steps_out_within_the_budget_and_counts_the_copies() -> None:
    """Blocks of two shapes; the layer with the larger ones needs room, the other does not."""
    manifest = model_of((1, 2, 1, 2))
    budget = int(0.4 * largest(manifest))
    runner = Runner(budget)
    model = runner.attach(1, manifest)
    before = {pool.layers: pool.layout.slots for pool in model.pools}
    assert set(before) == {(0, 2), (1, 3)}
    chance = random.Random(5)
    for _ in range(1500):
        for layer in range(4):
            runner.use(1, layer, chance.sample(range(100), 4) if layer in (1, 3) else [0, 1, 2, 3])
    after = {pool.layers: pool.layout.slots for pool in model.pools}
    assert after[1, 3] > 1.05 * before[1, 3]
    assert after[0, 2] < before[0, 2]
    assert runner.core.used <= budget
    assert not model.old
    largest_move = max(pool.layout.size for pool in model.pools)
    assert runner.most_used <= budget + largest_move, "both pools had a second generation at the same time"
    assert model.moves >= 2 and model.moves % 2 == 0
    assert model.copied > 0
    status = model_status(model)
    assert (status.moves, status.blocks_copied) == (model.moves, model.copied)


def test_the_core_moves_nothing_for_a_policy_without_estimates() -> None:
    manifest = model_of((1, 2))
    runner = Runner(int(0.4 * largest(manifest)), EWMA)
    model = runner.attach(1, manifest)
    for number in range(2000):
        runner.use(1, number % 2, [number % 7, 7 + number % 100] if number % 2 else [0, 1])
    assert model.moves == 0


def test_a_budget_that_changes_in_the_middle_of_a_step_leaves_no_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "COPYING", 0.0)
    manifest = model_of((1, 2))
    runner = Runner(int(0.4 * largest(manifest)))
    model = runner.attach(1, manifest)
    chance = random.Random(5)
    for _ in range(300):
        for layer in range(2):
            runner.use(1, layer, chance.sample(range(100), 4) if layer else [0, 1, 2, 3])
    assert model.moves > 0
    for pool in model.pools:
        pool.quota = pool.layout.size
    runner.feed(events.BudgetChanged(smallest(manifest)))
    assert [pool.quota for pool in model.pools] == [None, None]
    assert runner.core.used <= smallest(manifest)


# -- the beginning -----------------------------------------------------------------------------------------------------


def test_shallow_layers_begin_with_more() -> None:
    """A model whose slabs are too large for one pool: runs of neighbouring layers."""
    parts = (Part("up_proj.weight", "U32", (1536, 512), ("tensor",), (0,)),)
    manifest = Manifest("/m", "family", (), tuple(Layer(f"layers.{n}", 128, 8, parts) for n in range(94)))
    plans = plan_pools(manifest, int(0.6 * largest(manifest)))
    assert len(plans) > 2
    per_layer = [plan.layout.slots / len(plan.layers) for plan in plans]
    assert all(here > there for here, there in pairwise(per_layer))
    assert 1.05 < per_layer[0] / per_layer[-1] < 1.11
    everything = plan_pools(manifest, largest(manifest) + 10 * PAGE)
    assert sum(plan.layout.slots for plan in everything) == 94 * 128
