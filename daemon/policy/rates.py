"""How often each block is used: exponentially weighted rates, and the part of a forecast that they make.

An event should cost little, so most of the work is done for many layers at once: what the next event of a layer will
mean is worked out before it happens, for experts that it uses and for those that it does not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.base import Statistics, array_of

HALF_LIVES = (3.0, 23.0)
"""Of the rates, in tokens; one more rate has a growing half-life, up to that of STEADY tokens."""
STEADY = 2000
PROFILE = 16
"""What a profile tells counts as so many tokens; the figure matters little (docs/decisions.md)."""
TOPIC = 1
"""Which rate begins anew when a session turns to another topic."""
FLOOR = 0.02
"""Added to rates, so that what never happened can happen."""

Layers = NDArray[np.intp] | slice


class Rates:
    """R rates of a model with L layers and E experts in each.

    Attributes:
        steady: of each layer, ``[E]``: the rate with the longest half-life, in uses per token, and FLOOR.
    """

    def __init__(self, layers: int, experts: int, top_k: int, weights: Sequence[float], constant: float) -> None:
        self._top_k = top_k
        self._weights, self._constant = np.array(weights, np.float32), np.float32(constant)
        self._shares = _shares()
        self._tokens = np.zeros(layers, np.intp)
        self._share = self._shares[:, self._tokens]  # of the next event of each layer
        # As they will be after the next event of the layer, for experts that it does not use.
        self._values = np.full((len(weights), layers, experts), FLOOR, np.float32)
        self._values[-1] += top_k / experts
        self.steady = list(self._values[-1])
        # Weighted, after the next event: for experts that it does not use, and for those that it does.
        self._unused = np.empty((layers, experts), np.float32)
        self._used = np.empty((layers, experts), np.float32)
        self._unused_of, self._used_of = list(self._unused), list(self._used)
        self._pending: dict[int, NDArray[np.intp]] = {}
        self._look_ahead(slice(None))

    def use(self, layer: int, experts: NDArray[np.intp]) -> NDArray[np.float32]:
        """``layer`` used ``experts``: constant + the sum of weight x log(rate), ``[E]``, after that.

        It is valid until the next call.
        """
        if layer in self._pending:
            self.settle()
        self._pending[layer] = experts
        rated = self._unused_of[layer]
        rated[experts] = self._used_of[layer].take(experts)
        return rated

    def use_many(self, layer: int, experts: NDArray[np.intp], again: bool) -> NDArray[np.float32]:
        """The same for a prompt, or for one more group of it.

        Many tokens at once say of each block little more than one token does: they must not wash out the others.
        """
        self.settle()
        weight = self._top_k / max(self._top_k, len(experts))
        self._add(np.full(len(experts), layer), experts, weight)
        rated = self._weighted(self._values[:, layer])
        if not again:
            self._age(np.array([layer]))
        self._look_ahead(np.array([layer]))
        return rated

    def settle(self) -> None:
        """Take in what is pending."""
        if not self._pending:
            return
        numbers, chosen = np.array(list(self._pending)), list(self._pending.values())
        self._pending.clear()
        self._add(numbers.repeat([len(experts) for experts in chosen]), np.concatenate(chosen), 1.0)
        layers = slice(None) if len(numbers) == len(self._tokens) else numbers
        self._age(layers)
        self._look_ahead(layers)

    def last(self, layer: int) -> NDArray[np.float32]:
        """The rates after the last event of ``layer``, ``[R, E]`` (if that was a prompt, a token later)."""
        rates = self._values[:, layer].copy()
        if layer in self._pending:
            rates[:, self._pending[layer]] += self._share[:, layer, None]
        return rates

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
        """The rates ``[R, L, E]``, and of how many tokens of each layer they are."""
        self.settle()
        return self._values.copy(), self._tokens.copy()

    def expect(self, chances: NDArray[np.float32]) -> NDArray[np.float32]:
        """Begin as after PROFILE tokens that used blocks with these ``chances``, ``[L, E]``; returns what ``use`` does.

        Of all layers: ``[L, E]``.
        """
        self._values[:] = chances + np.float32(FLOOR)
        self._tokens[:] = PROFILE
        self._share[:] = self._shares.take(self._tokens, 1, mode="clip")
        self._look_ahead(slice(None))
        return self._weighted(self._values)

    def turned(self, chances: NDArray[np.float32], share: float) -> NDArray[np.float32]:
        """So large a ``share`` of what runs uses blocks with these ``chances`` from now on, ``[L, E]``.

        One rate begins anew with that: the shortest knows it at once, and the longest has to go on for other topics.
        Returns what ``use`` does, of all layers: ``[L, E]``.
        """
        self.settle()
        rates = self._values[TOPIC]
        rates += np.float32(share) * (chances + np.float32(FLOOR) - rates)
        self._look_ahead(slice(None))
        return self._weighted(self._values)

    def take_over(self, statistics: Statistics) -> bool:
        """Go on from such ``rates`` and ``tokens``; False, and nothing is done, if they are none of this model."""
        rates = array_of(statistics, "rates", np.float32, self._values.shape)
        tokens = array_of(statistics, "tokens", np.intp, self._tokens.shape)
        if rates is None or tokens is None or (rates <= 0).any() or (tokens < 0).any():
            return False
        self._values[:] = rates
        self._tokens[:] = tokens
        self._share[:] = self._shares.take(self._tokens, 1, mode="clip")
        self._look_ahead(slice(None))
        return True

    def _add(self, layers: NDArray[np.intp], experts: NDArray[np.intp], weight: float) -> None:
        """An event of each of some layers: ``layers[i]`` used ``experts[i]``."""
        rates, _, width = self._values.shape
        self._values.reshape(rates, -1)[:, layers * width + experts] += self._share[:, layers] * np.float32(weight)

    def _age(self, layers: Layers) -> None:
        """Turn the rates after an event of ``layers`` into those after the next, for experts that it does not use."""
        self._tokens[layers] += 1
        self._share[:, layers] = share = self._shares.take(self._tokens[layers], 1, mode="clip")
        self._values[:, layers] += share[:, :, None] * (FLOOR - self._values[:, layers])

    def _look_ahead(self, layers: Layers) -> None:
        """Work out what the next event of ``layers`` will mean."""
        rates = self._values[:, layers]
        self._unused[layers] = self._weighted(rates)
        self._used[layers] = self._weighted(rates + self._share[:, layers, None])

    def _weighted(self, rates: NDArray[np.float32]) -> NDArray[np.float32]:
        weighted: NDArray[np.float32] = self._weights.dot(np.log(rates).reshape(len(rates), -1))
        weighted += self._constant
        return weighted.reshape(rates.shape[1:])


def _shares() -> NDArray[np.float32]:
    """Of each number of tokens before an event, the event's share in each rate: ``[rates, STEADY]``."""
    shares = np.empty((len(HALF_LIVES) + 1, STEADY), np.float32)
    shares[:-1] = 1 - 2 ** (-1 / np.array(HALF_LIVES))[:, None]
    shares[-1] = 1 / (np.arange(STEADY) + 4)
    return shares
