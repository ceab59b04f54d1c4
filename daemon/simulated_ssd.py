"""A slower disk than there is, for honest experiments: reads of the daemon take as long as on an SSD of a given speed.

Everything else is real: the bytes come from the files, by the same threads.  A read is never quicker than it was.
``Ssd`` is pure; ``SimulatedSsd`` stands in the place of ``os.preadv``.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence

from expertd.protocol.errors import SizeInvalid
from expertd.protocol.sizes import parse_rate, show_size

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class Ssd:
    """A device that gives ``rate`` bytes a second to all reads together, and each of them ``latency_s`` later."""

    def __init__(self, rate: int, latency_s: float) -> None:
        self.rate, self.latency_s = rate, latency_s
        self._free_at = float("-inf")

    def done_at(self, began: float, size: int) -> float:
        """When a read of ``size`` bytes that ``began`` then is done; reads come in the order of these calls."""
        self._free_at = max(self._free_at, began) + size / self.rate
        return self._free_at + self.latency_s

    def __str__(self) -> str:
        return f"{show_size(self.rate)}/s, {1e6 * self.latency_s:.0f} us"


def parse_ssd(text: str) -> Ssd:
    """An SSD as people write it: ``RATE[,LATENCY]``, for example ``2GB`` or ``1.5GB/s,100us``.

    Raises:
        SizeInvalid: it is written in another way.
    """
    rate, _, latency = text.strip().partition(",")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*", latency or "0s")
    if found is None:
        raise SizeInvalid(f"{latency.strip()!r} is not a latency; write RATE[,LATENCY], for example 2GB,100us")
    try:
        size = parse_rate(rate)
    except SizeInvalid:
        raise SizeInvalid(
            f"{rate.strip()!r} is not a rate in bytes a second; write RATE[,LATENCY], for example 2GB,100us"
        ) from None
    return Ssd(size, float(found.group(1)) * _UNITS_S[found.group(2)])


class SimulatedSsd:
    """Called as ``os.preadv``, by any number of threads; returns when the SSD would have been done."""

    def __init__(
        self,
        ssd: Ssd,
        read: Callable[[int, Sequence[memoryview], int], int] = os.preadv,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._ssd = ssd
        self._read, self._clock, self._sleep = read, clock, sleep
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        began = self._clock()
        size = self._read(descriptor, buffers, offset)
        with self._lock:
            done_at = self._ssd.done_at(began, size)
        left = done_at - self._clock()
        if left > 0:
            self._sleep(left)
        return size

    def __str__(self) -> str:
        return str(self._ssd)
