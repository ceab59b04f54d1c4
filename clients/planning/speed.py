"""How long a single token takes: its computing, and its waiting for blocks that are absent.

    seconds a token = computing + layers x (part of events that miss x (EVENT_S + fixed)
                                            + part of lookups that miss x top_k x a block's time)

The absent blocks of one event are read at once: all are there ``fixed + n x a block's time`` after the first read began
(``Disk``).  Where the numbers come from is the caller's business, and each says it (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expertd.clients.planning.hits import Misses

EVENT_S = 0.0006
"""What an event that misses costs beside its reading: two messages, four wakes of a thread, and what is computed late."""
TOUCHED_SHARE = 0.6
"""Part of a memory's rate at which weights are read while a token is computed."""


@dataclass(frozen=True)
class Disk:
    """``n`` blocks that are read at once are there after ``fixed_s + n * block_s``; ``source``: whose figures."""

    fixed_s: float
    block_s: float
    source: str = ""

    def seconds(self, blocks: float) -> float:
        """Until so many blocks that are read at once are there."""
        return self.fixed_s + blocks * self.block_s


def disk_of(times: Mapping[int, float], source: str = "") -> Disk:
    """The disk that reads so many blocks at once in so many seconds: the straight line through the ends.

    Args:
        times: seconds by the number of blocks, for at least one number.
    """
    few, many = min(times), max(times)
    if few == many:
        return Disk(0.0, times[few] / few, source)
    block_s = max(0.0, (times[many] - times[few]) / (many - few))
    return Disk(max(0.0, times[few] - few * block_s), block_s, source)


@dataclass(frozen=True)
class Computing:
    """Seconds that one token takes beside its waiting: with everything resident, and with some of it absent.

    ``estimated``: it was not measured, and is the least that it can be.
    """

    complete_s: float
    partial_s: float
    source: str = ""
    estimated: bool = False


def estimated(touched_bytes: int, memory_rate: float, source: str = "") -> Computing:
    """What computing takes at least: its weights have to come out of memory that gives ``memory_rate`` bytes a second."""
    seconds = touched_bytes / (TOUCHED_SHARE * memory_rate)
    return Computing(seconds, seconds, source, estimated=True)


def token_seconds(misses: Misses, layers: int, top_k: int, computing: Computing, disk: Disk) -> float:
    """Seconds that a single token takes in a model of so many MoE layers, if it misses so much."""
    if not misses.lookups:
        return computing.complete_s
    waiting = layers * (
        misses.events * (EVENT_S + disk.fixed_s) + misses.lookups * top_k * disk.block_s
    )
    return computing.partial_s + waiting
