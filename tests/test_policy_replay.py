"""The simulator that policies are judged by (``benchmarks.policy.simulator``): known figures, oracles, invariants."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policy.simulator import Pools, Replay, even_pools, replay
from benchmarks.policy.traffic import Event, Pass, passes_of
from expertd.clients.traces.replay import Events, belady, events_of, lru
from expertd.daemon.policy import EWMA, LRU, POLICIES, Block, Policy, PolicyFactory
from expertd.protocol.traces import Trace, TraceInfo, read_trace

ROOT = Path(__file__).parents[1]
DEVELOPMENT_TRACE = ROOT.parent / "shared" / "traces" / "gpt_oss_20b_dev.npz"

untimed = settings(deadline=None, derandomize=True)  # the machine may be busy
fewer = settings(untimed, max_examples=40)
every_policy = pytest.mark.parametrize("factory", POLICIES.values(), ids=POLICIES)


# -- figures that are known --------------------------------------------------------------------------------------------

LAYERS, EXPERTS, TOP_K = 24, 32, 4
TOKENS = 20_000

needs_trace = pytest.mark.skipif(
    not DEVELOPMENT_TRACE.exists(), reason="the traces for development are not in ../shared/traces"
)


@pytest.fixture(scope="module")
def development() -> Trace:
    """The tokens that the figures of the README beside the file are of."""
    trace = read_trace(DEVELOPMENT_TRACE)
    assert (trace.info.layers, trace.info.experts, trace.info.top_k) == (LAYERS, EXPERTS, TOP_K)
    return dataclasses.replace(trace, experts=trace.experts[:TOKENS], forward=trace.forward[:TOKENS])


@pytest.fixture(scope="module")
def by_number(development: Trace) -> list[Pass]:
    """As that README takes an event: a set, its experts in the order of their numbers.  Only LRU sees a difference."""
    passes = passes_of(development)
    return [[event._replace(experts=sorted(event.experts)) for event in each] for each in passes]


def slots_of(fraction: float) -> int:
    return round(fraction * LAYERS * EXPERTS)


def percent(done: Replay) -> float:
    assert done.hits + done.misses == TOKENS * LAYERS * TOP_K
    return round(100 * done.hit_rate, 1)


def quotas(slots: int) -> Pools:
    """A pool for each layer; what does not divide evenly goes to the first of them."""
    each, more = divmod(slots, LAYERS)
    return [(range(layer, layer + 1), each + (layer < more)) for layer in range(LAYERS)]


@needs_trace
@pytest.mark.parametrize(("fraction", "hits"), [(0.10, 0.0), (0.25, 60.6)])
def test_lru_in_one_pool_hits_what_is_known(by_number: list[Pass], fraction: float, hits: float) -> None:
    pools = [(range(LAYERS), slots_of(fraction))]
    assert percent(replay(by_number, LRU(LAYERS, EXPERTS, TOP_K), pools)) == hits


@needs_trace
def test_lru_in_a_pool_for_each_layer_hits_what_is_known(by_number: list[Pass]) -> None:
    assert percent(replay(by_number, LRU(LAYERS, EXPERTS, TOP_K), quotas(slots_of(0.15)))) == 48.3


@needs_trace
def test_ewma_in_one_pool_hits_what_is_known(by_number: list[Pass]) -> None:
    pools = [(range(LAYERS), slots_of(0.30))]
    assert percent(replay(by_number, EWMA(LAYERS, EXPERTS, TOP_K), pools)) == 74.8


@needs_trace
def test_belady_in_one_pool_hits_what_is_known(development: Trace) -> None:
    events = events_of(development)
    found = [belady(events, slots_of(fraction)) for fraction in (0.05, 0.50)]
    assert [round(100 * hits / (TOKENS * LAYERS * TOP_K), 1) for hits in found] == [32.8, 96.4]


# -- traffic -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Passes of a small model, every event of which fits into ``slots``, or none has to if that is 0."""

    layers: int
    experts: int
    top_k: int
    slots: int
    passes: list[Pass]

    def flat(self) -> Events:
        return [
            [layer * self.experts + expert for expert in experts] for each in self.passes for _, layer, experts in each
        ]

    @property
    def looked(self) -> int:
        return sum(map(len, self.flat()))

    def one_pool(self, factory: PolicyFactory) -> Replay:
        return replay(self.passes, factory(self.layers, self.experts, self.top_k), [(range(self.layers), self.slots)])


@st.composite
def traffics(
    draw: st.DrawFn, *, fits: bool = True, most_experts: int = 8, passes: int = 25, most_layers: int = 3
) -> Traffic:
    layers, experts = draw(st.integers(1, most_layers)), draw(st.integers(2, most_experts))
    top_k = draw(st.integers(1, min(4, experts)))
    sizes = st.one_of(st.just(top_k), st.integers(1, experts))
    order = st.permutations(range(experts))

    def one_pass(session: int, orders: Sequence[list[int]], sizes: Sequence[int]) -> Pass:
        cut = [order[:size] for order, size in zip(orders, sizes, strict=True)]
        return [Event(session, layer, chosen) for layer, chosen in enumerate(cut)]

    each = st.builds(one_pass, st.integers(1, 2), st.tuples(*[order] * layers), st.tuples(*[sizes] * layers))
    run = draw(st.lists(each, min_size=1, max_size=passes))
    largest = max(len(event.experts) for each in run for event in each)
    return Traffic(layers, experts, top_k, draw(st.integers(largest if fits else 1, layers * experts)), run)


# -- oracles -----------------------------------------------------------------------------------------------------------


def best_possible(events: Events, capacity: int) -> int:
    """The most hits of all ways to evict that admit every miss: every choice of victims is tried, at every event."""

    @functools.cache
    def most(now: int, cached: frozenset[int]) -> int:
        if now == len(events):
            return 0
        event = frozenset(events[now])
        short = max(0, len(cached | event) - capacity)
        outcomes = [most(now + 1, (cached | event) - frozenset(out)) for out in combinations(cached - event, short)]
        return len(cached & event) + max(outcomes)

    return most(0, frozenset())


def farthest_first(events: Events, capacity: int) -> int:
    """Hits if the block goes whose next use is farthest, found by looking through all that is to come."""
    sets = [set(event) for event in events]
    cached: set[int] = set()
    hits = 0
    for now, event in enumerate(sets):
        hits += len(cached & event)
        cached |= event
        while len(cached) > capacity:
            candidates = cached - event
            for later in sets[now + 1 :]:
                if len(candidates) > 1 and candidates - later:
                    candidates -= later
            cached.discard(min(candidates))
    return hits


small = traffics(most_experts=3, most_layers=2, passes=6)


@untimed
@given(traffic=small)
def test_nothing_that_admits_every_miss_is_better_than_belady(traffic: Traffic) -> None:
    assert belady(traffic.flat(), traffic.slots) == best_possible(traffic.flat(), traffic.slots)


@fewer
@given(seed=st.integers(0, 1 << 30), layers=st.integers(1, 4), capacity=st.integers(4, 40))
def test_belady_evicts_what_is_used_farthest_from_now(seed: int, layers: int, capacity: int) -> None:
    """As traffic is: some experts are used more often than others, and each token uses much that the last one did."""
    chance = random.Random(seed)
    events: Events = []
    for _ in range(60):
        for layer in range(layers):
            weighted = [layer * 12 + min(chance.randrange(12), chance.randrange(12)) for _ in range(4)]
            events.append(list(dict.fromkeys(weighted)))
    assert belady(events, capacity) == farthest_first(events, capacity) >= lru(events, capacity)


@every_policy
@fewer
@given(traffic=traffics())
def test_no_policy_hits_more_than_belady(factory: PolicyFactory, traffic: Traffic) -> None:
    assert traffic.one_pool(factory).hits <= belady(traffic.flat(), traffic.slots)


@untimed
@given(traffic=traffics())
def test_lru_in_the_simulator_is_that_of_the_other_replay(traffic: Traffic) -> None:
    assert traffic.one_pool(LRU).hits == lru(traffic.flat(), traffic.slots)


@untimed
@given(traffic=traffics())
def test_lru_in_a_pool_for_each_layer_is_as_many_replays_of_one_layer(traffic: Traffic) -> None:
    slots = max(len(event.experts) for each in traffic.passes for event in each)
    pools = [(range(layer, layer + 1), slots) for layer in range(traffic.layers)]
    done = replay(traffic.passes, LRU(traffic.layers, traffic.experts, traffic.top_k), pools)
    for layer in range(traffic.layers):
        of_layer = traffic.flat()[layer :: traffic.layers]
        assert done.layers[layer].hits == lru(of_layer, slots)


def ewma_of_the_formula(traffic: Traffic) -> int:
    """Hits if that goes whose ``1/(p + 1e-4) + ((layer of block - layer now - 1) mod L) / L`` is largest.

    ``p`` is a use rate per token with alpha .05: it ages at the beginning of each token, in all layers.
    """
    rates: dict[Block, float] = dict.fromkeys(
        ((layer, expert) for layer in range(traffic.layers) for expert in range(traffic.experts)), 0.0
    )
    held: set[Block] = set()
    hits = 0
    for each in traffic.passes:
        for block in rates:
            rates[block] *= 1 - 0.05
        for _, now, experts in each:
            event = {(now, expert) for expert in experts}
            hits += len(held & event)
            for block in event:
                rates[block] += 0.05

            def worth(block: Block, now: int = now) -> tuple[float, int, int]:
                layer, expert = block
                phase = (layer - now - 1) % traffic.layers / traffic.layers
                return 1 / (rates[block] + 1e-4) + phase, -layer, -expert

            while held - event and len(held | event) > traffic.slots:
                held.remove(max(held - event, key=worth))
            held |= event
    return hits


@untimed
@given(traffic=traffics())
def test_ewma_is_its_formula(traffic: Traffic) -> None:
    assert traffic.one_pool(EWMA).hits == ewma_of_the_formula(traffic)


# -- invariants --------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A policy that sees to it that the simulator keeps its side of the contract, and notes what happens."""

    policy: Policy
    pools: Sequence[tuple[range, int]]
    resident: set[Block] = field(default_factory=set)
    observed: list[Event] = field(default_factory=list)
    resident_before: list[set[Block]] = field(default_factory=list)
    removals: int = 0

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        self.check_pools()
        assert len(set(experts)) == len(experts) > 0
        self.observed.append(Event(session, layer, list(experts)))
        self.resident_before.append(set(self.resident))
        self.policy.observe(session, layer, experts)

    def ended(self, session: int) -> None:
        self.policy.ended(session)

    def admitted(self, block: Block) -> None:
        _, layer, experts = self.observed[-1]
        assert block not in self.resident
        assert block in {(layer, expert) for expert in experts}, "what nobody looked up was admitted"
        self.resident.add(block)
        self.policy.admitted(block)

    def removed(self, block: Block) -> None:
        self.resident.remove(block)
        self.removals += 1
        self.policy.removed(block)

    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        _, layer, experts = self.observed[-1]
        assert count > 0
        ((members, _),) = [pool for pool in self.pools if layer in pool[0]]
        assert list(layers) == list(members), "victims of other layers than the pool's"
        for block in self.resident:
            assert evictable(block) == (block not in {(layer, expert) for expert in experts})
        return self.policy.victims(layers, count, evictable)

    def check_pools(self) -> None:
        for members, slots in self.pools:
            assert sum(layer in members for layer, _ in self.resident) <= slots


@st.composite
def pools_of(draw: st.DrawFn, layers: int, most: int) -> Pools:
    """Any division of the layers among pools of any size."""
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1)))) if layers > 1 else []
    return [(range(*ends), draw(st.integers(1, most))) for ends in pairwise([0, *cuts, layers])]


@every_policy
@fewer
@given(traffic=traffics(fits=False), data=st.data())
def test_the_simulator_keeps_its_side_of_the_contract_and_counts_right(
    factory: PolicyFactory, traffic: Traffic, data: st.DataObject
) -> None:
    pools = data.draw(pools_of(traffic.layers, traffic.experts * 2))
    watched = Watched(factory(traffic.layers, traffic.experts, traffic.top_k), pools)
    done = replay(traffic.passes, watched, pools)
    watched.check_pools()
    assert done.hits + done.misses == traffic.looked
    assert len(done.layers) == traffic.layers
    for layer, counts in enumerate(done.layers):
        of_layer = [event for each in traffic.passes for event in each if event.layer == layer]
        assert counts.hits + counts.misses == sum(len(event.experts) for event in of_layer)
        left = sum(block[0] == layer for block in watched.resident)
        assert counts.evictions == counts.misses - left
    assert sum(counts.evictions for counts in done.layers) == watched.removals
    hits = sum(
        (layer, expert) in before
        for (_, layer, experts), before in zip(watched.observed, watched.resident_before, strict=True)
        for expert in experts
    )
    assert done.hits == hits


@untimed
@given(traffic=traffics(fits=False), data=st.data())
def test_an_event_with_more_blocks_than_slots_is_computed_by_groups_residents_first(
    traffic: Traffic, data: st.DataObject
) -> None:
    pools = data.draw(pools_of(traffic.layers, traffic.experts))
    watched = Watched(LRU(traffic.layers, traffic.experts, traffic.top_k), pools)
    replay(traffic.passes, watched, pools)
    observed = list(zip(watched.observed, watched.resident_before, strict=True))
    for session, layer, experts in (event for each in traffic.passes for event in each):
        (slots,) = [slots for members, slots in pools if layer in members]
        before = observed[0][1]
        groups = [observed.pop(0)[0] for _ in range(-(-len(experts) // slots))]
        assert all((group.session, group.layer) == (session, layer) for group in groups)
        assert all(len(group.experts) == slots for group in groups[:-1])
        if len(groups) == 1:
            assert groups[0].experts == experts  # in the router's order
        else:
            together = [expert for group in groups for expert in group.experts]
            assert sorted(together) == sorted(experts)
            there = [(layer, expert) in before for expert in together]
            assert there == sorted(there, reverse=True)
    assert not observed


@every_policy
@fewer
@given(traffic=traffics())
def test_in_pools_that_hold_everything_each_block_misses_once(factory: PolicyFactory, traffic: Traffic) -> None:
    everything = dataclasses.replace(traffic, slots=traffic.layers * traffic.experts)
    done = everything.one_pool(factory)
    assert done.misses == len({block for event in traffic.flat() for block in event})
    assert sum(counts.evictions for counts in done.layers) == 0


def test_a_group_may_evict_what_an_earlier_one_of_its_event_used() -> None:
    """Two slots: 5; then 5 and 0, and 1 in the place of 0; then 1; then 0 in the place of 5."""
    passes = [[Event(1, 0, experts)] for experts in ([5], [0, 1, 5], [1], [0])]
    done = replay(passes, LRU(1, 8, 1), [(range(1), 2)], timed=True)
    assert (done.hits, done.misses, done.layers[0].evictions) == (2, 4, 2)
    assert len(done.seconds) == 5
    assert done.hit_rate == 2 / 6


def test_a_policy_that_names_too_few_victims_is_found_out() -> None:
    class Miser(LRU):
        def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
            return super().victims(layers, count - 1, evictable)

    passes = [[Event(1, 0, [expert])] for expert in range(3)]
    with pytest.raises(AssertionError, match="fewer victims"):
        replay(passes, Miser(1, 4, 1), [(range(1), 2)])


@given(layers=st.integers(1, 60), data=st.data())
def test_even_pools_hold_all_layers_and_all_slots_as_evenly_as_can_be(layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers))
    slots = data.draw(st.integers(count, 4000))
    pools = even_pools(layers, count, slots)
    assert [layer for members, _ in pools for layer in members] == list(range(layers))
    assert sum(size for _, size in pools) == slots
    for sizes in ([len(members) for members, _ in pools], [size for _, size in pools]):
        assert max(sizes) - min(sizes) <= 1


@untimed
@given(traffic=traffics(most_layers=2), data=st.data())
def test_the_passes_of_a_trace_are_the_events_of_the_other_replay(traffic: Traffic, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    tokens = sum(lengths)
    chance = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    shape = tokens, traffic.layers, traffic.top_k
    trace = Trace(
        TraceInfo(layers=traffic.layers, experts=traffic.experts, top_k=traffic.top_k, tokens=tokens),
        experts=chance.integers(0, traffic.experts, shape, np.uint8),
        candidates=None,
        scores=None,
        seq_id=np.zeros(tokens, np.uint32),
        pos=np.arange(tokens, dtype=np.uint32),
        forward=np.repeat(np.arange(len(lengths), dtype=np.uint32), lengths),
        phase=np.ones(tokens, np.uint8),
    )
    passes = passes_of(trace, session=3)
    assert [[event.layer for event in each] for each in passes] == [list(range(traffic.layers))] * len(lengths)
    assert {event.session for each in passes for event in each} == {3}
    flat = [[event.layer * traffic.experts + expert for expert in event.experts] for each in passes for event in each]
    assert flat == events_of(trace)


def test_a_warm_start_counts_only_what_comes_after() -> None:
    passes = [[Event(0, layer, [token % 3, 3 + token % 5]) for layer in range(2)] for token in range(60)]
    pools = even_pools(2, 1, 12)
    cold, warm = replay(passes, LRU(2, 8, 2), pools), replay(passes, LRU(2, 8, 2), pools, before=passes)
    twice = replay(passes + passes, LRU(2, 8, 2), pools)
    assert warm.hits + cold.hits == twice.hits
    assert warm.hits + warm.misses == cold.hits + cold.misses
    assert warm.misses < cold.misses
