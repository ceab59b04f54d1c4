"""Whether a model fits into the memory that this process may take: asked before its weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mlx.utils import tree_flatten

from expertd.protocol.errors import MemoryPressure
from expertd.protocol.manifest import Layer
from expertd.protocol.sizes import show_size
from expertd.worker.kv_memory import available_bytes, cache_bytes, caches_of
from expertd.worker.manifest import LazyModel

KV_TOKENS = 4096
"""A model is of use if the cache of so many tokens fits beside it."""


def least_experts(layers: Iterable[Layer]) -> int:
    """Bytes of the experts that one token uses at once, which is what pools have at least."""
    least: dict[Any, int] = {}
    for layer in layers:
        least[layer.shape_key] = max(least.get(layer.shape_key, 0), layer.top_k * layer.block_bytes)
    return sum(least.values())


def check_room(loaded: LazyModel, pools: int, available: Callable[[], int] = available_bytes) -> None:
    """Nothing has been read yet; ``pools`` bytes are the daemon's, which gives back what it does not need.

    Raises:
        MemoryPressure: base weights, the fewest experts and one KV cache need more than there is.
    """
    layers = loaded.manifest.layers
    everything = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    base = everything - sum(layer.experts * layer.block_bytes for layer in layers)
    experts = least_experts(layers)
    cache = cache_bytes(caches_of(loaded.model), KV_TOKENS)
    room = available() + pools
    if base + experts + cache > room:
        raise MemoryPressure(
            f"{loaded.manifest.folder} does not fit: its base weights take {show_size(base)}, the experts of one token "
            f"{show_size(experts)} and the KV cache of {KV_TOKENS} tokens {show_size(cache)}, and {show_size(room)} "
            "are available; close other apps, or take a model with smaller base weights"
        )
