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
from math import exp, inf

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.base import Block

HALF_LIVES = (3.0, 23.0)
"""Of the use rates, in tokens; one more rate has a growing half-life, up to that of STEADY tokens."""
STEADY = 2000
NEIGHBOURS = (0, -1, -2, -4, -8)
"""Which layers' last experts tell what a layer will use, counted from it (0: its own).

The first of them only, where a token uses many experts (LOOKED_AT) or there are very many (COUNTS).
"""
LOOKED_AT = 24
"""So many experts are looked at in an event: what followed each of them has to be gathered."""
COUNTS = 32_000_000
"""So many counts of what follows what, a byte each, unless those of the layers' own experts are more."""
NEVER = 1e18
IDLE_SWEEPS = 64
"""A layer is idle if it has not run for so many sweeps through the model of each session."""
SMOOTHING = 8.0
"""What follows an expert is believed as much as the steady rates when it was seen so many times."""
MOST = 255
"""The counts of what followed one expert are halved when one of them is so large."""
FLOOR = 0.01
"""Added to chances, so that what never happened can happen."""
WEIGHTS = (-0.18, -0.51, 0.73, -1.22)
"""Of the logarithms of the three rates, and of the chance by what follows what."""
CONSTANT = -0.41

RATES = len(HALF_LIVES) + 1
HOT, ONES = RATES, RATES + 1


class _Layer:
    """One layer's part of what is known: E experts, N neighbours, K experts an event.

    Attributes:
        state: ``[RATES + 2, E]``: the rates, the experts of the event that is taken in (0 or 1), ones.  So one small
            product ages the rates and takes the event in.
        follows: ``[N * (E + 1), E]``: in row ``n * (E + 1) + i``, how often the layer used each expert a token after
            its nth neighbour had used i.  (i = E stands for: not known what it had used.)
        trust: ``[N * (E + 1)]``: 1 / (how often that neighbour had + SMOOTHING).
        chances: ``[E]``: by what follows what, times N * K, mixed over the sessions that are generating.
        ran: the number of its last event, from which forecasts count; NEVER if that is long ago.
        forecast: ``[E]``: logarithm of the events until the next use.
        absent: ``[E]``: 0 for resident blocks, -inf for others.
        due: ``[E]``: the sum of these.
        latest: the expert whose ``due`` is largest.
    """

    def __init__(
        self,
        number: int,
        layers: int,
        experts: int,
        top_k: int,
        neighbours: Sequence[int],
        follows: NDArray[np.uint8],
        trust: NDArray[np.float32],
    ) -> None:
        self.follows, self.trust = follows, trust
        self.tokens = 0
        self.ran = 0.0
        self.neighbours = np.array([(number + n) % layers for n in neighbours])
        self.state = np.zeros((RATES + 2, experts), np.float32)
        self.state[:HOT] = FLOOR
        self.state[HOT - 1] += top_k / experts
        self.state[ONES] = 1
        self.rates, self.steady, self.hot = self.state[:HOT], self.state[HOT - 1], self.state[HOT]
        self.chances = np.full(experts, len(neighbours) * top_k * top_k / experts, np.float32)
        self.forecast = np.full(experts, np.log(layers * experts / top_k), np.float32)
        self.absent = np.full(experts, -np.inf, np.float32)
        self.due = np.full(experts, -np.inf, np.float32)
        self.latest = 0


class _Session:
    """What the layers used last in one session, and which rows of ``follows`` that pointed to."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.used = np.full((layers, top_k), experts, np.intp)
        self.pointed: list[NDArray[np.intp] | None] = [None] * layers
        self.layer = -1
        self.experts: Sequence[int] = ()
        self.seen = 0


class Forecast:
    """See the module."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._experts, self._top_k = experts, top_k
        looked_at = min(LOOKED_AT // top_k, COUNTS // (layers * experts * (experts + 1)))
        neighbours = NEIGHBOURS[: max(1, looked_at)]
        contexts = len(neighbours) * (experts + 1)
        self._follows = np.zeros((layers, contexts, experts), np.uint8)
        self._seen = np.zeros((layers, contexts), np.float32)
        self._trust = np.full((layers, contexts), 1 / SMOOTHING, np.float32)
        self._layers = [
            _Layer(number, layers, experts, top_k, neighbours, self._follows[number], self._trust[number])
            for number in range(layers)
        ]
        self._due = np.full(layers, -np.inf)  # the number of the event that will use each layer's latest block
        self._changed: set[int] = set()  # layers of which that has to be looked up again
        self._named: list[Block] = []  # victims that are not gone yet; they are not in ``due``
        self._sessions: dict[int, _Session] = {}
        self._generating = 1
        self._events = 0
        self._lessons: list[tuple[int, NDArray[np.intp], NDArray[np.intp]]] = []

        self._ageing = list(_ageing())
        width = len(neighbours) * top_k
        self._weights = np.array([*WEIGHTS, CONSTANT + np.log(layers) - WEIGHTS[-1] * np.log(width)], np.float32)
        # Work space; ``_logs`` holds what the weights are for, and ones.
        self._logs = np.ones((len(WEIGHTS) + 1, experts), np.float32)
        self._new_rates, self._new_chances = self._logs[:RATES], self._logs[RATES]
        self._known = self._logs[:-1]
        self._first = np.repeat(np.arange(len(neighbours))[:, None] * (experts + 1), top_k, axis=1)
        self._gathered = np.empty((width, experts), np.uint8)
        # Chances times ``width`` are one product: of trust in what follows each expert, trust in the steady rates for
        # the rest, and FLOOR; with the counts, the steady rates, and ones.
        self._width = width
        self._rows = np.ones((width + 2, experts), np.float32)
        self._counts, self._steady = self._rows[:width], self._rows[width]
        self._trust_in = np.full(width + 2, width * FLOOR, np.float32)
        self._trust_in_counts = self._trust_in[:width]
        self._smoothing = np.full(width, SMOOTHING, np.float32)

    @property
    def evidence(self) -> NDArray[np.float32]:
        """What the last forecast was made of, ``[weights + 1, E]``: logarithms of chances per token, and ones."""
        logs = self._logs.copy()
        logs[RATES] -= np.log(self._width)
        return logs

    @property
    def size(self) -> int:
        """Bytes of all arrays."""
        own = [*vars(self).values(), *(array for layer in self._layers for array in vars(layer).values())]
        arrays = {id(base): base for base in own if isinstance(base, np.ndarray) and base.base is None}
        return sum(array.nbytes for array in arrays.values())

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        if not experts:
            return
        source = self._sessions.get(session)
        if source is None:
            source = self._sessions[session] = _Session(len(self._layers), self._experts, self._top_k)
            self._count_generating()
        self._events += 1
        if not self._events & 255:
            self._count_generating()
            self._find_idle_layers()
        again = source.layer == layer and len(self._layers) > 1 and not set(experts).intersection(source.experts)
        source.experts = [*source.experts, *experts] if again else experts  # groups of one event have none in common
        source.layer, source.seen = layer, self._events
        here = self._layers[layer]
        here.ran = self._events
        chosen = np.array(sorted(experts), np.intp)  # sums of floats in another order would be other sums
        self._age(here, chosen, again)
        if len(experts) == self._top_k and not again:
            self._follow(source, layer, here, chosen)
        else:
            # A prompt, or a batch: which of them followed whom is not known.
            source.used[layer] = self._experts
            source.pointed[layer] = None
            self._new_chances[:] = here.steady * self._width
        np.log(self._known, self._known)
        self._weights.dot(self._logs, here.forecast)
        np.add(here.forecast, here.absent, here.due)
        self._changed.add(layer)

    def ended(self, session: int) -> None:
        self._sessions.pop(session, None)
        self._count_generating()

    def admitted(self, block: Block) -> None:
        layer, expert = block
        here = self._layers[layer]
        here.absent[expert] = 0
        here.due[expert] = until = here.forecast.item(expert)
        if until >= here.due.item(here.latest):
            self._changed.add(layer)

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

    def _look_up(self, layer: int) -> float:
        """Find the latest block of ``layer``, and return when it is due, -inf if there is none."""
        here = self._layers[layer]
        here.latest = latest = int(here.due.argmax())
        until = here.due.item(latest)
        self._due[layer] = due = here.ran + exp(until) if until > -inf else -inf
        return due

    def _count_generating(self) -> None:
        """A session is generating if it ran in what is about the last two tokens of each."""
        recent = self._events - 2 * len(self._layers) * len(self._sessions)
        self._generating = max(1, sum(session.seen >= recent for session in self._sessions.values()))

    def _find_idle_layers(self) -> None:
        """Blocks of a layer that does not run any more are due at no time, whatever was forecast when it did."""
        recent = self._events - IDLE_SWEEPS * len(self._layers) * max(1, len(self._sessions))
        for number, here in enumerate(self._layers):
            if here.ran < recent:
                here.ran = NEVER
                self._changed.add(number)

    def _age(self, here: _Layer, chosen: NDArray[np.intp], again: bool) -> None:
        """Take one event into the rates of a layer; they are in ``_new_rates`` then, too."""
        here.hot[chosen] = 1
        ageing = self._ageing[min(here.tokens, STEADY - 1)]
        if len(chosen) > self._top_k:
            # Many tokens at once say of each block little more than one token does: they must not wash out the others.
            ageing = ageing.copy()
            ageing[:, HOT] *= self._top_k / len(chosen)
        if again:
            here.rates += ageing[:, HOT:ONES] * here.hot
            self._new_rates[:] = here.rates
        else:
            here.tokens += 1
            ageing.dot(here.state, self._new_rates)
            here.rates[:] = self._new_rates
        here.hot[chosen] = 0

    def _follow(self, session: _Session, layer: int, here: _Layer, chosen: NDArray[np.intp]) -> None:
        """Put the chances by what follows what into ``_new_chances``, and learn from what has followed."""
        if (pointed := session.pointed[layer]) is not None:
            self._lessons.append((layer, pointed, chosen))
            if len(self._lessons) >= len(self._layers):
                self._learn()
        session.used[layer] = chosen
        pointers = session.used.take(here.neighbours, 0)
        pointers += self._first
        session.pointed[layer] = pointers = pointers.ravel()
        here.follows.take(pointers, 0, self._gathered, "clip")  # by place: names cost as much as the work
        self._counts[:] = self._gathered
        self._steady[:] = here.steady
        here.trust.take(pointers, 0, self._trust_in_counts, "clip")
        self._trust_in[-2] = self._trust_in_counts.dot(self._smoothing)
        chances = self._new_chances
        self._trust_in.dot(self._rows, chances)
        if self._generating > 1:
            # Whoever runs next in this layer may be another session: what was forecast for that counts as well.
            here.chances += (chances - here.chances) / np.float32(self._generating)
            chances[:] = here.chances

    def _learn(self) -> None:
        """Count what has followed, for many events at once."""
        lessons, self._lessons = self._lessons, []
        layers, pointers, chosen = (np.array(each) for each in zip(*lessons, strict=True))
        rows = layers[:, None] * self._seen.shape[1] + pointers
        places = (rows[:, :, None] * self._experts + chosen[:, None, :]).ravel()
        rows = rows.ravel()
        counts, seen = self._follows.reshape(-1), self._seen.reshape(-1)
        counted = counts.take(places) + np.uint8(1)
        counts[places] = counted
        seen[rows] += 1
        if counted.max() == MOST:
            full = np.unique(places[counted == MOST] // self._experts)
            self._follows.reshape(-1, self._experts)[full] >>= 1
            seen[full] /= 2
            rows = np.concatenate((rows, full))
        self._trust.reshape(-1)[rows] = 1 / (seen.take(rows) + SMOOTHING)


def _ageing() -> NDArray[np.float32]:
    """Of each number of tokens before, the matrix ``[RATES, RATES + 2]`` that takes an event into a layer's rates."""
    share = np.empty((STEADY, RATES))  # of a rate that is this event's
    share[:, :-1] = 1 - 2 ** (-1 / np.array(HALF_LIVES))
    share[:, -1] = 1 / (np.arange(STEADY) + 4)
    rate = np.arange(RATES)
    out = np.zeros((STEADY, RATES, RATES + 2), np.float32)
    out[:, rate, rate] = 1 - share
    out[:, :, HOT] = share
    out[:, :, ONES] = share * FLOOR
    return out
