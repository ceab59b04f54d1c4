"""Brings the machine's pressure to the governor, and what that decides to the daemon and to people."""

from __future__ import annotations

import time
from typing import Literal

from expertd.daemon.core.governor import Change, Governor
from expertd.daemon.machine import this_machine
from expertd.daemon.pressure import Level, Source
from expertd.protocol.logs import Log
from expertd.protocol.messages import JournalEntry, Pressure
from expertd.protocol.sizes import show_size

log = Log("expertd.daemon")

TICK_S, IDLE_TICK_S = 0.25, 1.0
"""How often the system is asked, while there is something to give back and while there is not."""
ASK_S = 2.0
"""If the system gave no memory for another pool, it is asked again so often."""
LEVELS: dict[Level, Literal["normal", "warning", "critical"]] = {
    Level.NORMAL: "normal",
    Level.WARNING: "warning",
    Level.CRITICAL: "critical",
}


class MemoryWatch:
    """Owned by the daemon's loop; ``tick`` is called every TICK_S or IDLE_TICK_S."""

    def __init__(self, budget: int, source: Source) -> None:
        self.governor = Governor(budget)
        self._source = source
        self._told = Level.NORMAL
        self._asked_at = time.monotonic()  # when memory to move to was asked for last

    @property
    def pressure(self) -> Pressure:
        """What sessions are told."""
        return Pressure(level=LEVELS[self.governor.level], figure=self.governor.figure)

    @property
    def journal(self) -> list[JournalEntry]:
        """What the governor changed, with the time of day."""
        began = time.time() - time.monotonic()
        return [
            JournalEntry(
                at=round(began + change.at, 3),
                pressure=change.level.word,
                why=change.why,
                before_bytes=change.before,
                after_bytes=change.after,
            )
            for change in self.governor.journal
        ]

    def tick(self, used: int, floor: int, fixed: int = 0) -> tuple[Change | None, Pressure | None]:
        """How the limit changes, and what sessions are to be told.

        Args:
            used, floor, fixed: bytes, see ``Governor.tick``.
        """
        reading = self._source.read()
        governor = self.governor
        quiet = reading.level is Level.NORMAL and governor.limit == governor.budget
        there_is = 0 if quiet else room()  # nobody asks for it while nothing can change
        change = governor.tick(time.monotonic(), reading.level, reading.figure, used, floor, there_is, fixed)
        if change is not None:
            before, after = show_size(change.before), show_size(change.after)
            log.info("limit changed", before=before, now=after, why=change.why)
        if reading.level is self._told:
            return change, None
        self._told = reading.level
        log.info("memory pressure changed", level=reading.level.word, figure=reading.figure)
        return change, self.pressure

    def asks_again(self, wanting: bool) -> bool:
        """Whether it is time to ask for memory again, if the core is ``wanting``: there was none, it seems."""
        if not wanting or time.monotonic() - self._asked_at < ASK_S:
            return False
        self._asked_at = time.monotonic()
        return True

    def set_budget(self, budget: int, why: str) -> Change | None:
        """Somebody wants another budget."""
        return self.governor.set_budget(time.monotonic(), budget, why)


def room() -> int:
    """Bytes that the machine could give at once."""
    try:
        return this_machine().available
    except OSError as error:  # no descriptor is left to read it with
        log.warning("what memory is available cannot be read: %s", error)
        return 0
