"""Writes packed stores (``expertd.protocol.packed``), and verifies them.

A store is written beside its place, under its name and ``.part``, and renamed when all of it is on the disk.  Whatever
ends a run leaves that file for the next one, which takes over each record that fits its checksum and writes the others.
Where blocks come from is the caller's business: the model's files, or what mlx-lm computes of them.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from expertd.protocol.checkpoint import check_unchanged
from expertd.protocol.errors import FileChanged, PackFailed, PackRunning, StoreInvalid
from expertd.protocol.packed import PackedLayer, StoreHeader, StoreLayout, checksum
from expertd.protocol.sizes import show_size

Fill = Callable[[int, int, Sequence[memoryview]], None]
"""``fill(layer, expert, rows)`` puts the bytes of a block into ``rows``, one writable view for each part."""

Moved = Callable[[int, bool], None]
"""``moved(size, fresh)`` is told of each block: its bytes, and whether it was dealt with in this run."""

SYNC_BYTES = 256 << 20
"""So much is written between two waits for the disk, so that memory does not fill with what is to be written."""


class _Record:
    """Memory for one record of a layer: all of it, and its parts' rows.  Between the rows are zeros."""

    def __init__(self, layer: PackedLayer) -> None:
        self.all = memoryview(bytearray(layer.record_bytes))
        self.rows = [self.all[part.offset : part.offset + part.bytes] for part in layer.parts]


def part_path(path: Path) -> Path:
    """Where the store at ``path`` is while it is not complete."""
    return path.with_name(path.name + ".part")


def write_store(layout: StoreLayout, path: Path, fill: Fill, moved: Moved) -> None:
    """Write a store at ``path``, going on with what an earlier run has left.

    Raises:
        PackRunning: another process does so.
        PackFailed: there is no room, or the system does not let us; what was written is kept.
        FileChanged: the model is not the one that was looked at any more; what was written is deleted.
    """
    part = part_path(path)
    try:
        with _unfinished(part) as descriptor:
            written = _begin(descriptor, layout)
            _check_room(descriptor, path.parent, layout)
            try:
                _write_records(descriptor, layout, written, fill, moved)
                for mark in layout.header.files:
                    check_unchanged(Path(layout.header.folder) / mark.name, mark)
            except FileChanged:
                part.unlink()
                raise
            os.ftruncate(descriptor, layout.size)
            os.fsync(descriptor)
            _forget(descriptor, 0, 0)
            part.replace(path)
            sync_folder(path.parent)
    except OSError as error:
        there = "the same command goes on with what is there; to have its space back, delete it"
        raise PackFailed(
            f"{part} cannot be written ({error.strerror}); {there if part.exists() else 'name another folder with -o'}"
        ) from error


def verify_store(layout: StoreLayout, path: Path, fill: Fill, moved: Moved) -> None:
    """Compare every byte of the store at ``path`` with its checksums, and with what ``fill`` says.

    Raises:
        StoreInvalid: the first thing that is wrong.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _forget(descriptor, 0, 0)  # it is the disk that is asked, not the system's memory
            _verify_records(descriptor, layout, path, fill, moved)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreInvalid(f"the packed store {path} cannot be read ({error.strerror})") from error


def sync_folder(folder: Path) -> None:
    """Have the names in ``folder`` on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _unfinished(part: Path) -> Iterator[int]:
    """A descriptor of the file at ``part``, which is created if need be and belongs to this process alone."""
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PackRunning(f"another process is writing {part}; wait for it, or end it") from None
            if _same_file(part, descriptor):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _same_file(path: Path, descriptor: int) -> bool:
    """Whether ``path`` still is what was opened: whoever had the lock before may have renamed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _begin(descriptor: int, layout: StoreLayout) -> tuple[tuple[int, ...], ...]:
    """The checksums ``[layer][expert]`` of what is there, 0 of what is not; a file of something else is emptied."""
    nothing = bytes(layout.table_bytes)
    if os.pread(descriptor, len(layout.encoded), 0) != layout.encoded:
        os.ftruncate(descriptor, 0)
        _write(descriptor, memoryview(layout.encoded), 0)
    table = os.pread(descriptor, layout.table_bytes, layout.start)
    return layout.checksums(table + nothing[len(table) :])


def _check_room(descriptor: int, folder: Path, layout: StoreLayout) -> None:
    needed = layout.size - os.fstat(descriptor).st_blocks * 512
    status = os.fstatvfs(descriptor)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise PackFailed(
            f"the packed store of {layout.header.folder} needs {show_size(needed)} in {folder}, where "
            f"{show_size(free)} are free; make room, or name a folder on another disk with -o"
        )


def _blocks(header: StoreHeader) -> Iterator[tuple[int, int, PackedLayer, _Record]]:
    for number, layer in enumerate(header.layers):
        record = _Record(layer)
        for expert in range(layer.experts):
            yield number, expert, layer, record


def _write_records(
    descriptor: int, layout: StoreLayout, written: tuple[tuple[int, ...], ...], fill: Fill, moved: Moved
) -> None:
    unsynced = 0
    for number, expert, layer, record in _blocks(layout.header):
        offset = layout.record(number, expert)
        there = written[number][expert]
        if there and _read(descriptor, record.all, offset) and checksum(record.rows) == there:
            moved(layer.record_bytes, False)
            continue
        record.all[:] = bytes(layer.record_bytes)
        fill(number, expert, record.rows)
        _write(descriptor, record.all, offset)
        entry = checksum(record.rows).to_bytes(8, "little")
        _write(descriptor, memoryview(entry), layout.entry(number, expert))
        unsynced += layer.record_bytes
        if unsynced >= SYNC_BYTES:
            os.fsync(descriptor)
            _forget(descriptor, 0, offset + layer.record_bytes)
            unsynced = 0
        moved(layer.record_bytes, True)


def _verify_records(descriptor: int, layout: StoreLayout, path: Path, fill: Fill, moved: Moved) -> None:
    head = memoryview(bytearray(layout.start + layout.header.layers[0].offset))
    _read(descriptor, head, 0)
    table = slice(layout.start, layout.start + layout.table_bytes)
    if any(head[len(layout.encoded) : layout.start]) or any(head[table.stop :]):
        raise StoreInvalid(f"the packed store {path} is damaged beside its table; delete it and pack again")
    checksums = layout.checksums(bytes(head[table]))
    for number, expert, layer, record in _blocks(layout.header):
        found = _Record(layer)
        complete = _read(descriptor, found.all, layout.record(number, expert))
        where = f"the packed store {path}: layer {number} ({layer.path}), expert {expert}"
        if not complete or checksum(found.rows) != checksums[number][expert]:
            raise StoreInvalid(f"{where} does not fit its checksum; delete the store and pack again")
        fill(number, expert, record.rows)
        if found.all != record.all:
            raise StoreInvalid(f"{where} is not what the model has; delete the store and pack again")
        moved(layer.record_bytes, True)


def _write(descriptor: int, what: memoryview, offset: int) -> None:
    while what:
        done = os.pwrite(descriptor, what, offset)
        what, offset = what[done:], offset + done


def _read(descriptor: int, into: memoryview, offset: int) -> bool:
    """Fill ``into``; False if the file ends before."""
    while into:
        done = os.preadv(descriptor, [into], offset)
        if not done:
            return False
        into, offset = into[done:], offset + done
    return True


def _forget(descriptor: int, offset: int, size: int) -> None:
    """Have the system drop what it holds of the file; 0 bytes: up to its end."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
