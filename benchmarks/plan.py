"""Does a plan tell what will be?  ``expertd plan`` for the demo model, against what daemons with its budgets then give.

The disk is slowed down (``--simulate-ssd``) so that reading matters.  A trace is recorded with prompts from the first
halves of the held-out texts, and what is measured are answers to prompts from the second halves.  Each budget is
planned right before it is tried, some times in turn, because how fast a shared machine computes changes by the minute;
what workers have measured until then is all that a plan knows of the model's speed.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean, harmonic_mean
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
ANSWER_TOKENS = 48
TEMPERATURE = 0.8
WARM_UP, TOKENS = 144, 141
"""Of a round: an answer to a prompt of each text, whose first tokens are the prompts' and not counted."""


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


class Counts(NamedTuple):
    """Of single tokens: how many, the seconds that they took, and their lookups."""

    tokens: int
    seconds: float
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        return self.hits / (self.hits + self.misses)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def together(counts: Iterable[Counts]) -> Counts:
    """Their sum."""
    tokens, seconds, hits, misses = map(sum, zip(*counts, strict=True))
    return Counts(tokens, seconds, hits, misses)


class Answers:
    """Answers to prompts, one after the other."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._model, self._tokenizer = expertd.load(DEMO, home=home)

    def run(self, texts: Iterator[str], tokens: int) -> Counts:
        """Answer until there are so many tokens: what the single ones among them took."""
        found = [self._answer(next(texts))]
        while together(found).tokens < tokens:
            found.append(self._answer(next(texts)))
        return together(found)

    def _answer(self, text: str) -> Counts:
        prompt = mx.array(self._tokenizer.encode(text))
        steps = generate_step(prompt, self._model, max_tokens=ANSWER_TOKENS, sampler=make_sampler(TEMPERATURE))
        next(steps)
        before, began = self._lookups(), time.perf_counter()
        tokens = sum(1 for _ in steps)
        seconds = time.perf_counter() - began
        after = self._lookups()
        return Counts(tokens, seconds, after[0] - before[0], after[1] - before[1])

    def _lookups(self) -> tuple[int, int]:
        status = ask_status(self._home).models[0]
        return status.hits, status.misses

    def close(self) -> None:
        expertd.unload(self._model)


class Round(NamedTuple):
    """What was planned, a hit rate (0-1) and tokens a second, and what was then measured."""

    hits: float
    speed: float
    truth: Counts


def rounds(home: Home, budget: int, count: int) -> Iterator[Round]:
    """Plan ``budget`` and try it with a daemon that has it, again and again; before that its cache fills."""
    with running_daemon(home, budget, "--simulate-ssd", DISK):
        answers = Answers(home)
        try:
            known, unknown = prompts(0), prompts(1)
            answers.run(known, WARM_UP)
            for _ in range(count):
                time.sleep(2.0)  # an idle worker keeps what it has measured
                found = reckon(home, DEMO, sizes=[budget])
                (row,) = found.plan.rows
                yield Round(row.hits, row.tokens_s, answers.run(unknown, TOKENS))
            print("\n" + "\n".join(table(found)) + "\n")
        finally:
            answers.close()


def run(quick: bool = False) -> dict[str, Any]:
    """``hits_error_25`` and so on in points, ``speed_error_25`` in percent of what was measured, and what that was."""
    manifest = load_lazily(DEMO).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    figures: dict[str, Any] = {}
    with temporary_home() as home:
        record(home, blocks, 1000 if quick else 2400)
        for share in SHARES:
            found = []
            name = f"{100 * share:.0f}"
            for one in rounds(home, budget_for(manifest, round(share * blocks)), 1 if quick else 3):
                print(
                    f"{name} % of the blocks: hits {100 * one.hits:.1f} % planned, {100 * one.truth.hit_rate:.1f} % "
                    f"measured; tokens/s {one.speed:.1f} planned, {one.truth.speed:.1f} measured",
                    flush=True,
                )
                found.append(one)
            truth = together(one.truth for one in found)
            hits, speed = fmean(one.hits for one in found), harmonic_mean(one.speed for one in found)
            figures |= {
                f"hits_error_{name}": round(100 * (hits - truth.hit_rate), 2),
                f"speed_error_{name}": round(100 * (speed / truth.speed - 1), 1),
                f"hits_{name}": round(100 * truth.hit_rate, 2),
                f"tokens_s_{name}": round(truth.speed, 2),
            }
    return figures
