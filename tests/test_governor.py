"""How the limit follows memory pressure (``daemon.core.governor``): a table, an hour of noise, what always holds."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.daemon.core.governor import (
    CALM_S,
    GROW_S,
    JOURNAL,
    MOST_QUIET_S,
    QUIET_S,
    RELAPSE_S,
    STEP_S,
    STEPS,
    WARNED_S,
    Change,
    Governor,
)
from expertd.daemon.pressure import Level

NORMAL, WARNING, CRITICAL = Level
BUDGET, FLOOR = 800, 50
TICK = 0.25

untimed = settings(deadline=None, derandomize=True)


class Machine:
    """A governor whose clock the test moves; the pools use all that they may, and at least ``floor``."""

    def __init__(self, budget: int = BUDGET, floor: int = FLOOR) -> None:
        self.governor = Governor(budget)
        self.floor = floor
        self.room = 10 * budget
        self.now = 0.0
        self.changes: list[Change] = []

    def run(self, level: Level, seconds: float, used: int | None = None) -> list[Change]:
        """So long at ``level``; the changes that this brought."""
        before = len(self.changes)
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            held = max(self.floor, self.governor.limit if used is None else used)
            change = self.governor.tick(self.now, level, f"{level.word} {self.now}", held, self.floor, self.room)
            if change is not None:
                self.changes.append(change)
        return self.changes[before:]


def limits(changes: Iterable[Change]) -> list[int]:
    return [change.after for change in changes]


def turns(changes: list[Change]) -> int:
    """How often the direction changed."""
    return sum((a.after > a.before) != (b.after > b.before) for a, b in pairwise(changes))


def test_without_pressure_nothing_changes() -> None:
    machine = Machine()
    assert machine.run(NORMAL, 3600) == []
    assert machine.governor.limit == BUDGET


def test_a_warning_gives_back_step_by_step_until_it_clears() -> None:
    machine = Machine()
    assert limits(machine.run(WARNING, WARNED_S + 2 * STEP_S + TICK)) == [700, 600, 500]
    assert machine.run(NORMAL, QUIET_S - TICK) == []


def test_a_warning_that_lasts_leads_to_one_step_above_nothing_or_to_the_floor() -> None:
    for floor, end in ((0, 100), (FLOOR, 100), (300, 300)):
        machine = Machine(floor=floor)
        machine.run(WARNING, 60)
        assert machine.governor.limit == end


def test_a_warning_takes_from_what_is_used_and_not_from_what_is_allowed() -> None:
    machine = Machine()
    assert limits(machine.run(WARNING, WARNED_S + TICK, used=400)) == [300]


def test_a_short_warning_is_none() -> None:
    assert Machine().run(WARNING, WARNED_S) == []


def test_critical_falls_to_the_floor_at_once_and_without_copies() -> None:
    machine = Machine()
    (change,) = machine.run(CRITICAL, 30)
    assert (change.at, change.before, change.after, change.drop) == (TICK, BUDGET, FLOOR, True)
    assert change.why == f"critical {TICK}"


def test_copies_are_made_at_a_warning_and_on_the_way_up() -> None:
    machine = Machine()
    machine.run(WARNING, 10)
    machine.run(NORMAL, 60)
    assert not any(change.drop for change in machine.changes)


def test_a_step_without_room_for_copies_is_made_without() -> None:
    machine = Machine()
    machine.room = 400
    (only,) = machine.run(WARNING, 60)
    assert (only.after, only.drop) == (100, True), "the new pool should take a quarter of the room at most"


def test_it_does_not_grow_into_room_that_is_not_there() -> None:
    machine = Machine()
    machine.run(CRITICAL, 1)
    machine.room = 400
    machine.run(NORMAL, 3600)
    assert machine.governor.limit == 350


def test_after_a_quiet_while_it_grows_back_slowly() -> None:
    machine = Machine()
    machine.run(CRITICAL, 1)
    up = machine.run(NORMAL, QUIET_S + STEPS * GROW_S)
    assert limits(up) == [150, 250, 350, 450, 550, 650, 750, 800]
    assert up[0].at - 1 >= QUIET_S
    assert all(b.at - a.at >= GROW_S for a, b in pairwise(up))
    assert up[-1].at - 1 <= 60


def test_pressure_stops_the_growth() -> None:
    machine = Machine()
    machine.run(CRITICAL, 1)
    machine.run(NORMAL, QUIET_S + 1)
    before = machine.governor.limit
    machine.run(WARNING, WARNED_S)
    assert machine.run(NORMAL, QUIET_S) == []
    assert machine.governor.limit == before


def test_after_each_relapse_it_waits_twice_as_long_and_forgets_that_when_it_was_calm() -> None:
    machine = Machine()
    waits = []
    for _ in range(9):
        machine.run(CRITICAL, 1)
        pressed = machine.now
        while not machine.run(NORMAL, TICK):
            assert machine.now - pressed < 2 * MOST_QUIET_S
        waits.append(machine.now - pressed)
    assert [round(wait) for wait in waits] == [min(QUIET_S * 2**n, MOST_QUIET_S) for n in range(9)]
    machine.run(NORMAL, CALM_S + STEPS * GROW_S)
    machine.run(CRITICAL, 1)
    pressed = machine.now
    while not machine.run(NORMAL, TICK):
        pass
    assert machine.now - pressed == pytest.approx(QUIET_S, abs=2 * TICK)


def test_pressure_long_after_growing_is_no_relapse() -> None:
    machine = Machine()
    machine.run(CRITICAL, 1)
    machine.run(NORMAL, QUIET_S + STEPS * GROW_S + RELAPSE_S)
    machine.run(CRITICAL, 1)
    assert machine.run(NORMAL, QUIET_S + TICK)


def test_the_floor_is_kept_when_it_rises() -> None:
    machine = Machine()
    machine.run(CRITICAL, 1)
    machine.floor = 200
    assert limits(machine.run(NORMAL, TICK)) == [200]
    machine.floor = BUDGET + 100
    machine.run(CRITICAL, 5)
    assert machine.governor.limit <= BUDGET


def test_another_budget_counts_at_once_but_not_against_pressure() -> None:
    machine = Machine()
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
    machine = Machine()
    for _ in range(JOURNAL):
        machine.governor.set_budget(machine.now, 1600, "more")
        machine.governor.set_budget(machine.now, 800, "less")
    assert len(machine.governor.journal) == JOURNAL
    assert machine.governor.journal[-1].why == "less"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("length", [1.0, 5.0, 20.0, 60.0])
def test_an_hour_of_noise_brings_at_most_one_turn_a_minute_and_no_swing(seed: int, length: float) -> None:
    """Levels that last ``length`` seconds in the mean, in any order."""
    chance = random.Random(seed)
    machine = Machine()
    while machine.now < 3600:
        level = chance.choice([NORMAL, NORMAL, WARNING, CRITICAL])
        machine.run(level, min(3600 - machine.now + TICK, chance.expovariate(1 / length) + TICK))
    assert turns(machine.changes) <= 40
    turned = [b.at for a, b in pairwise(machine.changes) if (a.after > a.before) != (b.after > b.before)]
    for start in turned:
        assert sum(start <= at < start + 120 for at in turned) <= 5, "it swings"


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
