"""``python -m benchmarks._decoder MODEL``: loads a model, says ``ready``, and decodes until its standard input ends."""

from __future__ import annotations

import select
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler

import expertd

ANSWER_TOKENS = 200


def main() -> None:
    """See the module."""
    model, tokenizer = expertd.load(Path(sys.argv[1]))
    chance, sampler = np.random.default_rng(7), make_sampler(1.0)
    print("ready", flush=True)
    while True:
        prompt = mx.array(chance.integers(3, tokenizer.vocab_size, 32))
        for _ in generate_step(prompt, model, max_tokens=ANSWER_TOKENS, sampler=sampler):
            if select.select([sys.stdin], [], [], 0)[0]:
                expertd.unload(model)
                return


if __name__ == "__main__":
    main()
