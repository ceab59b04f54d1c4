"""Do reads hide behind computing?  A prompt on a slowed disk, two workers with the same prompt, and single tokens.

The disk is slowed down (``--simulate-ssd``) to the rate at which a prompt's reading takes as long as its computing,
where overlap has most to give: what takes twice as long one after the other should take as long as one of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

import expertd
from expertd.protocol.messages import AheadStatus, ModelStatus
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
TOKENS = 512
RESIDENT = 0.25
SIZES = {"hidden": 512, "expert_width": 128, "layers": 8, "n_experts": 64, "top_k": 8, "vocab": 2048}
WARM_UP = 64
"""Tokens after which single tokens are measured: until then it is not known whether announcements pay."""


class Cached:
    """The model through a daemon of its own."""

    def __init__(self, stack: ExitStack, folder: Path, slots: int, *options: str) -> None:
        self.home: Home = stack.enter_context(temporary_home())
        manifest = load_lazily(folder).manifest
        stack.enter_context(running_daemon(self.home, budget_for(manifest, slots), *options))
        self.model, self.tokenizer = expertd.load(folder, home=self.home)
        stack.callback(expertd.unload, self.model)

    @property
    def status(self) -> ModelStatus:
        """What its daemon says."""
        return ask_status(self.home).models[0]

    def prefill(self, prompt: Any) -> tuple[float, int]:
        """Seconds that ``prompt`` takes, logits of its end included, and the bytes read for it."""
        before = self.status.bytes_read
        cache = make_prompt_cache(self.model)
        began = time.perf_counter()
        mx.eval(self.model(prompt, cache=cache)[:, -1])
        took = time.perf_counter() - began
        return took, self.status.bytes_read - before


def prompts(count: int) -> list[Any]:
    """Different prompts, ``[1, TOKENS]``."""
    return [mx.array(np.random.default_rng(n).integers(3, SIZES["vocab"], (1, TOKENS))) for n in range(count)]


def prefill(folder: Path, rounds: int) -> dict[str, Any]:
    """One prompt after another, each through a complete pool, an overlapped and a serial one, in changing order."""
    manifest = load_lazily(folder).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    slots = round(RESIDENT * blocks)
    first, *others = prompts(rounds + 2)
    with ExitStack() as stack:
        complete = Cached(stack, folder, blocks)
        while complete.status.resident_blocks < blocks:
            time.sleep(0.1)
        quick = Cached(stack, folder, slots, "--no-read-ahead")
        quick.prefill(first)
        computing = min(complete.prefill(prompt)[0] for prompt in (first, others[0]))
        rate = round(quick.prefill(others[0])[1] / computing)
        options = ("--simulate-ssd", str(rate))
        overlapped = Cached(stack, folder, slots, *options)
        serial = Cached(stack, folder, slots, *options, "--no-read-ahead")
        for cached in (overlapped, serial):
            cached.prefill(first)
        rows = []
        for number, prompt in enumerate(others[1:]):
            order = [complete, overlapped, serial]
            found = {id(c): c.prefill(prompt) for c in order[number % 3 :] + order[: number % 3]}
            (compute_s, _), (overlap_s, overlap_bytes), (serial_s, serial_bytes) = (found[id(c)] for c in order)
            rows.append((compute_s, serial_bytes / rate, overlap_s, serial_s, overlap_bytes / serial_bytes))
            print(
                f"computing {compute_s:.2f} s, reading {serial_bytes / rate:.2f} s; overlapped {overlap_s:.2f} s "
                f"(reads {overlap_bytes / serial_bytes:.2f} of that), one after the other {serial_s:.2f} s"
            )
        gate = next(kind for kind in overlapped.status.ahead if kind.kind == "prompt")
    print(f"disk {rate / 1e6:.1f} MB/s, {slots} of {blocks} blocks; {gate.useful:.0%} of what was announced was used")
    ratios = [overlap / max(compute, read) for compute, read, overlap, _, _ in rows]
    return {
        "prefill_ratio": round(statistics.median(ratios), 3),
        "prefill_ratio_without": round(statistics.median(s / max(c, r) for c, r, _, s, _ in rows), 3),
        "prefill_bytes_ratio": round(statistics.median(row[4] for row in rows), 3),
        "prefill_useful": gate.useful,
        "rate_mb_s": round(rate / 1e6, 2),
    }


class Prefiller:
    """A worker process that computes a prompt when it is told to (``benchmarks._prefiller``)."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks._prefiller", str(folder), str(TOKENS), str(SIZES["vocab"])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        self._process.communicate(timeout=60)


def shared(folder: Path, rate: int, workers: int) -> tuple[int, list[dict[str, Any]]]:
    """Bytes read when so many workers begin the same prompt at once on an empty cache, and what they computed."""
    manifest = load_lazily(folder).manifest
    slots = round(RESIDENT * sum(layer.experts for layer in manifest.layers))
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        stack.enter_context(running_daemon(home, budget_for(manifest, slots), "--simulate-ssd", str(rate)))
        running = [Prefiller(folder) for _ in range(workers)]
        for prefiller in running:
            stack.callback(prefiller.close)
        for prefiller in running:
            prefiller.go()
        found = [prefiller.result() for prefiller in running]
        return ask_status(home).models[0].bytes_read, found


def decode(tokens: int, disk: str = "100MB,200us") -> dict[str, Any]:
    """Single tokens of the demo model, with and without reading ahead, on a disk where that could matter."""
    manifest = load_lazily(DEMO).manifest
    slots = round(RESIDENT * sum(layer.experts for layer in manifest.layers))
    text = (DEMO / "held_out" / "prose.txt").read_text(encoding="utf-8")
    options = ("--simulate-ssd", disk)
    with ExitStack() as stack:
        pair = [Cached(stack, DEMO, slots, *options), Cached(stack, DEMO, slots, *options, "--no-read-ahead")]
        seconds: list[list[float]] = [[], []]
        for piece in range(tokens // 64 + 2):
            prompt = mx.array(pair[0].tokenizer.encode(text[piece * 400 : piece * 400 + 200]))
            for which in (0, 1) if piece % 2 else (1, 0):
                steps = generate_step(prompt, pair[which].model, max_tokens=65)
                next(steps)
                began = time.perf_counter()
                for _ in steps:
                    pass
                if piece * 64 >= WARM_UP:
                    seconds[which].append(time.perf_counter() - began)
        kinds: dict[str, AheadStatus] = {kind.kind: kind for kind in pair[0].status.ahead}
        hits = [cached.status.hits / (cached.status.hits + cached.status.misses) for cached in pair]
    for kind in kinds.values():
        print(
            f"{kind.kind}: {kind.announced} announced, {kind.useful:.0%} used (a shuffled guess {kind.shuffled:.0%}), "
            f"{'read ahead' if kind.reading else 'not read'}: {kind.useful_bytes / 1e6:.1f} MB useful, "
            f"{kind.wasted_bytes / 1e6:.1f} MB wasted"
        )
    print(f"hits with reading ahead {hits[0]:.1%}, without {hits[1]:.1%}")
    next_layer = kinds["next layer"]
    return {
        "readahead_useful": next_layer.useful,
        "readahead_shuffled": next_layer.shuffled,
        "readahead_on": next_layer.reading,
        "readahead_useful_2": kinds["second next layer"].useful,
        "decode_ratio": round(
            statistics.median(on / off for on, off in zip(*seconds, strict=True)), 3
        ),
    }


def run(quick: bool = False) -> dict[str, Any]:
    """See the module."""
    with tempfile.TemporaryDirectory(prefix="expertd-") as temporary:
        folder = write_checkpoint(Path(temporary) / "model", "qwen3_moe", **SIZES)
        figures = prefill(folder, 2 if quick else 7)
        rate = round(figures["rate_mb_s"] * 1e6)
        one, (alone,) = shared(folder, rate, 1)
        ratios = []
        for _ in range(1 if quick else 3):
            two, both = shared(folder, rate, 2)
            assert [worker["sum"] for worker in both] == [alone["sum"]] * 2, "two workers do not compute what one does"
            ratios.append(two / one)
            print(f"one worker reads {one / 1e6:.1f} MB, two with the same prompt {two / 1e6:.1f} MB")
        figures["shared_prefill_bytes_ratio"] = round(max(ratios), 3)
        return {**figures, **decode(128 if quick else 1024)}
