"""How long a model computes for a token: measured while it runs, at the price of a look at the clock for each call.

From the beginning of one call with a single token to that of the next, less what was waited for blocks meanwhile.  The
last ones tell, by medians: pauses, prompts and batches are not among them, or few.  A token that fetches computes
longer, too (caches are cold after a wait), so there is a figure for each Fetch.  Pure; ``protocol.pace`` keeps what
comes of it.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable

KEPT = 256
"""So many of the last tokens count."""
ENOUGH = 24
"""Fewer tell nothing."""
GROUP = 6
"""Tokens with the same number of Fetches whose median counts."""


class PaceMeter:
    """Called under the session's forward lock."""

    def __init__(self) -> None:
        self._last: tuple[bool, float, float, int] | None = None  # the call before, if it was of a single token
        self._complete: deque[float] = deque(maxlen=KEPT)
        self._partial: deque[tuple[int, float]] = deque(maxlen=KEPT)  # number of Fetches, seconds
        self._fresh = 0

    def begin(self, single: bool, complete: bool, now: float, waited_s: float, fetches: int) -> None:
        """A call begins at ``now``.

        Args:
            single: it computes one token of one sequence.
            complete: every block of the model is resident.
            waited_s: seconds that were waited in all Fetches so far, of which there were ``fetches``.
        """
        last = self._last
        self._last = (complete, now, waited_s, fetches) if single else None
        if not single or last is None or last[0] is not complete:
            return
        seconds = max(0.0, now - last[1] - (waited_s - last[2]))
        if complete:
            self._complete.append(seconds)
        else:
            self._partial.append((fetches - last[3], seconds))
        self._fresh += 1

    def complete_us(self) -> float:
        """Microseconds of a token with everything resident; 0 if too few were seen."""
        return 1e6 * statistics.median(self._complete) if len(self._complete) >= ENOUGH else 0.0

    def partial_us(self) -> tuple[float, float]:
        """Microseconds of a token that fetches nothing where it might have to, and those of each Fetch; 0 as above."""
        if len(self._partial) < ENOUGH:
            return 0.0, 0.0
        token, fetch = _line(self._partial)
        return 1e6 * token, 1e6 * fetch

    def news(self) -> bool:
        """Whether enough has been measured since this was true that it is worth keeping."""
        if self._fresh < ENOUGH:
            return False
        self._fresh = 0
        return True


def _line(points: Iterable[tuple[int, float]]) -> tuple[float, float]:
    """The straight line through the medians of the groups, by least squares; it never falls, nor begins below zero."""
    groups: dict[int, list[float]] = defaultdict(list)
    everything = []
    for number, seconds in points:
        groups[number].append(seconds)
        everything.append(seconds)
    medians = [(n, statistics.median(found), len(found)) for n, found in groups.items() if len(found) >= GROUP]
    weight = sum(count for _, _, count in medians)
    if len(medians) < 2:
        return statistics.median(everything), 0.0
    mean_x = sum(n * count for n, _, count in medians) / weight
    mean_y = sum(y * count for _, y, count in medians) / weight
    spread = sum(count * (n - mean_x) ** 2 for n, _, count in medians)
    slope = sum(count * (n - mean_x) * (y - mean_y) for n, y, count in medians) / spread
    slope = min(max(0.0, slope), mean_y / mean_x)
    return mean_y - slope * mean_x, slope
