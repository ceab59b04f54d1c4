"""The contract between the core and an eviction policy.

One policy object serves one model, in whatever pools its layers are.  The core tells it what happened and asks it for
victims; it decides nothing else: it does not know slots, leases or reads.  Budgets are not its business either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from numpy.typing import NDArray

Block = tuple[int, int]
"""A block: (layer, expert)."""

Statistics = Mapping[str, NDArray[Any]]
"""What a policy knows of a model's use, by names of its own."""


class Policy(Protocol):
    """An eviction policy.  No method may block, do I/O or look at a clock; none ever raises.

    The caller guarantees: ``admitted`` once for each block that becomes resident, ``removed`` once for each that ceases
    to be, and ``observe`` in the order in which the events of a session happened, as far as that is known.
    """

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        """One event: in ``session``, ``layer`` used ``experts`` (resident or not) together, each named once.

        They come in the router's order where that is known.  A prompt that needs more blocks than fit is computed by
        groups: several events of one layer, one after the other.
        """

    def ended(self, session: int) -> None:
        """``session`` is over."""

    def admitted(self, block: Block) -> None:
        """``block`` became resident."""

    def removed(self, block: Block) -> None:
        """``block`` is resident no more."""

    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        """Up to ``count`` blocks of ``layers`` to evict, the least worth keeping first.

        ``evictable`` may be asked about resident blocks of these layers only.

        MUST return only distinct resident blocks for which ``evictable`` is true, and MUST return ``count`` of them
        if that many exist.
        """
        ...

    def chance(self, block: Block) -> float:
        """How likely an event of the model is to use ``block``, resident; 0.0 if this policy does not estimate it.

        Where a model has several pools, memory goes to those that have to evict what is more likely.
        """
        ...

    def ranked(self) -> list[Block]:
        """All resident blocks, the most worth keeping first: ``victims`` of all layers in the opposite order."""
        ...

    def lasting(self) -> list[Block]:
        """All resident blocks, the most used in the long run first.

        So they should come back when all was gone: what they would be needed for next is not known any more then.
        """
        ...

    def statistics(self) -> Statistics:
        """What another object of this class would have to know to choose as this one: copies, of a few bytes a block.

        It is kept for a daemon that comes after this one.  What takes more room to keep than it is worth is left out.
        """
        ...

    def take_over(self, statistics: Statistics) -> bool:
        """Go on from what an earlier object knew.  Called before anything else, if at all.

        The caller guarantees nothing about ``statistics``: they may be those of another class, or damaged.  MUST leave
        everything as it was and return False if they make no sense for this model.
        """
        ...

    def expect(self, chances: NDArray[np.float32]) -> bool:
        """Begin with what a profile tells: how likely a token is to use each block, ``[layers, experts]``.

        Called before anything else, if at all; what then is observed counts more and more.  MUST leave everything as it
        was and return False if this makes no sense, or the policy has no use for it.
        """
        ...

    def turned(self, chances: NDArray[np.float32]) -> None:
        """A session has turned to a topic whose tokens are so likely to use each block, ``[layers, experts]``.

        What other sessions do counts as before.  A policy that has no use for it does nothing.
        """


PolicyFactory = Callable[[int, int, int], Policy]
"""Makes a policy for a model of so many MoE layers, experts in each, of which a token uses so many.

Where layers differ, these are the largest numbers.
"""


def usable(chances: NDArray[Any], layers: int, experts: int) -> bool:
    """Whether ``chances`` are some of a model of that shape."""
    return chances.shape == (layers, experts) and bool(((chances >= 0) & (chances <= experts)).all())


def array_of(
    statistics: Statistics, name: str, dtype: npt.DTypeLike, shape: Sequence[int | None]
) -> NDArray[Any] | None:
    """An array of ``statistics`` if it is of that type and shape (None: any length) and finite, else None."""
    found = statistics.get(name)
    if found is None or found.dtype != np.dtype(dtype) or found.ndim != len(shape):
        return None
    fits = all(wanted in (None, size) for wanted, size in zip(shape, found.shape, strict=True))
    return found if fits and bool(np.isfinite(found).all()) else None
