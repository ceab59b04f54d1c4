"""How much of a pool the daemon has put together into large pages (``expertd.daemon.large_pages``), from outside of it.

By the count of the whole system, as the daemon maps its pools in small pages whatever they lie in: what others make of
their shared memory at that moment is in it too.
"""

from __future__ import annotations

import time
from pathlib import Path

STILL_S, MOST_S = 1.0, 30.0
"""The daemon has done what it can when nothing has changed for so long; and it is waited for no longer than that."""
POLL_S = 0.05


class PageCount:
    """Shared memory in large pages since this was made."""

    def __init__(self, meminfo: Path = Path("/proc/meminfo")) -> None:
        self._meminfo = meminfo
        self._before = self._bytes()

    def share_when_still(self, size: int) -> float | None:
        """Of ``size`` bytes, when it grows no more or is all; None: this system does not count it."""
        if self._before is None:
            return None
        began = changed_at = time.monotonic()
        share = 0.0
        while share < 1 and time.monotonic() - changed_at < STILL_S and time.monotonic() - began < MOST_S:
            time.sleep(POLL_S)
            now = min(1.0, max(0, (self._bytes() or 0) - self._before) / size)
            if now != share:
                share, changed_at = now, time.monotonic()
        return share

    def _bytes(self) -> int | None:
        """Shared memory of the whole system that lies in large pages (proc_meminfo(5))."""
        try:
            lines = self._meminfo.read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("ShmemHugePages:"))
        except (OSError, StopIteration, ValueError, IndexError):
            return None
