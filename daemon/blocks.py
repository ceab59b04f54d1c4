"""Where a model's blocks are read from: its packed store as long as that is in order, else its own files.

Whoever calls waits for the disk; the daemon's threads are in ``expertd.daemon.reader``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence

from expertd.daemon.direct import Piece, runs
from expertd.daemon.files import Read
from expertd.daemon.index import BlockIndex
from expertd.daemon.packed import StoreFile, StoreIndex
from expertd.daemon.plain import PlainFile
from expertd.protocol.checkpoint import check_unchanged
from expertd.protocol.errors import ReadFailed, StoreInvalid

log = logging.getLogger("expertd.daemon")


class OpenFiles:
    """One model's open files, and its packed store while one is in use (``use``)."""

    def __init__(self, index: BlockIndex) -> None:
        self.index = index
        self._files = [PlainFile(path, mark) for path, mark in zip(index.paths, index.marks, strict=True)]
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

    def read_packed(self, layer: int, first: int, blocks: Sequence[Sequence[memoryview]], read: Read) -> int:
        """Read neighbours from the packed store; returns how many bytes each took, 0 if no store is used (any more).

        A store that fails while one block alone is read is left.

        Raises:
            FileChanged: a file of the model itself is not the one that was indexed.
            ReadFailed: the store has failed, and the block is nowhere else.
            StoreInvalid: it has failed with one of several blocks.
        """
        store = self._store
        if store is None:
            return 0
        try:
            size = store.read_blocks(layer, first, blocks, read)
            self._check_files(layer, range(first, first + len(blocks)))
            return size
        except StoreInvalid as error:
            self._check_files(layer, range(first, first + len(blocks)))
            if len(blocks) > 1:
                raise
            folder = store.index.layout.header.folder
            if self.index.derived:
                raise ReadFailed(f"{error}; look at it with: expertd pack {folder} --verify") from error
            self._refuse(store, f"{error}; from now on the safetensors of {folder} are read")
            return 0

    def _check_files(self, layer: int, experts: Iterable[int]) -> None:
        """Raise FileChanged if one of the files of these blocks is not the one that was indexed."""
        for file in set().union(*(self.index.files_of(layer, expert) for expert in experts)):
            check_unchanged(self.index.paths[file], self.index.marks[file])

    def _refuse(self, store: StoreFile, why: str) -> None:
        with self._lock:
            first = self._store is store
            if first:
                self._store, self._refused = None, store.index
        if first:
            log.warning("%s", why)
            store.close()

    def read_plain(self, layer: int, first: int, blocks: Sequence[Sequence[memoryview]], read: Read) -> int:
        """Read neighbours from the model's own files; returns how many bytes each has.

        Raises:
            ReadFailed: the system failed, or a file ended early.
            FileChanged: a file is not the one that was indexed.
        """
        pieces: defaultdict[int, list[Piece]] = defaultdict(list)
        for expert, rows in enumerate(blocks, first):
            for found in self.index.ranges(layer, expert):
                pieces[found.file].append(Piece(found.offset, rows[found.slab]))
        for file in sorted(pieces):
            for run in runs(pieces[file]):
                self._files[file].read(run, read)
        return sum(map(len, blocks[0]))

    def close(self) -> None:
        for file in self._files:
            file.close()
        with self._lock:
            store, self._store = self._store, None
        if store is not None:
            store.close()


def read_blocks(
    files: OpenFiles, layer: int, first: int, blocks: Sequence[Sequence[memoryview]], read: Read = os.preadv
) -> int:
    """Read experts ``first`` and so on of a layer into ``blocks``; returns the bytes that were read for each of them.

    Raises:
        ReadFailed: the system failed, or a file ended early.
        FileChanged: a file is not the one that was indexed.
        StoreInvalid: the packed store has failed with one of several blocks: read each alone, to learn which.
    """
    return files.read_packed(layer, first, blocks, read) or files.read_plain(layer, first, blocks, read)


def read_block(files: OpenFiles, layer: int, expert: int, rows: Sequence[memoryview], read: Read = os.preadv) -> int:
    """Read one block into ``rows``, one writable view for each part; raises as ``read_blocks`` for one block."""
    return read_blocks(files, layer, expert, [rows], read)
