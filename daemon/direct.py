"""An open file, read past the page cache in the best way that the system takes.

Direct reads want whole sectors.  So they go straight to where the bytes belong if all of that is whole sectors; else
through a buffer of the thread, with the rest of the first and the last sector; and where the system takes no direct
reads at all, through the page cache, which is dropped behind.  What is refused once is not tried again.

Which bytes are read, and what it means when that fails, is decided by ``expertd.daemon.plain`` and
``expertd.daemon.packed``; how systems differ is in ``expertd.daemon.files``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from expertd.daemon.files import SECTOR, FillFailed, Read, drop_behind, fill, leave_direct, open_direct, own_buffer

CHUNK = 4 << 20
"""Reads through a buffer are no longer than this, so that it stays small, whatever the size of an expert."""
PAGE = 4096
"""What devices want whose sectors are larger than ``SECTOR``."""


class Piece(NamedTuple):
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


class DirectFile:
    """``read`` may be called from any thread.

    Attributes:
        descriptor: of the open file.
    """

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            OSError: that is not possible.
        """
        self.descriptor, direct = open_direct(path)
        self._lock = threading.Lock()
        self._straight = True
        self._step = SECTOR if direct else 0
        """Direct reads begin and end on multiples of it; 0: reads go through the page cache."""

    def read(self, run: Sequence[Piece], read: Read) -> None:
        """Fill pieces that touch, in one read if the system does it in one.

        Raises:
            FillFailed: the system failed, or the file ended early.
        """
        whole = all((offset | len(row)) % SECTOR == 0 for offset, row in run)
        while True:
            step, straight = self._step, whole and self._straight
            try:
                if step and not straight:
                    self._read_through_buffer(run, read, step)
                else:
                    fill(read, self.descriptor, [piece.row for piece in run], run[0].offset, step=step or 1)
                    if not step:
                        drop_behind(self.descriptor, run[0].offset, run[-1].end - run[0].offset)
                return
            except FillFailed as failed:
                if not (step and failed.refused):
                    raise
                self._refused(step, straight)

    def close(self) -> None:
        """Nobody reads any more."""
        os.close(self.descriptor)

    def _refused(self, step: int, straight: bool) -> None:
        """Reads of that kind are refused: what is left is tried from now on."""
        with self._lock:
            if straight:
                self._straight = False
            elif self._step == step:  # else another thread was told so too
                self._step = PAGE if step < PAGE else 0
                if not self._step:
                    leave_direct(self.descriptor)

    def _read_through_buffer(self, run: Sequence[Piece], read: Read, step: int) -> None:
        start, end = run[0].offset, run[-1].end
        for begin in range(start - start % step, end, CHUNK):
            until = min(begin + CHUNK, end)
            buffer = own_buffer(-(-(until - begin) // step) * step)
            fill(read, self.descriptor, [buffer], begin, until - begin, step)
            source = np.frombuffer(buffer, np.uint8)
            for piece in run:
                low, high = max(begin, piece.offset), min(until, piece.end)
                if low < high:
                    # NumPy copies without holding the interpreter.
                    row = np.frombuffer(piece.row, np.uint8)
                    np.copyto(row[low - piece.offset : high - piece.offset], source[low - begin : high - begin])
