"""Are a worker's logits and tokens those of plain mlx-lm, in every family, form, capacity, prompt length and batch?

One case is one (checkpoint, capacity, prompt length, batch): all logits of the prompt and of 64 greedy steps bit for
bit, and the tokens.  Cells that plain mlx-lm itself cannot load or run here are printed with the reason.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
BFLOAT16_SIZES = {"hidden": 64, "expert_width": 64}
"""bfloat16 is 8 to 45 times slower on the CPU back end; here a budget may give up to 7 slots more than it should."""


@dataclass(frozen=True)
class Result:
    """What became of one checkpoint: its cases, the differences found, or that it was refused."""

    cell: Cell
    cases: int
    mismatches: list[str]
    refused: bool
    seconds: float


def capacities(top_k: int, experts: int) -> dict[str, int]:
    """Slots a layer: as many as a token uses, a quarter, half and all of the experts."""
    return {"top_k": top_k, "25 %": max(1, experts // 4), "50 %": experts // 2, "100 %": experts}


def run(quick: bool = False) -> dict[str, Any]:
    """``cases`` compared and ``mismatches`` found; ``refused``: derived checkpoints, which attach has to refuse."""
    chosen = _one_of_each_family(cells()) if quick else cells()
    shapes = list(itertools.product((7,), (1,)) if quick else itertools.product(LENGTHS, BATCHES))
    results: list[Result] = []
    # Checkpoints are independent of each other, so each core takes one at a time, in processes of their own.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(check, cell, shapes) for cell in chosen]):
            result = done.result()
            results.append(result)
            said = "refused: its experts are derived" if result.refused else f"{result.cases} cases"
            print(f"{result.cell!s:<45} {said}, {result.seconds:.1f} s", flush=True)
    reasons = Counter(reason for _, reason in left_out())
    print("\nleft out, because plain mlx-lm cannot load or run them here:")
    for reason, number in reasons.most_common():
        print(f"  {number:>3} cells: {reason}")
    mismatches = [mismatch for result in results for mismatch in result.mismatches]
    for mismatch in mismatches:
        print(f"MISMATCH {mismatch}")
    return {
        "cases": sum(result.cases for result in results),
        "mismatches": len(mismatches),
        "cells": len(results),
        "refused": sum(result.refused for result in results),
    }


def check(cell: Cell, shapes: list[tuple[int, int]]) -> Result:
    """Compare one checkpoint at every capacity with prompts of ``shapes`` (length, batch)."""
    began = time.monotonic()
    sizes = SIZES if cell.dense == "float32" else BFLOAT16_SIZES
    cases, mismatches = 0, []
    with tempfile.TemporaryDirectory(prefix="expertd-") as folder, temporary_home() as home:
        path = write_checkpoint(
            Path(folder) / "model", cell.family, experts=cell.experts, dense=cell.dense, names=cell.names, shards=2,
            **sizes,
        )  # fmt: skip
        try:
            manifest = load_lazily(path).manifest
        except DerivedExperts:
            return Result(cell, 0, [], True, time.monotonic() - began)
        plain, config = load_model(path)
        vocabulary = config.get("vocab_size") or config["text_config"]["vocab_size"]
        chance = np.random.default_rng(1)
        prompts = {(t, b): chance.integers(3, vocabulary, (b, t)) for t, b in shapes}
        expected = {shape: greedy(plain, prompts[shape], TOKENS) for shape in shapes}
        first, layers = manifest.layers[0], len(manifest.layers)
        for name, slots in capacities(first.top_k, first.experts).items():
            with running_daemon(home, budget_for(manifest, slots * layers)):
                model, _ = expertd.load(path)
                spare = session_of(model).pools[0].layout.slots - slots * layers
                assert spare == 0 if sizes is SIZES else 0 <= spare < 8
                for shape in shapes:
                    difference = first_difference(expected[shape], greedy(model, prompts[shape], TOKENS))
                    cases += 1
                    if difference is not None:
                        mismatches.append(f"{cell}, {name}, prompt {shape[0]}, batch {shape[1]}: {difference}")
                expertd.unload(model)
    return Result(cell, cases, mismatches, False, time.monotonic() - began)


def _one_of_each_family(found: list[Cell]) -> list[Cell]:
    """For each family its mxfp4 checkpoint, and one of each other kind that exists anywhere."""
    chosen = [cell for cell in found if cell.experts == "mxfp4" and cell.names == "stacked" and cell.dense == "float32"]
    kinds = {(cell.experts, cell.names) for cell in chosen}
    for cell in found:
        if (cell.experts, cell.names) not in kinds and cell.dense == "float32":
            kinds.add((cell.experts, cell.names))
            chosen.append(cell)
    return chosen
