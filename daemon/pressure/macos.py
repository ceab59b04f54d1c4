"""Memory pressure as the macOS kernel sees it: sysctl ``kern.memorystatus_vm_pressure_level``.

Swap and compressed memory are not looked at here, on purpose.  The kernel computes its level from what is left
outside of the compressor, against the thresholds at which it begins to compact and to swap, and with different ones on
the way up and down (XNU, ``vm_compressor_xnu.h`` and ``kern_memorystatus_notify.c``): both are in the level already.
Swap that fills up says less, because macOS swaps out idle apps long before memory is short.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

from expertd.daemon.pressure import Content, Level, Reading, Source

PRESSURE = "kern.memorystatus_vm_pressure_level"

LEVELS = {1: Level.NORMAL, 2: Level.WARNING, 4: Level.CRITICAL}
"""The sysctl answers in the values of dispatch's DISPATCH_MEMORYPRESSURE_*, not in the kernel's own 0 to 3."""

Sysctl = Callable[[str], int]


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def sysctl_int(name: str) -> int:
    """The 32-bit integer that the kernel keeps under ``name``; needs no privilege.

    Raises:
        OSError: there is no such name, it is no such integer, or this system has no ``sysctlbyname``.
    """
    value = ctypes.c_int32(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    try:
        call = _library().sysctlbyname
    except AttributeError:
        raise OSError("this system has no sysctlbyname") from None
    if call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{os.strerror(number)}: sysctl {name}")
    if size.value != ctypes.sizeof(value):
        raise OSError(f"sysctl {name} has {size.value} bytes instead of {ctypes.sizeof(value)}")
    return value.value


class MacSource:
    """Readings of the kernel's level; ``sysctl(name)`` gives an integer or raises OSError.

    Raises:
        OSError: when it is made: the kernel does not report its level.
    """

    def __init__(self, sysctl: Sysctl = sysctl_int) -> None:
        self._sysctl = sysctl
        sysctl(PRESSURE)

    def read(self) -> Reading:
        """The kernel's level; one system call."""
        try:
            value = self._sysctl(PRESSURE)
        except OSError as error:
            return Reading(Level.NORMAL, f"the kernel no longer reports its memory pressure ({error})")
        level = LEVELS.get(value)
        if level is None:
            return Reading(Level.NORMAL, f"the kernel reports memory pressure level {value} (unknown, taken as normal)")
        return Reading(level, f"the kernel reports memory pressure level {value} ({level.word})")


def macos_source(sysctl: Sysctl = sysctl_int) -> Source:
    """A ``MacSource``, or one that is always content if the kernel does not report its level.  Never fails."""
    try:
        return MacSource(sysctl)
    except OSError as error:
        return Content(f"the kernel does not report its memory pressure ({error})")
