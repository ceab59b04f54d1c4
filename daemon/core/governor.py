"""How much of the budget the pools may use while the machine is short of memory.  Pure: time is given.

    change = governor.tick(now, level, figure, used, floor, room)

Warning: give back a step, and another one for as long as it lasts.  Critical: fall to the floor at once.  Normal for a
while: grow again by steps.  What it learns from growing too early is to wait longer, so it cannot swing with a
pressure that comes and goes.

When pressure comes is not its choice, and giving back never waits.  What waits is growing, until a minute after it last
began to give back what had grown.  So in any minute it begins to grow once at most, and to give back once at most.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from expertd.daemon.pressure import Level

STEPS = 8
"""So many steps lead from the whole budget to nothing, and back."""
WARNED_S = 0.5
"""A warning that is over sooner is none."""
STEP_S = 2.0
"""Between two steps down: what was given back must have had time to show."""
GROW_S = 2.0
"""Between two steps up."""
TURN_S = 60.0
"""When the limit has grown and then falls, it grows again no sooner than so long after that."""
QUIET_S = 30.0
"""Before the first step up it must have been quiet for so long; twice as long after each relapse."""
MOST_QUIET_S = 480.0
RELAPSE_S = 120.0
"""Pressure within so long of a step up is a relapse."""
CALM_S = 600.0
"""After so long without pressure relapses are forgotten."""
JOURNAL = 256
"""Changes that are remembered."""


@dataclass(frozen=True)
class Change:
    """At ``at`` (seconds, of the clock that ``tick`` is given) the limit went from ``before`` to ``after`` bytes.

    ``why`` is the figure that decided it; ``drop``: there is no room or time for copying blocks that would stay.
    """

    at: float
    level: Level
    why: str
    before: int
    after: int
    drop: bool = False


class Governor:
    """Attributes:
    budget: bytes that the user allows.
    limit: bytes that may be used now.
    level: of the last tick.
    figure: what that rested on.
    journal: the last changes, the newest last.
    """

    def __init__(self, budget: int) -> None:
        self.budget = self.limit = budget
        self.level, self.figure = Level.NORMAL, ""
        self.journal: deque[Change] = deque(maxlen=JOURNAL)
        self._warned_at: float | None = None  # since when there is a warning, or worse
        self._pressed_at = float("-inf")  # when there was one last
        self._shrunk_at = self._grown_at = float("-inf")
        self._turned_at = float("-inf")  # when it began to shrink last after it had grown
        self._quiet_s = QUIET_S

    def set_budget(self, now: float, budget: int, why: str) -> Change | None:
        """The user allows another budget: it counts at once, as far as there is no pressure."""
        pressed = self.limit < self.budget
        self.budget = budget
        return self._change(now, min(self.limit, budget) if pressed else budget, why)

    def tick(
        self, now: float, level: Level, figure: str, used: int, floor: int, room: int, fixed: int = 0
    ) -> Change | None:
        """The machine's state ``now``.

        Args:
            used: bytes that pools and base weights take.
            floor: the fewest that the live sessions need.
            room: that the machine could give at once: what a pool is copied to has to fit there.
            fixed: the part of ``used`` that is base weights, which are never copied.
        """
        self.level, self.figure = level, figure
        floor = min(floor, self.budget)
        if level > Level.NORMAL:
            return self._shrink(now, used, floor, room, fixed)
        self._warned_at = None
        if self.limit < floor:
            return self._change(now, floor, "sessions need it")
        return self._grow(now, used, room + fixed)

    def _shrink(self, now: float, used: int, floor: int, room: int, fixed: int) -> Change | None:
        if self._warned_at is None:
            self._warned_at = now
            if now - self._grown_at < RELAPSE_S:
                self._quiet_s = min(2 * self._quiet_s, MOST_QUIET_S)
        self._pressed_at = now
        here = min(self.limit, max(used, floor))
        drop = self.level is Level.CRITICAL
        if drop:
            after = floor
        elif now - self._warned_at >= WARNED_S and now - self._shrunk_at >= STEP_S:
            step = self.budget // STEPS
            after = max(floor, here - step, min(step, self.limit))  # one step is left for whoever comes
            if room + fixed < min(used, after):  # what stays cannot be copied, and even its new place must be small
                after, drop = max(floor, min(after, fixed + room // 4)), True
        else:
            return None
        if after < self.limit:
            if self._grown_at > self._shrunk_at:
                self._turned_at = now
            self._shrunk_at = now
        return self._change(now, after, self.figure, drop)

    def _grow(self, now: float, used: int, room: int) -> Change | None:
        quiet = now - self._pressed_at
        if quiet >= CALM_S:
            self._quiet_s = QUIET_S
        if self.limit >= self.budget or quiet < self._quiet_s:
            return None
        if now - self._grown_at < GROW_S or now - self._turned_at < TURN_S:
            return None
        after = min(self.budget, self.limit + max(1, self.budget // STEPS))
        if room < min(used + after - self.limit, after):
            return None
        self._grown_at = now
        return self._change(now, after, f"no pressure for {quiet:.0f} s")

    def _change(self, now: float, after: int, why: str, drop: bool = False) -> Change | None:
        if after == self.limit:
            return None
        change = Change(now, self.level, why, self.limit, after, drop and after < self.limit)
        self.limit = after
        self.journal.append(change)
        return change
