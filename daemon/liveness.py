"""Who has gone silent: counts ticks, so that time in which this process was stopped too is nobody's silence.

Pure: whoever owns it calls ``tick`` at a steady rate while it runs itself.  A machine that slept for an hour has
missed 14,400 ticks, and nobody is late.  What silence means is the core's business (``events.Silent``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

TICK_S = 0.25
PING_TICKS = 2
"""A session that owes an ack, or holds an old generation, is pinged when it was not heard for so many ticks."""
SILENT_TICKS = 8
"""One that was not heard for so long is silent: stopped, swapped out, or in a debugger."""
BUSY_TICKS = 60
"""One that is heard and still owes its ack after so long, deep in one evaluation, counts as silent too."""


@dataclass
class _Watched:
    owing: int = 0
    unheard: int = 0


class Liveness:
    """Of the sessions that owe an ack or hold an old generation; nobody else is asked whether it lives."""

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def heard(self, session: int) -> None:
        """``session`` said something."""
        if session in self._watched:
            self._watched[session].unheard = 0

    def tick(self, owing: Collection[int], holding: Iterable[int]) -> tuple[list[int], list[int]]:
        """Another tick has passed, and these sessions owe an ack or hold memory: ``(whom to ping, who is silent)``."""
        self._watched = {session: self._watched.get(session, _Watched()) for session in (*owing, *holding)}
        ping, silent = [], []
        for session, state in self._watched.items():
            state.owing = state.owing + 1 if session in owing else 0
            state.unheard += 1
            if state.unheard > SILENT_TICKS or state.owing > BUSY_TICKS:
                silent.append(session)
            elif state.unheard % PING_TICKS == 0:
                ping.append(session)
        return ping, silent
