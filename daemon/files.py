"""Reading files without filling the page cache behind the user's back: the difference between systems.

Linux: O_DIRECT into a buffer on a page, of whole sectors; where that is refused, read, then POSIX_FADV_DONTNEED for the
range.  macOS: F_NOCACHE on the descriptor, for any range (reference: open(2), fcntl(2)).

How a file is read best with these is in ``expertd.daemon.direct``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path

SECTOR = 512
"""Direct reads want buffers, lengths and offsets to be multiples of it; where that is not enough, they are refused."""

Read = Callable[[int, list[memoryview], int], int]
"""As ``os.preadv``: ``read(descriptor, buffers, offset)`` fills the buffers in turn and returns how many bytes came."""

LARGE_PAGE = 2 << 20

_F_NOCACHE = 48

_own = threading.local()


class FillFailed(Exception):
    """Reading stopped at byte ``offset``: by ``error``, or because the file ends there."""

    def __init__(self, offset: int, error: OSError | None = None) -> None:
        super().__init__(offset, error)
        self.offset, self.error = offset, error

    @property
    def ended(self) -> bool:
        """Whether the file ended."""
        return self.error is None

    @property
    def why(self) -> str:
        """The system's own words."""
        return (self.error.strerror if self.error is not None else None) or "no reason is known"

    @property
    def refused(self) -> bool:
        """Whether the system does not take such reads of this file at all."""
        return self.error is not None and self.error.errno == errno.EINVAL


def open_uncached(path: Path) -> int:
    """A read-only descriptor whose reads leave the page cache alone where the system can do that by descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
    return descriptor


def open_direct(path: Path) -> tuple[int, bool]:
    """A read-only descriptor for reads on sectors, and whether it takes no others (O_DIRECT)."""
    if sys.platform == "linux":
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system has no direct reads
                raise
    return open_uncached(path), False


def leave_direct(descriptor: int) -> None:
    """From now on reads of a direct descriptor go through the page cache, and may be of any range."""
    if sys.platform == "linux":
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)


def drop_behind(descriptor: int, offset: int, size: int) -> None:
    """Tell the system that these bytes, just read, will not be read again from its cache."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def fill(
    read: Read, descriptor: int, buffers: list[memoryview], offset: int, needed: int | None = None, step: int = 1
) -> None:
    """Fill ``buffers`` from ``offset`` on, in as many reads as the system needs.

    Args:
        needed: so many bytes have to come (default: all); the file may end behind them.
        step: reads begin on multiples of it.
    Raises:
        FillFailed: a read failed, or the file ended.
    """
    end = offset + (sum(map(len, buffers)) if needed is None else needed)
    while True:
        try:
            got = read(descriptor, buffers, offset)
        except OSError as error:
            raise FillFailed(offset, error) from error
        if offset + got >= end:
            return
        whole = got - got % step
        if not whole:
            raise FillFailed(offset + got)
        offset += whole
        while whole >= len(buffers[0]):
            whole -= len(buffers[0])
            buffers = buffers[1:]
        if whole:
            buffers = [buffers[0][whole:], *buffers[1:]]


def own_buffer(size: int) -> memoryview:
    """``size`` bytes that begin on a page and are this thread's own until it asks again."""
    held: memoryview | None = getattr(_own, "buffer", None)
    if held is None or len(held) < size:
        held = _own.buffer = _large_pages(size)
    return held[:size]


def _large_pages(size: int) -> memoryview:
    """Private memory in large pages, if the system has them: a device takes a read into few pieces sooner."""
    whole = -(-size // LARGE_PAGE) * LARGE_PAGE
    memory = mmap.mmap(-1, whole + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # this kernel was built without them
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % LARGE_PAGE
    return memoryview(memory)[begin : begin + whole]


def device_name(device: int) -> str:
    """The name that the system's tools have for the device with this ``st_dev``; its two numbers if there is none."""
    numbers = f"{os.major(device)}:{os.minor(device)}"
    try:
        if sys.platform == "darwin":
            call = ctypes.CDLL(None).devname
            call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_int32, ctypes.c_uint16]
            found: bytes | None = call(device, stat.S_IFBLK)
            return numbers if found is None else found.decode()
        return Path(f"/sys/dev/block/{numbers}").readlink().name
    except (OSError, AttributeError, UnicodeDecodeError):
        return numbers  # the file system is on no block device, or the system does not say
