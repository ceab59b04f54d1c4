"""What reading costs, from outside of the daemon: bytes by the kernel's own counters, and processor time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

SECTOR = 512  # of the kernel's counters, whatever the device's are (Documentation/admin-guide/iostats.rst)


@dataclass(frozen=True)
class Counted:
    """Bytes that a process had read from storage, that a device had read, and the process's seconds of processor.

    None: this system does not count it.
    """

    process_bytes: int | None
    device_bytes: int | None
    cpu_s: float


class Counters:
    """Of one process, and of the device that ``path`` is on."""

    def __init__(self, pid: int, path: Path) -> None:
        device = path.stat().st_dev
        self._process = psutil.Process(pid)
        self._io = Path(f"/proc/{pid}/io")
        self._device = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")

    def now(self) -> Counted:
        """All counters."""
        times = self._process.cpu_times()
        return Counted(self._process_bytes(), self._device_bytes(), times.user + times.system)

    def _process_bytes(self) -> int | None:
        try:
            fields = dict(line.split(": ") for line in self._io.read_text().splitlines())
            return int(fields["read_bytes"])
        except (OSError, KeyError, ValueError):
            return None

    def _device_bytes(self) -> int | None:
        try:
            return int(self._device.read_text().split()[2]) * SECTOR
        except (OSError, IndexError, ValueError):
            return None


def between(before: int | None, after: int | None) -> int | None:
    """The difference, if both were counted."""
    return None if before is None or after is None else after - before
