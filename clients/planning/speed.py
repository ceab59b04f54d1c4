"""How long a single token takes: its computing, and its waiting for blocks that are absent.

    seconds a token = computing + layers x (part of events that miss x (a Fetch's + the disk's fixed time)
                                            + part of lookups that miss x top_k x a block's time)

The absent blocks of one event are read at once: all are there ``fixed + n x a block's time`` after the first read began
(``Disk``).  Where the numbers come from is the caller's business, and each says it (docs/planning.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from expertd.clients.planning.hits import Misses
from expertd.protocol.messages import ModelStatus

FETCH_S = 0.0008
"""What a Fetch waits beside its reading, where that is not measured: two messages, and four threads that wake."""
ON_THE_WAY = 2.3
"""A session waits so many times what the daemon sees of it (the rest is on the way), reading left out."""
FETCHES = 500
"""So many Fetches make a measured figure."""
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

    ``fetch_s``: what each Fetch adds to the latter.  ``estimated``: it was not measured, and is the least that it can
    be.
    """

    complete_s: float
    partial_s: float
    fetch_s: float = 0.0
    source: str = ""
    estimated: bool = False


def estimated(touched_bytes: int, memory_rate: float, source: str = "") -> Computing:
    """What computing takes at least: weights have to come out of memory that gives ``memory_rate`` bytes a second."""
    seconds = touched_bytes / (TOUCHED_SHARE * memory_rate)
    return Computing(seconds, seconds, 0.0, source, estimated=True)


def fetch_seconds(model: ModelStatus) -> float | None:
    """What a Fetch waits beside its reading, as the daemon has measured it of its sessions; None: of too few."""
    fetches = sum(session.fetches for session in model.sessions)
    if fetches < FETCHES:
        return None
    waited = sum(session.waited_s - session.read_wait_s for session in model.sessions)
    return ON_THE_WAY * max(0.0, waited) / fetches


def token_seconds(
    misses: Misses, layers: int, top_k: int, computing: Computing, disk: Disk, fetch_s: float = FETCH_S
) -> float:
    """Seconds that a single token takes in a model of so many MoE layers, if it misses so much.

    Args:
        fetch_s: what a Fetch waits beside its reading.
    """
    if not misses.lookups:
        return computing.complete_s
    each = computing.fetch_s + fetch_s + disk.fixed_s
    return computing.partial_s + layers * (misses.events * each + misses.lookups * top_k * disk.block_s)
