"""The hit rates of all policies and of the oracle, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

STYLES = {"belady": ("black", "--"), "forecast": ("tab:red", "-"), "lru": ("tab:gray", "-")}


def draw(path: Path, fractions: Sequence[float], hits: dict[str, list[float]], title: str) -> None:
    """Write ``path`` (its suffix tells the format): percent of lookups that hit against the share that is cached."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("pictures need matplotlib: pip install 'expertd[pictures]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, rates in hits.items():
        colour, line = STYLES.get(name, (None, ":"))
        label = {"belady": "Belady (the optimum)", "forecast": "forecast (ours)"}.get(name, name.upper())
        axes.plot([100 * each for each in fractions], rates, line, color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("cached blocks, % of all")
    axes.set_ylabel("lookups that hit, %")
    axes.set_title(title)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
