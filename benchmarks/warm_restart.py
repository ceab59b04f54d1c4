"""What a profile, and what a record, are worth: misses of the first tokens, and what a restart of the daemon costs.

The model is the demo model at a part of its experts, the text is its held-out text: profiles are made of the first half
of a file, and tried on the second.  A miss is a block that was not resident when an event needed it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import expertd
from expertd.clients import Client
from expertd.clients.profiles.counting import profile_of
from expertd.protocol.errors import ModelInUse
from expertd.protocol.messages import ModelStatus
from expertd.protocol.paths import Home
from expertd.protocol.profiles import use_profile, write_profile
from expertd.protocol.traces import read_trace
from expertd.worker.answers import answer_all
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.recording import recording
from tools.stage import ask_status, budget_for, end, launch_daemon, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models/demo"
SHARE = 0.75
"""Part of the experts that there is room for: so much that most misses are first uses."""
PROMPT, TOKENS = 24, 50
"""Tokens of a prompt, and of its answer."""
KINDS = ("code", "prose")
RECOVERED = 0.95
"""Of the hits that there were: so much counts as being warm again."""
READ_S, QUICK_READ_S = 30.0, 5.0
"""How long reading a record is made to take."""
DEADLINE_S = 120.0


def prompts_of(tokenizer: Any, kind: str, count: int, second_half: bool) -> list[list[int]]:
    """Beginnings from all over one half of the held-out text of a kind, as tokens."""
    text = (DEMO / "held_out" / f"{kind}.txt").read_text(encoding="utf-8")
    half = text[len(text) // 2 :] if second_half else text[: len(text) // 2]
    tokens = [token for line in half.splitlines(keepends=True) for token in tokenizer.encode(line)]
    step = (len(tokens) - PROMPT) // count
    return [tokens[at * step : at * step + PROMPT] for at in range(count)]


def held(home: Home) -> ModelStatus:
    """What the daemon holds of the model."""
    (model,) = ask_status(home).models
    return model


def settled(home: Home) -> ModelStatus:
    """The same, when all that was to be brought in is there."""
    deadline = time.monotonic() + DEADLINE_S
    while (found := held(home)).warming:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{found.warming} blocks were not brought in within {DEADLINE_S:.0f} s")
        time.sleep(0.01)
    return found


def answer(model: Any, tokenizer: Any, prompts: Sequence[list[int]], tokens: int = TOKENS) -> None:
    """Answer ``prompts`` greedily, one after the other."""
    for _ in answer_all(model, tokenizer, prompts, tokens):
        pass


def profiles(count: int) -> dict[str, float]:
    """Misses of the prompts of each kind, with the right profile and with the other, over those with none.

    Each prompt meets a model that has just come: with a profile in use its experts are there, without one nothing is.
    """
    ratios: dict[str, list[float]] = {"right": [], "wrong": []}
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        stack.enter_context(running_daemon(home, budget_for(load_lazily(DEMO).manifest, _slots()), "--no-remember"))
        for kind in KINDS:
            _make_profile(home, kind, 4 * count)
            _forget(home)
        for kind, other in (KINDS, KINDS[::-1]):
            missed = {name: _misses(home, kind, name, count) for name in (None, kind, other)}
            print(f"{kind}: {missed[None]} misses in {count} prompts with no profile, {missed[kind]} with its own, "
                  f"{missed[other]} with that of {other}")  # fmt: skip
            ratios["right"].append(missed[kind] / missed[None])
            ratios["wrong"].append(missed[other] / missed[None])
    return {
        "profile_miss_ratio": round(statistics.mean(ratios["right"]), 4),
        "wrong_profile_miss_ratio": round(statistics.mean(ratios["wrong"]), 4),
    }


def _slots() -> int:
    manifest = load_lazily(DEMO).manifest
    return round(SHARE * sum(layer.experts for layer in manifest.layers))


def _make_profile(home: Home, kind: str, count: int) -> None:
    model, tokenizer = expertd.load(DEMO)
    path = home.root / f"{kind}.npz"
    with recording(model, path, scores=False):
        answer(model, tokenizer, prompts_of(tokenizer, kind, count, second_half=False))
    experts = [layer.experts for layer in load_lazily(DEMO).manifest.layers]
    write_profile(home, kind, profile_of([read_trace(path)], "demo", f"held-out {kind}", time.time(), experts))
    expertd.unload(model)


def _misses(home: Home, kind: str, profile: str | None, count: int) -> int:
    """Misses of ``count`` prompts of ``kind``, each on a model that has just come, with ``profile`` in use."""
    use_profile(home, str(DEMO.resolve()), profile)
    missed = 0
    for number in range(count):
        model, tokenizer = expertd.load(DEMO)
        try:
            before = settled(home)
            answer(model, tokenizer, [prompts_of(tokenizer, kind, count, second_half=True)[number]])
        finally:
            expertd.unload(model)
        missed += held(home).misses - before.misses
        _forget(home)
    return missed


def _forget(home: Home) -> None:
    """Have the daemon hold nothing of the model."""
    deadline = time.monotonic() + DEADLINE_S
    with Client(home.root) as client:
        while ask_status(home).models:
            try:
                client.unload(DEMO)
            except ModelInUse:  # the session's end is on its way
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def restart(count: int, read_s: float) -> dict[str, float]:
    """All is gone, daemon and program: how long after a program has loaded the model again it would hit as before.

    The disk is slowed down, so that reading the blocks that were recorded takes ``read_s``; loading reads the base
    weights before.  What would be hit is told by the routing of prompts that were answered before, and by the tables
    that the program sees: which of the blocks that these answers used are there.
    """
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        budget = budget_for(load_lazily(DEMO).manifest, _slots())
        first = launch_daemon(home, budget)
        try:
            model, tokenizer = expertd.load(DEMO)
            answer(model, tokenizer, prompts_of(tokenizer, "code", count, second_half=False))
            path = home.root / "late.npz"
            with recording(model, path, scores=False):
                answer(model, tokenizer, prompts_of(tokenizer, "code", count, second_half=True))
            used = read_trace(path).experts
            before = _hit_rate(model, used)
            expertd.unload(model)
            held_bytes = held(home).resident_blocks * held(home).block_bytes
        finally:
            end(first)
        stack.enter_context(running_daemon(home, budget, "--simulate-ssd", str(int(held_bytes / read_s))))
        began = time.monotonic()
        model, _ = expertd.load(DEMO)
        try:
            loaded = time.monotonic()
            recovered_s = _recovery(model, used, before, loaded)
            found = settled(home)
            back_s, after = time.monotonic() - loaded, _hit_rate(model, used)
        finally:
            expertd.unload(model)
    assert found.recalled is not None
    print(f"restart: {100 * before:.1f} % hits before; loaded after {loaded - began:.2f} s, "
          f"{100 * RECOVERED:.0f} % of the hits {recovered_s:.2f} s later; "
          f"all {found.recalled.back} of {found.recalled.blocks} blocks back {back_s:.2f} s after loading, of which "
          f"reading takes {read_s:.2f} s")  # fmt: skip
    return {
        "restart_recovery_s": round(recovered_s, 3),
        "restart_load_s": round(loaded - began, 3),
        "restart_read_s": read_s,
        "restart_all_back_s": round(back_s, 3),
        "restart_recovery_ratio": round(recovered_s / read_s, 4),
        "restart_hit_ratio": round(after / before, 4),
    }


def _recovery(model: Any, used: NDArray[np.integer], before: float, began: float) -> float:
    """Seconds from ``began`` until what was ``used`` would be hit nearly as ``before``."""
    while _hit_rate(model, used) < RECOVERED * before:
        if time.monotonic() > began + DEADLINE_S:
            raise TimeoutError(f"the hits of before did not come back within {DEADLINE_S:.0f} s")
        time.sleep(0.005)
    return time.monotonic() - began


def _hit_rate(model: Any, used: NDArray[np.integer]) -> float:
    """The part of the blocks ``used``, ``[tokens, layers, top_k]``, that is resident now."""
    tables = {layer: pool.table[row] for pool in session_of(model).pools for row, layer in enumerate(pool.layers)}
    return statistics.mean(float((tables[layer][used[:, layer]] >= 0).mean()) for layer in tables)


def adoption(count: int) -> dict[str, float]:
    """The daemon is killed between two prompts of a program that lives: what the next one reads to be as warm."""
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        budget = budget_for(load_lazily(DEMO).manifest, _slots())
        first = launch_daemon(home, budget)
        model, tokenizer = expertd.load(DEMO)
        try:
            answer(model, tokenizer, prompts_of(tokenizer, "code", count, second_half=False))
            there = held(home)
        finally:
            first.kill()
            first.wait()
        stack.callback(expertd.unload, model)
        stack.enter_context(running_daemon(home, budget, "--no-remember"))
        began = time.monotonic()
        while not ask_status(home).models or held(home).resident_blocks < there.resident_blocks:
            if time.monotonic() > began + DEADLINE_S:
                raise TimeoutError(f"the pool was not adopted within {DEADLINE_S:.0f} s")
            time.sleep(0.01)
        took, found = time.monotonic() - began, held(home)
        pool = there.resident_blocks * there.block_bytes
        adopted = 0 if found.recalled is None else found.recalled.adopted
        print(f"kill -9: {adopted} of {there.resident_blocks} blocks adopted after {took:.2f} s, "
              f"{found.bytes_read} bytes read")  # fmt: skip
    return {
        "adoption_s": round(took, 3),
        "adoption_read_bytes": found.bytes_read,
        "adoption_read_share": round(found.bytes_read / pool, 5),
    }


def run(quick: bool = False) -> dict[str, Any]:
    """What profiles are worth, and what it costs that all is restarted, or that the daemon is killed."""
    count = 3 if quick else 8
    return {**profiles(count), **restart(count, QUICK_READ_S if quick else READ_S), **adoption(count)}
