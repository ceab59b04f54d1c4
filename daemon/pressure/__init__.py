"""How short the machine is of memory: one contract, and the source that fits this system.

A source reports what it sees at this moment.  It does not smooth and has no hysteresis, and what a level means for the
budget is not its business either: that is the governor's (``daemon.core.governor``).

    Level, Reading, Source     the contract
    system_source              macOS: ``macos``; Linux: ``linux``; elsewhere one that is always content
    scripted                   levels out of a file, for tests and ``expertd daemon run --simulate-pressure``
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

__all__ = ["Content", "Level", "Reading", "Source", "system_source"]


class Level(IntEnum):
    """How short of memory, in ascending order."""

    NORMAL = 0
    WARNING = 1
    CRITICAL = 2

    @property
    def word(self) -> str:
        """``normal``, ``warning`` or ``critical``."""
        return self.name.lower()


@dataclass(frozen=True)
class Reading:
    """A level and, for people, the piece of a sentence that tells which number decided it.

    At ``NORMAL`` that is the number nearest to its threshold.
    """

    level: Level
    figure: str


class Source(Protocol):
    """Where readings come from."""

    def read(self) -> Reading:
        """The pressure now.  The daemon's loop calls this 4 to 10 times a second: it MUST be quick and MUST NOT raise.

        What worked once and cannot be read any more counts as ``NORMAL``, and the figure says so.
        """
        ...


class Content:
    """A source for want of one: always ``NORMAL``, with the reason why it knows nothing."""

    def __init__(self, figure: str = "this system reports no memory pressure") -> None:
        self._reading = Reading(Level.NORMAL, figure)

    def read(self) -> Reading:
        """The same each time."""
        return self._reading


def system_source(platform: str = sys.platform) -> Source:
    """The source of this system, or of another ``sys.platform``.  Never fails."""
    if platform == "darwin":
        from expertd.daemon.pressure.macos import macos_source

        return macos_source()
    if platform == "linux":
        from expertd.daemon.pressure.linux import LinuxSource

        return LinuxSource()
    return Content()
