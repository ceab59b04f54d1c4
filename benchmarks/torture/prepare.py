"""``python -m benchmarks.torture.prepare FOLDER PROMPTS TOKENS``: the checkpoints, and what plain mlx-lm says.

Two checkpoints that differ in their weights alone, so that one may take the other's place.  Prints one line when they
are written, and writes ``references.json`` when plain mlx-lm has answered every prompt with both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx_lm
import numpy as np

from benchmarks.torture.references import NAMES, QUESTION, References
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.stage import budget_for

SIZES = {"hidden": 256, "layers": 4, "n_experts": 24, "top_k": 4, "expert_width": 256, "vocab": 2048}
BUDGET_SHARE = 0.4
LONGEST_PROMPT = 40


def main() -> None:
    """See the module."""
    folder, prompts, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    paths = [
        write_checkpoint(folder / name, "qwen3_moe", seed=seed, **SIZES) for seed, name in enumerate(NAMES)
    ]
    manifest = load_lazily(paths[0]).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    budget = budget_for(manifest, round(blocks * BUDGET_SHARE))
    print(json.dumps({"budget": budget}), flush=True)

    chance = np.random.default_rng(0)
    given = [chance.integers(3, SIZES["vocab"], chance.integers(1, LONGEST_PROMPT)).tolist() for _ in range(prompts)]
    said: list[list[list[int]]] = []
    texts: list[list[str]] = []
    for path in paths:
        model, tokenizer = mlx_lm.load(str(path))[:2]
        said.append([
            [answer.token for answer in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=tokens)]
            for prompt in given
        ])  # fmt: skip
        chats = [[{"role": "user", "content": QUESTION.format(n)}] for n in range(prompts)]
        rendered = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        texts.append([mlx_lm.generate(model, tokenizer, prompt, max_tokens=tokens) for prompt in rendered])
    References(tokens, given, said, texts).write(folder)


if __name__ == "__main__":
    main()
