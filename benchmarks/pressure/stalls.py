"""How long decode stopped for other reasons than reads: gaps between tokens, less the reads in them.

What a session has waited for reads is known at samples only.  In between it cannot have become less, nor grown by more
than the time that has passed; with that much is said about any other moment, and the rest, half of the time between two
samples at either end of a gap at most, is taken for no read.  So a stall is never shorter than it was.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple


class Gap(NamedTuple):
    """Between two tokens of one answer, ``time.monotonic``."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long."""
        return self.ended - self.began


@dataclass
class Reads:
    """What one session has waited for reads in all, in seconds, as samples tell it."""

    _asked: list[float] = field(default_factory=list)
    _told: list[float] = field(default_factory=list)
    _waited: list[float] = field(default_factory=list)

    def add(self, asked: float, told: float, waited: float) -> None:
        """It was ``waited`` at some moment between ``asked`` and ``told``, which come later than those before."""
        self._asked.append(asked)
        self._told.append(told)
        self._waited.append(waited)

    def within(self, gap: Gap) -> float:
        """So much of ``gap`` it has waited for reads, at least."""
        return max(0.0, self._least(gap.ended) - self._most(gap.began)) if self._waited else 0.0

    def _most(self, now: float) -> float:
        """No more than this was waited until ``now``: as at the next sample, or since the last one all the time."""
        after = bisect_left(self._asked, now)
        bounds = [self._waited[after]] if after < len(self._waited) else []
        if after > 0:
            bounds.append(self._waited[after - 1] + now - self._asked[after - 1])
        return min(bounds)

    def _least(self, now: float) -> float:
        """No less than this: as at the last sample, or until the next one all the time."""
        before = bisect_right(self._told, now)
        bounds = [self._waited[before - 1]] if before > 0 else [0.0]
        if before < len(self._waited):
            bounds.append(self._waited[before] - (self._told[before] - now))
        return max(bounds)


def stall_s(gap: Gap, sessions: Iterable[Reads]) -> float:
    """Seconds of ``gap`` less the reads in it: those of one session, because an answer has one worker."""
    return gap.seconds - max((reads.within(gap) for reads in sessions), default=0.0)
