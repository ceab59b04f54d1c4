"""What happened over time, as a picture: limit, shared memory, memory left, and tokens per second."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.pressure.streams import Stream
from benchmarks.pressure.watch import Sample

COLOURS = {"warning": "tab:orange", "critical": "tab:red"}
BIN_S = 1.0


def draw(path: Path, samples: Sequence[Sample], streams: Sequence[Stream], marks: dict[str, float]) -> None:
    """Write ``path`` (its suffix tells the format)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit("pictures need matplotlib: pip install 'expertd[pictures]'") from error
    began = marks["began"]
    at = [sample.at - began for sample in samples]
    figure = Figure(figsize=(9, 6), layout="constrained")
    memory, speed = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    memory.step(at, [sample.status.limit_bytes / 1e6 for sample in samples], "k--", where="post", label="limit")
    memory.plot(at, [sample.shmem / 1e6 for sample in samples], color="tab:blue", label="shared memory in use")
    memory.plot(at, [sample.left / 1e6 for sample in samples], color="tab:green", alpha=0.6, label="left in the cgroup")
    for level, colour in COLOURS.items():
        label = level
        for here, there in pairwise(samples):
            if here.status.pressure == level:
                memory.axvspan(here.at - began, there.at - began, color=colour, alpha=0.2, lw=0, label=label)
                label = "_"
    memory.set_ylabel("MB")
    memory.legend(loc="center")
    came = sorted(time - began for stream in streams for time in stream.came)
    bins = [n * BIN_S for n in range(int(at[-1] / BIN_S) + 1)]
    speed.step(bins, [sum(start <= time < start + BIN_S for time in came) / BIN_S for start in bins], where="post")
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("s")
    for axes in (memory, speed):
        axes.grid(alpha=0.3)
        for name in ("eater_came", "eater_gone"):
            axes.axvline(marks[name] - began, color="gray", lw=1)
    figure.savefig(path)
