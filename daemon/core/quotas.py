"""How memory follows need among pools, of one model or of several: who should give a step to whom, and when.  Pure.

Layers whose blocks differ in shape cannot share a pool, one pool for all layers may be too large for its slabs, and
several models may be in use: what each pool needs shows only as they run.  The chance that a block is used again, when
it is evicted, is what one more slot would be worth there, in reads per event; a model that runs seldom has few events.
A step is made when what it would have saved since the last one has paid for the copies that it costs; so noise moves
nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

STEP = 1 / 16
"""Of the average pool: so much memory changes hands at once."""
MARGIN = 1.25
"""A pool that gives a step loses so many times what one more step would bring it: each is worth less than the last."""
COPYING = 0.5
"""What it costs to copy a byte from one generation to the next, in bytes read from disk."""
WINDOW = 16
"""Sweeps through the layers after which it is seen what evictions in them were worth."""


@dataclass(frozen=True)
class Size:
    """Bytes that a pool has, the fewest that it can live with, and the most that it could use.

    ``saved`` are the reads that one more slot would have saved there since the last step.
    """

    now: int
    fewest: int
    most: int
    saved: float = 0.0


Name = TypeVar("Name", bound=Hashable)


class Quotas:
    """What the pools of one model with so many layers need.  Pools are called by any number that stays the same."""

    def __init__(self, layers: int) -> None:
        self._events_of_window = WINDOW * layers
        self._events = 0
        self._chances: dict[int, list[float]] = {}  # of blocks evicted in this window
        self._saved: dict[int, float] = {}

    def evicted(self, pool: int, chance: float) -> None:
        """A block left ``pool`` that any event would use with this ``chance``."""
        self._chances.setdefault(pool, []).append(chance)

    def ran(self, events: int) -> bool:
        """So many events have run; whether it is time to ask for a ``step``."""
        self._events += events
        if self._events < self._events_of_window:
            return False
        for pool, chances in self._chances.items():
            self._saved[pool] = self._saved.get(pool, 0.0) + self._events * sum(chances) / len(chances)
        self._chances.clear()
        self._events = 0
        return True

    def saved(self, pool: int) -> float:
        """Reads that one more slot would have saved in ``pool`` since the last step."""
        return self._saved.get(pool, 0.0)

    def begin_again(self) -> None:
        """A step was made: what is saved from here on counts for the next."""
        self._saved.clear()


def step(sizes: Mapping[Name, Size], least: int = 1) -> tuple[Name, Name, int] | None:
    """The pool that should give, the pool that should take, and how many bytes (``least`` or more); None if all stay.

    A step of so many bytes holds blocks of either size: what it saves in bytes read is the same for both.
    """
    if len(sizes) < 2:
        return None
    takers = (pool for pool, size in sizes.items() if size.now < size.most)
    taker = max(takers, key=lambda pool: sizes[pool].saved, default=None)
    givers = (pool for pool, size in sizes.items() if size.now > size.fewest and pool != taker)
    giver = min(givers, key=lambda pool: sizes[pool].saved, default=None)
    if giver is None or taker is None:
        return None
    gives, takes = sizes[giver], sizes[taker]
    size = max(least, int(STEP * sum(each.now for each in sizes.values()) / len(sizes)))
    size = min(size, gives.now - gives.fewest, takes.most - takes.now)
    if size * (takes.saved - MARGIN * gives.saved) <= COPYING * (gives.now + takes.now):
        return None
    return giver, taker, size
