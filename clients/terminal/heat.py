"""A row of figures, one for each layer, as a strip of characters that is as wide as the terminal allows.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

LEVELS = " ▁▂▃▄▅▆▇█"
PLAIN_LEVELS = " .:-=+*#%"
"""For a terminal that has no others."""
WIDEST = 16
"""Columns that one layer takes at most."""


def fit(values: Sequence[float], width: int) -> list[float]:
    """As many values as there are columns to fill: each repeated as often as it fits, or the largest of neighbours.

    The largest and not the mean, because one hot layer is what is looked for.
    """
    if not values or width < 1:
        return []
    if len(values) <= width:
        columns = min(WIDEST, width // len(values))
        return [value for value in values for _ in range(columns)]
    edges = [place * len(values) // width for place in range(width + 1)]
    return [max(values[low:high]) for low, high in pairwise(edges)]


def levels(values: Sequence[float], top: float, levels: str = LEVELS) -> str:
    """A character for each value, the last of ``levels`` for ``top`` or more, the first for nothing only."""
    highest = len(levels) - 1
    if top <= 0:
        return levels[0] * len(values)
    return "".join(
        levels[0] if value <= 0 else levels[min(highest, max(1, round(highest * value / top)))] for value in values
    )
