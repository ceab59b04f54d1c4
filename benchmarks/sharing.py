"""One copy: what a second worker of a model adds to the machine's memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from expertd.protocol.checkpoint import weight_files
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.memory import memory_of
from tools.stage import ask_status, budget_for, running_daemon, temporary_home


class Holder:
    """A worker process that has loaded a model, generated some tokens, and holds on."""

    def __init__(self, model: Path, tokens: int) -> None:
        command = [sys.executable, "-m", "tools.hold", str(model), str(tokens)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.said: dict[str, Any] = json.loads(self._process.stdout.readline())

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)


def run(quick: bool = False) -> dict[str, Any]:
    """``growth`` of the summed Pss_Shmem from one worker to two, and private bytes in the workers beside their base."""
    sizes = {"hidden": 512, "layers": 4, "expert_width": 256} if quick else \
            {"hidden": 2048, "layers": 4, "expert_width": 768}  # fmt: skip
    tokens = 4 if quick else 16
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertd-")))
        home = stack.enter_context(temporary_home())
        path = write_checkpoint(folder / "model", "qwen3_moe", n_experts=128, top_k=8, vocab=4096, **sizes)
        manifest = load_lazily(path).manifest
        blocks = len(manifest.layers) * manifest.layers[0].experts
        experts = blocks * manifest.layers[0].block_bytes
        base = sum(file.stat().st_size for file in weight_files(path)) - experts
        daemon = stack.enter_context(running_daemon(home, budget_for(manifest, blocks)))
        first = stack.enter_context(Holder(path, tokens))
        deadline = time.monotonic() + 300
        while ask_status(home).models[0].resident_blocks < blocks:  # the fill would look like growth
            if time.monotonic() > deadline:
                raise TimeoutError("the pool was not filled in five minutes")
            time.sleep(0.2)
        one = memory_of(daemon.pid).shared + memory_of(first.pid).shared
        second = stack.enter_context(Holder(path, tokens))
        assert first.said["tokens"] == second.said["tokens"]
        two = sum(memory_of(pid).shared for pid in (daemon.pid, first.pid, second.pid))
        private = [h.said["anonymous_after"] - h.said["anonymous_before"] - base for h in (first, second)]
        print(f"experts {experts / 1e6:.0f} MB, base weights {base / 1e6:.0f} MB")
        print(f"Pss_Shmem of daemon and one worker {one / 1e6:.1f} MB, of daemon and two {two / 1e6:.1f} MB")
        print("anonymous memory that loading and generating added beside the base weights: "
              + ", ".join(f"{size / 1e6:.1f} MB" for size in private))  # fmt: skip
    return {
        "growth": round(two / one - 1, 5),
        "expert_bytes": experts,
        "shared_bytes_one_worker": one,
        "shared_bytes_two_workers": two,
        "private_beside_base_bytes": max(private),
    }
