"""Pools of one model that give each other memory (``daemon.core.quotas``), and the core that carries it out."""

from __future__ import annotations

import random
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policy.simulator import even_pools, replay
from benchmarks.policy.traffic import Event
from expertd.daemon.core import Core, events, instructions, quotas
from expertd.daemon.core.plan import largest, plan_pools, smallest
from expertd.daemon.core.quotas import COPYING, STEP, WINDOW, Quotas, Size
from expertd.daemon.policy import EWMA, Forecast, PolicyFactory
from expertd.daemon.status import model_status
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import Layer, Manifest, Part

LAYERS = 4
SIZE = Size(100, 10, 200)


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
    step = int(STEP * 100)
    saved_in_a_window = step * 0.01 * WINDOW * LAYERS
    windows = int(COPYING * 200 / saved_in_a_window)
    fill(quota, windows, a=0.0, b=0.01)
    assert quota.step({0: SIZE, 1: SIZE}) is None
    fill(quota, 1, a=0.0, b=0.01)
    assert quota.step({0: SIZE, 1: SIZE}) == (0, 1, step)
    assert quota.step({0: SIZE, 1: SIZE}) is None, "what paid for one step pays for another"


def test_nothing_moves_between_pools_that_need_about_the_same_however_long_it_lasts() -> None:
    quota = Quotas(LAYERS)
    chance = random.Random(0)
    for _ in range(5000):
        fill(quota, 1, a=chance.uniform(0.001, 0.01), b=chance.uniform(0.001, 0.01))
        assert quota.step({0: SIZE, 1: SIZE}) is None


def test_a_policy_that_estimates_nothing_moves_nothing() -> None:
    quota = Quotas(LAYERS)
    fill(quota, 10_000, a=0.0, b=0.0)
    assert quota.step({0: SIZE, 1: SIZE}) is None


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
    decided = quota.step(dict(enumerate(sizes)))
    if decided is None:
        return
    giver, taker, step = decided
    assert giver != taker and step > 0
    assert needs[taker] > needs[giver]
    assert sizes[giver].now - step >= sizes[giver].fewest
    assert sizes[taker].now + step <= sizes[taker].most


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


def model(pages: tuple[int, ...], experts: int = 128) -> Manifest:
    """A layer for each of ``pages``: the size of its blocks."""
    layers = tuple(
        Layer(f"layers.{n}", experts, 4, (Part("up_proj.weight", "U8", (size * PAGE,), ("tensor",), (0,)),))
        for n, size in enumerate(pages)
    )
    return Manifest("/m", "family", (), layers)


class Runner:
    """A core whose files, memory and one session do at once what they are asked to."""

    def __init__(self, manifest: Manifest, budget: int, policy: PolicyFactory = Forecast) -> None:
        self.core = Core(budget, policy)
        self.sequence = self.answers = 0
        self.most_used = 0
        self.feed(events.Attach(1, 100, "shm", manifest))
        self.model = self.core.models[manifest.key]

    def feed(self, event: events.Event) -> None:
        todo = deque([event])
        while todo:
            for out in self.core.handle(todo.popleft()):
                match out:
                    case instructions.CreatePool(segment):
                        todo.append(events.PoolCreated(segment))
                    case instructions.StartRead(_, segment, slot):
                        todo.append(events.ReadDone(segment, slot, PAGE))
                    case instructions.StartCopy(_, _, segment, slot):
                        todo.append(events.ReadDone(segment, slot, 0))
                    case instructions.AskAck(session, version):
                        todo.append(events.Ack(session, version, self.sequence))
                    case instructions.Move(session, info):
                        left = [pool for pool in self.model.old if pool.layers == tuple(info.layers)]
                        todo.extend(events.Released(session, pool.segment) for pool in left)
                    case instructions.Answer():
                        self.answers += 1
            self.most_used = max(self.most_used, self.core.used)

    def use(self, layer: int, experts: list[int]) -> None:
        """An event, again if the pool has moved meanwhile."""
        before = self.answers
        while self.answers == before:
            self.sequence += 1
            segment = self.model.pool_of_layer[layer].segment
            self.feed(events.Fetch(1, self.sequence, segment, layer, tuple(experts)))


def test_the_core_carries_steps_out_within_the_budget_and_counts_the_copies() -> None:
    """Blocks of two shapes; the layer with the larger ones needs room, the other does not."""
    manifest = model((1, 2, 1, 2))
    budget = int(0.4 * largest(manifest))
    runner = Runner(manifest, budget)
    before = {pool.layers: pool.layout.slots for pool in runner.model.pools}
    assert set(before) == {(0, 2), (1, 3)}
    chance = random.Random(5)
    for _ in range(1500):
        for layer in range(4):
            runner.use(layer, chance.sample(range(100), 4) if layer in (1, 3) else [0, 1, 2, 3])
    after = {pool.layers: pool.layout.slots for pool in runner.model.pools}
    assert after[1, 3] > 1.05 * before[1, 3]
    assert after[0, 2] < before[0, 2]
    assert runner.core.used <= budget
    assert not runner.model.old
    largest_move = max(pool.layout.size for pool in runner.model.pools)
    assert runner.most_used <= budget + largest_move, "both pools had a second generation at the same time"
    assert runner.model.moves >= 2 and runner.model.moves % 2 == 0
    assert runner.model.copied > 0
    status = model_status(runner.model)
    assert (status.moves, status.blocks_copied) == (runner.model.moves, runner.model.copied)


def test_the_core_moves_nothing_for_a_policy_without_estimates() -> None:
    manifest = model((1, 2))
    runner = Runner(manifest, int(0.4 * largest(manifest)), EWMA)
    for number in range(2000):
        runner.use(number % 2, [number % 7, 7 + number % 100] if number % 2 else [0, 1])
    assert runner.model.moves == 0


def test_a_budget_that_changes_in_the_middle_of_a_step_leaves_no_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quotas, "COPYING", 0.0)
    manifest = model((1, 2))
    runner = Runner(manifest, int(0.4 * largest(manifest)))
    chance = random.Random(5)
    for _ in range(300):
        for layer in range(2):
            runner.use(layer, chance.sample(range(100), 4) if layer else [0, 1, 2, 3])
    assert runner.model.moves > 0
    for pool in runner.model.pools:
        pool.quota = pool.layout.size
    runner.feed(events.BudgetChanged(smallest(manifest)))
    assert [pool.quota for pool in runner.model.pools] == [None, None]
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
