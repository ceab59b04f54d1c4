"""What ``make demo-warmth`` shows: counts of what had to be waited for, from a cold start to a restart."""

from __future__ import annotations

from tools.demo_warmth import compare, show


def test_the_chart_shows_what_warmth_is_worth() -> None:
    rows = show(disk=None).rows
    misses = {row.label: sum(row.misses) for row in rows}
    assert list(misses) == [
        "cold", "the same again", "another topic", "and back", "daemon killed", "a second app",
        "after a restart",
    ]  # fmt: skip
    cold = misses["cold"]
    assert all(misses[label] < 0.7 * cold for label in ("the same again", "and back", "a second app"))
    assert compare(rows) == len(rows), "the same text as plain mlx-lm"
