"""Does a plan tell what will be?  ``expertd plan`` for the demo model, against what daemons with its budgets then give.

The disk is slowed down (``--simulate-ssd``) so that reading matters.  A trace is recorded and the model's pace measured
with prompts from the first halves of the held-out texts; plans are made while a daemon with half of the blocks runs, and
daemons with each budget answer prompts from the second halves.  Each budget is planned right before it is tried, because
how fast a shared machine computes changes by the minute.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

import expertd
from expertd.clients.cli.plan import reckon, table
from expertd.protocol.paths import Home
from expertd.worker.answers import answer_all
from expertd.worker.manifest import load_lazily
from expertd.worker.recording import recording
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
SHARES = (0.25, 0.5, 0.75)
DISK = "4MB,200us"
CHARACTERS = 200
ANSWER_TOKENS = 96
TEMPERATURE = 0.8


def prompts(half: int) -> Iterator[str]:
    """Pieces of one half of each held-out text in turn, without end, in an order that hardly repeats."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((DEMO / "held_out").glob("*.txt"))]
    halves = [text[len(text) // 2 * half : len(text) // 2 * (half + 1)] for text in texts]
    for number in itertools.count():
        text = halves[number % len(halves)]
        start = number * 7919 % (len(text) - CHARACTERS)
        yield text[start : start + CHARACTERS]


def record(home: Home, blocks: int, tokens: int) -> None:
    """A trace of the demo model in the home, where ``plan`` finds it, and its pace with everything resident."""
    home.traces.mkdir()
    with running_daemon(home, budget_for(load_lazily(DEMO).manifest, blocks)):
        model, tokenizer = expertd.load(DEMO, home=home)
        with recording(model, home.traces / "demo.npz", scores=False):
            texts = [tokenizer.encode(text) for text in itertools.islice(prompts(0), tokens // ANSWER_TOKENS)]
            for _ in answer_all(model, tokenizer, texts, ANSWER_TOKENS, TEMPERATURE):
                pass
        expertd.unload(model)


class Answers:
    """Answers to prompts, one after the other, with the time and the lookups of their single tokens."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._model, self._tokenizer = expertd.load(DEMO, home=home)
        self.tokens = self.hits = self.misses = 0
        self.seconds = 0.0

    def run(self, texts: Iterator[str], tokens: int) -> None:
        """Answer until there are so many more tokens."""
        sampler = make_sampler(TEMPERATURE)
        until = self.tokens + tokens
        while self.tokens < until:
            prompt = mx.array(self._tokenizer.encode(next(texts)))
            steps = generate_step(prompt, self._model, max_tokens=ANSWER_TOKENS, sampler=sampler)
            next(steps)
            before, began = self._lookups(), time.perf_counter()
            self.tokens += sum(1 for _ in steps)
            self.seconds += time.perf_counter() - began
            after = self._lookups()
            self.hits += after[0] - before[0]
            self.misses += after[1] - before[1]

    def _lookups(self) -> tuple[int, int]:
        status = ask_status(self._home).models[0]
        return status.hits, status.misses

    def close(self) -> None:
        expertd.unload(self._model)


def measured(home: Home, budget: int, warm_up: int, tokens: int) -> tuple[float, float]:
    """The hit rate and tokens a second of a daemon with this budget, once its cache has filled."""
    with running_daemon(home, budget, "--simulate-ssd", DISK):
        answers = Answers(home)
        try:
            answers.run(prompts(0), warm_up)
            answers.tokens = answers.hits = answers.misses = 0
            answers.seconds = 0.0
            answers.run(prompts(1), tokens)
        finally:
            answers.close()
    return answers.hits / (answers.hits + answers.misses), answers.tokens / answers.seconds


def planned(home: Home, running: int, budget: int, tokens: int) -> tuple[float, float]:
    """Hit rate and tokens a second with ``budget``, planned while a daemon with the budget ``running`` runs."""
    with running_daemon(home, running, "--simulate-ssd", DISK):
        answers = Answers(home)
        try:
            answers.run(prompts(0), tokens)
            time.sleep(2.0)  # an idle worker keeps what it has measured
            found = reckon(home, DEMO, sizes=[budget])
        finally:
            answers.close()
    print("\n".join(table(found)), "\n")
    (row,) = found.plan.rows
    return row.hits, row.tokens_s


def run(quick: bool = False) -> dict[str, Any]:
    """``hits_error_25`` and so on in points, ``speed_error_25`` in percent of what was measured, and what both are of."""
    manifest = load_lazily(DEMO).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    sizes = [budget_for(manifest, round(share * blocks)) for share in SHARES]
    warm_up, tokens = (96, 96) if quick else (192, 384)
    figures: dict[str, Any] = {}
    with temporary_home() as home:
        record(home, blocks, 1000 if quick else 2400)
        for share, size in zip(SHARES, sizes, strict=True):
            hits, speed = planned(home, sizes[1], size, warm_up)
            true_hits, true_speed = measured(home, size, warm_up, tokens)
            name = f"{100 * share:.0f}"
            print(
                f"{name} % of the blocks: hits {100 * hits:.1f} % planned, {100 * true_hits:.1f} % measured; "
                f"tokens/s {speed:.1f} planned, {true_speed:.1f} measured"
            )
            figures |= {
                f"hits_error_{name}": round(100 * (hits - true_hits), 2),
                f"speed_error_{name}": round(100 * (speed / true_speed - 1), 1),
                f"hits_{name}": round(100 * true_hits, 2),
                f"tokens_s_{name}": round(true_speed, 2),
            }
    return figures
