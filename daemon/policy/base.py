"""The contract between the core and an eviction policy.

One policy object serves one pool.  The core tells it what happened and asks it for victims; it decides nothing else: it
does not know slots, leases, sessions or reads.  Budgets and quotas between pools are not its business either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

Block = tuple[int, int]
"""A block: (layer, expert)."""


class Policy(Protocol):
    """An eviction policy.  No method may block, do I/O or look at a clock; none ever raises.

    The caller guarantees: ``admitted`` once for each block that becomes resident, ``removed`` once for each that ceases
    to be, and ``observe`` in the order in which events happened as far as that is known.
    """

    def observe(self, layer: int, experts: Sequence[int]) -> None:
        """One event: ``layer`` used ``experts`` (resident or not) together."""

    def admitted(self, block: Block) -> None:
        """``block`` became resident."""

    def removed(self, block: Block) -> None:
        """``block`` is resident no more."""

    def victims(self, count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        """Up to ``count`` blocks to evict, the least worth keeping first.

        ``evictable`` may be asked about resident blocks only.

        MUST return only distinct resident blocks for which ``evictable`` is true, and MUST return ``count`` of them
        if that many exist.
        """
        ...


PolicyFactory = Callable[[], Policy]
