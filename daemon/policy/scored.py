"""Simple policies that give each block a score: what was proposed elsewhere, to be compared with.

They work out the scores of all blocks whenever they are asked, which is good enough for a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.base import Block, Statistics, array_of

Floats = NDArray[np.floating[Any]]


UNBELIEVABLE = 1e12
"""More than any count of uses or tokens."""


class Scored:
    """Evicts the block with the largest score; of equal ones that of the lowest layer and expert."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._resident = np.zeros((layers, experts), bool)
        self._layer = 0

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        self._layer = layer
        self.use(layer, list(experts))

    def ended(self, session: int) -> None:
        """Nothing is known of sessions."""

    def admitted(self, block: Block) -> None:
        self._resident[block] = True

    def removed(self, block: Block) -> None:
        self._resident[block] = False

    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        scores = np.where(self._resident, self.scores(), -np.inf)
        if len(layers) < len(scores):
            others = np.ones(len(scores), bool)
            others[list(layers)] = False
            scores[others] = -np.inf
        chosen: list[Block] = []
        flat = scores.ravel()
        while len(chosen) < count:
            worst = int(flat.argmax())
            if flat[worst] == -np.inf:
                break
            flat[worst] = -np.inf
            block = divmod(worst, scores.shape[1])
            if evictable(block):
                chosen.append(block)
        return chosen

    def chance(self, block: Block) -> float:
        """It knows an order, and no chances."""
        return 0.0

    def ranked(self) -> list[Block]:
        worst_first = np.argsort(np.where(self._resident, -self.scores(), np.inf), axis=None, kind="stable")
        resident = worst_first[: np.count_nonzero(self._resident)][::-1]
        return [divmod(block, self._resident.shape[1]) for block in resident.tolist()]

    def lasting(self) -> list[Block]:
        return self.ranked()

    def statistics(self) -> Statistics:
        return {name: value.copy() for name, value in self._known.items()}

    def take_over(self, statistics: Statistics) -> bool:
        found = {name: array_of(statistics, name, own.dtype, own.shape) for name, own in self._known.items()}
        if any(value is None or ((value < 0) | (value > UNBELIEVABLE)).any() for value in found.values()):
            return False
        for name, value in found.items():
            self._known[name][:] = value
        return True

    def expect(self, chances: NDArray[np.float32]) -> bool:
        """What was proposed elsewhere begins with nothing."""
        return False

    def turned(self, chances: NDArray[np.float32]) -> None:
        """It does not know of topics."""

    @property
    def _known(self) -> dict[str, NDArray[Any]]:
        """The arrays that its scores are made of."""
        raise NotImplementedError

    def use(self, layer: int, experts: list[int]) -> None:
        """One event."""
        raise NotImplementedError

    def scores(self) -> Floats:
        """How little each block is worth now, ``[layers, experts]``, all finite."""
        raise NotImplementedError


class LFU(Scored):
    """Least frequently used, since the beginning."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        super().__init__(layers, experts, top_k)
        self._uses = np.zeros((layers, experts))

    def use(self, layer: int, experts: list[int]) -> None:
        self._uses[layer, experts] += 1

    def scores(self) -> Floats:
        return -self._uses

    @property
    def _known(self) -> dict[str, NDArray[Any]]:
        return {"uses": self._uses}


class LCP(LFU):
    """Least ``frequency * 0.25^(age / 128)``, age in tokens: the least critical priority of mlx-based peers."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        super().__init__(layers, experts, top_k)
        self._tokens = np.zeros((layers, 1))
        self._last = np.zeros((layers, experts))

    def use(self, layer: int, experts: list[int]) -> None:
        super().use(layer, experts)
        self._tokens[layer] += 1
        self._last[layer, experts] = self._tokens[layer]

    def scores(self) -> Floats:
        return np.asarray(-self._uses * 0.25 ** ((self._tokens - self._last) / 128))

    @property
    def _known(self) -> dict[str, NDArray[Any]]:
        return {**super()._known, "tokens": self._tokens, "last": self._last}

    def take_over(self, statistics: Statistics) -> bool:
        tokens, last = (statistics.get(name) for name in ("tokens", "last"))
        shapes = [None if array is None else array.shape for array in (tokens, last)]
        if tokens is None or last is None or shapes != [self._tokens.shape, self._last.shape]:
            return False
        # What was used in the future would have a weight beyond all bounds.
        return not (last > tokens).any() and super().take_over(statistics)


class EWMA(Scored):
    """Longest ``1 / p`` tokens, plus how far off the block's layer is in the cycle; ``p`` is a use rate per token.

    The rates of all layers age together: a token begins when a layer has run more often than any did before.
    """

    ALPHA = 0.05

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        super().__init__(layers, experts, top_k)
        self._rates = np.zeros((layers, experts))
        self._tokens = [0] * layers
        self._token = 0
        number = np.arange(layers)
        self._phase = (number[None, :] - number[:, None] - 1) % layers / layers  # [layer now, layer of the block]

    def use(self, layer: int, experts: list[int]) -> None:
        self._tokens[layer] += 1
        if self._tokens[layer] > self._token:
            self._token += 1
            self._rates *= 1 - self.ALPHA
        self._rates[layer, experts] += self.ALPHA

    def scores(self) -> Floats:
        return np.asarray(1 / (self._rates + 1e-4) + self._phase[self._layer][:, None])

    @property
    def _known(self) -> dict[str, NDArray[Any]]:
        return {"rates": self._rates}
