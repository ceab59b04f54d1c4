"""``python -m benchmarks._prefiller MODEL TOKENS VOCAB``: loads a model, and computes a prompt for each line.

Says ``ready``, then for each prompt one JSON line: the sum of its last logits and the seconds it took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

import expertd


def main() -> None:
    """See the module."""
    model, _ = expertd.load(Path(sys.argv[1]))
    tokens, vocab = int(sys.argv[2]), int(sys.argv[3])
    prompt = mx.array(np.random.default_rng(7).integers(3, vocab, (1, tokens)))
    print("ready", flush=True)
    for _ in sys.stdin:
        cache = make_prompt_cache(model)
        began = time.perf_counter()
        last = model(prompt, cache=cache)[:, -1]
        mx.eval(last)
        took = time.perf_counter() - began
        print(json.dumps({"sum": float(mx.sum(last).item()), "seconds": took}), flush=True)
    expertd.unload(model)


if __name__ == "__main__":
    main()
