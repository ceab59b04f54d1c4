"""Is the machine, or its SSD, too hot to read what nobody waits for?  The difference between systems.

Linux: an NVMe drive is at the temperature at which it says that it becomes too hot (hwmon).  macOS: the system's
thermal pressure is heavy or worse (notify(3), OSThermalNotification.h).  Whatever fails: it is not hot.  What follows
from heat is decided in ``expertd.daemon.pacing``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

HEAVY = 2
"""Of 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping."""
_PRESSURE = b"com.apple.system.thermalpressurelevel"

Hot = Callable[[], bool]


def never_hot() -> bool:
    """Of machines that do not say."""
    return False


def nvme_hot(root: Path = Path("/sys/class/hwmon")) -> bool:
    """Whether one of the NVMe drives is too hot by its own measure (kernel documentation, hwmon/sysfs-interface)."""
    try:
        return any(_drive_hot(drive) for drive in sorted(root.iterdir()))
    except OSError:
        return False


def _drive_hot(drive: Path) -> bool:
    try:
        if (drive / "name").read_text().strip() != "nvme":
            return False
        return int((drive / "temp1_input").read_text()) >= int((drive / "temp1_max").read_text())
    except (OSError, ValueError):
        return False  # it does not say


class MacThermal:
    """The system's level; ``library`` has ``notify_register_check`` and ``notify_get_state``.

    Raises:
        OSError: when it is made: the system does not tell.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        token = ctypes.c_int(0)
        try:
            status = library.notify_register_check(_PRESSURE, ctypes.byref(token))
        except AttributeError:
            raise OSError("this system has no notify_register_check") from None
        if status != 0:
            raise OSError(f"the system does not tell its thermal pressure (status {status})")
        self._token = token

    def __call__(self) -> bool:
        level = ctypes.c_uint64(0)
        return self._library.notify_get_state(self._token, ctypes.byref(level)) == 0 and level.value >= HEAVY


def system_thermal() -> Hot:
    """What tells on this system whether it is hot.  Never fails."""
    if sys.platform == "darwin":
        try:
            return MacThermal(ctypes.CDLL(None))
        except OSError:
            return never_hot
    return nvme_hot
