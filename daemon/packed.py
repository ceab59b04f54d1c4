"""Packed stores as the daemon uses them: finding the one that fits a model, and reading its records into slots.

What a store looks like is in ``expertd.protocol.packed``.  What happens when one fails is decided in
``expertd.daemon.blocks``.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expertd.daemon.files import SECTOR, FillFailed, Read, drop_behind, fill, leave_direct, open_direct, own_buffer
from expertd.protocol.errors import StoreInvalid
from expertd.protocol.manifest import Manifest
from expertd.protocol.packed import (
    ALIGN,
    SUFFIX,
    PackedLayer,
    StoreLayout,
    check_fits,
    checksum,
    layout_of,
    read_header,
    store_name,
)

log = logging.getLogger("expertd.daemon")

_padding = memoryview(mmap.mmap(-1, ALIGN))
"""Where the zeros between parts go, from all threads at once: nobody reads it."""


@dataclass(frozen=True)
class StoreIndex:
    """A store that fits its model: where it is, which version of the file, and each block's checksum.

    ``path`` is the file itself, no link.  ``checksums`` are ``[layer][expert]``.
    """

    path: Path
    mark: tuple[int, int, int]
    layout: StoreLayout
    checksums: tuple[tuple[int, ...], ...]


def find_store(folder: Path, manifest: Manifest) -> StoreIndex | None:
    """The store of ``manifest`` in ``folder``, if there is one and it fits; one that does not is told in the log."""
    path = folder / store_name(manifest.key)
    try:
        return _index(path, manifest)
    except FileNotFoundError:
        lost = path.is_symlink()
        why = f"{path} leads to {path.readlink()}, which is not there" if lost else _outdated(folder, manifest)
    except (StoreInvalid, OSError) as error:
        why = str(error)
    if why:
        instead = "" if manifest.derived_by else "its safetensors are read instead; "
        log.warning("%s; %sto write it again: expertd pack %s", why, instead, manifest.folder)
    return None


def _index(path: Path, manifest: Manifest) -> StoreIndex:
    mark = _mark(path)
    return _indexed(path.resolve(), mark, check_fits(path, manifest))


def any_store(path: Path) -> StoreIndex:
    """The store at ``path``, whatever model it is of.

    Raises:
        StoreInvalid: it is none, or damaged.
        OSError: it cannot be read.
    """
    return _indexed(path.resolve(), _mark(path), layout_of(read_header(path)))


def _indexed(path: Path, mark: tuple[int, int, int], layout: StoreLayout) -> StoreIndex:
    with path.open("rb") as file:
        file.seek(layout.start)
        table = file.read(layout.table_bytes)
    if len(table) < layout.table_bytes:
        raise StoreInvalid(f"the packed store {path} is truncated")
    return StoreIndex(path, mark, layout, layout.checksums(table))


def _outdated(folder: Path, manifest: Manifest) -> str:
    """A sentence about a store of another version of the model, or nothing if there is none."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            if read_header(path).folder == manifest.folder:
                return f"the packed store {path} is of another version of {manifest.folder} (delete it)"
        except (StoreInvalid, OSError):
            continue
    return ""


def _mark(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


class StoreFile:
    """An open store.  Its methods may be called from any thread."""

    def __init__(self, index: StoreIndex) -> None:
        self.index = index
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._users = 0
        self._closed = False
        self._direct = False
        self._straight = True  # direct reads go into the slabs themselves

    def read_blocks(self, layer: int, first: int, blocks: Sequence[Sequence[memoryview]], read: Read) -> int:
        """Read the records of experts ``first`` and so on into ``blocks``, each one row for each part.

        Returns how many bytes each of them took.

        Raises:
            StoreInvalid: the file is gone, is another one, cannot be read, or a record is not what was written.
        """
        path = self.index.path
        packed, offset = self.index.layout.header.layers[layer], self.index.layout.record(layer, first)
        problem: str | None = None  # no error: what is kept in a name here holds the rows until a collection
        try:
            try:
                with self._open() as descriptor:
                    self._transfer(descriptor, offset, packed, blocks, read)
            except FillFailed as failed:
                ended = f"ended at byte {failed.offset}, inside a record"
                problem = f"the packed store {path} {ended if failed.ended else f'cannot be read ({failed.why})'}"
            # Afterwards, because the device can work meanwhile; what was read of another file is of no use.
            if _mark(path) != self.index.mark:
                raise StoreInvalid(f"the packed store {path} has changed since it was opened")
        except OSError as error:
            raise StoreInvalid(f"the packed store {path} cannot be read ({error.strerror})") from error
        if problem is not None:
            raise StoreInvalid(problem)
        for expert, rows in enumerate(blocks, first):
            if checksum(rows) != self.index.checksums[layer][expert]:
                raise StoreInvalid(f"the packed store {path} is damaged: layer {layer}, expert {expert}")
        return packed.record_bytes

    def close(self) -> None:
        """Close the file as soon as nobody reads it."""
        with self._lock:
            self._closed = True
            self._close_if_unused()

    @contextmanager
    def _open(self) -> Iterator[int]:
        with self._lock:
            if self._descriptor is None:
                if self._closed:
                    raise StoreInvalid(f"the packed store {self.index.path} is not used any more")
                self._descriptor, self._direct = open_direct(self.index.path)
            self._users += 1
            descriptor = self._descriptor
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._users and self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _transfer(
        self, descriptor: int, offset: int, packed: PackedLayer, blocks: Sequence[Sequence[memoryview]], read: Read
    ) -> None:
        """Fill ``blocks`` in the best way that the system takes.

        Direct reads want everything aligned.  So they go straight into the slabs where all parts are whole sectors,
        else through a buffer; and what a file system or device refuses once is not tried again.
        """
        size = packed.record_bytes * len(blocks)
        while True:
            direct = self._direct
            bounce = direct and not (self._straight and all(part.bytes % SECTOR == 0 for part in packed.parts))
            buffer = own_buffer(size) if bounce else None
            buffers = [buffer] if buffer is not None else [one for rows in blocks for one in _scattered(packed, rows)]
            try:
                fill(read, descriptor, buffers, offset, step=SECTOR if direct else 1)
            except FillFailed as failed:
                if not failed.refused or not direct:
                    raise
                if bounce:
                    leave_direct(descriptor)
                    self._direct = False
                else:
                    self._straight = False
                continue
            if buffer is not None:
                for number, rows in enumerate(blocks):
                    for part, row in zip(packed.parts, rows, strict=True):
                        start = number * packed.record_bytes + part.offset
                        # NumPy copies without holding the interpreter.
                        np.copyto(np.frombuffer(row, np.uint8), np.frombuffer(buffer, np.uint8, part.bytes, start))
            elif not direct:
                drop_behind(descriptor, offset, size)
            return


def _scattered(packed: PackedLayer, rows: Sequence[memoryview]) -> list[memoryview]:
    """The record as buffers in a row: each part's own, and one for the zeros up to the next."""
    ends = [part.offset for part in packed.parts[1:]] + [packed.record_bytes]
    buffers = []
    for part, row, end in zip(packed.parts, rows, ends, strict=True):
        buffers.append(row)
        if gap := end - part.offset - part.bytes:
            buffers.append(_padding[:gap])
    return buffers
