"""Several models under one budget: a newcomer begins at once, others make room for it, memory follows use."""

from __future__ import annotations

import random

import pytest

from expertd.daemon.core import events
from expertd.daemon.core.plan import largest, smallest
from expertd.daemon.core.state import Model
from expertd.daemon.policy import LRU
from expertd.protocol.errors import BudgetTooSmall
from expertd.protocol.layout import PAGE
from tests.core_runner import Runner, model_of

A, B, C = (model_of((1, 1), 64, name) for name in "abc")
BUDGET = 90 * PAGE
"""Less than the 129 pages that one of them takes whole."""
NEAR = 2 * PAGE
"""What slots and tables leave over."""


def hold(*models: Model) -> list[int]:
    return [model.size for model in models]


def near(sizes: list[int], wanted: int) -> bool:
    return all(abs(size - wanted) <= NEAR for size in sizes)


def busy(runner: Runner, session: int, chance: random.Random, tokens: int = 1, experts: int = 64) -> None:
    """Tokens that use any four experts of the first so many."""
    for _ in range(tokens):
        for layer in range(2):
            runner.use(session, layer, chance.sample(range(experts), 4))


def test_a_newcomer_begins_at_once_and_gets_as_much_as_each_of_the_others_keeps() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    assert first.size > BUDGET - NEAR
    second = runner.attach(2, B)
    assert near(hold(first, second), BUDGET // 2)
    third = runner.attach(3, C)
    assert near(hold(first, second, third), BUDGET // 3)
    assert runner.core.used <= BUDGET
    assert not [model.key for model in runner.core.models.values() if model.extra]
    for session in (1, 2, 3):
        busy(runner, session, random.Random(session))


def test_it_is_granted_its_floor_before_the_others_have_left() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    runner.stopped.add(1)
    second = runner.attach(2, B)
    assert second.size == smallest(B) and 2 in runner.core.sessions
    busy(runner, 2, random.Random(1), tokens=20)
    assert runner.core.used == first.size + first.extra + second.size, "and what the first holds counts"
    runner.wake(1)
    assert near(hold(first, second), BUDGET // 2)


def test_who_never_leaves_an_older_generation_keeps_that_and_no_more_from_the_others() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    runner.stopped.add(1)
    second = runner.attach(2, B)
    runner.feed(events.Silent(1))
    assert near(hold(first), BUDGET // 2) and second.size == smallest(B), "a smaller pool would give nothing back"
    runner.wake(1)
    assert sum(hold(first, second)) > BUDGET - 2 * NEAR
    assert runner.core.used <= BUDGET


def test_who_has_no_more_than_its_share_gives_nothing() -> None:
    small = model_of((1, 1), 8, "small")
    runner = Runner(BUDGET)
    first, little = runner.attach(1, A), runner.attach(2, small)
    assert little.size == largest(small)
    moves = little.moves
    runner.attach(3, C)
    assert little.size == largest(small) and little.moves == moves
    assert near(hold(first), (BUDGET - little.size) // 2) or first.size > BUDGET // 3


def test_a_newcomer_takes_no_more_than_it_can_use() -> None:
    small = model_of((1, 1), 8, "small")
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    little = runner.attach(2, small)
    assert little.size == largest(small)
    assert BUDGET - little.size - NEAR <= first.size <= BUDGET - little.size


def test_models_that_do_not_fit_even_at_their_floors_are_refused_and_told_what_works() -> None:
    floors = smallest(A) + smallest(B)
    runner = Runner(floors - 1)
    first = runner.attach(1, A)
    before = first.size
    with pytest.raises(BudgetTooSmall, match=f"--budget {floors} or more"):
        runner.attach(2, B)
    assert first.size == before and not first.moves, "nobody makes room for one who is not let in"
    runner.feed(events.BudgetChanged(floors))
    second = runner.attach(2, B)
    assert hold(first, second) == [smallest(A), smallest(B)]
    assert runner.core.used <= floors


def test_under_the_worst_pressure_there_is_an_event_for_each_session_or_at_least_for_each_model() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    for session in (2, 3):
        runner.attach(session, A)
    second = runner.attach(4, B)
    floor, least = runner.core.floor, runner.core.smallest_budget
    assert least == smallest(A) + smallest(B) < floor
    runner.feed(events.BudgetChanged(floor, drop=True, most=BUDGET))
    assert [sum(pool.layout.slots for pool in model.pools) for model in (first, second)] == [12, 4]
    runner.feed(events.BudgetChanged(least, drop=True, most=BUDGET))
    assert hold(first, second) == [smallest(A), smallest(B)]
    assert runner.core.used == least


def test_a_model_that_was_kept_warm_gets_its_share_when_it_is_used_again() -> None:
    runner = Runner(BUDGET)
    first, second = runner.attach(1, A), runner.attach(2, B)
    runner.feed(events.Ended(2))
    chance = random.Random(7)
    busy(runner, 1, chance, tokens=6000)
    assert first.size > 3 * second.size
    assert runner.attach(3, B) is second
    assert near(hold(first, second), BUDGET // 2)
    third = runner.attach(4, C)
    runner.feed(events.Ended(4))
    runner.feed(events.BudgetChanged(2 * BUDGET))
    assert runner.attach(5, C) is third
    assert near(hold(first, second, third), 2 * BUDGET // 3)
    assert runner.core.used <= 2 * BUDGET


def test_a_budget_that_changes_while_a_newcomer_waits_leaves_it_its_share() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    runner.stopped.add(1)
    second = runner.attach(2, B)
    for pages in (95, 100, 85):
        runner.feed(events.BudgetChanged(pages * PAGE))
    runner.wake(1)
    assert near(hold(first), BUDGET // 2)
    assert near(hold(second), 85 * PAGE - BUDGET // 2), "all that there is of it"


def test_other_models_steps_leave_a_newcomer_its_share() -> None:
    runner = Runner(2 * BUDGET)
    first, second = runner.attach(1, A), runner.attach(2, B)
    runner.stopped.add(1)
    third = runner.attach(3, C)
    chance = random.Random(8)
    for _ in range(300):
        busy(runner, 2, chance)
        busy(runner, 3, chance, experts=16)
    runner.wake(1)
    assert near(hold(first, second, third), 2 * BUDGET // 3)


def test_models_with_blocks_of_very_different_size_exchange_memory_too() -> None:
    large = model_of((6, 6), 32, "large")
    runner = Runner(BUDGET)
    first, second = runner.attach(1, A), runner.attach(2, large)
    before = second.size
    chance = random.Random(9)
    busy(runner, 2, chance, tokens=6000, experts=32)
    assert second.size > 1.3 * before
    assert first.size >= smallest(A) and runner.core.used <= BUDGET


def test_a_smaller_generation_for_which_there_is_no_memory_is_asked_for_again() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    runner.memory_left = 20 * PAGE
    runner.feed(events.BudgetChanged(60 * PAGE))
    assert near(hold(first), 60 * PAGE), "by way of a generation that fits into what is left"
    runner.memory_left = 0
    runner.feed(events.BudgetChanged(30 * PAGE))
    assert near(hold(first), 60 * PAGE)
    runner.memory_left = 100 * PAGE
    runner.feed(events.MemoryWanted())
    assert near(hold(first), 30 * PAGE)
    assert runner.core.used <= 30 * PAGE


def test_a_newcomer_that_goes_again_leaves_its_memory_to_the_first() -> None:
    runner = Runner(BUDGET)
    first = runner.attach(1, A)
    runner.attach(2, B)
    runner.feed(events.Ended(2))
    runner.feed(events.Unwanted(B.key))
    assert list(runner.core.models) == [A.key]
    assert first.size > BUDGET - NEAR


def test_memory_follows_use_from_one_model_to_the_other_and_back_but_never_below_the_floor() -> None:
    runner = Runner(BUDGET)
    first, second = runner.attach(1, A), runner.attach(2, B)
    chance = random.Random(3)
    busy(runner, 2, chance, tokens=50)
    busy(runner, 1, chance, tokens=6000)
    assert first.size > 1.4 * second.size >= 1.4 * smallest(B)
    assert runner.core.used <= BUDGET
    busy(runner, 2, chance, tokens=12000)
    assert second.size > 1.4 * first.size >= 1.4 * smallest(A)
    assert runner.core.used <= BUDGET


def test_models_that_are_used_alike_give_each_other_nothing() -> None:
    runner = Runner(BUDGET)
    first, second = runner.attach(1, A), runner.attach(2, B)
    moves = first.moves + second.moves
    chance = random.Random(4)
    for _ in range(2500):
        busy(runner, 1, chance)
        busy(runner, 2, chance)
    assert first.moves + second.moves == moves


def test_a_model_that_needs_little_lets_the_other_have_the_rest() -> None:
    """Both run alike; one uses eight of its experts, all the time."""
    runner = Runner(BUDGET)
    first, second = runner.attach(1, A), runner.attach(2, B)
    chance = random.Random(5)
    for _ in range(5000):
        busy(runner, 1, chance)
        busy(runner, 2, chance, experts=8)
    misses = second.misses
    for _ in range(200):
        busy(runner, 1, chance)
        busy(runner, 2, chance, experts=8)
    assert first.size > 1.5 * second.size
    assert second.misses - misses <= 0.01 * 200 * 2 * 4, "and that misses nothing"


def test_a_policy_without_estimates_leaves_everybody_the_share_of_the_beginning() -> None:
    runner = Runner(BUDGET, LRU)
    first, second = runner.attach(1, A), runner.attach(2, B)
    busy(runner, 1, random.Random(6), tokens=1000)
    assert near(hold(first, second), BUDGET // 2)


def test_base_weights_that_go_with_a_model_are_there_for_the_others_at_once() -> None:
    """Else these would shrink for the moment in which they are still counted, and grow again."""
    runner = Runner(largest(A) + largest(B))
    runner.attach(1, B)
    runner.feed(events.Ended(1))
    model = runner.attach(2, A)
    assert list(runner.core.models) == [B.key, A.key] and model.size == largest(A)
    weights = 20 * PAGE
    runner.feed(events.BudgetChanged(largest(A) - weights, going={B.key: weights}))
    assert list(runner.core.models) == [A.key]
    assert (runner.core.budget, model.size, model.moves) == (largest(A), largest(A), 0)
