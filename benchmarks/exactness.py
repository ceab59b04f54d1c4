"""Are a worker's logits and tokens those of plain mlx-lm, in every family, form, capacity, prompt length and batch?

One case is one (checkpoint, capacity, prompt length, batch): all logits of the prompt and of 64 greedy steps bit for
bit, and the tokens.  Cells that plain mlx-lm itself cannot load or run here are printed with the reason.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model

import expertd
from expertd.protocol.errors import DerivedExperts
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.verify import first_difference, greedy
from tools.factory import Cell, cells, left_out, write_checkpoint
from tools.stage import budget_for, running_daemon, temporary_home

LENGTHS = (1, 7, 300)
BATCHES = (1, 4)
TOKENS = 64
SIZES = {"hidden": 128, "expert_width": 256}
"""Large enough that a row of a 4-bit slab fills a page of 16 KiB: so a budget gives just the slots that it should."""


def capacities(top_k: int, experts: int) -> dict[str, int]:
    """Slots a layer: as many as a token uses, a quarter, half and all of the experts."""
    return {"top_k": top_k, "25 %": max(1, experts // 4), "50 %": experts // 2, "100 %": experts}


def run(quick: bool = False) -> dict[str, Any]:
    """``cases`` compared and ``mismatches`` found; ``refused``: derived checkpoints, which attach has to refuse."""
    chosen = _one_of_each_family(cells()) if quick else cells()
    lengths, batches = ((7,), (1,)) if quick else (LENGTHS, BATCHES)
    count, mismatches, refused = 0, [], 0
    for cell in chosen:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="expertd-") as folder, temporary_home() as home:
            path = write_checkpoint(Path(folder) / "model", cell.family, experts=cell.experts, dense=cell.dense,
                                    names=cell.names, shards=2, **SIZES)  # fmt: skip
            try:
                manifest = load_lazily(path).manifest
            except DerivedExperts:
                refused += 1
                print(f"{cell!s:<45} refused: its experts are derived", flush=True)
                continue
            shapes = list(itertools.product(lengths, batches))
            plain, config = load_model(path)
            vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
            chance = np.random.default_rng(1)
            prompts = {(t, b): chance.integers(3, vocabulary, (b, t)) for t, b in shapes}
            expected = {shape: greedy(plain, prompts[shape], TOKENS) for shape in shapes}
            first, layers = manifest.layers[0], len(manifest.layers)
            for name, slots in capacities(first.top_k, first.experts).items():
                with running_daemon(home, budget_for(manifest, slots * layers)):
                    model, _ = expertd.load(path)
                    assert session_of(model).pools[0].layout.slots == slots * layers
                    for shape in shapes:
                        difference = first_difference(expected[shape], greedy(model, prompts[shape], TOKENS))
                        count += 1
                        if difference is not None:
                            mismatches.append(f"{cell}, {name}, prompt {shape[0]}, batch {shape[1]}: {difference}")
                    expertd.unload(model)
                    del model
            del plain, expected
        gc.collect()
        mx.clear_cache()
        print(f"{cell!s:<45} {len(shapes) * 4} cases, {time.monotonic() - began:.1f} s", flush=True)
    reasons = Counter(reason for _, reason in left_out())
    print("\nleft out, because plain mlx-lm cannot load or run them here:")
    for reason, number in reasons.most_common():
        print(f"  {number:>3} cells: {reason}")
    for mismatch in mismatches:
        print(f"MISMATCH {mismatch}")
    return {"cases": count, "mismatches": len(mismatches), "cells": len(chosen), "refused": refused}


def _one_of_each_family(found: list[Cell]) -> list[Cell]:
    """For each family its mxfp4 checkpoint, and one of each other kind that exists anywhere."""
    chosen = [cell for cell in found if cell.experts == "mxfp4" and cell.names == "stacked" and cell.dense == "float32"]
    kinds = {(cell.experts, cell.names) for cell in chosen}
    for cell in found:
        if (cell.experts, cell.names) not in kinds and cell.dense == "float32":
            kinds.add((cell.experts, cell.names))
            chosen.append(cell)
    return chosen
