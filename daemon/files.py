"""Reading files without filling the page cache behind the user's back: the difference between systems.

Linux: O_DIRECT where what is read lies on sectors, else read, then POSIX_FADV_DONTNEED for the range.  macOS: F_NOCACHE
on the descriptor, for any range (reference: open(2), fcntl(2)).
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable
from pathlib import Path

SECTOR = 512
"""Direct reads want buffers, lengths and offsets to be multiples of it; where that is not enough, they are refused."""

Read = Callable[[int, list[memoryview], int], int]
"""As ``os.preadv``: ``read(descriptor, buffers, offset)`` fills the buffers in turn and returns how many bytes came."""

_F_NOCACHE = 48


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
