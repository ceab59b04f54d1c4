"""What every eviction policy must do (``daemon.policy.base``), as one suite over all of them; LRU's order; Forecast.

How good a policy's choices are is measured by the benchmarks, and that it is quick enough too.  Here they have to be
allowed, and Forecast's have to be what a user would expect in traffic that is easy to understand.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policy.footprint import arrays_of, bytes_of_arrays, things_of
from expertd.daemon.policy import LRU, POLICIES, Block, Forecast, Policy, PolicyFactory

every_policy = pytest.mark.parametrize("factory", POLICIES.values(), ids=POLICIES)


@dataclass(frozen=True)
class Model:
    layers: int
    experts: int
    top_k: int

    @property
    def blocks(self) -> list[Block]:
        return [(layer, expert) for layer in range(self.layers) for expert in range(self.experts)]


# -- histories ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observe:
    """One event; of a prompt that does not fit, one group after the other."""

    session: int
    layer: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Token:
    """One token through all layers: of each its experts."""

    session: int
    experts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Toggle:
    """Admits blocks that are not resident, removes those that are: the caller does neither twice."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Ended:
    session: int


@dataclass(frozen=True)
class Turned:
    """A session turns to a topic whose tokens use every so-many-th block."""

    every: int


@dataclass(frozen=True)
class Ask:
    """Ask for ``count`` victims of ``layers``, none of them ``spared``; ``evict`` removes them, as the core does."""

    layers: tuple[int, ...]
    count: int
    spared: frozenset[Block]
    evict: bool


Step = Observe | Token | Toggle | Ended | Turned | Ask


@st.composite
def histories(draw: st.DrawFn) -> tuple[Model, list[Step]]:
    experts = draw(st.sampled_from((1, 2, 5, 8)))
    model = Model(draw(st.sampled_from((1, 2, 3, 6))), experts, min(experts, draw(st.integers(1, 4))))
    layer, session = st.integers(0, model.layers - 1), st.integers(0, 2)
    order = st.permutations(range(experts)).map(tuple)
    block = st.tuples(layer, st.integers(0, experts - 1))

    def cut(order: tuple[int, ...], used: int, size: int) -> tuple[tuple[int, ...], ...]:
        return tuple(order[start : min(used, start + size)] for start in range(0, used, size)) or ((),)

    sizes = st.one_of(st.just(model.top_k), st.just(experts), st.integers(0, experts))
    groups = st.builds(cut, order, sizes, st.one_of(st.just(experts), st.integers(1, experts)))
    chosen = st.tuples(*[order.map(lambda order: order[: model.top_k])] * model.layers)
    ask = st.builds(
        Ask,
        st.lists(layer, unique=True).map(tuple),
        st.integers(0, len(model.blocks) + 2),
        st.frozensets(block, max_size=8),
        st.booleans(),
    )
    some = st.lists(block, min_size=1, max_size=10, unique=True).map(lambda blocks: Toggle(tuple(blocks)))
    step: st.SearchStrategy[Step] = st.one_of(
        st.builds(Observe, session, layer, groups), st.builds(Token, session, chosen), ask, some, ask,
        st.builds(Ended, session), st.builds(Turned, st.integers(1, 7)),
    )  # fmt: skip
    first = draw(st.lists(block, max_size=len(model.blocks), unique=True))
    return model, [Toggle(tuple(first)), *draw(st.lists(step, max_size=25))]


thorough = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass
class Play:
    """Does steps with a policy of its own, and checks every answer.

    Attributes:
        renumber: sessions get other numbers than those of the steps, and none of them a number that another had.
        curious: asks more than the steps do.
        answers: the victims of each question of the steps.
    """

    factory: PolicyFactory
    model: Model
    renumber: bool = False
    curious: bool = False
    resident: set[Block] = field(default_factory=set)
    answers: list[list[Block]] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    given: int = 1 << 40

    def __post_init__(self) -> None:
        self.policy: Policy = self.factory(self.model.layers, self.model.experts, self.model.top_k)

    def all(self, steps: Iterable[Step]) -> list[list[Block]]:
        for step in steps:
            self.do(step)
        return self.answers

    def do(self, step: Step) -> None:
        policy = self.policy
        match step:
            case Observe(session, layer, groups):
                for group in groups:
                    policy.observe(self.number(session), layer, group)
            case Token(session, experts):
                for layer, chosen in enumerate(experts):
                    policy.observe(self.number(session), layer, list(chosen))
            case Ended(session):
                policy.ended(self.number(session))
                self.numbers.pop(session, None)
            case Turned(every):
                chances = np.zeros((self.model.layers, self.model.experts), np.float32)
                chances.reshape(-1)[::every] = 0.8
                policy.turned(chances)
                policy.turned(chances[:, 1:])  # of another model
            case Toggle(blocks):
                for block in blocks:
                    (policy.removed if block in self.resident else policy.admitted)(block)
                    self.resident ^= {block}
            case Ask(layers, count, spared, evict):
                victims = self.ask(layers, count, spared)
                assert self.ask(layers, count, spared) == victims, "naming victims has changed something"
                self.answers.append(victims)
                for block in victims if evict else ():
                    policy.removed(block)
                    self.resident.remove(block)
        if self.curious:
            layers = tuple(range(self.model.layers))
            self.ask(layers, len(self.model.blocks))
            self.ask(layers, 1)
            self.ask(layers[:1], 3, frozenset(self.model.blocks))

    def number(self, session: int) -> int:
        if not self.renumber:
            return session
        if session not in self.numbers:
            self.given += 3
            self.numbers[session] = self.given
        return self.numbers[session]

    def ask(self, layers: Sequence[int], count: int, spared: frozenset[Block] = frozenset()) -> list[Block]:
        there = {block for block in self.resident if block[0] in layers}
        victims = self.policy.victims(layers, count, asking(there, spared))
        assert len(set(victims)) == len(victims), "a victim was named twice"
        assert set(victims) <= there, "a victim is not resident, or of another layer"
        assert not set(victims) & spared, "a victim is not evictable"
        assert len(victims) == min(count, len(there - spared)), "not as many victims as there are"
        return victims


def asking(there: set[Block], spared: frozenset[Block] = frozenset()) -> Callable[[Block], bool]:
    """The core's question; it can be put about resident blocks of the layers only."""

    def evictable(block: Block) -> bool:
        assert block in there, f"the policy asked about {block}, which is not resident, or of another layer"
        return block not in spared

    return evictable


def anything(block: Block) -> bool:
    return True


# -- every policy ------------------------------------------------------------------------------------------------------


@every_policy
@thorough
@given(history=histories())
def test_victims_are_distinct_resident_evictable_and_as_many_as_there_are(
    factory: PolicyFactory, history: tuple[Model, list[Step]]
) -> None:
    model, steps = history
    Play(factory, model).all(steps)


@every_policy
@thorough
@given(history=histories(), other=histories())
def test_the_same_history_gives_the_same_victims_whatever_other_models_do_and_however_sessions_are_called(
    factory: PolicyFactory, history: tuple[Model, list[Step]], other: tuple[Model, list[Step]]
) -> None:
    model, steps = history
    one, noise = Play(factory, model), Play(factory, other[0])
    for step, another in zip_longest(steps, other[1]):
        if step is not None:
            one.do(step)
        if another is not None:
            noise.do(another)
    assert Play(factory, model, renumber=True).all(steps) == one.answers


@every_policy
@thorough
@given(history=histories())
def test_questions_change_nothing(factory: PolicyFactory, history: tuple[Model, list[Step]]) -> None:
    model, steps = history
    assert Play(factory, model, curious=True).all(steps) == Play(factory, model).all(steps)


@every_policy
@thorough
@given(history=histories())
def test_the_ranking_is_the_order_of_all_victims_turned_around(
    factory: PolicyFactory, history: tuple[Model, list[Step]]
) -> None:
    model, steps = history
    play = Play(factory, model)
    play.all(steps)
    assert play.policy.ranked() == play.ask(range(model.layers), len(model.blocks))[::-1]
    assert sorted(play.policy.lasting()) == sorted(play.policy.ranked())


def test_what_is_used_in_the_long_run_comes_before_what_is_used_now() -> None:
    policy = Forecast(1, 8, 1)
    for expert in range(8):
        policy.admitted((0, expert))
    for _ in range(200):
        policy.observe(1, 0, [3])
    for _ in range(20):
        policy.observe(1, 0, [5])
    assert policy.ranked()[0] == (0, 5)
    assert policy.lasting()[:2] == [(0, 3), (0, 5)]


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"ewma"}))  # which knows a layer's place in the cycle as well
@thorough
@given(history=histories())
def test_who_takes_the_statistics_over_ranks_as_before(name: str, history: tuple[Model, list[Step]]) -> None:
    model, steps = history
    play = Play(POLICIES[name], model)
    play.all(steps)
    heir = POLICIES[name](model.layers, model.experts, model.top_k)
    assert heir.take_over(play.policy.statistics())
    for block in sorted(play.resident):
        heir.admitted(block)
    assert heir.ranked() == play.policy.ranked()


@every_policy
def test_statistics_that_make_no_sense_change_nothing(factory: PolicyFactory) -> None:
    policy, other = factory(2, 4, 2), factory(2, 8, 2)
    for _ in range(3):
        other.observe(1, 0, [6, 7])
        other.observe(1, 1, [0, 7])
    before = {name: value.copy() for name, value in policy.statistics().items()}
    good = dict(factory(2, 4, 2).statistics())
    spoilt = [{}, dict(other.statistics())]
    for name, value in good.items():
        spoilt.append({**good, name: value.astype(np.float64) if value.dtype != np.float64 else value.astype(np.int8)})
        spoilt.append({**good, name: np.full_like(value, -1) if value.size else np.array([[9, 9]], np.int32)})
        if value.dtype.kind == "f":
            spoilt.append({**good, name: np.full_like(value, np.nan)})
            spoilt.append({**good, name: np.full_like(value, 1e30)})
    for statistics in spoilt[:2]:
        assert not policy.take_over(statistics)
    taken = [policy.take_over(statistics) for statistics in spoilt[2:]]
    assert not all(taken)
    if not any(taken):
        assert all(np.array_equal(value, before[name]) for name, value in policy.statistics().items())
    policy.observe(1, 0, [1, 2])
    policy.admitted((0, 1))
    assert policy.ranked() == [(0, 1)]


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"lru"}))
@thorough
@given(history=histories(), seed=st.integers(0, 1000))
def test_but_for_lru_the_order_of_an_events_experts_does_not_matter(
    name: str, history: tuple[Model, list[Step]], seed: int
) -> None:
    """Who has to fetch names them in another order than the router's."""
    model, steps = history
    chance = random.Random(seed)

    def shuffled(experts: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(chance.sample(experts, len(experts)))

    others: list[Step] = []
    for step in steps:
        match step:
            case Observe(session, layer, groups):
                others.append(Observe(session, layer, tuple(map(shuffled, groups))))
            case Token(session, experts):
                others.append(Token(session, tuple(map(shuffled, experts))))
            case _:
                others.append(step)
    assert Play(POLICIES[name], model).all(others) == Play(POLICIES[name], model).all(steps)


@every_policy
def test_nothing_resident_gives_no_victims(factory: PolicyFactory) -> None:
    policy = factory(2, 4, 2)
    assert policy.victims((0, 1), 3, asking(set())) == []
    policy.observe(1, 0, [0, 1])
    assert policy.victims((0, 1), 3, asking(set())) == []


@every_policy
def test_no_layers_give_no_victims(factory: PolicyFactory) -> None:
    policy = factory(2, 4, 2)
    policy.admitted((0, 0))
    policy.observe(1, 0, [0, 1])
    for none in ((), [], range(0)):
        assert policy.victims(none, 3, asking(set())) == []


@every_policy
def test_layers_and_experts_come_in_whatever_sequence(factory: PolicyFactory) -> None:
    kinds: list[Callable[[Sequence[int]], Sequence[int]]] = [list, tuple, lambda of: range(of[0], of[-1] + 1)]
    answers = []
    for kind in kinds:
        policy = factory(4, 5, 2)
        for layer in range(4):
            for expert in range(5):
                policy.admitted((layer, expert))
        for layer in (0, 1, 2, 3, 0, 1):
            policy.observe(1, layer, kind([layer, layer + 1]))
        asked = ([0, 1, 2, 3], [1, 2], [3])
        answers.append([policy.victims(kind(layers), count, anything) for layers in asked for count in (1, 4, 20)])
    assert answers[0] == answers[1] == answers[2]
    assert [len(victims) for victims in answers[0]] == [1, 4, 20, 1, 4, 10, 1, 4, 5]


@every_policy
def test_a_block_that_came_back_can_be_named_again(factory: PolicyFactory) -> None:
    policy = factory(1, 2, 1)
    for _ in range(3):
        policy.admitted((0, 0))
        assert policy.victims((0,), 2, asking({(0, 0)})) == [(0, 0)]
        policy.removed((0, 0))
        assert policy.victims((0,), 2, asking(set())) == []


@every_policy
def test_what_it_is_given_or_gives_is_not_kept_or_changed(factory: PolicyFactory) -> None:
    policy = factory(1, 3, 2)
    experts, layers = [1, 0], [0]
    there = {(0, 0), (0, 1)}
    for block in sorted(there):
        policy.admitted(block)
    policy.observe(1, 0, experts)
    victims = policy.victims(layers, 2, asking(there))
    assert (experts, layers, set(victims)) == ([1, 0], [0], there)
    before = list(victims)
    experts.clear()
    layers.clear()
    victims.clear()
    assert policy.victims([0], 2, asking(there)) == before


@every_policy
def test_sessions_may_end_that_were_never_heard_of(factory: PolicyFactory) -> None:
    policy = factory(1, 2, 1)
    policy.ended(3)
    policy.observe(3, 0, [1])
    policy.ended(3)
    policy.ended(3)
    policy.admitted((0, 1))
    assert policy.victims((0,), 1, anything) == [(0, 1)]


@every_policy
def test_after_a_very_long_time_numbers_are_finite_and_the_hot_expert_stays(factory: PolicyFactory) -> None:
    policy = factory(1, 5, 2)
    for expert in range(5):
        policy.admitted((0, expert))
    for token in range(20_000):
        policy.observe(1, 0, (0, 1 + token % 3))
        if token % 50 == 49:
            assert (0, 0) not in policy.victims((0,), 3, anything)
    assert_numbers(policy)


@every_policy
def test_layers_that_never_run_do_no_harm(factory: PolicyFactory) -> None:
    policy = factory(3, 5, 2)
    there = {(layer, expert) for layer in range(3) for expert in range(5)}
    for block in sorted(there):
        policy.admitted(block)
    for token in range(3_000):
        policy.observe(1, 1, (0, 1 + token % 3))
    assert set(policy.victims((0, 1, 2), 15, asking(there))) == there
    assert (1, 0) not in policy.victims((1,), 3, anything)
    assert_numbers(policy)


@every_policy
def test_sessions_come_fall_silent_return_and_end_whenever_they_like(factory: PolicyFactory) -> None:
    """Up to twelve at a time, each in layers of its own choice: long histories, which ``histories`` does not make."""
    for seed in range(12):
        chance = random.Random(seed)
        model = Model(chance.choice((1, 2, 6)), 8, 2)
        play = Play(factory, model)
        play.do(Toggle(tuple(chance.sample(model.blocks, len(model.blocks) // 2))))
        busy: list[int] = []
        for number in range(1500):
            if number % 40 == 0:
                busy = chance.sample(range(12), chance.choice((1, 2, 3, 12)))
            session = chance.choice(busy)
            play.do(Observe(session, chance.randrange(model.layers), (tuple(chance.sample(range(8), 2)),)))
            if number % 25 == 0:
                play.do(Ask(tuple(range(model.layers)), 3, frozenset(), evict=True))
                play.do(Toggle(tuple(chance.sample(model.blocks, 3))))
            if chance.random() < 0.005:
                play.do(Ended(session))
        assert_numbers(play.policy)


@every_policy
def test_what_was_known_of_sessions_that_ended_is_dropped(factory: PolicyFactory) -> None:
    policy = factory(6, 8, 2)
    chance = random.Random(1)

    def come_and_go(sessions: range) -> None:
        for session in sessions:
            for _ in range(3):
                for layer in range(6):
                    policy.observe(session, layer, chance.sample(range(8), 2))
            policy.ended(session)

    come_and_go(range(20))
    before = size_of(policy)
    come_and_go(range(20, 320))
    assert size_of(policy) - before < 10_000


@every_policy
def test_a_large_model_takes_less_than_five_megabytes(factory: PolicyFactory) -> None:
    layers, experts, top_k = 48, 128, 8
    policy = factory(layers, experts, top_k)
    chance = random.Random(1)
    for layer in range(layers):
        for expert in range(experts):
            policy.admitted((layer, expert))
    for session in range(4):
        for layer in range(layers):
            policy.observe(session, layer, range(experts))
    for _ in range(3):
        for session in range(4):
            for layer in range(layers):
                policy.observe(session, layer, chance.sample(range(experts), top_k))
    policy.victims(tuple(range(layers)), 100, anything)
    assert bytes_of_arrays(policy) < 5_000_000
    assert size_of(policy) < 6_000_000


def assert_numbers(policy: Policy) -> None:
    for array in arrays_of(policy):
        if array.dtype.kind == "f":
            assert not np.isnan(array).any()
            assert not np.isposinf(array).any()  # -inf is the worth of what is not resident


def size_of(root: object) -> int:
    """Bytes, roughly."""
    return sum(map(sys.getsizeof, things_of(root)))


# -- LRU's own order ---------------------------------------------------------------------------------------------------


def lru_with(blocks: Iterable[Block]) -> LRU:
    policy = LRU(3, 8, 2)
    for block in blocks:
        policy.admitted(block)
    return policy


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = lru_with((0, expert) for expert in range(4))
    policy.observe(1, 0, [1])
    policy.observe(2, 0, [0, 3])
    assert policy.victims((0,), 4, anything) == [(0, 2), (0, 1), (0, 3), (0, 0)]


def test_lru_takes_the_first_choice_of_an_event_for_the_most_recent_even_if_it_had_to_be_brought() -> None:
    policy = lru_with([(0, 1), (0, 3)])
    policy.observe(1, 0, [0, 1, 2, 3])
    policy.admitted((0, 0))
    policy.admitted((0, 2))
    assert policy.victims((0,), 4, anything) == [(0, 3), (0, 2), (0, 1), (0, 0)]


def test_lru_counts_a_block_that_was_never_used_from_its_admission() -> None:
    policy = lru_with([(0, 0), (0, 1)])
    policy.observe(1, 0, [0])
    policy.admitted((0, 2))
    assert policy.victims((0,), 3, anything) == [(0, 1), (0, 0), (0, 2)]


def test_lru_passes_over_what_cannot_be_evicted_and_over_other_layers() -> None:
    policy = lru_with((layer, expert) for expert in range(4) for layer in range(3))
    assert policy.victims((0, 2), 3, lambda block: block[1] % 2 == 1) == [(0, 1), (2, 1), (0, 3)]


def test_lru_does_not_remember_uses_before_a_block_was_removed() -> None:
    policy = lru_with([(0, 0), (0, 1), (0, 2)])
    policy.observe(1, 0, [0])
    policy.removed((0, 0))
    policy.admitted((0, 0))
    policy.observe(1, 0, [1])
    assert policy.victims((0,), 3, anything) == [(0, 2), (0, 0), (0, 1)]


@thorough
@given(history=histories())
def test_lru_names_blocks_in_the_order_of_their_last_use(history: tuple[Model, list[Step]]) -> None:
    model, steps = history
    play = Play(LRU, model)
    last: dict[Block, int] = {}
    clock = 0

    def used(layer: int, experts: Sequence[int]) -> None:
        nonlocal clock
        for expert in reversed(experts):
            clock += 1
            last[layer, expert] = clock

    for step in steps:
        before = set(play.resident)
        play.do(step)
        match step:
            case Observe(_, layer, groups):
                for group in groups:
                    used(layer, group)
            case Token(_, experts):
                for layer, chosen in enumerate(experts):
                    used(layer, chosen)
            case Toggle(blocks):
                for block in blocks:
                    clock += 1
                    if block in before:
                        del last[block]
                    else:
                        last.setdefault(block, clock)
            case Ask(layers, count, spared, evict):
                there = {block for block in before - spared if block[0] in layers}
                assert play.answers[-1] == sorted(there, key=last.__getitem__)[:count]
                for block in play.answers[-1] if evict else ():
                    del last[block]


# -- what is expected of Forecast --------------------------------------------------------------------------------------

several_layers = pytest.mark.parametrize("layers", [1, 2, 3, 6])


def everything(policy: Policy, layers: int, layer: int | None = None) -> list[Block]:
    """All that is resident, the least worth keeping first; or only what is of ``layer`` of that."""
    named = policy.victims(tuple(range(layers)), 1 << 20, anything)
    return [block for block in named if layer in (None, block[0])]


def full(layers: int, experts: int, top_k: int) -> Forecast:
    policy = Forecast(layers, experts, top_k)
    for layer in range(layers):
        for expert in range(experts):
            policy.admitted((layer, expert))
    return policy


@several_layers
def test_an_expert_of_every_token_outlives_those_that_are_never_used(layers: int) -> None:
    policy = full(layers, 8, 2)
    for token in range(100):
        for layer in range(layers):
            policy.observe(1, layer, [7, 1 + token % 4])
        if token >= 10:
            for layer in range(layers):
                order = everything(policy, layers, layer)
                assert {(layer, 0), (layer, 5), (layer, 6)} == set(order[:3])
                assert order.index((layer, 7)) >= 4


@several_layers
def test_what_always_comes_next_is_the_last_to_go(layers: int) -> None:
    """0, 1, 2, 0, 1, 2...: by recency it would be the first, and by frequency all are the same."""
    policy = full(layers, 4, 1)
    for token in range(150):
        for layer in range(layers):
            policy.observe(1, layer, [token % 3])
        if token >= 30:
            for layer in range(layers):
                assert everything(policy, layers, layer)[-1] == (layer, (token + 1) % 3)


def test_what_follows_another_layers_choice_is_kept() -> None:
    """Layer 1 uses 2 or 3 as layer 0 used 0 or 1 a token ago, and what layer 0 uses cannot be foreseen."""
    chance = random.Random(1)
    policy = full(2, 4, 1)
    before, right = 0, 0
    for token in range(600):
        now = chance.randrange(2)
        policy.observe(1, 0, [now])
        policy.observe(1, 1, [2 + before])
        before = now
        if token >= 200:
            right += everything(policy, 2, 1)[-1] == (1, 2 + now)
    assert right >= 380


def test_among_blocks_of_every_token_the_layer_that_ran_last_goes_first() -> None:
    policy = full(6, 2, 2)
    for _ in range(50):
        for layer in range(6):
            policy.observe(1, layer, [0, 1])
    for now in range(6):
        policy.observe(1, now, [0, 1])
        layers = [layer for layer, _ in everything(policy, 6)]
        assert layers == [layer for back in range(6) for layer in [(now - back) % 6] * 2]


@pytest.mark.parametrize(("chunks", "groups"), [(1, 1), (1, 3), (5, 1), (5, 3)])
@pytest.mark.parametrize("seed", range(3))
@several_layers
def test_a_prompt_that_uses_everything_does_not_make_the_hot_experts_the_next_victims(
    layers: int, seed: int, chunks: int, groups: int
) -> None:
    """In a model of one layer, small groups of a prompt look like tokens of a batch, and there is no telling."""
    if layers == 1:
        groups = 1
    chance = random.Random(seed)
    policy = Forecast(layers, 32, 4)
    hot = [chance.sample(range(32), 8) for _ in range(layers)]
    there = {(layer, expert) for layer in range(layers) for expert in {*hot[layer], *chance.sample(range(32), 16)}}
    for block in sorted(there):
        policy.admitted(block)
    for _ in range(150):
        for layer in range(layers):
            policy.observe(1, layer, chance.sample(hot[layer], 4))
    for _ in range(chunks):
        for layer in range(layers):
            for group in range(groups):
                policy.observe(1, layer, range(group, 32, groups))
    cold = {(layer, expert) for layer, expert in there if expert not in hot[layer]}
    assert set(policy.victims(range(layers), len(cold), asking(there))) == cold


def misses(policy: Policy, layers: int, slots: int, events: Iterable[tuple[int, int, list[int]]]) -> list[int]:
    """Of each event how many blocks were absent, in one pool that the policy rules."""
    held: set[Block] = set()
    out = []
    for session, layer, experts in events:
        wanted = {(layer, expert) for expert in experts}
        absent = sorted(wanted - held)
        policy.observe(session, layer, experts)
        short = len(held) + len(absent) - slots
        if short > 0:
            spared = frozenset(wanted)
            for block in policy.victims(range(layers), short, asking(set(held), spared)):
                policy.removed(block)
                held.remove(block)
        for block in absent:
            policy.admitted(block)
        held |= wanted
        out.append(len(absent))
    return out


def test_the_burst_of_another_session_does_not_evict_what_a_session_uses_all_the_time() -> None:
    """Of lookups of the steady session 0.0 to 0.3 % miss in the burst; by LRU it would be 35 %."""
    layers, experts, quiet, burst = 3, 64, 300, 100
    for seed in range(3):
        chance = random.Random(seed)
        mine = [chance.sample(range(experts), 5) for _ in range(layers)]
        theirs = [chance.sample(sorted(set(range(experts)) - set(mine[layer])), 32) for layer in range(layers)]
        events = []
        for token in range(quiet + burst):
            for layer in range(layers):
                events.append((1, layer, chance.sample(mine[layer], 2)))
                if token >= quiet:
                    events.append((2, layer, chance.sample(theirs[layer], 2)))
        absent = misses(Forecast(layers, experts, 2), layers, 24, events)
        of_mine = [count for (session, _, _), count in zip(events, absent, strict=True) if session == 1]
        in_burst = of_mine[quiet * layers :]
        assert len(in_burst) == burst * layers
        assert sum(in_burst) <= 0.05 * 2 * len(in_burst)


def test_what_is_used_no_more_makes_room_for_what_is() -> None:
    """The traffic moves to other experts, which fit: after 20 tokens all of them are there, and they stay."""
    for seed in range(3):
        chance = random.Random(seed)
        events = [
            (1, layer, chance.sample(range(8) if token < 500 else range(12, 20), 4))
            for token in range(700)
            for layer in range(3)
        ]
        absent = misses(Forecast(3, 32, 4), 3, 36, events)
        assert sum(absent[3 * 20 : 3 * 500]) == 0
        assert sum(absent[3 * 500 : 3 * 520]) >= 3 * 8
        assert sum(absent[3 * 540 :]) <= 6


def test_counts_of_what_follows_what_are_halved_before_they_could_wrap_around() -> None:
    """Of two sessions at once, whose lessons are learned together; 20,000 events."""
    policy = full(2, 4, 2)
    before = policy._follows._counts.copy()
    highest = 0
    for token in range(5_000):
        for layer in range(2):
            for session in (1, 2):
                policy.observe(session, layer, [0, 1 + token % 3])
        counts = policy._follows._counts
        assert (counts >= before // 2).all(), "a count fell by more than half"
        before = counts.copy()
        highest = max(highest, int(counts.max()))
    assert 128 <= highest <= 255
    assert policy._follows._counts.max() >= 127


def test_a_session_that_ended_teaches_nothing_more() -> None:
    """A later session of the same number is another one: its first token follows nothing."""
    last = []
    for number in (1, 2):
        policy = full(2, 4, 1)
        for _ in range(3):
            for layer in range(2):
                policy.observe(1, layer, [0])
        policy.ended(1)
        for token in range(40):
            for layer in range(2):
                policy.observe(number, layer, [1 + token % 3])
        last.append(policy._follows._counts.copy())
    assert (last[0] == last[1]).all()
    assert set(policy._sessions) == {2}


def test_a_layer_that_does_not_run_any_more_goes_first() -> None:
    policy = Forecast(2, 8, 1)
    there = {(layer, expert) for layer in range(2) for expert in range(8)}
    for block in sorted(there):
        policy.admitted(block)
    for token in range(200):
        for layer in range(2):
            policy.observe(1, layer, [token % 2])
    for token in range(1000):
        policy.observe(1, 1, [token % 2])
    assert {layer for layer, _ in policy.victims(range(2), 8, asking(there))} == {0}
    policy.observe(1, 0, [0])
    assert {layer for layer, _ in policy.victims(range(2), 8, asking(there))} != {0}


def test_a_layer_that_is_seen_alone_ages_as_others_do() -> None:
    """Only groups of one event are one event, and they have no expert in common."""
    policy = Forecast(3, 32, 4)
    there = {(2, expert) for expert in range(16)}
    for block in sorted(there):
        policy.admitted(block)
    for experts in (range(4), range(4, 8), range(8, 12)):
        for _ in range(300):
            policy.observe(1, 2, experts)
    assert not set(policy.victims([2], 4, asking(there))) & {(2, expert) for expert in range(8, 12)}
    assert float(policy.evidence(2).max()) <= 1
