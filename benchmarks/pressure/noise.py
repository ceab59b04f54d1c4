"""The governor alone through simulated hours of noisy pressure, with a clock that somebody else moves.

What a change of direction is, and how many fall into a minute, is said here once, for the benchmark and the tests.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from expertd.daemon.core.governor import Change, Governor
from expertd.daemon.memory_watch import TICK_S
from expertd.daemon.pressure import Level

BUDGET, FLOOR = 800, 50
HOUR_S, MINUTE_S = 3600.0, 60.0
LENGTHS_S = (1.0, 5.0, 20.0, 60.0)
"""So long a level lasts in the mean: one kind of hour each."""
HOURS, QUICK_HOURS = 200, 20


class Simulated:
    """A governor whose clock stands until ``run``; the pools use all that they may, and at least ``floor``.

    Attributes:
        room: bytes that the machine has left for copies.
        now: seconds since the beginning.
        changes: all that the governor decided.
    """

    def __init__(self, budget: int = BUDGET, floor: int = FLOOR) -> None:
        self.governor = Governor(budget)
        self.floor = floor
        self.room = 10 * budget
        self.now = 0.0
        self.changes: list[Change] = []

    def run(self, level: Level, seconds: float, used: int | None = None) -> list[Change]:
        """So long at ``level``; the changes that this brought."""
        before = len(self.changes)
        for _ in range(round(seconds / TICK_S)):
            self.now += TICK_S
            held = max(self.floor, self.governor.limit if used is None else used)
            change = self.governor.tick(self.now, level, f"{level.word} {self.now}", held, self.floor, self.room)
            if change is not None:
                self.changes.append(change)
        return self.changes[before:]


def noisy_hour(seed: int, length_s: float) -> list[Change]:
    """What an hour brings of levels in any order, half of them normal, that last ``length_s`` in the mean."""
    chance = random.Random(seed)
    simulated = Simulated()
    while simulated.now < HOUR_S:
        level = chance.choice([Level.NORMAL, Level.NORMAL, Level.WARNING, Level.CRITICAL])
        simulated.run(level, min(HOUR_S - simulated.now, chance.expovariate(1 / length_s)) + TICK_S)
    return simulated.changes


def turns(changes: Iterable[Change]) -> list[Change]:
    """Those that change the direction: a step down after one up, or a step up after one down."""
    return [after for before, after in pairwise(changes) if rises(before) != rises(after)]


def rises(change: Change) -> bool:
    """Whether it is one up."""
    return change.after > change.before


def most_in_a_minute(changes: Sequence[Change]) -> int:
    """How many of them fall into one minute at most, whenever that begins."""
    return max((sum(0 <= one.at - first.at < MINUTE_S for one in changes) for first in changes), default=0)


def noise_figures(hours: int) -> dict[str, Any]:
    """``turns_per_hour_max``, ``turns_per_minute_max``, and ``upturns_per_minute_max`` of those that are its choice."""
    found = [turns(noisy_hour(number, LENGTHS_S[number % len(LENGTHS_S)])) for number in range(hours)]
    return {
        "turns_per_hour_max": max(map(len, found)),
        "turns_per_minute_max": max(map(most_in_a_minute, found)),
        "upturns_per_minute_max": max(most_in_a_minute([turn for turn in hour if rises(turn)]) for hour in found),
    }
