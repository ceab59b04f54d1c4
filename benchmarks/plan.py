"""Does a plan tell what will be?  ``expertd plan`` for the demo model, against what daemons with its budgets then give.

The disk is slowed down (``--simulate-ssd``) so that reading matters.  A trace is recorded with prompts from the first
halves of the held-out texts, and what is measured are answers to prompts from the second halves.  Each budget is
planned right before it is tried, some times in turn, because how fast a shared machine computes changes by the minute;
what workers have measured until then is all that a plan knows of the model's speed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


class Round(NamedTuple):
    """What was planned and what was then measured: hit rates (0-1) and tokens a second."""

    hits: float
    speed: float
    true_hits: float
    true_speed: float


def rounds(home: Home, budget: int, count: int, tokens: int) -> Iterator[Round]:
    """Plan ``budget`` and try it with a daemon that has it, again and again; at first its cache fills."""
    with running_daemon(home, budget, "--simulate-ssd", DISK):
        answers = Answers(home)
        try:
            known, unknown = prompts(0), prompts(1)
            answers.run(known, 2 * tokens)
            for _ in range(count):
                time.sleep(2.0)  # an idle worker keeps what it has measured
                found = reckon(home, DEMO, sizes=[budget])
                answers.tokens = answers.hits = answers.misses = 0
                answers.seconds = 0.0
                answers.run(unknown, tokens)
                (row,) = found.plan.rows
                looked = answers.hits + answers.misses
                yield Round(row.hits, row.tokens_s, answers.hits / looked, answers.tokens / answers.seconds)
            print("\n" + "\n".join(table(found)) + "\n")
        finally:
            answers.close()


def run(quick: bool = False) -> dict[str, Any]:
    """``hits_error_25`` and so on in points, ``speed_error_25`` in percent of what was measured, and what that was.

    Each is the median of its rounds.
    """
    manifest = load_lazily(DEMO).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    figures: dict[str, Any] = {}
    with temporary_home() as home:
        record(home, blocks, 1000 if quick else 2400)
        for share in SHARES:
            found = []
            size = budget_for(manifest, round(share * blocks))
            name = f"{100 * share:.0f}"
            for one in rounds(home, size, 1 if quick else 3, 96):
                print(
                    f"{name} % of the blocks: hits {100 * one.hits:.1f} % planned, {100 * one.true_hits:.1f} % "
                    f"measured; tokens/s {one.speed:.1f} planned, {one.true_speed:.1f} measured",
                    flush=True,
                )
                found.append(one)
            errors = [one.speed / one.true_speed - 1 for one in found]
            figures |= {
                f"hits_error_{name}": round(100 * statistics.median(one.hits - one.true_hits for one in found), 2),
                f"speed_error_{name}": round(100 * statistics.median(errors), 1),
                f"hits_{name}": round(100 * statistics.median(one.true_hits for one in found), 2),
                f"tokens_s_{name}": round(statistics.median(one.true_speed for one in found), 2),
            }
    return figures
