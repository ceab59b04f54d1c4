"""What earlier requests computed, for those whose prompts begin as theirs did; bounded in bytes.

Agents send a conversation again and again, each time a little longer.  What is kept is what a request has left behind
when it ended; a request takes a copy, so that several may grow from one.  A cache whose end cannot be taken off (of a
sliding window that is full, of a state) serves only prompts that begin with all of it.

What goes first is worth least for its bytes and has not been asked for lately (GDSF; Cherkasova, HPL-98-69R1): many
small questions that nobody goes on with drive out each other, and not somebody's long conversation.

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

MOST = 512
"""Caches that are kept: each counts as at least so small a part of the limit, because each is looked at."""
MOST_USES = 4
"""Uses that make a cache dearer; more would keep it for long after the last one."""
NEARLY = 16
"""Tokens at its end, a quarter of all at most, in which a cache may differ from a longer one that takes its place:
how a turn ends is often written in other tokens than the model has ended it with."""


@dataclass
class _Kept:
    tokens: NDArray[np.int64]
    cache: Any
    size: int  # in bytes
    counted: int  # as how many bytes it counts
    uses: int = 1
    rank: float = 0.0  # who has the lowest goes first

    @property
    def worth(self) -> float:
        """Tokens that it has saved, or may save, for each byte."""
        return min(self.uses, MOST_USES) * len(self.tokens) / self.counted

    @property
    def trims(self) -> bool:
        """Whether its end can be taken off."""
        return bool(can_trim_prompt_cache(self.cache))

    def common(self, prompt: NDArray[np.int64]) -> int:
        """With how many of its tokens ``prompt`` begins."""
        length = min(len(self.tokens), len(prompt))
        differ = np.flatnonzero(self.tokens[:length] != prompt[:length])
        return int(differ[0]) if len(differ) else length

    def continues(self, other: _Kept) -> bool:
        """Whether it is ``other``, or what became of it."""
        length = len(other.tokens)
        return len(self.tokens) >= length and other.common(self.tokens) >= length - min(NEARLY, length // 4)


class PromptCache:
    """Caches and the tokens that they hold.  ``limit_bytes`` 0: nothing is kept."""

    def __init__(self, limit_bytes: int, most: int = MOST) -> None:
        self._limit_bytes, self._least = limit_bytes, limit_bytes // most
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # the latest used last
        self._number = 0
        self._counted = 0
        self._clock = 0.0  # The rank of what went last: what is used now is ahead of all that was worth no more.
        self.size = 0
        """Bytes that are kept."""

    def take(self, prompt: list[int]) -> tuple[Any, list[int]]:
        """A cache for the longest known beginning of ``prompt``, or None; and the tokens that it lacks (at least 1)."""
        wanted = np.array(prompt, np.int64)
        best, most = None, 0
        for number, kept in self._kept.items():
            # The last token is always computed: nothing follows from a cache alone.
            common = min(kept.common(wanted), len(prompt) - 1)
            if common > most and (common == len(kept.tokens) or kept.trims):
                best, most = number, common
        if best is None:
            return None, prompt
        self._kept.move_to_end(best)
        kept = self._kept[best]
        kept.uses += 1
        kept.rank = self._clock + kept.worth
        cache = copy.deepcopy(kept.cache)
        trim_prompt_cache(cache, len(kept.tokens) - most)
        return cache, prompt[most:]

    def keep(self, tokens: list[int], cache: Any) -> None:
        """Keep what a request has left behind; what it continues need not be kept beside it if its end comes off."""
        size = sum(layer.nbytes for layer in cache)
        if not tokens or not 0 < size <= self._limit_bytes:
            return
        mx.eval([layer.state for layer in cache])  # until then it holds on to those of all that ran beside it
        kept = _Kept(np.array(tokens, np.int64), cache, size, max(size, self._least))
        for number, other in list(self._kept.items()):
            if kept.continues(other):
                kept.uses = max(kept.uses, other.uses)
                if kept.trims or np.array_equal(kept.tokens, other.tokens):
                    self._forget(number)
        while self._counted + kept.counted > self._limit_bytes:
            self.give_back_least()
        kept.rank = self._clock + kept.worth
        self._number += 1
        self._kept[self._number] = kept
        self._counted += kept.counted
        self.size += size

    def give_back_least(self) -> None:
        """Give back the cache that is worth least; there has to be one."""
        number = min(self._kept, key=lambda number: self._kept[number].rank)
        self._clock = self._kept[number].rank
        self._forget(number)

    def give_back(self) -> None:
        """Give back all."""
        self._kept.clear()
        self._counted = self.size = 0

    def _forget(self, number: int) -> None:
        kept = self._kept.pop(number)
        self._counted -= kept.counted
        self.size -= kept.size
