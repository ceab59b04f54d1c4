"""Least recently used: the baseline that every other policy has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.base import Block, Statistics, array_of


class LRU:
    """Evicts the block whose last event is longest ago; a block that was admitted and never used counts from then.

    Of one event's blocks the router's first choice counts as the most recent, whether they were resident or not.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._shape = layers, experts
        self._resident: set[Block] = set()
        self._order: dict[Block, None] = {}  # the longest unused first; with blocks that were used and are absent

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        for expert in reversed(experts):
            self._order.pop((layer, expert), None)
            self._order[layer, expert] = None

    def ended(self, session: int) -> None:
        """Nothing is known of sessions."""

    def admitted(self, block: Block) -> None:
        self._resident.add(block)
        self._order.setdefault(block)

    def removed(self, block: Block) -> None:
        self._resident.discard(block)
        self._order.pop(block, None)

    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        chosen: list[Block] = []
        if count <= 0:
            return chosen
        for block in self._order:
            if block in self._resident and block[0] in layers and evictable(block):
                chosen.append(block)
                if len(chosen) == count:
                    break
        return chosen

    def chance(self, block: Block) -> float:
        """It knows an order, and no chances."""
        return 0.0

    def ranked(self) -> list[Block]:
        return [block for block in reversed(self._order) if block in self._resident]

    def lasting(self) -> list[Block]:
        return self.ranked()

    def statistics(self) -> Statistics:
        return {"order": np.array(list(self._order), np.int32).reshape(-1, 2)}

    def expect(self, chances: NDArray[np.float32]) -> bool:
        """It knows an order, and no chances."""
        return False

    def turned(self, chances: NDArray[np.float32]) -> None:
        """The same."""

    def take_over(self, statistics: Statistics) -> bool:
        order = array_of(statistics, "order", np.int32, (None, 2))
        if order is None or (order < 0).any() or (order >= self._shape).any():
            return False
        self._order = dict.fromkeys((layer, expert) for layer, expert in order.tolist())
        return True
