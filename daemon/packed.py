"""Packed stores as the daemon uses them: finding the one that fits a model, and reading its records into slots.

What a store looks like is in ``expertd.protocol.packed``.  What happens when one fails is decided in
``expertd.daemon.blocks``.
"""

from __future__ import annotations

import logging
import mmap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from expertd.daemon.direct import DirectFile, Piece
from expertd.daemon.files import FillFailed, Read
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
        self._file: DirectFile | None = None
        self._users = 0
        self._closed = False

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
                with self._open() as file:
                    file.read(_pieces(packed, offset, blocks), read)
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
    def _open(self) -> Iterator[DirectFile]:
        with self._lock:
            if self._file is None:
                if self._closed:
                    raise StoreInvalid(f"the packed store {self.index.path} is not used any more")
                self._file = DirectFile(self.index.path)
            self._users += 1
            file = self._file
        try:
            yield file
        finally:
            with self._lock:
                self._users -= 1
                self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._closed and not self._users and self._file is not None:
            self._file.close()
            self._file = None


def _pieces(packed: PackedLayer, offset: int, blocks: Sequence[Sequence[memoryview]]) -> list[Piece]:
    """Records in a row, from ``offset`` of the file on: each part's own bytes, and the zeros up to the next."""
    ends = [part.offset for part in packed.parts[1:]] + [packed.record_bytes]
    pieces = []
    for rows in blocks:
        for part, row, end in zip(packed.parts, rows, ends, strict=True):
            pieces.append(Piece(offset + part.offset, row))
            if gap := end - part.offset - part.bytes:
                pieces.append(Piece(offset + part.offset + part.bytes, _padding[:gap]))
        offset += packed.record_bytes
    return pieces
