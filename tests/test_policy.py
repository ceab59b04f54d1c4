"""What every eviction policy must do (``daemon.policy.base``), as one suite over all of them; and LRU's own order.

How good a policy's choices are is measured by the benchmarks, and that it is quick enough too; here they only have to
be allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.daemon.policy import LRU, Block, Policy, PolicyFactory

POLICIES: list[PolicyFactory] = [LRU]

every_policy = pytest.mark.parametrize("factory", POLICIES, ids=["LRU"])


@dataclass(frozen=True)
class Observe:
    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True)
class Toggle:
    """Admits a block that is not resident, removes one that is: the caller does neither twice."""

    block: Block


@dataclass(frozen=True)
class Ask:
    """Ask for ``count`` victims, none of them ``spared``; ``evict`` removes them, as the core does."""

    count: int
    spared: frozenset[Block]
    evict: bool


Step = Observe | Toggle | Ask

_blocks = st.tuples(st.integers(0, 2), st.integers(0, 4))
_steps = st.lists(
    st.one_of(
        st.builds(Observe, st.integers(0, 3), st.lists(st.integers(0, 6), max_size=5, unique=True).map(tuple)),
        st.builds(Toggle, _blocks),
        st.builds(Toggle, _blocks),
        st.builds(Ask, st.integers(0, 8), st.frozensets(_blocks, max_size=5), st.booleans()),
    ),
    max_size=60,
)
_thorough = settings(max_examples=300, deadline=None, derandomize=True)


def play(policy: Policy, steps: Sequence[Step]) -> list[list[Block]]:
    """Do ``steps`` and return the victims of each question, after checking that the policy may name them."""
    resident: set[Block] = set()
    answers: list[list[Block]] = []
    for step in steps:
        match step:
            case Observe(layer, experts):
                policy.observe(layer, experts)
            case Toggle(block) if block in resident:
                resident.remove(block)
                policy.removed(block)
            case Toggle(block):
                resident.add(block)
                policy.admitted(block)
            case Ask(count, spared, evict):
                victims = policy.victims(count, asking(resident, spared))
                assert len(set(victims)) == len(victims), "a victim was named twice"
                assert set(victims) <= resident - spared, "a victim is not resident, or not evictable"
                assert len(victims) == min(count, len(resident - spared)), "not as many victims as there are"
                answers.append(victims)
                for block in victims if evict else ():
                    resident.remove(block)
                    policy.removed(block)
    return answers


def asking(resident: set[Block], spared: frozenset[Block] = frozenset()) -> Callable[[Block], bool]:
    """The core's question; it can be put about resident blocks only."""

    def evictable(block: Block) -> bool:
        assert block in resident, f"{block} is not resident, and the policy asked about it"
        return block not in spared

    return evictable


@every_policy
@_thorough
@given(steps=_steps)
def test_victims_are_distinct_resident_evictable_and_as_many_as_there_are(
    factory: PolicyFactory, steps: list[Step]
) -> None:
    play(factory(), steps)


@every_policy
@_thorough
@given(steps=_steps)
def test_the_same_history_gives_the_same_victims(factory: PolicyFactory, steps: list[Step]) -> None:
    assert play(factory(), steps) == play(factory(), steps)


@every_policy
@_thorough
@given(steps=_steps, other=_steps)
def test_policies_of_two_pools_know_nothing_of_each_other(
    factory: PolicyFactory, steps: list[Step], other: list[Step]
) -> None:
    first, second = factory(), factory()
    play(second, other)
    assert play(first, steps) == play(factory(), steps)


@every_policy
@_thorough
@given(steps=_steps, count=st.integers(0, 8))
def test_naming_victims_removes_nothing(factory: PolicyFactory, steps: list[Step], count: int) -> None:
    policy = factory()
    play(policy, steps)
    everything = set(policy.victims(100, lambda block: True))
    assert len(policy.victims(count, lambda block: True)) == min(count, len(everything))
    assert set(policy.victims(100, lambda block: True)) == everything


@every_policy
def test_nothing_resident_gives_no_victims(factory: PolicyFactory) -> None:
    policy = factory()
    policy.observe(0, [0, 1, 2])
    assert policy.victims(3, asking(set())) == []


@every_policy
def test_a_block_that_came_back_can_be_named_again(factory: PolicyFactory) -> None:
    policy = factory()
    for _ in range(3):
        policy.admitted((0, 0))
        assert policy.victims(2, asking({(0, 0)})) == [(0, 0)]
        policy.removed((0, 0))
        assert policy.victims(2, asking(set())) == []


@every_policy
def test_what_it_is_given_is_not_kept_or_changed(factory: PolicyFactory) -> None:
    policy = factory()
    experts = [1, 0]
    policy.admitted((0, 0))
    policy.admitted((0, 1))
    policy.observe(0, experts)
    assert experts == [1, 0]
    experts.clear()
    assert sorted(policy.victims(2, asking({(0, 0), (0, 1)}))) == [(0, 0), (0, 1)]


# -- LRU's own order ---------------------------------------------------------------------------------------------------


def test_lru_evicts_what_was_used_longest_ago() -> None:
    policy = LRU()
    for expert in range(4):
        policy.admitted((0, expert))
    policy.observe(0, [1])
    policy.observe(0, [0, 3])
    assert policy.victims(4, lambda block: True) == [(0, 2), (0, 1), (0, 0), (0, 3)]


def test_lru_counts_a_block_that_was_never_used_from_its_admission() -> None:
    policy = LRU()
    policy.admitted((0, 0))
    policy.admitted((0, 1))
    policy.observe(0, [0])
    policy.admitted((0, 2))
    assert policy.victims(3, lambda block: True) == [(0, 1), (0, 0), (0, 2)]


def test_lru_passes_over_what_cannot_be_evicted() -> None:
    policy = LRU()
    for expert in range(4):
        policy.admitted((0, expert))
    assert policy.victims(2, lambda block: block[1] % 2 == 1) == [(0, 1), (0, 3)]


def test_lru_does_not_remember_uses_before_an_absence() -> None:
    policy = LRU()
    for block in ((0, 0), (0, 1)):
        policy.admitted(block)
    policy.removed((0, 0))
    policy.observe(0, [0])
    policy.admitted((0, 0))
    policy.observe(0, [1])
    assert policy.victims(2, lambda block: True) == [(0, 0), (0, 1)]


@_thorough
@given(steps=_steps)
def test_lru_names_blocks_in_the_order_of_their_last_use(steps: list[Step]) -> None:
    policy = LRU()
    last: dict[Block, int] = {}
    clock = 0
    for step in steps:
        match step:
            case Observe(layer, experts):
                policy.observe(layer, experts)
                for expert in experts:
                    clock += 1
                    if (layer, expert) in last:
                        last[layer, expert] = clock
            case Toggle(block) if block in last:
                del last[block]
                policy.removed(block)
            case Toggle(block):
                clock += 1
                last[block] = clock
                policy.admitted(block)
            case Ask(count, spared, _):
                expected = sorted(last.keys() - spared, key=last.__getitem__)[:count]
                assert policy.victims(count, asking(set(last), spared)) == expected
