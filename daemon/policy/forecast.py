"""Evict what will be used again last, by a forecast of each block's next use.

The forecast is made where something becomes known: when a layer has run, for the blocks of that layer.  It is

    log(tokens until the next use) = sum of weight x log(chance of use per token), over several estimates of that chance

- how often the block is used: over the last few tokens, the last few dozen, and always (exponentially weighted rates);
- what follows what: how often it came a token after the experts that have just run in its own layer, and after those
  that ran last in layers before it.  The counts are learned as the model runs.

These tokens, times the layers of the model, count from the layer's last event: one that has just run comes again after
all others.  The weights were fitted on recorded routing (docs/decisions.md); what is learned online needs no fitting.

An event costs a few NumPy calls on one row of each array, and each victim one or two more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, inf, log

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.base import Block, Statistics, array_of, usable
from expertd.daemon.policy.follows import NOTHING, Follows, Used
from expertd.daemon.policy.rates import Rates

WEIGHTS = (-0.18, -0.51, 0.73)
"""Of the logarithms of the rates."""
FOLLOWS_WEIGHT = 1.22
"""Of the logarithm of the chance by what follows what, with the sign turned around."""
CONSTANT = -0.41
BATCH = 4
"""An event of more than so many times the experts of one token is a prompt."""
BELIEVED = 0.75
"""Of what is known of a topic, when a session turns to it; the rest is what it did before."""
GENERATING = 8
"""The forecasts of so many sessions are mixed at most."""
NEVER = 1e18
UNBELIEVABLE = 60.0
"""The logarithm of a time that no forecast reaches."""
IDLE_SWEEPS = 64
"""A layer is idle if it has not run for so many sweeps through the model of each session."""


class _Layer:
    """One layer of E experts.

    Attributes:
        ran: the number of its last event, from which forecasts count; NEVER if that is long ago.
        forecast: ``[E]``: logarithm of the events until the next use, divided by FOLLOWS_WEIGHT, which is dearer to
            multiply with.
        absent: ``[E]``: 0 for resident blocks, -inf for others.
        due: ``[E]``: the sum of these.
        latest: the expert whose ``due`` is largest.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.ran = 0.0
        self.forecast = np.full(experts, log(layers * experts / top_k) / FOLLOWS_WEIGHT, np.float32)
        self.absent = np.full(experts, -np.inf, np.float32)
        self.due = np.full(experts, -np.inf, np.float32)
        self.latest = 0


class _Session:
    """What is known of one session.

    Attributes:
        used: what its layers used last.
        layer: the layer that ran last, ``experts`` what that used (by all its groups), ``seen`` the event's number.
        chances: of each layer, by what follows what in this session, if others were generating as well.
    """

    def __init__(self, layers: int, top_k: int) -> None:
        self.used = Used(layers, top_k)
        self.layer = -1
        self.experts: Sequence[int] = ()
        self.seen = 0
        self.chances: dict[int, NDArray[np.float32]] = {}


class Forecast:
    """See the module."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._experts, self._top_k = experts, top_k
        self._follows = Follows(layers, experts, top_k, BATCH)
        weights = tuple(weight / FOLLOWS_WEIGHT for weight in WEIGHTS)
        constant = (CONSTANT + log(layers)) / FOLLOWS_WEIGHT + log(self._follows.width)
        self._rates = Rates(layers, experts, top_k, weights, constant)
        self._layers = [_Layer(layers, experts, top_k) for _ in range(layers)]
        self._due = np.full(layers, -np.inf)  # the number of the event that will use each layer's latest block
        self._changed: set[int] = set()  # layers of which that has to be looked up again
        self._named: list[Block] = []  # victims that are not gone yet; they are not in ``due``
        self._sessions: dict[int, _Session] = {}
        self._generating: list[_Session] = []
        self._events = 0
        self._chances = np.empty(experts, np.float32)  # by what follows what, of the last event, times width

    def evidence(self, layer: int) -> NDArray[np.float32]:
        """What the forecast of ``layer``, which ran last, was made of: ``[weights + 1, E]``, logarithms, and ones."""
        chances = np.vstack((self._rates.last(layer), self._chances / self._follows.width))
        return np.vstack((np.log(chances), np.ones(self._experts, np.float32)))

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        if not experts:
            return
        self._events += 1
        source = self._sessions.get(session)
        if source is None:
            source = self._sessions[session] = _Session(len(self._layers), self._top_k)
            source.seen = self._events
            self._count_generating()
        if not self._events & 255:
            self._count_generating()
            self._find_idle_layers()
        again = source.layer == layer and len(self._layers) > 1 and not set(experts).intersection(source.experts)
        source.experts = [*source.experts, *experts] if again else experts  # groups of one event have none in common
        source.layer, source.seen = layer, self._events
        here = self._layers[layer]
        here.ran = self._events
        chosen = np.array(sorted(experts), np.intp)  # sums of floats in another order would be other sums
        if again or len(experts) > BATCH * self._top_k:
            rated = self._rates.use_many(layer, chosen, again)
            chosen = NOTHING  # which of them followed whom is not known
        else:
            rated = self._rates.use(layer, chosen)
        chances, forecast = self._chances, here.forecast
        self._follows.after(source.used, layer, chosen, self._rates.steady[layer], chances)
        if len(self._generating) > 1 or source not in self._generating:
            self._mix(source, layer, chances)
        np.log(chances, forecast)
        np.subtract(rated, forecast, forecast)
        np.add(forecast, here.absent, here.due)
        self._changed.add(layer)

    def ended(self, session: int) -> None:
        self._sessions.pop(session, None)
        self._count_generating()

    def admitted(self, block: Block) -> None:
        layer, expert = block
        here = self._layers[layer]
        here.absent[expert] = 0
        until = here.forecast.item(expert)
        if layer not in self._changed and (until, -expert) > (here.due.item(here.latest), -here.latest):
            here.latest = expert
            self._due[layer] = here.ran + exp(FOLLOWS_WEIGHT * until)
        here.due[expert] = until

    def removed(self, block: Block) -> None:
        layer, expert = block
        here = self._layers[layer]
        here.absent[expert] = here.due[expert] = -inf
        if block in self._named:
            self._named.remove(block)
        if here.latest == expert:
            self._changed.add(layer)

    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        of_layer, changed = self._layers, self._changed
        for layer, expert in self._named:  # they are still there
            here = of_layer[layer]
            here.due[expert] = here.forecast[expert]
            changed.add(layer)
        for layer in changed:
            self._look_up(layer)
        changed.clear()
        due = self._due
        if len(layers) < len(of_layer):
            due = np.full(len(of_layer), -inf)
            due[list(layers)] = self._due[list(layers)]
        named: list[Block] = []
        chosen: list[Block] = []
        while len(chosen) < count:
            layer = int(due.argmax())
            if due.item(layer) == -inf:
                break
            here = of_layer[layer]
            block = layer, here.latest
            named.append(block)
            if evictable(block):
                chosen.append(block)
            here.due[here.latest] = -inf
            due[layer] = self._look_up(layer)
        self._named = named
        return chosen

    def chance(self, block: Block) -> float:
        layer, expert = block
        here = self._layers[layer]
        until = here.ran + exp(FOLLOWS_WEIGHT * here.forecast.item(expert)) - self._events
        return 1 / max(len(self._layers), until)  # at most once a token

    def ranked(self) -> list[Block]:
        forecasts = np.array([here.forecast + here.absent for here in self._layers], np.float64)
        ran = np.array([here.ran for here in self._layers])
        due = ran[:, None] + np.exp(FOLLOWS_WEIGHT * forecasts)
        due[np.isneginf(forecasts)] = -inf
        latest_first = np.argsort(-due, axis=None, kind="stable")[: np.count_nonzero(due > -inf)]
        return [divmod(block, self._experts) for block in latest_first[::-1].tolist()]

    def lasting(self) -> list[Block]:
        used = np.array(self._rates.steady, np.float64)
        used[np.isneginf([here.absent for here in self._layers])] = -inf
        most_first = np.argsort(-used, axis=None, kind="stable")[: np.count_nonzero(used > -inf)]
        return [divmod(block, self._experts) for block in most_first.tolist()]

    def statistics(self) -> Statistics:
        """Rates, and the forecasts as they stand.  What follows what is left out: it is large, and soon learned."""
        rates, tokens = self._rates.statistics()
        ran = [here.ran if here.ran == NEVER else here.ran - self._events for here in self._layers]
        until = np.array([here.forecast for here in self._layers])
        return {"rates": rates, "tokens": tokens, "until": until, "ran": np.array(ran, np.float64)}

    def take_over(self, statistics: Statistics) -> bool:
        layers = len(self._layers)
        until = array_of(statistics, "until", np.float32, (layers, self._experts))
        ran = array_of(statistics, "ran", np.float64, (layers,))
        if until is None or ran is None or (abs(until) > UNBELIEVABLE).any() or ((ran > 0) & (ran != NEVER)).any():
            return False
        if not self._rates.take_over(statistics):
            return False
        for number, here in enumerate(self._layers):
            here.ran = ran.item(number)
            here.forecast[:] = until[number]
        return True

    def expect(self, chances: NDArray[np.float32]) -> bool:
        if not usable(chances, len(self._layers), self._experts):
            return False
        for here, rated, steady in zip(self._layers, self._rates.expect(chances), self._rates.steady, strict=True):
            here.forecast[:] = rated - np.log(steady * np.float32(self._follows.width))
        return True

    def turned(self, chances: NDArray[np.float32]) -> None:
        """The rates over a few dozen tokens begin anew; what follows what is known again when each layer has run."""
        if not usable(chances, len(self._layers), self._experts):
            return
        rated = self._rates.turned(chances, BELIEVED / max(1, len(self._generating)))
        for number, here in enumerate(self._layers):
            here.forecast[:] = rated[number] - np.log(self._rates.steady[number] * np.float32(self._follows.width))
            np.add(here.forecast, here.absent, here.due)
        self._named = []  # they are in ``due`` again
        self._changed.update(range(len(self._layers)))

    def _look_up(self, layer: int) -> float:
        """Find the latest block of ``layer``, and return when it is due, -inf if there is none."""
        here = self._layers[layer]
        here.latest = latest = int(here.due.argmax())
        until = here.due.item(latest)
        self._due[layer] = due = here.ran + exp(FOLLOWS_WEIGHT * until) if until > -inf else -inf
        return due

    def _mix(self, source: _Session, layer: int, chances: NDArray[np.float32]) -> None:
        """Whoever runs next in this layer may be another session: what is forecast for that counts as well."""
        source.chances[layer] = own = chances.copy()
        others = [other for other in self._generating if other is not source]  # it may have been silent for long
        of_each = [own, *(other.chances[layer] for other in others if layer in other.chances)]
        np.add.reduce(of_each, out=chances)
        chances /= np.float32(len(of_each))

    def _count_generating(self) -> None:
        """A session is generating if it ran in what is about the last two tokens of each."""
        recent = self._events - 2 * len(self._layers) * len(self._sessions)
        generating = [session for session in self._sessions.values() if session.seen >= recent]
        self._generating = sorted(generating, key=lambda session: session.seen)[-GENERATING:]

    def _find_idle_layers(self) -> None:
        """Blocks of a layer that does not run any more are due at no time, whatever was forecast when it did."""
        recent = self._events - IDLE_SWEEPS * len(self._layers) * max(1, len(self._sessions))
        for number, here in enumerate(self._layers):
            if here.ran < recent:
                here.ran = NEVER
                self._changed.add(number)
