"""Is a worker exact?  Compares logits and greedy tokens with plain mlx-lm, on the machine that asks.

Where plain model and pools do not fit together, layer by layer: every MoE layer's output is compared with that of
mlx-lm's own switch on weights loaded for this one layer.  All else in the worker's model *is* mlx-lm's code and
weights, so equal layers mean equal logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from numpy.typing import NDArray

from expertd.worker.experts import CachedExperts
from expertd.worker.manifest import find_switches, replace_module


@dataclass(frozen=True)
class Run:
    """A greedy continuation: prompt logits ``[batch, length, vocabulary]``, then for each of ``tokens`` (each
    ``[batch]``) the last position's logits that chose it (each ``[batch, vocabulary]``).
    """

    prompt_logits: NDArray[Any]
    step_logits: list[NDArray[Any]]
    tokens: list[NDArray[Any]]


def greedy(model: Any, prompts: NDArray[np.integer], count: int) -> Run:
    """Continue ``prompts`` ``[batch, length]`` by ``count`` greedy tokens with ``model``."""
    cache = make_prompt_cache(model)
    logits = model(mx.array(prompts), cache=cache)
    prompt_logits = _bits(logits)
    last = logits[:, -1]
    step_logits, tokens = [], []
    for _ in range(count):
        token = mx.argmax(last, axis=-1)
        mx.eval(token, last)
        step_logits.append(_bits(last))
        tokens.append(np.array(token))
        last = model(token[:, None], cache=cache)[:, -1]
    return Run(prompt_logits, step_logits, tokens)


def first_difference(plain: Run, cached: Run) -> str | None:
    """Where two runs first differ by a bit of a logit or by a token, as a sentence, or None."""
    if not np.array_equal(plain.prompt_logits, cached.prompt_logits):
        place = np.argwhere(plain.prompt_logits != cached.prompt_logits)[0].tolist()
        return f"the prompt's logits differ first at [sequence, position, token] {place}"
    for number, (one, other) in enumerate(zip(plain.step_logits, cached.step_logits, strict=True)):
        if not np.array_equal(one, other):
            return f"the logits differ first at generated token {number}"
    return tokens_difference(plain, cached)


def tokens_difference(plain: Run, cached: Run) -> str | None:
    """Where the greedy tokens of two runs first differ, as a sentence, or None."""
    for number, (one, other) in enumerate(zip(plain.tokens, cached.tokens, strict=True)):
        if not np.array_equal(one, other):
            return f"generated token {number} differs: {one.tolist()} (plain) and {other.tolist()} (worker)"
    return None


def _bits(logits: Any) -> NDArray[Any]:
    """Logits as NumPy; bfloat16, which NumPy lacks, as its exact float32 values."""
    return np.array(logits.astype(mx.float32) if logits.dtype == mx.bfloat16 else logits)


class _Checked(CachedExperts):
    """A layer that compares each of its outputs with mlx-lm's own switch on the file's weights."""

    def __init__(self, cached: CachedExperts, plain: Any, path: str, differences: list[str]) -> None:
        super(CachedExperts, self).__init__()
        self._parts = cached._parts
        self._check = (cached, plain, path, differences)

    def __call__(self, x: Any, indices: Any) -> Any:
        cached, plain, path, differences = self._check
        out = cached(x, indices)
        expected = plain(x, indices)
        if not mx.array_equal(out, expected).item():
            largest = mx.max(mx.abs(out - expected)).item()
            differences.append(f"{path}: outputs differ by up to {largest:.3g}")
        return out


def compare_layers(folder: Path, model: Any, prompts: Sequence[NDArray[np.integer]]) -> list[str]:
    """Run ``prompts`` (each ``[1, length]``) through ``model`` once for each MoE layer, checking that layer.

    One layer's experts are in memory at a time.  Returns the differences, empty if there are none.
    """
    differences: list[str] = []
    plain, _ = load_model(folder, lazy=True)
    for switch in find_switches(plain):
        cached = _module_at(model, switch.path)
        replace_module(model, switch.path, _Checked(cached, switch.module, switch.path, differences))
        try:
            for prompt in prompts:
                mx.eval(model(mx.array(prompt), cache=make_prompt_cache(model)))
        finally:
            replace_module(model, switch.path, cached)
        # Its tensors were read when the layer was checked: let go of them before the next.
        replace_module(plain, switch.path, type(switch.module)(1, 1, 1))
        del switch
        mx.clear_cache()
    return differences


def _module_at(model: Any, path: str) -> Any:
    return dict(model.named_modules())[path]
