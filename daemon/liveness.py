"""Who has gone silent: counts ticks, so that time in which this process was stopped too is nobody's silence.

Pure: whoever owns it calls ``tick`` at a steady rate while it runs itself.  A machine that slept for an hour has
missed 14,400 ticks, and nobody is late.  What silence means is the core's business (``events.Silent``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TICK_S = 0.25
PING_TICKS = 2
"""A session that owes an ack is pinged every so many ticks."""
SILENT_TICKS = 8
"""One that owes an ack and was not heard for so long is silent: stopped, swapped out, or in a debugger."""
BUSY_TICKS = 60
"""One that is heard and still owes its ack after so long, deep in one evaluation, is left behind too."""


@dataclass
class _Owing:
    ticks: int = 0
    unheard: int = 0


class Liveness:
    """Of the sessions that owe an ack; nobody else is asked whether it lives."""

    def __init__(self) -> None:
        self._owing: dict[int, _Owing] = {}

    def heard(self, session: int) -> None:
        """``session`` said something."""
        if session in self._owing:
            self._owing[session].unheard = 0

    def tick(self, owing: Iterable[int]) -> tuple[list[int], list[int]]:
        """Another tick has passed, and these sessions owe an ack now: ``(whom to ping, who is silent)``."""
        self._owing = {session: self._owing.get(session, _Owing()) for session in owing}
        ping, silent = [], []
        for session, state in self._owing.items():
            state.ticks += 1
            state.unheard += 1
            if state.unheard > SILENT_TICKS or state.ticks > BUSY_TICKS:
                silent.append(session)
            elif state.ticks % PING_TICKS == 0:
                ping.append(session)
        return ping, silent
