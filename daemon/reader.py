"""Reads blocks from disk straight into slots, on a few threads.

The core decides what is read and sees to it that a block is read once; this module only reads.  Demand goes before
background.  A block comes from the model's packed store (``expertd.daemon.packed``) as long as that is in order, else
from the model's files.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from expertd.daemon.core.instructions import Priority
from expertd.daemon.files import Read, drop_behind, open_uncached
from expertd.daemon.index import BlockIndex
from expertd.daemon.packed import StoreFile, StoreIndex
from expertd.protocol.checkpoint import check_unchanged
from expertd.protocol.errors import ExpertdError, FileChanged, ReadFailed, StoreInvalid

log = logging.getLogger("expertd.daemon")

THREADS = 4
"""Buffered reads need a queue depth of 4 to reach what the device gives (measured; docs/decisions.md)."""


class OpenFiles:
    """The open descriptors of one model's files, and its packed store while one is in use (``use``)."""

    def __init__(self, index: BlockIndex) -> None:
        self.index = index
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()
        self._store: StoreFile | None = None
        self._refused: StoreIndex | None = None

    @property
    def packed(self) -> str:
        """The path of the packed store that blocks are read from, empty if there is none."""
        store = self._store
        return "" if store is None else str(store.index.path)

    def use(self, found: StoreIndex | None) -> None:
        """Read from this store from now on, unless it is the one that is used, or that has failed before."""
        with self._lock:
            used = self._store
            if found is None or found == self._refused or (used is not None and found == used.index):
                return
            self._store = StoreFile(found)
        if used is not None:
            used.close()
        log.info("%s is read from the packed store %s", found.layout.header.folder, found.path)

    def read_packed(self, layer: int, expert: int, rows: Sequence[memoryview], read: Read) -> int:
        """Read one block from the packed store; returns how many bytes were read, 0 if no store is used (any more).

        Raises:
            FileChanged: a file of the model itself is not the one that was indexed.
            ReadFailed: the store has failed, and the block is nowhere else.
        """
        store = self._store
        if store is None:
            return 0
        for file in self.index.files_of(layer, expert):
            check_unchanged(self.index.paths[file], self.index.marks[file])
        try:
            return store.read_block(layer, expert, rows, read)
        except StoreInvalid as error:
            folder = store.index.layout.header.folder
            if self.index.derived:
                raise ReadFailed(f"{error}; look at it with: expertd pack {folder} --verify") from error
            self._refuse(store, f"{error}; from now on the safetensors of {folder} are read")
            return 0

    def _refuse(self, store: StoreFile, why: str) -> None:
        with self._lock:
            first = self._store is store
            if first:
                self._store, self._refused = None, store.index
        if first:
            log.warning("%s", why)
            store.close()

    def descriptor(self, file: int) -> int:
        """The descriptor of file number ``file``, opened at first use.

        Raises:
            FileChanged: the file is not the one that was indexed.
        """
        with self._lock:
            if file not in self._descriptors:
                path = self.index.paths[file]
                try:
                    self._descriptors[file] = open_uncached(path)
                except OSError as error:
                    raise FileChanged(
                        f"{path} cannot be opened any more ({error.strerror}); load the model again"
                    ) from error
            descriptor = self._descriptors[file]
        check_unchanged(self.index.paths[file], self.index.marks[file], descriptor)
        return descriptor

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            store, self._store = self._store, None
        if store is not None:
            store.close()


@dataclass(order=True)
class Job:
    priority: int
    number: int
    work: Callable[[], int] | None = field(compare=False)  # None ends the thread that takes it
    done: Callable[[int, ExpertdError | None], None] = field(compare=False)
    begun: bool = field(default=False, compare=False)


class Reader:
    """A bounded number of threads behind one queue.  Its methods may be called from any thread.

    ``done(bytes read, None)`` or ``done(0, error)`` is called on one of its threads; until then the rows are its own.
    """

    def __init__(self, threads: int = THREADS, read: Read = os.preadv) -> None:
        """``read`` is there for those who want to see what happens when reading fails."""
        self._read = read
        self._queue: queue.PriorityQueue[Job] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, name=f"reader-{n}", daemon=True) for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(
        self,
        files: OpenFiles,
        layer: int,
        expert: int,
        rows: Sequence[memoryview],
        done: Callable[[int, ExpertdError | None], None],
        priority: Priority,
    ) -> Job:
        """Read block (``layer``, ``expert``) into ``rows``, one writable view for each part."""
        work = partial(read_block, files, layer, expert, rows, self._read)
        job = Job(priority, next(self._numbers), work, done)
        self._queue.put(job)
        return job

    def promote(self, job: Job) -> None:
        if not job.begun:
            self._queue.put(Job(Priority.DEMAND, next(self._numbers), job.work, job.done))
            job.begun = True

    def cancel(self, job: Job) -> bool:
        begun, job.begun = job.begun, True
        return not begun

    def copy(
        self,
        sources: Sequence[memoryview],
        rows: Sequence[memoryview],
        done: Callable[[int, ExpertdError | None], None],
    ) -> None:
        """Copy a block from ``sources`` into ``rows``."""
        self._queue.put(Job(Priority.DEMAND, next(self._numbers), partial(copy_block, sources, rows), done))

    def close(self) -> None:
        """Finish what is being read, forget what is queued, and end the threads."""
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                break
        for _ in self._threads:
            self._queue.put(Job(max(Priority) + 1, next(self._numbers), None, lambda size, error: None))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job.work is None:
                return
            if job.begun:
                continue
            job.begun = True
            try:
                size = job.work()
            except ExpertdError as error:
                job.done(0, error)
            except Exception as error:
                # Somebody waits for this block, whatever went wrong.
                log.exception("a read failed in a way that was not foreseen")
                job.done(0, ReadFailed(f"reading a block failed ({type(error).__name__}: {error})"))
            else:
                job.done(size, None)


def copy_block(sources: Sequence[memoryview], rows: Sequence[memoryview]) -> int:
    """Copy one block within memory; no bytes are read.  NumPy copies without holding the interpreter."""
    for source, row in zip(sources, rows, strict=True):
        np.copyto(np.frombuffer(row, np.uint8), np.frombuffer(source, np.uint8))
    return 0


def read_block(files: OpenFiles, layer: int, expert: int, rows: Sequence[memoryview], read: Read = os.preadv) -> int:
    """Read one block into ``rows``; returns the bytes that were read for it.

    Raises:
        ReadFailed: the system failed, or a file ended early.
        FileChanged: a file is not the one that was indexed.
    """
    if packed := files.read_packed(layer, expert, rows, read):
        return packed
    total = 0
    for piece in files.index.ranges(layer, expert):
        descriptor = files.descriptor(piece.file)
        row, path = rows[piece.slab], files.index.paths[piece.file]
        done = 0
        while done < piece.size:
            try:
                got = read(descriptor, [row[done:]], piece.offset + done)
            except OSError as error:
                raise ReadFailed(f"reading {path} failed at byte {piece.offset + done} ({error.strerror})") from error
            if got == 0:
                raise ReadFailed(f"{path} ended at byte {piece.offset + done}, inside a block")
            done += got
        drop_behind(descriptor, piece.offset, piece.size)
        check_unchanged(path, files.index.marks[piece.file], descriptor)
        total += done
    return total
