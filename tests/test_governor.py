"""How the limit follows memory pressure (``daemon.core.governor``): a table, hours of noise, what always holds."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pressure.noise import BUDGET, FLOOR, MINUTE_S, Simulated, most_in_a_minute, noisy_hour, rises, turns
from expertd.daemon.core.governor import (
    CALM_S,
    GROW_S,
    JOURNAL,
    MOST_QUIET_S,
    QUIET_S,
    RELAPSE_S,
    STEP_S,
    STEPS,
    TURN_S,
    WARNED_S,
    Change,
    Governor,
)
from expertd.daemon.memory_watch import TICK_S
from expertd.daemon.pressure import Level

NORMAL, WARNING, CRITICAL = Level

untimed = settings(deadline=None, derandomize=True)


def limits(changes: Iterable[Change]) -> list[int]:
    return [change.after for change in changes]


def test_without_pressure_nothing_changes() -> None:
    machine = Simulated()
    assert machine.run(NORMAL, 3600) == []
    assert machine.governor.limit == BUDGET


def test_a_warning_gives_back_step_by_step_until_it_clears() -> None:
    machine = Simulated()
    assert limits(machine.run(WARNING, WARNED_S + 2 * STEP_S + TICK_S)) == [700, 600, 500]
    assert machine.run(NORMAL, QUIET_S - TICK_S) == []


def test_a_warning_that_lasts_leads_to_one_step_above_nothing_or_to_the_floor() -> None:
    for floor, end in ((0, 100), (FLOOR, 100), (300, 300)):
        machine = Simulated(floor=floor)
        machine.run(WARNING, 60)
        assert machine.governor.limit == end


def test_a_warning_takes_from_what_is_used_and_not_from_what_is_allowed() -> None:
    machine = Simulated()
    assert limits(machine.run(WARNING, WARNED_S + TICK_S, used=400)) == [300]


def test_a_short_warning_is_none() -> None:
    assert Simulated().run(WARNING, WARNED_S) == []


def test_critical_falls_to_the_floor_at_once_and_without_copies() -> None:
    machine = Simulated()
    (change,) = machine.run(CRITICAL, 30)
    assert (change.at, change.before, change.after, change.drop) == (TICK_S, BUDGET, FLOOR, True)
    assert change.why == f"critical {TICK_S}"


def test_copies_are_made_at_a_warning_and_on_the_way_up() -> None:
    machine = Simulated()
    machine.run(WARNING, 10)
    machine.run(NORMAL, 60)
    assert not any(change.drop for change in machine.changes)


def test_a_step_without_room_for_copies_is_made_without() -> None:
    machine = Simulated()
    machine.room = 400
    (only,) = machine.run(WARNING, 60)
    assert (only.after, only.drop) == (100, True), "the new pool should take a quarter of the room at most"


def test_it_does_not_grow_into_room_that_is_not_there() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    machine.room = 400
    machine.run(NORMAL, 3600)
    assert machine.governor.limit == 350


def test_after_a_quiet_while_it_grows_back_slowly() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    up = machine.run(NORMAL, QUIET_S + STEPS * GROW_S)
    assert limits(up) == [150, 250, 350, 450, 550, 650, 750, 800]
    assert up[0].at - 1 >= QUIET_S
    assert all(b.at - a.at >= GROW_S for a, b in pairwise(up))
    assert up[-1].at - 1 <= 60


def test_pressure_stops_the_growth() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    machine.run(NORMAL, QUIET_S + 1)
    before = machine.governor.limit
    machine.run(WARNING, WARNED_S)
    assert machine.run(NORMAL, QUIET_S) == []
    assert machine.governor.limit == before


def test_after_each_relapse_it_waits_twice_as_long_and_forgets_that_when_it_was_calm() -> None:
    machine = Simulated()
    waits = []
    for _ in range(9):
        machine.run(CRITICAL, 1)
        pressed = machine.now
        while not machine.run(NORMAL, TICK_S):
            assert machine.now - pressed < 2 * MOST_QUIET_S
        waits.append(machine.now - pressed)
    quiet = [min(QUIET_S * 2**n, MOST_QUIET_S) for n in range(9)]
    assert waits == pytest.approx([quiet[0], *(max(wait, TURN_S) for wait in quiet[1:])], abs=1.0)
    machine.run(NORMAL, CALM_S + STEPS * GROW_S)
    machine.run(CRITICAL, TURN_S)
    pressed = machine.now
    while not machine.run(NORMAL, TICK_S):
        pass
    assert machine.now - pressed == pytest.approx(QUIET_S, abs=2 * TICK_S)


def test_pressure_long_after_growing_is_no_relapse() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    machine.run(NORMAL, QUIET_S + STEPS * GROW_S + RELAPSE_S)
    machine.run(CRITICAL, TURN_S)
    assert machine.run(NORMAL, QUIET_S + TICK_S)


def test_it_never_waits_before_it_gives_back() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    assert rises(machine.run(NORMAL, QUIET_S)[-1])
    (down,) = machine.run(CRITICAL, TICK_S)
    assert down.after == FLOOR


def test_what_had_grown_and_was_given_back_does_not_grow_for_a_minute() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    machine.run(NORMAL, RELAPSE_S + QUIET_S + STEPS * GROW_S)
    (down,) = machine.run(CRITICAL, 1)
    up = machine.run(NORMAL, 2 * TURN_S)[0]
    assert up.at - down.at == TURN_S > QUIET_S


def test_one_that_eats_memory_for_a_while_again_and_again_gets_it_and_the_cache_is_back_within_a_minute() -> None:
    machine = Simulated()
    for _ in range(5):
        machine.run(CRITICAL, 20)
        gone = machine.now
        assert machine.run(NORMAL, RELAPSE_S + MINUTE_S)[-1].at - gone < MINUTE_S
        assert machine.governor.limit == BUDGET


def test_the_floor_is_kept_when_it_rises() -> None:
    machine = Simulated()
    machine.run(CRITICAL, 1)
    machine.floor = 200
    assert limits(machine.run(NORMAL, TICK_S)) == [200]
    machine.floor = BUDGET + 100
    machine.run(CRITICAL, 5)
    assert machine.governor.limit <= BUDGET


def test_another_budget_counts_at_once_but_not_against_pressure() -> None:
    machine = Simulated()
    change = machine.governor.set_budget(0.0, 1600, "asked for")
    assert change is not None and (change.before, change.after, change.why) == (800, 1600, "asked for")
    machine.run(CRITICAL, 1)
    assert machine.governor.set_budget(machine.now, 3200, "asked for") is None
    assert (machine.governor.budget, machine.governor.limit) == (3200, FLOOR)
    machine.run(NORMAL, QUIET_S + STEPS * GROW_S)
    assert machine.governor.limit == 3200
    smaller = machine.governor.set_budget(machine.now, 100, "asked for")
    assert smaller is not None and machine.governor.limit == 100


def test_the_journal_is_bounded_and_has_the_newest() -> None:
    machine = Simulated()
    for _ in range(JOURNAL):
        machine.governor.set_budget(machine.now, 1600, "more")
        machine.governor.set_budget(machine.now, 800, "less")
    assert len(machine.governor.journal) == JOURNAL
    assert machine.governor.journal[-1].why == "less"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("length", [1.0, 5.0, 20.0, 60.0])
def test_in_an_hour_of_noise_it_turns_twenty_times_at_most(seed: int, length: float) -> None:
    """Levels that last ``length`` seconds in the mean, in any order."""
    assert len(turns(noisy_hour(seed, length))) <= 20


@untimed
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(Level), st.floats(0.1, 70), st.integers(0, 2000), st.integers(0, 2000)), max_size=120
    ),
    floor=st.integers(0, 1000),
)
def test_whatever_happens_it_turns_up_once_a_minute_at_most_and_down_once(
    steps: list[tuple[Level, float, int, int]], floor: int
) -> None:
    """The turn down is not its choice.  Who needs more than before (a floor that rises) gets it at once, though."""
    governor = Governor(BUDGET)
    now = 0.0
    for level, seconds, used, room in steps:
        now += seconds
        governor.tick(now, level, "figure", used, floor, room)
    turned = turns(governor.journal)
    up, down = [turn for turn in turned if rises(turn)], [turn for turn in turned if not rises(turn)]
    assert most_in_a_minute(up) <= 1
    assert most_in_a_minute(down) <= 1
    assert most_in_a_minute(turned) <= 2
    assert all(rises(after) <= (after.at - before.at >= TURN_S) for before, after in pairwise(turned))


@untimed
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(Level), st.floats(0.1, 400), st.integers(0, 2000), st.integers(0, 1000)), max_size=60
    ),
    room=st.integers(0, 2000),
)
def test_whatever_happens_the_limit_stays_between_floor_and_budget(
    steps: list[tuple[Level, float, int, int]], room: int
) -> None:
    governor = Governor(BUDGET)
    now = 0.0
    for level, seconds, used, floor in steps:
        now += seconds
        before = governor.limit
        change = governor.tick(now, level, "figure", used, floor, room)
        assert min(floor, BUDGET) <= governor.limit <= BUDGET or (change is None and level is WARNING)
        if change is None:
            assert governor.limit == before
        else:
            assert (change.before, change.after) == (before, governor.limit)
            assert change.before != change.after
        if level is CRITICAL:
            assert governor.limit == min(floor, BUDGET)
        if level is WARNING and governor.limit > before:
            assert governor.limit == min(floor, BUDGET)
