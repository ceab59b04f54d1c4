"""What the daemon's reads are like, device by device: how many, how long, how many at once.

Pure: times are given, and whoever calls it holds a lock.  It takes a fixed amount of memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

RATIO = 1.2
"""Of neighbouring buckets' bounds: the middle of one is within 10 % of all that is in it."""
LEAST_US = 1.0
BUCKETS = 104
"""Up to 170 s; what is longer counts as that."""


class Histogram:
    """Times in microseconds, each kept to within 10 %."""

    def __init__(self) -> None:
        self.count = 0
        self._counts = [0] * BUCKETS

    def add(self, us: float) -> None:
        """Count one."""
        number = int(math.log(us / LEAST_US) / math.log(RATIO)) if us > LEAST_US else 0
        self._counts[min(number, BUCKETS - 1)] += 1
        self.count += 1

    def percentile(self, percent: float) -> float:
        """What ``percent`` of all are not longer than; 0 if there is none."""
        rank, seen = max(1, math.ceil(self.count * percent / 100)), 0
        for number, count in enumerate(self._counts):
            seen += count
            if seen >= rank:
                return float(LEAST_US * RATIO ** (number + 0.5))
        return 0.0


@dataclass(frozen=True)
class Device:
    """The reads of one device: ``number`` is its ``st_dev``; a depth counts the reads under way when one begins."""

    number: int
    reads: int
    bytes: int
    p50_us: float
    p95_us: float
    p99_us: float
    depth_mean: float
    depth_max: int


@dataclass(frozen=True)
class ReadStatistics:
    """All devices, and the time from a Fetch's coming to its first read."""

    devices: tuple[Device, ...]
    fetch_to_read_p50_us: float
    fetch_to_read_p99_us: float


@dataclass
class _Counts:
    """Of one device: ``begun`` reads, of which ``under_way`` have not ended."""

    begun: int = 0
    bytes: int = 0
    under_way: int = 0
    depths: int = 0
    depth_max: int = 0
    times: Histogram = field(default_factory=Histogram)


class Devices:
    """Counts reads from their ``begin`` to their ``end``; one that fails is none that took time, but was under way."""

    def __init__(self) -> None:
        self._devices: dict[int, _Counts] = {}
        self._fetches = Histogram()

    def begin(self, device: int) -> None:
        """A read of ``device`` begins."""
        counts = self._devices.setdefault(device, _Counts())
        counts.begun += 1
        counts.under_way += 1
        counts.depths += counts.under_way
        counts.depth_max = max(counts.depth_max, counts.under_way)

    def end(self, device: int, size: int, took_s: float | None) -> None:
        """It has ended, with so many bytes; None: it failed."""
        counts = self._devices[device]
        counts.under_way -= 1
        if took_s is not None:
            counts.bytes += size
            counts.times.add(took_s * 1e6)

    def fetched(self, waited_s: float) -> None:
        """The first read for a Fetch begins so long after that came."""
        self._fetches.add(waited_s * 1e6)

    def statistics(self) -> ReadStatistics:
        """All that was counted."""
        devices = tuple(
            Device(
                number=number,
                reads=counts.times.count,
                bytes=counts.bytes,
                p50_us=counts.times.percentile(50),
                p95_us=counts.times.percentile(95),
                p99_us=counts.times.percentile(99),
                depth_mean=counts.depths / counts.begun,
                depth_max=counts.depth_max,
            )
            for number, counts in sorted(self._devices.items())
        )
        return ReadStatistics(devices, self._fetches.percentile(50), self._fetches.percentile(99))
