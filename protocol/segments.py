"""Shared-memory segments: POSIX shared memory that has no name by the time anybody else hears of it.

A segment is created under a name, opened a second time read-only, and unlinked at once; from then on it lives through
descriptors and mappings alone, so that nothing is left behind however its processes end.  What a segment contains is
``expertd.protocol.layout``; how descriptors travel is ``expertd.protocol.lifeline``.
"""

from __future__ import annotations

import _posixshmem  # the C half of multiprocessing.shared_memory, without its resource tracker
import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from expertd.protocol.errors import SegmentFailed
from expertd.protocol.sizes import show_size

_MAP_FIXED = 0x10
"""Linux's; Python does not have it, because its own mappings are never put in the place of others."""
_PREFIX = b"/expertd-"
"""Begins the names of segments, which Linux shows for those that are mapped, though they have been unlinked."""


@dataclass(frozen=True)
class Segment:
    """A new segment: ``mapping`` is writable, ``readonly`` is the descriptor to hand out.  The creator owns both."""

    mapping: mmap.mmap
    readonly: int
    size: int

    def close(self) -> None:
        """Give up the creator's hold; the memory goes when the last other process has unmapped it too.

        A mapping that is still exported (a read is filling it) is left to the garbage collector.
        """
        os.close(self.readonly)
        try:
            self.mapping.close()
        except BufferError:
            return


def segment_name(home: Path) -> str:
    """The name that a home's daemon uses for the instant between creating a segment and unlinking it.

    One fixed name for each home (at most 31 bytes, macOS's limit): a daemon that was killed in that instant leaves at
    most this one behind, and its successor's first segment takes it over.
    """
    return f"{_PREFIX.decode()}{hashlib.sha256(os.fsencode(home)).hexdigest()[:12]}"


def mapped_by(pid: int) -> dict[bytes, int] | None:
    """The segments that process ``pid`` has mapped, and their bytes; None where the system does not tell (no Linux)."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_bytes().splitlines()
    except OSError:  # it may be another user's, too
        return None
    found: dict[bytes, int] = {}
    for line in lines:
        if _PREFIX in line and line.endswith(b"(deleted)"):
            addresses, _, _, device, inode, *_ = line.split()
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            segment = device + b" " + inode
            found[segment] = found.get(segment, 0) + end - start
    return found


def create(name: str, size: int, beyond: bool = False) -> Segment:
    """A zeroed segment of ``size`` bytes, already unlinked, its pages reserved where the system can do that.

    Args:
        beyond: where the room that the system sets aside for such segments is full (Linux's /dev/shm), take memory that
            does not count there.
    Raises:
        SegmentFailed: the system has no room for it (a full /dev/shm is this error and not a later SIGBUS).
    """
    try:
        try:
            return _reserved(*_named(name), size)
        except OSError as error:
            if not beyond or error.errno != errno.ENOSPC or sys.platform != "linux":
                raise
            descriptor = os.memfd_create(name)
            return _reserved(descriptor, os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY), size)
    except OSError as error:
        raise SegmentFailed(
            f"the system gave no {show_size(size)} of shared memory ({error.strerror}); lower the budget, or give "
            "/dev/shm more room"
        ) from error


def _named(name: str) -> tuple[int, int]:
    """A segment that had that name for a moment: one descriptor that can write, and one that cannot."""
    try:
        descriptor = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    except FileExistsError:
        _posixshmem.shm_unlink(name)
        descriptor = _posixshmem.shm_open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    try:
        return descriptor, _posixshmem.shm_open(name, os.O_RDONLY, mode=0o600)
    finally:
        _posixshmem.shm_unlink(name)


def _reserved(descriptor: int, readonly: int, size: int) -> Segment:
    """``size`` bytes in the segment behind both descriptors; closes the one that can write."""
    try:
        os.ftruncate(descriptor, size)
        if sys.platform == "linux":
            os.posix_fallocate(descriptor, 0, size)
        mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError:
        os.close(readonly)
        raise
    finally:
        os.close(descriptor)
    return Segment(mapping, readonly, size)


def remove(name: str) -> None:
    """Remove what a daemon left under its name that was killed in the instant before it unlinked it."""
    with contextlib.suppress(FileNotFoundError):
        _posixshmem.shm_unlink(name)


def map_readonly(descriptor: int, size: int) -> mmap.mmap:
    """Map a segment that was handed over, and close ``descriptor``.  Writing through the mapping is impossible.

    Raises:
        SegmentFailed: the descriptor is no segment of that size.
    """
    try:
        if os.fstat(descriptor).st_size < size:
            raise SegmentFailed(f"a segment has {os.fstat(descriptor).st_size} bytes where {size} were announced")
        return mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError as error:
        raise SegmentFailed(f"a segment of {show_size(size)} could not be mapped ({error.strerror})") from error
    finally:
        os.close(descriptor)


def make_private(address: int, size: int, descriptor: int) -> bool:
    """Let this process write to what it has mapped at ``address`` read-only, with nobody else seeing it.

    Bytes and addresses stay what they are; a page is copied when it is written to.  Linux only; False: it did not work.
    """
    if sys.platform != "linux":
        return False
    system = ctypes.CDLL(None).mmap
    system.restype = ctypes.c_void_p
    system.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_ssize_t]
    rights, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    return bool(system(address, size, rights, kind, descriptor, 0) == address)
