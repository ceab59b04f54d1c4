"""KV caches in 8 or 4 bits, for those who would rather have longer conversations than exact ones.

The cache and the attention over it are mlx-lm's.  This makes them for a model, refuses the models that cannot have
them, and lets them join a batch: ``BatchQuantizedCache`` is three of mlx-lm's batches side by side, because a quantized
tensor is three arrays.  What is in the cache is quantized from its first token on, so what a prompt comes to does not
depend on the pieces in which it was computed.  (mlx-lm's own ``--kv-bits`` computes the first piece of a prompt with
what is not quantized yet.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache, QuantizedKVCache, make_prompt_cache

from expertd.protocol.errors import KvBitsUnsupported

__all__ = ["GROUP_SIZE", "BatchQuantizedCache", "QuantizedCache", "new_caches"]

GROUP_SIZE = 64
"""Numbers that share a scale, as in mlx-lm."""


class QuantizedCache(QuantizedKVCache):  # type: ignore[misc]
    """mlx-lm's, which can join a batch."""

    def size(self) -> int:
        """Tokens in it."""
        return int(self.offset)

    @property
    def nbytes(self) -> int:
        return 0 if self.keys is None else int(super().nbytes)

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> BatchQuantizedCache:
        """All of ``caches``, each with what it holds."""
        parts = [BatchKVCache.merge([_part(cache, place) for cache in caches]) for place in range(3)]
        return BatchQuantizedCache(parts, caches[0].bits)


class BatchQuantizedCache:
    """Quantized caches of requests that run side by side; the surface is that of mlx-lm's ``BatchKVCache``."""

    group_size = GROUP_SIZE

    def __init__(self, parts: list[BatchKVCache], bits: int) -> None:
        """``parts``: of the quantized keys and values, of their scales, of their biases."""
        self._parts = parts
        self.bits = bits

    def update_and_fetch(self, keys: Any, values: Any) -> tuple[Any, Any]:
        """Take in what one step computed ``[batch, heads, tokens, width]``; all that there is, quantized."""
        new = (mx.quantize(array, group_size=self.group_size, bits=self.bits) for array in (keys, values))
        found = [part.update_and_fetch(*pair) for part, pair in zip(self._parts, zip(*new, strict=True), strict=True)]
        return tuple(key for key, _ in found), tuple(value for _, value in found)

    def extract(self, place: int) -> QuantizedCache:
        """The cache of one of the requests, for itself."""
        alone = QuantizedCache(self.group_size, self.bits)
        parts = [part.extract(place) for part in self._parts]
        alone.keys, alone.values = [part.keys for part in parts], [part.values for part in parts]
        alone.offset = parts[0].offset
        return alone

    def extend(self, other: BatchQuantizedCache) -> None:
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.extend(theirs)

    def filter(self, places: Any) -> None:
        for part in self._parts:
            part.filter(places)

    def prepare(self, **lengths: Any) -> None:
        for part in self._parts:
            part.prepare(**lengths)

    def finalize(self) -> None:
        for part in self._parts:
            part.finalize()

    def trim(self, tokens: int) -> int:
        trimmed = [int(part.trim(tokens)) for part in self._parts]
        return trimmed[0]

    def is_trimmable(self) -> bool:
        return True

    def make_mask(self, *args: Any, **options: Any) -> Any:
        return self._parts[0].make_mask(*args, **options)

    def size(self) -> int:
        return int(self._parts[0].size())

    def empty(self) -> bool:
        return bool(self._parts[0].empty())

    @property
    def offset(self) -> Any:
        return self._parts[0].offset

    @property
    def state(self) -> Any:
        return [part.state for part in self._parts]

    @property
    def nbytes(self) -> int:
        return sum(int(part.nbytes) for part in self._parts)


def _part(cache: QuantizedCache, place: int) -> KVCache:
    """One of the three arrays of its keys and of its values, as if they were a cache."""
    part = KVCache()
    if cache.keys is not None:
        part.keys, part.values, part.offset = cache.keys[place], cache.values[place], cache.offset
    return part


def new_caches(model: Any, kv_bits: int | None) -> list[Any]:
    """Empty caches for one request, as mlx-lm makes them; with ``kv_bits`` those of keys and values are quantized.

    What is no cache of keys and values, as the state of linear attention, stays as it is.

    Raises:
        KvBitsUnsupported: they cannot be, by their kind (see ``kv_memory.check_kv_bits`` for other reasons).
    """
    caches: list[Any] = make_prompt_cache(model)
    if kv_bits is None:
        return caches
    other = {type(cache).__name__ for cache in caches if type(cache) not in (KVCache, ArraysCache)}
    if other or not any(type(cache) is KVCache for cache in caches):
        raise KvBitsUnsupported(
            f"the model's caches ({', '.join(sorted(other)) or 'states'}) cannot be quantized; leave --kv-bits out"
        )
    return [QuantizedCache(GROUP_SIZE, kv_bits) if type(cache) is KVCache else cache for cache in caches]
