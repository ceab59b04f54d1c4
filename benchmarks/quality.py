"""How good a worker's answers are: held-out perplexity, greedy agreement and pass keys, against plain mlx-lm.

Exact execution changes nothing, to the last bit, at any budget; whatever is lossy is judged by how much it changes:
KV caches in 8 and 4 bits (``--kv-bits``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load as load_plain
from numpy.typing import NDArray
from transformers.utils import logging as hub_logging

import expertd
from expertd.protocol.errors import KvBitsUnsupported
from expertd.worker.answers import answer_all, encode_prompt
from expertd.worker.kv_memory import check_kv_bits
from expertd.worker.kv_quantized import new_caches
from expertd.worker.manifest import load_lazily
from tools.demo_model.corpus import passkey
from tools.stage import budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
HELD_OUT = DEMO / "held_out"
SHARES = (25, 50)
"""Budgets, in percent of all blocks."""
KV_BITS = (8, 4)
WINDOW = 512
ANSWER = 64
PASSKEY_ANSWER = 24
PASSKEY_TOKENS = (128, 256, 448)
"""Lengths of the texts that a key is hidden in."""
PROMPTS = (
    "What does textwrap.fill do?",
    "Write the function clamp: Limit a value to a range.",
    "Explain os.path.join.",
    "What is the module json for?",
    "Go on: The ship went down in the night, and nobody saw it.",
    "Go on: My fellow citizens, the state of our Union is strong.",
)


@dataclass
class Quality:
    """What one model did: sums of losses by text (nats, exact), greedy answers, and pass keys by length."""

    losses: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)
    found: dict[int, list[bool]] = field(default_factory=dict)

    def perplexity(self, *texts: str) -> float:
        """Over ``texts``, or all of them."""
        names = texts or tuple(self.losses)
        return math.exp(sum(self.losses[n] for n in names) / sum(self.counts[n] for n in names))

    def agreement(self, other: Quality) -> float:
        """Share of greedy tokens that are ``other``'s, until an answer's first difference and nothing after it."""
        same = total = 0
        for one, two in zip(self.answers, other.answers, strict=True):
            total += max(len(one), len(two))
            same += next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        return same / total

    def retrieved(self) -> float:
        """Share of pass keys that were found."""
        hits = [hit for each in self.found.values() for hit in each]
        return sum(hits) / len(hits)


def measure(
    model: Any, tokenizer: Any, windows: dict[str, NDArray[np.int32]], keys: int, kv_bits: int | None = None
) -> Quality:
    """What ``model`` makes of held-out ``windows`` ``[n, WINDOW + 1]`` by text, of ``PROMPTS``, and of pass keys.

    ``kv_bits``: of its KV caches (``new_caches``).
    """
    out = Quality()
    for name, rows in windows.items():
        losses = []
        for row in rows:
            logits = model(mx.array(row[None, :-1]), cache=new_caches(model, kv_bits))[0].astype(mx.float32)
            taken = mx.take_along_axis(logits, mx.array(row[1:, None]), axis=-1)[:, 0]
            losses.append(np.array(mx.logsumexp(logits, axis=-1) - taken, np.float64))
        out.losses[name] = float(np.sum(losses))
        out.counts[name] = sum(map(len, losses))
    out.answers = _answers(model, tokenizer, PROMPTS, ANSWER, kv_bits)
    text = (HELD_OUT / "prose.txt").read_text(encoding="utf-8")
    chance = random.Random(0)
    for length in PASSKEY_TOKENS:
        out.found[length] = []
        for number in range(keys):
            key, place = f"{chance.randrange(10**5):05}", number / max(1, keys - 1)
            asked, _ = passkey(_cut(tokenizer, text, length, chance), key, place)
            (tokens,) = _answers(model, tokenizer, [asked], PASSKEY_ANSWER, kv_bits)
            out.found[length].append(key in tokenizer.decode(tokens))
    return out


def _cut(tokenizer: Any, text: str, tokens: int, chance: random.Random) -> str:
    """A piece of ``text`` that makes a prompt of about so many tokens."""
    start = chance.randrange(len(text) // 2)
    ids = tokenizer.encode(text[start : start + 8 * tokens], add_special_tokens=False)
    return str(tokenizer.decode(ids[: max(8, tokens - 60)]))


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, kv_bits: int | None
) -> list[list[int]]:
    """Greedy answers to ``prompts``, each by itself."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    return [answer for _, answer in answer_all(model, tokenizer, encoded, tokens, kv_bits=kv_bits)]


def held_out(tokenizer: Any, windows: int) -> dict[str, NDArray[np.int32]]:
    """The first ``windows`` windows of each held-out text, ``[windows, WINDOW + 1]``."""
    out = {}
    hub_logging.set_verbosity_error()  # a text that is longer than the model's context is cut into windows here
    for file in sorted(HELD_OUT.glob("*.txt")):
        ids = tokenizer.encode(file.read_text(encoding="utf-8"), add_special_tokens=False)
        count = min(windows, (len(ids) - 1) // WINDOW)
        out[file.stem] = np.stack([ids[n * WINDOW : (n + 1) * WINDOW + 1] for n in range(count)]).astype(np.int32)
    return out


def run(quick: bool = False, model: Path = DEMO) -> dict[str, Any]:
    """Perplexity of plain mlx-lm and of workers at ``SHARES`` of the blocks, and how far they agree."""
    windows, keys = (2, 2) if quick else (16, 8)
    plain, tokenizer, *_ = load_plain(str(model))
    rows = held_out(tokenizer, windows)
    wanted = measure(plain, tokenizer, rows, keys)
    figures: dict[str, Any] = {"held_out_tokens": sum(wanted.counts.values())}
    print(f"{'':>10}  perplexity" + "".join(f"{name:>10}" for name in rows) + "   greedy agreement  pass keys")

    def tell(name: str, found: Quality) -> None:
        print(
            f"{name:>10}  {found.perplexity():>10.4f}" + "".join(f"{found.perplexity(text):>10.4f}" for text in rows)
            + f"  {found.agreement(wanted):>17.4f}  {found.retrieved():>9.3f}"
        )  # fmt: skip
        figures[f"perplexity_{name}"] = found.perplexity()
        figures.update({f"perplexity_{name}_{text}": found.perplexity(text) for text in rows})
        figures[f"passkey_{name}"] = found.retrieved()

    tell("plain", wanted)
    for bits in () if quick else KV_BITS:
        try:
            check_kv_bits(plain, bits)
        except KvBitsUnsupported as error:
            print(f"{f'kv {bits}':>10}  {error.message}")
            continue
        found = measure(plain, tokenizer, rows, keys, bits)
        tell(f"kv{bits}", found)
        figures[f"greedy_agreement_kv{bits}"] = found.agreement(wanted)
    del plain
    figures.update({f"passkey_plain_{length}": sum(hits) / len(hits) for length, hits in wanted.found.items()})
    agreements = []
    equal = True
    manifest = load_lazily(model).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    for share in SHARES:
        with temporary_home() as home, running_daemon(home, budget_for(manifest, blocks * share // 100)):
            worker, tokenizer = expertd.load(model)
            found = measure(worker, tokenizer, rows, keys)
            expertd.unload(worker)
        tell(str(share), found)
        agreements.append(found.agreement(wanted))
        equal = equal and (found.losses, found.answers, found.found) == (wanted.losses, wanted.answers, wanted.found)
    figures["greedy_agreement"] = min(agreements)
    figures["bit_equal"] = equal
    return figures
