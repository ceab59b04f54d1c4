"""When a worker that died is started again, and what is said about it.

Pure: no clock, no process, no log.  ``expertd.clients.gateway.workers`` tells it what happens to the process and when,
in seconds on any clock that does not run backwards, and does what it answers.
"""

from __future__ import annotations

__all__ = ["Supervision"]

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
HEALTHY_S = 60.0
"""A worker that was ready for so long owes its death to something new: the waits begin again."""
LOAD_S = 5.0
"""What a load is taken to need until one was seen."""
LONGEST_LOAD_S = 120.0
"""A load that seemed to need longer was interrupted by something, as a machine that slept."""
SOONEST_RETRY_S = 1.0


class Supervision:
    """The life of one worker process after the other.

    The caller reports ``started``, then perhaps ``ready``, then ``died``, and so on.  The first death is followed by a
    start at once, the next ones by waits of 0.5 s, 1 s, 2 s up to 30 s, until a process has been ready for 60 s.
    """

    def __init__(self) -> None:
        self._load_s = LOAD_S
        self._deaths = 0
        self._told: str | None = None
        self._start_at = 0.0  # When the process was started, or is going to be.
        self._ready_at: float | None = None

    def started(self, now: float) -> None:
        """A process was started."""
        self._start_at = now
        self._ready_at = None

    def ready(self, now: float) -> None:
        """It has loaded the model."""
        self._ready_at = now
        self._load_s = min(now - self._start_at, LONGEST_LOAD_S)
        self._told = None

    def died(self, now: float) -> float:
        """It has ended, or could not be started; return after how many seconds to start the next one."""
        if self._ready_at is not None and now - self._ready_at >= HEALTHY_S:
            self._deaths = 0
        self._ready_at = None
        wait_s = min(FIRST_WAIT_S * 2.0 ** min(self._deaths - 1, 16), LONGEST_WAIT_S) if self._deaths else 0.0
        self._deaths += 1
        self._start_at = now + wait_s
        return wait_s

    def is_news(self, why: str) -> bool:
        """Whether ``why`` a process died is worth a line in the log: no process since the last ready one said so."""
        told, self._told = self._told, why
        return told != why

    def retry_after_s(self, now: float) -> float:
        """When asking again is worth it: what is left of the wait, and of a load as long as the last one."""
        if self._ready_at is not None:
            return SOONEST_RETRY_S
        return max(SOONEST_RETRY_S, self._start_at + self._load_s - now)
