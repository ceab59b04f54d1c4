"""What earlier requests computed, for those whose prompts begin as theirs did; bounded in bytes.

Agents send a conversation again and again, each time a little longer.  What is kept is what a request has left behind
when it ended; a request takes a copy, so that several may grow from one.  A cache whose end cannot be taken off (of a
sliding window that is full, of a state) serves only prompts that begin with all of it.

(mlx-lm's own prompt cache looks a prompt up in a tree of tokens, which takes seconds for one of 40,000.)
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from numpy.typing import NDArray

__all__ = ["PromptCache"]

MOST = 256
"""Caches that are kept."""
NEARLY = 16
"""Tokens at its end, a quarter of all at most, in which a cache may differ from a longer one that takes its place:
how a turn ends is often written in other tokens than the model has ended it with."""


@dataclass(frozen=True)
class _Kept:
    tokens: NDArray[np.int64]
    cache: Any
    size: int

    def common(self, prompt: NDArray[np.int64]) -> int:
        """With how many of its tokens ``prompt`` begins."""
        length = min(len(self.tokens), len(prompt))
        differ = np.flatnonzero(self.tokens[:length] != prompt[:length])
        return int(differ[0]) if len(differ) else length


class PromptCache:
    """Caches and the tokens that they hold, the latest used last.  ``limit_bytes`` 0: nothing is kept."""

    def __init__(self, limit_bytes: int, most: int = MOST) -> None:
        self._limit_bytes, self._most = limit_bytes, most
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        self._number = 0
        self.size = 0
        """Bytes that are kept."""

    def take(self, prompt: list[int]) -> tuple[Any, list[int]]:
        """A cache for the longest known beginning of ``prompt``, or None; and the tokens that it lacks (at least 1)."""
        wanted = np.array(prompt, np.int64)
        best, most = None, 0
        for number, kept in self._kept.items():
            # The last token is always computed: nothing follows from a cache alone.
            common = min(kept.common(wanted), len(prompt) - 1)
            if common > most and (common == len(kept.tokens) or can_trim_prompt_cache(kept.cache)):
                best, most = number, common
        if best is None:
            return None, prompt
        self._kept.move_to_end(best)
        kept = self._kept[best]
        cache = copy.deepcopy(kept.cache)
        trim_prompt_cache(cache, len(kept.tokens) - most)
        return cache, prompt[most:]

    def keep(self, tokens: list[int], cache: Any) -> None:
        """Keep what a request has left behind; what it continues need not be kept beside it."""
        size = sum(layer.nbytes for layer in cache)
        if not tokens or not 0 < size <= self._limit_bytes:
            return
        mx.eval([layer.state for layer in cache])  # until then it holds on to those of all that ran beside it
        kept = _Kept(np.array(tokens, np.int64), cache, size)
        trims = can_trim_prompt_cache(cache)
        for number, other in list(self._kept.items()):
            length = len(other.tokens)
            common, grown = other.common(kept.tokens), len(kept.tokens) > length
            nearly = length - min(NEARLY, length // 4) if trims and grown else length
            if common >= nearly and (trims or not grown):
                self._forget(number)
        self._number += 1
        self._kept[self._number] = kept
        self.size += size
        while len(self._kept) > self._most:
            self._forget(next(iter(self._kept)))
        self.give_back(self._limit_bytes)

    def give_back(self, limit_bytes: int = 0) -> None:
        """Keep at most so much from what there is now, the latest used."""
        while self.size > limit_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, number: int) -> None:
        self.size -= self._kept.pop(number).size
