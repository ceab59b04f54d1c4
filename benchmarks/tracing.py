"""What recording a trace costs a token, and what a token of a trace takes on the disk.

The same answer is generated again and again in one process.  One half of it is recorded, the next time the other half:
two answers tell what recording costs, whatever each half holds and however the machine drifts.  A recorded half ends
when all of it is in the file.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step

import expertd
from expertd.worker.load import events_of, session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.recording import Recorder
from tools.stage import budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
PROMPT = np.arange(100, 116)


def _answer(model: Any, tokens: int, recorders: list[Recorder | None]) -> list[float]:
    """Seconds for each part of one answer: ``tokens`` decoded, and in the file if there is a recorder."""
    events = events_of(model)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=tokens * len(recorders) + 1)
    next(steps)
    seconds = []
    for recorder in recorders:
        began = time.perf_counter()
        events.recorder = recorder
        if recorder is not None:
            recorder.listen()
        for _ in range(tokens):
            next(steps)
        if recorder is not None:
            recorder.flush()
            recorder.leave()
        events.recorder = None
        seconds.append(time.perf_counter() - began)
    return seconds


def _cost(model: Any, tokens: int, rounds: int, path: Path) -> tuple[list[float], float]:
    """``(share of the time of a token that recording adds, by round; bytes a token)``."""
    shares = []
    for number in range(rounds + 1):
        # A file each: that they are all of one answer must not make a token smaller.
        recorder = Recorder(path.with_stem(f"{path.stem}-{number}"), model, session_of(model).manifest)
        recorder.leave()
        first, rest = _answer(model, tokens, [recorder, None])
        begun, last = _answer(model, tokens, [None, recorder])
        written = recorder.finish().tokens
        if number:  # the first round warms up
            shares.append((first + last) / (begun + rest) - 1)
    return shares, recorder.path.stat().st_size / written


def run(quick: bool = False, model: Path = DEMO) -> dict[str, Any]:
    """``cost_complete_percent`` and ``cost_partial_percent`` of decode time (medians), and ``bytes_per_token``."""
    tokens, rounds = (32, 6) if quick else (128, 48)
    figures: dict[str, Any] = {}
    manifest = load_lazily(model).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    with temporary_home() as home, tempfile.TemporaryDirectory(prefix="expertd-") as folder:
        for name, share in (("complete", 1.0), ("partial", 0.5)):
            with running_daemon(home, budget_for(manifest, round(share * blocks))):
                loaded, _ = expertd.load(model)
                shares, size = _cost(loaded, tokens, rounds, Path(folder) / f"{name}.npz")
                expertd.unload(loaded)
            low, cost, high = (100 * share for share in statistics.quantiles(shares, n=4))
            print(f"{name} pool: recording adds {cost:.2f} % to a token (quartiles {low:.1f} and {high:.1f})")
            print(f"{name} pool: {size:.0f} bytes a token on disk")
            figures[f"cost_{name}_percent"] = round(cost, 3)
            figures["bytes_per_token"] = round(size, 1)
    return figures
