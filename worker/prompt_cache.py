"""What earlier requests computed, for those whose prompts begin as theirs did: mlx-lm's prompt cache, bounded in bytes.

Agents send a conversation again and again, each time a little longer.  What is kept is what a request has left behind
when it ended; a request takes a copy, so that several may grow from one.
"""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import LRUPromptCache

__all__ = ["PromptCache"]

_MODEL = "model"  # mlx-lm's cache is for many; a worker has one


class PromptCache:
    """Caches by the tokens that they hold.  ``limit_bytes`` 0: nothing is kept."""

    def __init__(self, limit_bytes: int, most: int = 256) -> None:
        self._limit_bytes = limit_bytes
        self._kept = LRUPromptCache(max_size=most, max_bytes=limit_bytes)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return int(self._kept.nbytes)

    def take(self, prompt: list[int]) -> tuple[Any, list[int]]:
        """A cache for the longest known beginning of ``prompt``, or None; and the tokens that it lacks (at least 1)."""
        cache, rest = self._kept.fetch_nearest_cache(_MODEL, prompt)
        if cache is not None and rest:
            return cache, rest
        # Of a prompt that is known as a whole the last token is computed again: nothing follows from a cache alone.
        cache, rest = self._kept.fetch_nearest_cache(_MODEL, prompt[:-1])
        return (None, prompt) if cache is None else (cache, [*rest, prompt[-1]])

    def keep(self, tokens: list[int], cache: Any) -> None:
        """Keep what a request has left behind."""
        size = sum(layer.nbytes for layer in cache)
        if tokens and 0 < size <= self._limit_bytes:
            self._kept.insert_cache(_MODEL, list(tokens), cache)

    def give_back(self, limit_bytes: int = 0) -> None:
        """Keep at most so much from what there is now, the latest used."""
        self._kept.trim_to(n_bytes=limit_bytes)
