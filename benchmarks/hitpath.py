"""What a hit costs: speed with everything resident, time added by a partially resident layer that hits, and frames.

Plain and cached runs alternate, so that a busy machine slows both.  Noise on a shared machine only ever adds time, so
the ratio of the minima estimates the code and the ratio of the medians the day; both are reported, and
``resident_ratio`` is that of the minima (docs/benchmarks.md argues it).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import expertd
from expertd.worker.experts import CachedExperts
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily, replace_module
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

PROMPT = np.arange(5, 21)


class _Layer(nn.Module):  # type: ignore[misc]
    """A cached layer, or in its place what any exact cache has to do: evaluate the router, then compute.

    The second takes its slots from a record of an earlier run, so that both compute the same on the same memory.
    """

    def __init__(self, cached: CachedExperts, record: _Record) -> None:
        super().__init__()
        self._cached = cached
        self._record = record

    def __call__(self, x: Any, indices: Any) -> Any:
        if self._record.looking_up:
            out = self._cached(x, indices)
            if self._record.recording:
                self._record.slots.append(mx.array(self._cached._parts._slots + 0))
            return out
        mx.eval(indices)
        out = self._cached._parts.switch(x, next(self._record.replaying))
        if self._record.ahead:
            mx.async_eval(out)
        return out


@dataclass
class _Record:
    """The slots of all events of a run, in order."""

    slots: list[Any] = field(default_factory=list)
    recording: bool = True
    looking_up: bool = True
    ahead: bool = False
    replaying: Iterator[Any] = field(default_factory=lambda: iter(()))


def decode(model: Any, tokens: int) -> list[float]:
    """Seconds each of ``tokens`` greedy tokens took, through mlx-lm's own pipelined ``generate_step``."""
    times = []
    steps = generate_step(mx.array(PROMPT), model, max_tokens=tokens + 1)
    next(steps)
    for _ in range(tokens):
        began = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - began)
    return times


def token_by_token(forwards: list[Callable[..., Any]], cache_of: Any, tokens: int) -> Any:
    """Seconds ``[forward, token]`` that each of ``forwards`` took for each of ``tokens`` greedy tokens.

    Every token is decoded by all of them, one right after the other, each with its own KV cache and evaluated before
    the next begins; who goes first alternates.
    """
    caches = [make_prompt_cache(cache_of) for _ in forwards]
    prompt = mx.array(PROMPT)[None]
    last = [forward(prompt, cache=cache)[:, -1] for forward, cache in zip(forwards, caches, strict=True)]
    times = np.zeros((len(forwards), tokens))
    for number in range(tokens):
        for place in range(len(forwards)) if number % 2 == 0 else reversed(range(len(forwards))):
            token = mx.argmax(last[place], axis=-1)
            mx.eval(token)
            began = time.perf_counter()
            last[place] = forwards[place](token[:, None], cache=caches[place])[:, -1]
            mx.eval(last[place])
            times[place, number] = time.perf_counter() - began
    return times


def interleaved(measure: Callable[[Any, int], list[float]], models: list[Any], rounds: int, tokens: int) -> Any:
    """Times ``[model, round, token]``; the order of the models turns around from round to round."""
    times = np.zeros((len(models), rounds, tokens))
    for number in range(rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for place in order:
            times[place, number] = measure(models[place], tokens)
    return times


def partial_hits(model: Any, rounds: int, tokens: int) -> Any:
    """Times ``[3, round, token]`` of decoding: routers evaluated, no more; the same, but the experts' computing begun
    at once as cached layers do; and cached layers that look up and hit.
    """
    record = _Record()
    for layer in [path for path, module in model.named_modules() if isinstance(module, CachedExperts)]:
        replace_module(model, layer, _Layer(dict(model.named_modules())[layer], record))
    token_by_token([model], model, tokens)
    record.recording = False
    call_without_session = type(model).__mro__[1].__call__  # the model's own call, with no session's bracket around it

    slots = {ahead: iter(()) for ahead in (False, True)}

    def replay(ahead: bool, *args: Any, **kwargs: Any) -> Any:
        record.looking_up, record.ahead, record.replaying = False, ahead, slots[ahead]
        return call_without_session(model, *args, **kwargs)

    def look_up(*args: Any, **kwargs: Any) -> Any:
        record.looking_up = True
        return model(*args, **kwargs)

    times = np.zeros((3, rounds, tokens))
    for number in range(rounds):
        slots = {ahead: iter(record.slots) for ahead in slots}
        times[:, number] = token_by_token([partial(replay, False), partial(replay, True), look_up], model, tokens)
    return times


def wait_until_complete(home: Any, model: Any) -> None:
    """Return when the daemon has filled the pool and the session has heard of it."""
    deadline = time.monotonic() + 120
    while not all(pool.complete for pool in session_of(model).pools):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the pool was not filled: {ask_status(home).models}")
        time.sleep(0.05)


def run(quick: bool = False) -> dict[str, Any]:
    """See the module."""
    rounds, tokens = (6, 24) if quick else (30, 32)
    forwards = 200 if quick else 1000
    with tempfile.TemporaryDirectory(prefix="expertd-") as folder, temporary_home() as home:
        path = write_checkpoint(Path(folder) / "model", "qwen3_moe", hidden=512, layers=8, n_experts=64, top_k=8,
                                expert_width=256, vocab=2048)  # fmt: skip
        manifest = load_lazily(path).manifest
        plain, _ = load_model(path)
        layers, blocks = len(manifest.layers), len(manifest.layers) * manifest.layers[0].experts

        with running_daemon(home, budget_for(manifest, blocks)):
            model, _ = expertd.load(path)
            wait_until_complete(home, model)
            times = interleaved(decode, [plain, model], rounds, tokens)
            before = session_of(model).frames
            for _ in range(forwards // 50):
                decode(model, 49)  # a forward for the prompt's last token, and one for each of 49 tokens
            frames = (session_of(model).frames - before) * 1000 / forwards
            expertd.unload(model)
        plain_s, cached_s = times.reshape(2, -1)

        with running_daemon(home, budget_for(manifest, blocks - 1)):
            model, _ = expertd.load(path)
            token_by_token([model], model, tokens)  # brings in what the run needs
            misses = ask_status(home).models[0].misses
            routers, ahead, cached = partial_hits(model, rounds, tokens)
            assert ask_status(home).models[0].misses == misses, "a run that was to hit has missed"
            expertd.unload(model)
        # Each token has its counterpart in the other variant: the same token, milliseconds apart.
        added_us = (cached - routers) / layers * 1e6
        lookup_us = (cached - ahead) / layers * 1e6

    print(f"tokens/s, plain:  best {1 / plain_s.min():.1f}, median {1 / np.median(plain_s):.1f}")
    print(f"tokens/s, worker: best {1 / cached_s.min():.1f}, median {1 / np.median(cached_s):.1f}")
    return {
        "resident_ratio": round(plain_s.min() / cached_s.min(), 4),
        "resident_ratio_minima": round(plain_s.min() / cached_s.min(), 4),
        "resident_ratio_medians": round(float(np.median(plain_s) / np.median(cached_s)), 4),
        "resident_ratio_paired": round(statistics.median((times[0].sum(axis=1) / times[1].sum(axis=1)).tolist()), 4),
        "partial_hit_us": round(float(np.median(added_us)), 1),
        "partial_hit_us_lookup": round(float(np.median(lookup_us)), 1),
        "frames_per_1000_forwards": round(frames, 1),
        "pairs": rounds * tokens,
    }
