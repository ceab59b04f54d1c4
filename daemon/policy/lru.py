"""Least recently used: the baseline that every other policy has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertd.daemon.policy.base import Block


class LRU:
    """Evicts the block whose last event is longest ago; a block that was admitted and never used counts from then."""

    def __init__(self) -> None:
        self._resident: dict[Block, None] = {}  # insertion order is recency, oldest first

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            if (layer, expert) in self._resident:
                self.admitted((layer, expert))

    def admitted(self, block: Block) -> None:
        self._resident.pop(block, None)
        self._resident[block] = None

    def removed(self, block: Block) -> None:
        self._resident.pop(block, None)

    def victims(self, count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        chosen: list[Block] = []
        if count <= 0:
            return chosen
        for block in self._resident:
            if evictable(block):
                chosen.append(block)
                if len(chosen) == count:
                    break
        return chosen
