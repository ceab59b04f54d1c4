"""What recording a trace costs a token, and what a token of a trace takes on the disk.

The same answer is generated with and without recording, in turns and in changing order, in one process; a recorded run
ends when all of it is in the file.
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


def _seconds(model: Any, tokens: int, recorder: Recorder | None) -> float:
    """Time for ``tokens`` decoded tokens, until they are on the disk if they are recorded."""
    events = events_of(model)
    events.recorder = recorder
    steps = generate_step(mx.array(PROMPT), model, max_tokens=tokens + 1)
    next(steps)
    began = time.perf_counter()
    for _ in steps:
        pass
    if recorder is not None:
        recorder.flush()
    events.recorder = None
    return time.perf_counter() - began


def _cost(model: Any, tokens: int, rounds: int, path: Path) -> tuple[float, float]:
    """``(share of the time of a token that recording adds, bytes a token)``; the first the median over rounds."""
    shares = []
    for number in range(rounds + 1):
        recorder = Recorder(path.with_name(f"{path.stem}-{number}.npz"), model, session_of(model).manifest)
        recorder.leave()
        spent: dict[bool, float] = {}
        for recorded in (True, False) if number % 2 else (False, True):
            if recorded:
                recorder.listen()
            spent[recorded] = _seconds(model, tokens, recorder if recorded else None)
            recorder.leave()
        tokens_written = recorder.finish().tokens
        size = recorder.path.stat().st_size / tokens_written
        if number:  # the first round warms up
            shares.append(spent[True] / spent[False] - 1)
    return statistics.median(shares), size


def run(quick: bool = False, model: Path = DEMO) -> dict[str, Any]:
    """``cost_complete_percent`` and ``cost_partial_percent`` of decode time, and ``bytes_per_token``."""
    tokens, rounds = (64, 6) if quick else (256, 24)
    figures: dict[str, Any] = {}
    manifest = load_lazily(model).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    with temporary_home() as home, tempfile.TemporaryDirectory(prefix="expertd-") as folder:
        for name, share in (("complete", 1.0), ("partial", 0.5)):
            with running_daemon(home, budget_for(manifest, round(share * blocks))):
                loaded, _ = expertd.load(model)
                cost, size = _cost(loaded, tokens, rounds, Path(folder) / f"{name}.npz")
                expertd.unload(loaded)
            print(f"{name} pool: recording adds {100 * cost:.2f} % to a token, {size:.0f} bytes a token on disk")
            figures[f"cost_{name}_percent"] = round(100 * cost, 3)
            figures["bytes_per_token"] = round(size, 1)
    return figures
