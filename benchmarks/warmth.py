"""Warmth that is shared: what a second process on a warm model costs, and how soon it says its first token.

Every process is a user's program of its own (``benchmarks._second_app``), which measures itself from inside.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from expertd.protocol.checkpoint import weight_files
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.memory import Memory, memory_of
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

SLOWER = 20
"""The prompt's cold reads take so many times its computing."""
LIMIT_S = 600.0

Figures = dict[str, Any]


class App:
    """A program that has loaded a model, and holds on: what it said, and its process."""

    def __init__(self, model: Path | None, tokens: int = 0) -> None:
        command = [sys.executable, "-m", "benchmarks._second_app", "-" if model is None else str(model), str(tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.said: Figures = json.loads(self._process.stdout.readline() or "{}")

    def __enter__(self) -> App:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    @property
    def memory(self) -> Memory:
        """What it takes now."""
        return memory_of(self.pid)


def run(quick: bool = False) -> Figures:
    """The second app: ``attach_ms`` and what it reads and holds; ``ttft_*``: first tokens, cold, warm and second."""
    sizes = {"layers": 8, "n_experts": 16} if quick else {"layers": 24, "n_experts": 64}
    with tempfile.TemporaryDirectory(prefix="expertd-") as folder:
        path = write_checkpoint(
            Path(folder) / "model", "qwen3_moe", hidden=1024, top_k=8, expert_width=512, vocab=32768, **sizes
        )
        manifest = load_lazily(path).manifest
        size = sum(file.stat().st_size for file in weight_files(path))
        base = sum(tensor.bytes for tensor in manifest.base)
        print(f"a checkpoint of {size / 1e6:.0f} MB, {base / 1e6:.0f} MB of them base weights")
        return {
            "model_bytes": size,
            "base_bytes": base,
            **second_process(path, manifest, size, apps=4),
            **first_tokens(path, manifest, tokens=4 if quick else 6),
        }


def second_process(path: Path, manifest: Manifest, size: int, apps: int) -> Figures:
    """What one process after another costs on a model that is resident as a whole, as they all stay."""
    with ExitStack() as stack:
        bare = stack.enter_context(App(None)).memory.private
        home, daemon = stack.enter_context(warm_daemon(manifest))
        workers = [stack.enter_context(App(path))]
        await_resident(home)
        one = memory_of(daemon).all + workers[0].memory.all
        before = bytes_read(home)
        workers += [stack.enter_context(App(path)) for _ in range(apps - 1)]
        later = [worker.said for worker in workers[1:]]
        by_daemon = bytes_read(home) - before
        together = memory_of(daemon).all + sum(worker.memory.all for worker in workers)
        private = max(worker.memory.private for worker in workers[1:]) - bare
        assert all(session.shares_base for session in ask_status(home).models[0].sessions)
    best = min(later, key=lambda said: said["attach_ms"])
    print("attach: " + ", ".join(f"{worker.said['attach_ms']:.0f} ms" for worker in workers) + ", the first one reads")
    print(f"beside that imports {best['imports_ms']:.0f} ms, tokenizer {best['tokenizer_ms']:.0f} ms; "
          f"the first forward {best['forward_ms']:.0f} ms")  # fmt: skip
    print(f"private memory of a second process, over mlx-lm without a model ({bare / 1e6:.0f} MB): "
          f"{private / 1e6:.1f} MB; Pss of daemon and one {one / 1e6:.0f} MB, of daemon and {apps} "
          f"{together / 1e6:.0f} MB")  # fmt: skip
    return {
        "attach_ms": best["attach_ms"],
        "attach_cold_ms": workers[0].said["attach_ms"],
        "imports_ms": best["imports_ms"],
        "tokenizer_ms": best["tokenizer_ms"],
        "first_forward_ms": best["forward_ms"],
        "weights_read_bytes": by_daemon + sum(said["read_bytes"] for said in later),
        "private_bytes": private,
        "private_fraction": round(private / size, 4),
        f"pss_ratio_{apps}_workers": round(together / one, 4),
        f"pss_ratio_{apps}_workers_over_mlx_lm": round((together - apps * bare) / (one - bare), 4),
    }


def first_tokens(path: Path, manifest: Manifest, tokens: int) -> Figures:
    """Seconds from loading to the first token: nothing in memory; a warm daemon; another app is there already."""
    with warm_daemon(manifest, without=1) as (home, _), App(path, tokens) as app:
        read = bytes_read(home)  # where not all has room, nothing is read that nobody asked for
        with App(path, tokens) as again:
            computing = min(app.said["prompt_s"], again.said["prompt_s"])
    rate = int(read / (SLOWER * computing))
    print(f"a prompt of {tokens} tokens computes {computing:.2f} s; what it needs, {read / 1e6:.0f} MB, is read at "
          f"{rate / 1e6:.1f} MB/s")  # fmt: skip
    with warm_daemon(manifest, "--simulate-ssd", f"{rate},100us") as (home, _):
        with App(path, tokens) as cold:
            await_resident(home)
        with App(path, tokens) as warm, App(path, tokens) as second:
            pass
    cold_s, warm_s, second_s = (app.said["ttft_s"] for app in (cold, warm, second))
    print(f"first token: cold {cold_s:.2f} s, warm daemon {warm_s:.2f} s, second app {second_s:.2f} s "
          f"({cold_s / second_s:.1f} x faster than cold)")  # fmt: skip
    return {
        "simulated_bytes_s": rate,
        "ttft_cold_s": cold_s,
        "ttft_warm_s": warm_s,
        "ttft_second_app_s": second_s,
        "ttft_cold_over_second_app": round(cold_s / second_s, 2),
    }


@contextmanager
def warm_daemon(manifest: Manifest, *options: str, without: int = 0) -> Iterator[tuple[Home, int]]:
    """A daemon with room for all of a model, but so many blocks, in a home of its own: that, and its process id."""
    blocks = sum(layer.experts for layer in manifest.layers) - without
    with temporary_home() as home, running_daemon(home, budget_for(manifest, blocks), *options) as daemon:
        yield home, daemon.pid


def await_resident(home: Home) -> None:
    """Wait until all blocks are in memory."""
    deadline = time.monotonic() + LIMIT_S
    while (model := ask_status(home).models[0]).resident_blocks < model.blocks:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the pool was not filled in {LIMIT_S:.0f} s")
        time.sleep(0.1)


def bytes_read(home: Home) -> int:
    """What the daemon has read of weights."""
    model = ask_status(home).models[0]
    return model.bytes_read + model.base_read
