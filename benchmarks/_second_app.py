"""``python -m benchmarks._second_app MODEL TOKENS``: a user's program, from its first import to its first token.

``TOKENS`` is the length of its prompt; 0: it only loads the model.  ``MODEL`` ``-``: mlx-lm without any model.  Prints
one line of JSON, and holds on until its standard input ends.

    imports_ms    importing mlx-lm and expertd
    tokenizer_ms  loading the tokenizer
    attach_ms     all else of ``expertd.load``: after it the model can run a forward
    forward_ms    the first forward, of one token
    prompt_s      the prompt, once its experts are there
    ttft_s        from calling ``expertd.load`` to the first token of the answer
    read_bytes    what the process has read in ``attach_ms`` beside headers and settings
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOISE = 64 << 10
"""Of this process's reads so many bytes are of ``/proc`` and the like."""


def main() -> None:
    """See the module."""
    began = time.perf_counter()
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    said: dict[str, Any] = {}
    if sys.argv[1] == "-":
        mx.eval(mx.zeros((8,)) + 1)
    else:
        from expertd.worker import load as worker_load

        said["imports_ms"] = _ms(began)
        _measure(Path(sys.argv[1]), int(sys.argv[2]), worker_load, generate_step, said)
        mx.clear_cache()
    print(json.dumps(said), flush=True)
    sys.stdin.read()


def _measure(
    path: Path, tokens: int, worker_load: Any, generate_step: Callable[..., Any], said: dict[str, Any]
) -> None:
    import mlx.core as mx
    import numpy as np

    from expertd.worker.manifest import load_lazily

    plain = worker_load.load_tokenizer
    of_tokenizer = [0.0, 0.0]

    def load_tokenizer(*args: Any, **kwargs: Any) -> Any:
        began, read = time.perf_counter(), _read_bytes()
        tokenizer = plain(*args, **kwargs)
        of_tokenizer[:] = time.perf_counter() - began, _read_bytes() - read
        return tokenizer

    worker_load.load_tokenizer = load_tokenizer
    before, began = _read_bytes(), time.perf_counter()
    model, _ = worker_load.load(path)
    loaded = time.perf_counter()
    read = _read_bytes() - before - int(of_tokenizer[1])
    said["tokenizer_ms"] = round(1000 * of_tokenizer[0], 1)
    said["attach_ms"] = round(1000 * (loaded - began - of_tokenizer[0]), 1)
    if tokens:
        prompt = mx.array(np.random.default_rng(3).integers(3, 300, tokens))
        next(iter(generate_step(prompt, model, max_tokens=1)))
        said["ttft_s"] = round(time.perf_counter() - began, 3)
        began = time.perf_counter()
        next(iter(generate_step(prompt, model, max_tokens=1)))
        said["prompt_s"] = round(time.perf_counter() - began, 3)
    else:
        began = time.perf_counter()
        mx.eval(model(mx.array([[7]])))
        said["forward_ms"] = _ms(began)
    before = _read_bytes()
    load_lazily(path)
    beyond = read - (_read_bytes() - before)
    said["read_bytes"] = beyond if beyond > NOISE else 0
    worker_load.kept = model


def _ms(began: float) -> float:
    return round(1000 * (time.perf_counter() - began), 1)


def _read_bytes() -> int:
    """Bytes that this process has asked the system for, whether they came from a disk or not (proc(5))."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


if __name__ == "__main__":
    main()
