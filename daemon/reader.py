"""The daemon's reading threads: what is read next, and what waits.

The core decides what is read and sees to it that a block is read once; this module decides when.  What a Fetch waits
for goes first.  Of all else (read ahead, then background) one read is under way at a time, and none begins while a
demand is queued or read, so that a demand finds a free thread and at most one other read on the device; more about
that in ``expertd.daemon.pacing``.  Where the bytes come from is ``expertd.daemon.blocks``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from expertd.daemon.blocks import OpenFiles, read_block, read_blocks
from expertd.daemon.core.instructions import Priority
from expertd.daemon.devices import Devices, ReadStatistics
from expertd.daemon.files import Read
from expertd.daemon.pacing import Pacing
from expertd.daemon.thermal import Hot, never_hot
from expertd.protocol.errors import ExpertdError, ReadFailed, from_code

log = logging.getLogger("expertd.daemon")

THREADS = 6
"""Four reads keep a device busy; others begin while some compare a checksum, or copy (docs/decisions.md)."""
MERGED_BYTES = 2 << 20
"""Neighbours are read together up to this size: beyond it, one read less saves nothing."""
MERGED_BUFFERS = 512
"""And up to so many parts, because a read takes at most 1024 buffers (IOV_MAX), and zeros lie between parts."""

Done = Callable[[int, ExpertdError | None], None]
Rows = Sequence[memoryview]
Work = Callable[[Read], int]
"""Reads with the ``preadv`` that it is given, or copies; returns the bytes that were read, and raises as reads do."""
_Place = tuple[OpenFiles, int, int]


@dataclass(eq=False, slots=True)
class Job:
    """A block that is to be read, or other ``work``: an opaque handle for whoever asked for it.

    ``place`` is None for other work.
    """

    place: _Place | None
    rows: Rows
    done: Done
    priority: Priority
    asked_at: float | None = None
    size: int = 0
    work: Work | None = None

    def forget(self) -> None:
        """Let go of the rows: as long as somebody holds them, their segment stays."""
        self.rows, self.work = (), None


class Reader:
    """A bounded number of threads with one lock.  Its methods may be called from any thread.

    ``done(bytes read, None)`` or ``done(0, error)`` is called on one of its threads; until then the rows are its own.
    """

    def __init__(
        self,
        threads: int = THREADS,
        read: Read = os.preadv,
        *,
        background_rate: int | None = None,
        hot: Hot = never_hot,
    ) -> None:
        """Start the threads.

        Args:
            read: there for those who want to see what happens when reading fails.
            background_rate: bytes a second of what nobody waits for; None: no limit.
            hot: whether the machine is too hot for that.
        """
        self._preadv, self._hot = read, hot
        # Threads wait for a byte of this pipe and not for a condition: whoever writes one lets go of the interpreter,
        # and the thread that it wakes takes that at once (10 us), not when the loop has nothing else to do.
        self._bell, self._ring = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._ring, False)
        # Not earlier: somebody may be about to write.  Nor when the process exits, as long as threads wait for it.
        weakref.finalize(self, _close, self._bell, self._ring).atexit = False
        self._lock = threading.Lock()
        # All below is under that lock.
        self._queues: dict[Priority, OrderedDict[Job, None]] = {priority: OrderedDict() for priority in Priority}
        self._places: dict[_Place, Job] = {}  # the queued job that reads a block, to find neighbours by
        self._demand_under_way = 0
        self._other_under_way = False
        self._watched = False  # a thread waits for the moment when something else than demand may begin
        self._ending = False
        self._pacing = Pacing(background_rate)
        self._devices = Devices()
        self._last_asked = float("-inf")
        self._threads = [
            threading.Thread(target=self._work, name=f"reader-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # -- for the server ------------------------------------------------------------------------------------------------

    def read(
        self,
        files: OpenFiles,
        layer: int,
        expert: int,
        rows: Rows,
        done: Done,
        priority: Priority,
        asked_at: float | None = None,
    ) -> Job:
        """Read block (``layer``, ``expert``) into ``rows``, one writable view for each part.

        Args:
            asked_at: when the Fetch came that waits for it (``time.monotonic``).
        """
        return self._put(Job((files, layer, expert), rows, done, priority, asked_at, sum(map(len, rows))))

    def copy(self, sources: Rows, rows: Rows, done: Done) -> Job:
        """Copy a block from ``sources`` into ``rows``."""
        return self.work(lambda _: copy_block(sources, rows), done)

    def work(self, work: Work, done: Done) -> Job:
        """Do something else that somebody waits for; whoever asks for much of it asks bit by bit."""
        return self._put(Job(None, (), done, Priority.DEMAND, work=work))

    def promote(self, job: Job) -> None:
        """Somebody waits for this block now: if it has not begun, it is demand, behind all that is."""
        with self._lock:
            if job.priority is Priority.DEMAND or job not in self._queues[job.priority]:
                return
            del self._queues[job.priority][job]
            job.priority = Priority.DEMAND
            self._queues[Priority.DEMAND][job] = None
        self._wake()

    def cancel(self, job: Job) -> bool:
        """Forget a job that has not begun; False: it has, and ``done`` is or will be called."""
        with self._lock:
            if job not in self._queues[job.priority]:
                return False
            self._unqueue(job)
            job.forget()
            return True

    def devices(self) -> ReadStatistics:
        """What was read, from which devices, and how long it took."""
        with self._lock:
            return self._devices.statistics()

    def close(self) -> None:
        """Finish what is being read, forget what is queued, and end the threads."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
            for queue in self._queues.values():
                queue.clear()
            self._places.clear()
        for _ in self._threads:
            self._wake()
        for thread in self._threads:
            thread.join()

    def _put(self, job: Job) -> Job:
        with self._lock:
            if self._ending:
                return job
            self._queues[job.priority][job] = None
            if job.place is not None:
                self._places[job.place] = job
        self._wake()
        return job

    def _wake(self) -> None:
        """Have one more thread look at what is queued."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so all will look
            os.write(self._ring, b"x")

    # -- what comes next -----------------------------------------------------------------------------------------------

    def _next(self) -> list[Job]:
        """What a thread does next, begun; waits for it.  Nothing: the end."""
        while True:
            with self._lock:
                if self._ending:
                    return []
                batch, wait_s = self._choose(time.monotonic())
            if batch:
                return batch
            if wait_s == 0:
                self._measure()
            elif select.select([self._bell], [], [], wait_s)[0]:
                with contextlib.suppress(BlockingIOError):  # another thread was faster
                    os.read(self._bell, 1)
            if wait_s is not None:
                with self._lock:
                    self._watched = False

    # All that follows is under the lock, up to the threads.

    def _choose(self, now: float) -> tuple[list[Job], float | None]:
        """What a thread should do; if nothing: how long to wait for a wake, None: until there is one.

        One thread at a time waits for the moment when something else than demand may begin; 0: it should find out
        how hot it is, and ask again.
        """
        if self._queues[Priority.DEMAND]:
            self._demand_under_way += 1
            return self._take(Priority.DEMAND, now), None
        job = self._first_other()
        if job is None or self._watched:
            return [], None
        if self._pacing.asks_heat(now):
            self._watched = True
            return [], 0.0
        wait_s = self._pacing.wait_s(job.size, now)
        if wait_s > 0:
            self._watched = True
            return [], wait_s
        self._other_under_way = True
        return self._take(job.priority, now), None

    def _first_other(self) -> Job | None:
        """What would be read for nobody who waits, if it may be now as far as other reads are concerned."""
        if self._demand_under_way or self._other_under_way:
            return None
        return next((next(iter(self._queues[p])) for p in Priority if self._queues[p]), None)

    def _take(self, priority: Priority, now: float) -> list[Job]:
        """The first job of a queue, and as many of its neighbours as are read well together with it."""
        queue = self._queues[priority]
        first = next(iter(queue))
        share = len(queue) if priority is not Priority.DEMAND else len(queue) // len(self._threads)
        batch = [first]
        self._begin(first, now)
        if first.place is None:
            return batch
        files, layer, expert = first.place
        total = first.size
        for step in (1, -1):
            neighbour = expert + step
            while (job := self._places.get((files, layer, neighbour))) is not None and job.priority is priority:
                total += job.size
                buffers = len(first.rows) * (len(batch) + 1)
                if total > MERGED_BYTES or buffers > MERGED_BUFFERS or len(batch) >= share:
                    return batch
                if priority is not Priority.DEMAND and self._pacing.wait_s(job.size, now) > 0:
                    return batch
                self._begin(job, now)
                batch.insert(len(batch) if step > 0 else 0, job)
                neighbour += step
        return batch

    def _begin(self, job: Job, now: float) -> None:
        self._unqueue(job)
        if job.priority is not Priority.DEMAND:
            self._pacing.began(job.size, now)

    def _unqueue(self, job: Job) -> None:
        del self._queues[job.priority][job]
        if job.place is not None and self._places.get(job.place) is job:
            del self._places[job.place]

    def _ended(self, batch: Sequence[Job], well: bool) -> None:
        with self._lock:
            if batch[0].priority is Priority.DEMAND:
                self._demand_under_way -= 1
            else:
                self._other_under_way = False
                self._pacing.ended(well, time.monotonic())

    # -- the threads ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        # A thread that waits holds no job: rows keep their segment.
        while self._serve(self._next()):
            pass

    def _measure(self) -> None:
        """Ask how hot it is; no demand waits for the answer."""
        hot = self._hot()
        with self._lock:
            changed = self._pacing.measured(hot)
        if changed:
            log.info("nothing is read that nobody waits for: it is hot" if hot else "it is no longer hot")

    def _serve(self, batch: Sequence[Job]) -> bool:
        if not batch:
            return False
        if batch[0].work is not None:
            results = [_outcome(partial(batch[0].work, self._counting(batch)))]
        else:
            results = self._read_all(batch)
        self._ended(batch, all(error is None for _, error in results))
        for job, (size, error) in zip(batch, results, strict=True):
            job.forget()
            job.done(size, error)
        return True

    def _read_all(self, batch: Sequence[Job]) -> list[tuple[int, ExpertdError | None]]:
        """Read neighbours, together if that works; else each alone, so that each has its own verdict."""
        assert batch[0].place is not None
        files, layer, first = batch[0].place
        read = self._counting(batch)
        if len(batch) > 1:
            size, error = _outcome(partial(read_blocks, files, layer, first, [job.rows for job in batch], read))
            if error is None:
                return [(size, None)] * len(batch)
        alone = [partial(read_block, files, layer, expert, job.rows, read) for expert, job in enumerate(batch, first)]
        return list(map(_outcome, alone))

    def _counting(self, batch: Sequence[Job]) -> Read:
        """``preadv`` that notes what it does."""
        asked = [job.asked_at for job in batch if job.asked_at is not None]

        def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            device = os.fstat(descriptor).st_dev
            with self._lock:
                began = time.monotonic()
                self._devices.begin(device)
                for at in asked:
                    if at > self._last_asked:  # the first of a Fetch's reads
                        self._last_asked = at
                        self._devices.fetched(began - at)
                asked.clear()
            size, took_s = 0, None
            try:
                size = self._preadv(descriptor, buffers, offset)
                took_s = time.monotonic() - began
            finally:
                with self._lock:
                    self._devices.end(device, size, took_s)
            return size

        return read


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _outcome(work: Callable[[], int]) -> tuple[int, ExpertdError | None]:
    """Do it; returns the bytes that were read and no error, or the error."""
    try:
        return work(), None
    except ExpertdError as error:
        # A new one: this one's story holds the rows, and they their segment, as long as the core remembers it.
        return 0, from_code(error.code, error.message)
    except Exception as error:
        # Somebody waits for this block, whatever went wrong.
        log.exception("a read failed in a way that was not foreseen")
        return 0, ReadFailed(f"reading a block failed ({type(error).__name__}: {error})")


def copy_block(sources: Rows, rows: Rows) -> int:
    """Copy one block within memory; no bytes are read.  NumPy copies without holding the interpreter."""
    for source, row in zip(sources, rows, strict=True):
        np.copyto(np.frombuffer(row, np.uint8), np.frombuffer(source, np.uint8))
    return 0
