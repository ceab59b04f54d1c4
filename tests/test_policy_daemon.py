"""A recorded run again in the simulator: the daemon's hits, layer by layer, are those that replay finds."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

import expertd
from benchmarks.policy.simulator import even_pools, replay
from benchmarks.policy.traffic import passes_of
from expertd.daemon.policy import POLICIES
from expertd.protocol.paths import Home
from expertd.protocol.traces import read_trace
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.recording import recording
from tests.conftest import StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

PROMPTS = [np.random.default_rng(length).integers(3, 512, length).tolist() for length in (24, 2, 7)]


# LRU is left out: a Fetch names its blocks in the order of their numbers, a trace in the router's, and only to LRU that
# is a difference.
@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"lru"}))
def test_the_daemon_hits_what_the_simulator_hits(
    policy: str, home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Prompts that need groups, and answers; slots for 40 % of the blocks.  (Random weights have no topics.)"""
    # A row of a 4-bit slab fills a page: so a budget gives just the slots that it should.
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe", hidden=128, expert_width=256, layers=4)
    manifest = load_lazily(folder).manifest
    slots = round(0.4 * sum(layer.experts for layer in manifest.layers))
    start_daemon(str(budget_for(manifest, slots)), "--policy", policy, "--no-read-ahead")
    model, _ = expertd.load(folder)
    with recording(model, tmp_path / "trace.npz", scores=False):
        for prompt in PROMPTS:
            for _ in generate_step(mx.array(prompt), model, max_tokens=60):
                pass
    (pool,) = session_of(model).pools
    trace = read_trace(tmp_path / "trace.npz")
    info = trace.info
    assert pool.layout.slots == slots
    done = replay(passes_of(trace), POLICIES[policy](info.layers, info.experts, info.top_k), even_pools(4, 1, slots))
    wait_for(lambda: ask_status(home).models[0].hits == done.hits)  # the last hits are told by an idle session
    found = ask_status(home).models[0]
    expertd.unload(model)
    assert found.evictions > 200
    assert [(layer.hits, layer.misses, layer.evictions) for layer in found.layers] == [
        (layer.hits, layer.misses, layer.evictions) for layer in done.layers
    ]
