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

import expertd
from expertd.clients.profiles.counting import profile_of
from expertd.protocol.messages import ModelStatus
from expertd.protocol.paths import Home
from expertd.protocol.profiles import use_profile, write_profile
from expertd.protocol.traces import read_trace
from expertd.worker.answers import answer_all
from expertd.worker.manifest import load_lazily
from expertd.worker.recording import recording
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models/demo"
SHARE = 0.75
"""Part of the experts that there is room for: so much that most misses are first uses."""
PROMPT, TOKENS = 24, 50
"""Tokens of a prompt, and of its answer."""
KINDS = ("code", "prose")
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
    slots = _slots()
    ratios: dict[str, list[float]] = {"right": [], "wrong": []}
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        stack.enter_context(running_daemon(home, budget_for(load_lazily(DEMO).manifest, slots), "--no-remember"))
        for kind in KINDS:
            _make_profile(home, kind, count)
    for kind, other in (KINDS, KINDS[::-1]):
        missed = {name: _misses(kind, name, slots, count) for name in (None, kind, other)}
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


_made: dict[str, Any] = {}


def _make_profile(home: Home, kind: str, count: int) -> None:
    model, tokenizer = expertd.load(DEMO)
    path = home.root / f"{kind}.npz"
    with recording(model, path, scores=False):
        answer(model, tokenizer, prompts_of(tokenizer, kind, 4 * count, second_half=False))
    experts = [layer.experts for layer in load_lazily(DEMO).manifest.layers]
    _made[kind] = profile_of([read_trace(path)], "demo", f"held-out {kind}", time.time(), experts)
    expertd.unload(model)


def _misses(kind: str, profile: str | None, slots: int, count: int) -> int:
    """Misses of ``count`` prompts of ``kind``, each on a model that has just come, with ``profile`` in use."""
    missed = 0
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        budget = budget_for(load_lazily(DEMO).manifest, slots)
        # What is recorded would come again for the next prompt, so a daemon that remembers begins anew for each.
        for number in range(count):
            for record in home.warmth.glob("*"):
                record.unlink()
            if profile is not None:
                write_profile(home, profile, _made[profile], replace=True)
                use_profile(home, str(DEMO.resolve()), profile)
            with running_daemon(home, budget):
                model, tokenizer = expertd.load(DEMO)
                try:
                    before = settled(home)
                    answer(model, tokenizer, [prompts_of(tokenizer, kind, count, second_half=True)[number]])
                finally:
                    expertd.unload(model)
                missed += held(home).misses - before.misses
    return missed


def run(quick: bool = False) -> dict[str, Any]:
    """``profile_miss_ratio`` and ``wrong_profile_miss_ratio``, and what a restart of the daemon costs."""
    return dict(profiles(3 if quick else 8))
