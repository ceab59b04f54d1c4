"""How long sessions waited for answers to their Fetches, and how much of that was waiting for reads.

A Fetch waits for reads while at least one of its blocks is being read or has its turn at the disk to come, whoever
asked for that; while it waits for a slot or for another generation of its pool, or its blocks are copied, it does not.
Pure: time is given, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Waited(NamedTuple):
    """Seconds, in all Fetches of a session so far; ``read_s`` is part of ``all_s``."""

    all_s: float = 0.0
    read_s: float = 0.0

    def plus(self, other: Waited) -> Waited:
        """Both together."""
        return Waited(self.all_s + other.all_s, self.read_s + other.read_s)


class Place(NamedTuple):
    """Where a block is read to.  Numbers of segments are not reused, and a block has one slot in a segment at most."""

    segment: int
    layer: int
    expert: int


@dataclass(slots=True)
class _Session:
    """Its last Fetch, which ``came`` then, and what it waited in those before.

    Of the blocks that it waits for, ``reading`` are being read, and at least one of them has been ``since`` then.
    """

    sequence: int = 0
    segment: int = 0
    layer: int = 0
    experts: tuple[int, ...] = ()
    waits: bool = False
    came: float = 0.0
    reading: int = 0
    since: float = 0.0
    all_s: float = 0.0
    read_s: float = 0.0

    def wants(self, place: Place) -> bool:
        if not self.waits or self.segment != place.segment or self.layer != place.layer:
            return False
        return place.expert in self.experts

    def so_far(self, now: float) -> Waited:
        waiting = now - self.came if self.waits else 0.0
        reading = max(0.0, now - self.since) if self.reading else 0.0
        return Waited(self.all_s + waiting, self.read_s + reading)


class Waits:
    """Owned by the daemon's loop.  What it remembers is one record for each session and the reads under way."""

    def __init__(self) -> None:
        self._sessions: dict[int, _Session] = {}
        self._reads: set[Place] = set()

    def fetched(
        self, session: int, sequence: int, segment: int, layer: int, experts: tuple[int, ...], now: float
    ) -> None:
        """A Fetch came; one that comes again is the same."""
        known = self._sessions.get(session)
        if known is None:
            known = self._sessions[session] = _Session()
        if sequence <= known.sequence:
            return
        self.answered(session, now)  # whoever goes on to another Fetch waits for the one before no more
        known.sequence, known.segment, known.layer, known.experts = sequence, segment, layer, experts
        known.waits, known.came, known.since = True, now, now
        known.reading = sum(map(known.wants, self._reads))

    def waited_s(self, session: int) -> float:
        """Seconds in all Fetches of ``session`` that have their answers."""
        known = self._sessions.get(session)
        return 0.0 if known is None else known.all_s

    def answered(self, session: int, now: float) -> None:
        """The Fetch that ``session`` waits in has its answer, or an error."""
        known = self._sessions.get(session)
        if known is not None and known.waits:
            known.all_s, known.read_s = known.so_far(now)
            known.waits, known.reading = False, 0

    def read_began(self, place: Place, now: float) -> None:
        """A block is to be read from now on."""
        self._reads.add(place)
        for known in self._sessions.values():
            if known.wants(place):
                known.since = known.since if known.reading else now
                known.reading += 1

    def read_ended(self, place: Place, now: float) -> None:
        """It is there, or it failed; ``now`` may be a moment ago, when its last byte came."""
        self._reads.discard(place)
        for known in self._sessions.values():
            if known.wants(place):
                known.reading -= 1
                if not known.reading:
                    known.read_s += max(0.0, now - known.since)

    def ended(self, session: int, now: float) -> Waited:
        """It is over; what it had waited."""
        known = self._sessions.pop(session, None)
        return Waited() if known is None else known.so_far(now)

    def all(self, now: float) -> dict[int, Waited]:
        """What each session that ever sent a Fetch has waited, with the one that it still waits in."""
        return {number: known.so_far(now) for number, known in self._sessions.items()}
