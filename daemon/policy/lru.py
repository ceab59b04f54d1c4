"""Least recently used: the baseline that every other policy has to beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertd.daemon.policy.base import Block


class LRU:
    """Evicts the block whose last event is longest ago; a block that was admitted and never used counts from then.

    Of one event's blocks the router's first choice counts as the most recent, whether they were resident or not.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
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
