"""Reading files without filling the page cache behind the user's back: the difference between systems.

Linux: read, then POSIX_FADV_DONTNEED for the range.  macOS: F_NOCACHE on the descriptor (reference: fcntl(2)).
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

_F_NOCACHE = 48


def open_uncached(path: Path) -> int:
    """A read-only descriptor whose reads leave the page cache alone where the system can do that by descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    if sys.platform == "darwin":
        fcntl.fcntl(descriptor, _F_NOCACHE, 1)
    return descriptor


def drop_behind(descriptor: int, offset: int, size: int) -> None:
    """Tell the system that these bytes, just read, will not be read again from its cache."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)
