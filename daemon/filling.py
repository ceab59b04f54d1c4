"""Has slots filled as the core says: reads and copies that are under way, from their beginning to their event.

The threads that do it are ``expertd.daemon.reader``; which slot gets what, and what becomes of it, is the core's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from expertd.daemon.blocks import OpenFiles
from expertd.daemon.core import events, instructions
from expertd.daemon.diary import Diary
from expertd.daemon.pools import SharedPool
from expertd.daemon.reader import Done, Job, Reader
from expertd.daemon.waits import Place, Waits
from expertd.protocol.errors import ExpertdError


class Filling:
    """Owned by the daemon's loop, on which it is made."""

    def __init__(
        self,
        reader: Reader,
        pools: Mapping[int, SharedPool],
        files: Mapping[str, OpenFiles],
        waits: Waits,
        diary: Diary,
        feed: Callable[[events.Event], None],
    ) -> None:
        """Nothing is under way yet.

        Args:
            pools: by segment.
            files: by models' keys.
            waits, diary: are told.
            feed: gives an event to the core.
        """
        self._reader, self._pools, self._files = reader, pools, files
        self._waits, self._diary, self._feed = waits, diary, feed
        self._loop = asyncio.get_running_loop()
        self._reads: dict[tuple[int, int], tuple[Place, Job]] = {}  # by segment and slot

    def read(self, what: instructions.StartRead, asked_at: float | None) -> None:
        """Read a block.  ``asked_at``: when the Fetch came that waits for it (``time.monotonic``)."""
        rows, files = self._pools[what.segment].rows(what.slot), self._files[what.model]
        place = Place(what.segment, what.layer, what.expert)
        self._waits.read_began(place, time.monotonic())
        done = self._when_filled(what.segment, what.slot)
        job = self._reader.read(files, what.layer, what.expert, rows, done, what.priority, asked_at)
        self._reads[what.segment, what.slot] = place, job

    def copy(self, what: instructions.StartCopy) -> None:
        """Copy a block from an older generation."""
        sources, rows = self._pools[what.source].rows(what.source_slot), self._pools[what.segment].rows(what.slot)
        self._reader.copy(sources, rows, self._when_filled(what.segment, what.slot))

    def promote(self, segment: int, slot: int) -> None:
        """Somebody waits for what is read into that slot."""
        if (segment, slot) in self._reads:
            self._reader.promote(self._reads[segment, slot][1])

    def cancel(self, segment: int, slot: int) -> None:
        """Nobody wants what is read into that slot any more."""
        if (segment, slot) in self._reads:
            place, job = self._reads[segment, slot]
            if self._reader.cancel(job):
                del self._reads[segment, slot]
                self._waits.read_ended(place, time.monotonic())
                self._feed(events.ReadCancelled(segment, slot))

    def _when_filled(self, segment: int, slot: int) -> Done:
        """What the reader calls, on a thread of its own, when the slot is filled."""

        def done(size: int, error: ExpertdError | None) -> None:
            event: events.ReadDone | events.ReadFailed
            event = events.ReadDone(segment, slot, size) if error is None else events.ReadFailed(segment, slot, error)
            # The loop may be closed already when the daemon ends; then nobody waits for this read.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._filled, event, time.monotonic())

        return done

    def _filled(self, event: events.ReadDone | events.ReadFailed, at: float) -> None:
        read = self._reads.pop((event.segment, event.slot), None)
        if read is not None:  # else it was copied
            self._waits.read_ended(read[0], at)
        if isinstance(event, events.ReadFailed):
            self._diary.read_failed(event.error.message)
        self._feed(event)
