"""A model's own files as the daemon reads them: ranges that begin and end anywhere.

Direct reads take whole sectors, so a range is read with the rest of its first and last one into a buffer of the thread
and copied from there.  Where the system refuses that, the page cache is used and dropped behind.  Which ranges make a
block is in ``expertd.daemon.index``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertd.daemon.files import (
    SECTOR,
    FillFailed,
    Read,
    drop_behind,
    fill,
    leave_direct,
    open_direct,
    own_buffer,
)
from expertd.protocol.checkpoint import FileMark, check_unchanged
from expertd.protocol.errors import FileChanged, ReadFailed

CHUNK = 4 << 20
"""Direct reads are no longer than this, so that a thread's buffer stays small, whatever the size of an expert."""
PAGE = 4096
"""What devices want whose sectors are larger than ``SECTOR``."""


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, from ``offset`` on, and where they go."""

    offset: int
    row: memoryview

    @property
    def end(self) -> int:
        return self.offset + len(self.row)


def runs(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The pieces by offset; those that touch are together."""
    found: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if found and found[-1][-1].end == piece.offset:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


class PlainFile:
    """One file of a model, opened at first use.  Its methods may be called from any thread."""

    def __init__(self, path: Path, mark: FileMark) -> None:
        self._path, self._mark = path, mark
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._step = 0
        """Direct reads begin and end on multiples of it; 0: reads go through the page cache."""

    def read(self, run: Sequence[Piece], read: Read) -> None:
        """Fill pieces that touch, in one read if the system does it in one.

        Raises:
            ReadFailed: the system failed, or the file ended early.
            FileChanged: the file is not the one that was indexed.
        """
        descriptor = self._open()
        problem = self._fill(descriptor, run, read)
        # Afterwards, because the device can work meanwhile; what was read of another file is of no use.
        check_unchanged(self._path, self._mark, descriptor)
        if problem is not None:
            raise ReadFailed(problem)

    def _fill(self, descriptor: int, run: Sequence[Piece], read: Read) -> str | None:
        """Fill pieces in the best way that the system takes; returns how that failed, as a sentence.

        Not as an error: what is kept in a name here holds the rows, and they their segment, until a collection.
        """
        while True:
            step = self._step
            try:
                if step:
                    _read_direct(read, descriptor, run, step)
                else:
                    fill(read, descriptor, [piece.row for piece in run], run[0].offset)
                    drop_behind(descriptor, run[0].offset, run[-1].end - run[0].offset)
            except FillFailed as failed:
                if failed.ended:
                    return f"{self._path} ended at byte {failed.offset}, inside a block"
                if not step or not failed.refused:
                    return f"reading {self._path} failed at byte {failed.offset} ({failed.why})"
                self._refuse(descriptor, step)
            else:
                return None

    def close(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                try:
                    self._descriptor, direct = open_direct(self._path)
                except OSError as error:
                    raise FileChanged(
                        f"{self._path} cannot be opened any more ({error.strerror}); load the model again"
                    ) from error
                self._step = SECTOR if direct else 0
            return self._descriptor

    def _refuse(self, descriptor: int, step: int) -> None:
        """Reads on multiples of ``step`` are refused: what is left is tried from now on."""
        with self._lock:
            if self._step != step:
                return  # another thread was told so too
            self._step = PAGE if step < PAGE else 0
            if not self._step:
                leave_direct(descriptor)


def _read_direct(read: Read, descriptor: int, run: Sequence[Piece], step: int) -> None:
    start, end = run[0].offset, run[-1].end
    for begin in range(start - start % step, end, CHUNK):
        until = min(begin + CHUNK, end)
        buffer = own_buffer(-(-(until - begin) // step) * step)
        fill(read, descriptor, [buffer], begin, until - begin, step)
        source = np.frombuffer(buffer, np.uint8)
        for piece in run:
            low, high = max(begin, piece.offset), min(until, piece.end)
            if low < high:
                # NumPy copies without holding the interpreter.
                row = np.frombuffer(piece.row, np.uint8)
                np.copyto(row[low - piece.offset : high - piece.offset], source[low - begin : high - begin])
