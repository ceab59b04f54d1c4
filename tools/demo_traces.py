"""Routing traces of the demo model, one a domain: ``python -m tools.demo_traces FOLDER [--tokens 50000]``.

Each goes on from pieces of the held-out texts that lie beside the checkpoint, sampled with a fixed seed.  Uses a daemon
of its own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import expertd
from expertd.clients.traces.statistics import jaccard, uses
from expertd.protocol.traces import read_trace
from expertd.worker.answers import answer_all
from expertd.worker.manifest import load_lazily
from expertd.worker.recording import recording
from tools.stage import budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
PROMPT_CHARACTERS = 240
ANSWER_TOKENS = 256
TEMPERATURE = 0.8


def pieces(text: str) -> Iterator[str]:
    """Pieces all over ``text``, without end, in an order that hardly repeats."""
    for number in itertools.count():
        start = number * 7919 % (len(text) - PROMPT_CHARACTERS)
        yield text[start : start + PROMPT_CHARACTERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=50_000, help="decoded tokens, over all domains")
    parser.add_argument("--parallel", type=int, default=1, help="answers at a time")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    texts = sorted((DEMO / "held_out").glob("*.txt"))
    manifest = load_lazily(DEMO).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    with temporary_home() as home, running_daemon(home, budget_for(manifest, blocks)):
        model, tokenizer = expertd.load(DEMO)
        for text in texts:
            prompts = pieces(text.read_text(encoding="utf-8"))
            decoded, wanted = 0, -(-arguments.tokens // len(texts))
            with recording(model, arguments.folder / f"{text.stem}.npz"):
                for seed in itertools.count():
                    some = [tokenizer.encode(next(prompts)) for _ in range(arguments.parallel)]
                    answers = answer_all(model, tokenizer, some, ANSWER_TOKENS, TEMPERATURE, seed, len(some))
                    decoded += sum(len(tokens) for _, tokens in answers)
                    if decoded >= wanted:
                        break
        expertd.unload(model)
    found = {text.stem: read_trace(arguments.folder / f"{text.stem}.npz") for text in texts}
    for name, trace in found.items():
        info = trace.info
        print(f"{name}: {info.tokens:,} tokens, {info.decode_tokens:,} decoded, {info.sequences} answers")
    print(f"decoded tokens in all: {sum(trace.info.decode_tokens for trace in found.values()):,}")
    for one, other in itertools.combinations(found, 2):
        shares = " ".join(f"{share:.2f}" for share in jaccard(uses(found[one]), uses(found[other])))
        print(f"{one} and {other}: hottest quarters in common (Jaccard) by layer: {shares}")


if __name__ == "__main__":
    main()
