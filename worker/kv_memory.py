"""How much memory a request's KV cache needs, and whether there is that much: asked before its prompt is computed.

What a token takes is measured once for each model, on the caches that mlx-lm makes for it.  An estimate from below:
padding in batches and what a step computes with are not in it, so what is refused clearly does not fit.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import psutil

from expertd.protocol.cgroups import cgroup_room
from expertd.protocol.errors import KvBitsUnsupported, MemoryPressure
from expertd.protocol.sizes import show_size
from expertd.worker.experts import CachedExperts
from expertd.worker.kv_quantized import new_caches

__all__ = ["CacheMemory", "Growth", "LayerCache", "available_bytes", "cache_bytes", "caches_of", "check_kv_bits",
           "measure"]  # fmt: skip

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerCache:
    """What one cache takes, in bytes: ``fixed``, and ``per_token`` for each of the last ``window`` tokens (None: all).

    It grows by ``step`` tokens at a time.
    """

    fixed: int
    per_token: int = 0
    step: int = 1
    window: int | None = None


def cache_bytes(layers: Iterable[LayerCache], tokens: int) -> int:
    """What the caches of ``layers`` take after so many tokens."""
    if tokens == 0:
        return 0
    total = 0
    for layer in layers:
        kept = -(-tokens // layer.step) * layer.step
        total += layer.fixed + layer.per_token * (kept if layer.window is None else min(kept, layer.window))
    return total


def measure(model: Any, kv_bits: int | None = None) -> list[LayerCache]:
    """What the caches of ``model`` take, seen on those of a forward of one token; ``kv_bits`` as in ``new_caches``.

    The forward is never evaluated, since an array's shape is known without its values.  Experts are left out of it.
    """
    caches = new_caches(model, kv_bits)
    # Not through the session: nothing is looked up, and this is no token of anybody's.
    forward = getattr(type(model), "_expertd_plain", type(model)).__call__
    with _without_experts(model):
        forward(model, mx.array([[0]]), cache=caches)
    return [_layer(cache) for cache in _leaves(caches)]


def check_kv_bits(model: Any, kv_bits: int | None) -> None:
    """Find out whether ``model`` computes with caches of ``kv_bits``, before anybody waits for it.

    Raises:
        KvBitsUnsupported: it does not.
    """
    if kv_bits is None:
        return
    try:
        measure(model, kv_bits)
    except KvBitsUnsupported:
        raise
    except Exception as error:  # attention sinks, heads too narrow for a group: each model says it in its own way
        reason = " ".join(str(error).split()).rstrip(".")
        raise KvBitsUnsupported(f"the model's caches cannot be quantized ({reason}); leave --kv-bits out") from error


def caches_of(model: Any, kv_bits: int | None = None) -> list[LayerCache]:
    """``measure``; a model whose caches cannot be measured is taken to need nothing, so nothing is refused.

    Raises:
        KvBitsUnsupported: see ``check_kv_bits``.
    """
    check_kv_bits(model, kv_bits)
    try:
        return measure(model, kv_bits)
    except Exception as error:  # a model's code may do anything, and it may still generate
        log.warning("what the model's caches need could not be measured (%r): no prompt is too long for it", error)
        return []


class _Shape(CachedExperts):
    """Stands in for a CachedExperts where only the shape of its output is wanted."""

    def __call__(self, x: Any, indices: Any) -> Any:
        return mx.zeros((*indices.shape, x.shape[-1]), x.dtype)


@contextlib.contextmanager
def _without_experts(model: Any) -> Iterator[None]:
    """In the block the model's cached experts are ``_Shape``; nobody may compute with it."""
    layers = [module for module in model.modules() if type(module) is CachedExperts]
    for layer in layers:
        layer.__class__ = _Shape
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = CachedExperts


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        if hasattr(cache, "caches"):
            yield from _leaves(cache.caches)
        else:
            yield cache


def _layer(cache: Any) -> LayerCache:
    keys = getattr(cache, "keys", None)
    if isinstance(keys, tuple | list):
        keys = keys[0]  # quantized; scales and biases have as many rows
    if not isinstance(keys, mx.array):
        return LayerCache(fixed=cache.nbytes)  # a state of fixed size, or a kind that says no more of itself
    window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return LayerCache(0, cache.nbytes // keys.shape[2], keys.shape[2], window)


def available_bytes(mlx: Any = mx, root: Path = Path("/")) -> int:
    """What this process can still take, in bytes: the machine's rest, or its memory cgroup's if that is less.

    MLX's own unused buffers are among it.  ``root`` is where /proc and the cgroups are (Linux; elsewhere it has none).
    """
    try:
        room = int(psutil.virtual_memory().available)
    except OSError:  # no descriptor is left to read it with: what nobody knows refuses no request
        room = sys.maxsize
    cgroup = cgroup_room(root)
    room = (room if cgroup is None else min(room, cgroup.left)) + int(mlx.get_cache_memory())
    if mlx.metal.is_available():
        recommended = int(mlx.device_info()["max_recommended_working_set_size"])
        room = min(room, recommended - int(mlx.get_active_memory()))
    return max(0, room)


class Growth(NamedTuple):
    """A request that runs: how many tokens its cache has now, and how many it may get."""

    now: int
    most: int


class CacheMemory:
    """Whether there is memory for the caches of one model's requests."""

    def __init__(self, layers: Sequence[LayerCache], available: Callable[[], int] = available_bytes) -> None:
        """``available()``: how many bytes can still be taken now."""
        self._layers = layers
        self._available = available

    @classmethod
    def of(cls, model: Any, kv_bits: int | None = None) -> CacheMemory:
        """That of ``model``.

        Raises:
            KvBitsUnsupported: see ``check_kv_bits``.
        """
        return cls(caches_of(model, kv_bits))

    def fits(self, prompt_tokens: int, max_tokens: int | None, running: Sequence[Growth], spare_bytes: int = 0) -> bool:
        """Whether a request's cache fits beside what the ``running`` ones may still grow to; if not now, it may later,
        or when the caller has given back ``spare_bytes``.

        Without ``max_tokens`` only the prompt counts, because nobody knows how long the answer gets.

        Raises:
            MemoryPressure: it does not even fit when the others have ended and those are given back.
        """
        need = cache_bytes(self._layers, prompt_tokens + (max_tokens or 0))
        available = self._available()
        most = sum(cache_bytes(self._layers, max(other)) for other in running)
        if need > available + most + spare_bytes:
            raise self._error(prompt_tokens, max_tokens, need, available + spare_bytes)
        return need + most - sum(cache_bytes(self._layers, other.now) for other in running) <= available

    def _error(self, prompt_tokens: int, max_tokens: int | None, need: int, available: int) -> MemoryPressure:
        prompt_fits = cache_bytes(self._layers, prompt_tokens) <= available
        answer = "" if max_tokens is None else f" and max_tokens is {max_tokens}"
        shorter = "send a shorter prompt" if max_tokens is None else "send a shorter prompt or a smaller max_tokens"
        return MemoryPressure(
            f"the prompt has {prompt_tokens} tokens{answer}, for which the KV cache needs {show_size(need)}, but only "
            f"{show_size(available)} of memory are available; {shorter}, close other apps, or give the experts less "
            "with: expertd budget SIZE",
            param="max_tokens" if prompt_fits else "messages",
        )
