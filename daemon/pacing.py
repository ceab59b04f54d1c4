"""When reading that nobody waits for may go on: its rate, pauses after trouble, and heat.

Pure: time and heat are given.  That it makes way for demand, and that one such read is under way at a time, is seen to
by ``expertd.daemon.reader``; how heat is measured is in ``expertd.daemon.thermal``.
"""

from __future__ import annotations

LEAST_BURST = 4 << 20
"""A bucket of this many bytes at least: a record of any usual model."""
TROUBLE_S = (1.0, 60.0)
"""The pause after an error, and the longest that it doubles to."""
HEAT_S = 5.0
"""How often somebody asks how hot the machine is, while there is something to read."""


class TokenBucket:
    """Gives out bytes: at most ``rate`` a second, and ``burst`` at once after a pause.

    What is larger than ``burst`` is given when the bucket is full, and paid back before anything else.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._level, self._at = burst, float("-inf")

    def wait_s(self, size: int, now: float) -> float:
        """How long until ``size`` bytes may be taken; 0: now."""
        return max(0.0, min(size, self.burst) - self._filled(now)) / self.rate

    def take(self, size: int, now: float) -> None:
        """Take ``size`` bytes; the caller has waited for them."""
        self._level, self._at = self._filled(now) - size, now

    def _filled(self, now: float) -> float:
        if self._at == float("-inf"):
            return self._level
        return min(self.burst, self._level + max(0.0, now - self._at) * self.rate)


class Pacing:
    """Decides when a read that nobody waits for may begin.  No locks: the reader calls it under its own."""

    def __init__(self, rate: int | None = None) -> None:
        """``rate``: bytes a second; None: no limit."""
        self._bucket = None if rate is None else TokenBucket(rate, max(LEAST_BURST, rate // 10))
        self._pause_s = 0.0
        self._until = float("-inf")
        self._hot = False
        self._heat_at = float("-inf")

    def wait_s(self, size: int, now: float) -> float:
        """How long until a read of ``size`` bytes may begin, as far as is known; 0: now."""
        wait = max(0.0, self._until - now)
        if self._hot:
            wait = max(wait, self._heat_at + HEAT_S - now)
        return wait if self._bucket is None else max(wait, self._bucket.wait_s(size, now))

    def began(self, size: int, now: float) -> None:
        """A read of ``size`` bytes begins."""
        if self._bucket is not None:
            self._bucket.take(size, now)

    def ended(self, well: bool, now: float) -> None:
        """A read has ended; not well: with an error."""
        if well:
            self._pause_s, self._until = 0.0, float("-inf")
        else:
            first, most = TROUBLE_S
            self._pause_s = min(most, 2 * self._pause_s) if self._pause_s else first
            self._until = now + self._pause_s

    def asks_heat(self, now: float) -> bool:
        """Whether it is time to measure again; who is told so does it, and calls ``measured``."""
        if now - self._heat_at < HEAT_S:
            return False
        self._heat_at = now
        return True

    def measured(self, hot: bool) -> bool:
        """How hot it is now; returns whether that has changed."""
        changed, self._hot = hot != self._hot, hot
        return changed
