"""Evict what will be used again last, by a forecast of each block's next use.

The forecast is made where something becomes known: when a layer has run, for the blocks of that layer.  It is

    log(tokens until the next use) = sum of weight x log(chance of use per token), over several estimates of that chance

- how often the block is used: over the last few tokens, the last few dozen, and always (exponentially weighted rates);
- what follows what: how often it came a token after the experts that have just run in its own layer, in the layers
  before it, and in the one after it a token ago.  The counts are learned as the model runs.

To these tokens, times the layers of the model, the place of the block's layer in the cycle is added: a layer that has
just run comes again after all others.  The weights were fitted on recorded routing (``benchmarks policy --fit``,
docs/decisions.md); what is learned online needs no fitting.

An event costs a few NumPy calls on one row of each array, and each victim one or two more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.base import Block

Floats = NDArray[np.float32]

HALF_LIVES = (3.0, 23.0)
"""Of the use rates, in tokens; one more rate has a growing half-life, up to STEADY tokens."""
STEADY = 4000
NEIGHBOURS = (0, -1, 1, -4)
"""Which layers' last experts tell what a layer will use, counted from it (0: its own)."""
SMOOTHING = 8.0
"""What follows an expert is believed as much as its steady rate when it was seen so many times."""
COUNT = np.uint8
MOST = 255
"""The counts of what followed one expert are halved when one of them is so large."""
FLOOR = 1e-3
"""Added to chances, so that what never happened can happen."""
WEIGHTS = (-0.13, -0.41, 0.54, -0.30, -0.22, -0.20, -0.20)
"""Of the logarithms of the three rates, and of the chances by each of the neighbours."""
CONSTANT = -0.10


class _Session:
    """What one session's layers used last, and which counts that pointed to when they ran before."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.used = np.full((layers, top_k), experts, np.intp)  # ``experts`` stands for an unknown one
        self.pointed: list[NDArray[np.intp] | None] = [None] * layers
        self.layer = -1
        self.seen = 0


class Forecast:
    """Array axes: layer L, expert E, the top_k experts of an event K, neighbours N."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self._layers, self._experts, self._top_k = layers, experts, top_k
        self._events = 0
        self._sessions: dict[int, _Session] = {}
        self._active = 1  # sessions that are generating

        # Rates.  A row of ``_rates`` is (3 rates, the event's experts as 0/1, ones) x E, so that one small product
        # ages the rates and takes the event in.
        self._clock = [0] * layers
        self._mixes = _mixes()
        self._rates = np.zeros((layers, 5, experts), np.float32)
        self._rates[:, :2] = FLOOR
        self._rates[:, 2] = top_k / experts
        self._rates[:, 4] = 1

        # What follows what: ``_follows[layer, n * (E + 1) + i, e]`` counts how often ``layer`` used e a token after
        # its nth neighbour had used i; ``_seen`` how often that had; ``_trust`` is 1 / (seen + SMOOTHING).
        contexts = len(NEIGHBOURS) * (experts + 1)
        self._neighbours = [[(layer + n) % layers for n in NEIGHBOURS] for layer in range(layers)]
        self._first = np.arange(len(NEIGHBOURS))[:, None] * (experts + 1)
        self._follows = np.zeros((layers, contexts, experts), COUNT)
        self._seen = np.zeros((layers, contexts), np.float32)
        self._trust = np.full((layers, contexts), 1 / SMOOTHING, np.float32)
        self._chances = np.full((layers, len(NEIGHBOURS), experts), top_k / experts, np.float32)
        self._lessons: list[tuple[int, NDArray[np.intp], NDArray[np.intp]]] = []

        # Events until the next use, counted from the end of the layer's cycle; of resident blocks in ``_due`` too,
        # of which ``_last`` knows each layer's latest.
        self._forecast = np.full((layers, experts), layers * experts / top_k, np.float32)
        self._due = np.full((layers, experts), -np.inf, np.float32)
        self._resident = np.zeros((layers, experts), bool)
        self._last_due = np.full(layers, -np.inf, np.float32)
        self._last = [0] * layers
        self._changed: set[int] = set()
        number = np.arange(layers)
        self._phase = ((number[None, :] - number[:, None] - 1) % layers + 1 - layers).astype(np.float32)
        self._layer = 0

        self._weights = np.array([*WEIGHTS, CONSTANT + np.log(layers)], np.float32)
        width = len(NEIGHBOURS) * top_k
        self._logs = np.ones((len(WEIGHTS) + 1, experts), np.float32)
        self._own = np.kron(np.eye(len(NEIGHBOURS)), np.ones(top_k)).astype(np.float32)  # [N, N * K]
        self._mixing = np.zeros((len(NEIGHBOURS), width + 1), np.float32)
        self._gathered = np.empty((width, experts), COUNT)
        self._counts = np.empty((width + 1, experts), np.float32)

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        if not experts:
            return
        known = self._sessions.get(session)
        if known is None:
            known = self._sessions[session] = _Session(self._layers, self._experts, self._top_k)
        self._events += 1
        if self._events % self._layers == 0:
            self._count_active()
        again = known.layer == layer and self._layers > 1  # another group of the same event
        known.layer, known.seen = layer, self._events
        chosen = np.array(experts, np.intp)
        logs = self._logs
        self._age(layer, chosen, again)
        if len(experts) == self._top_k and not again:
            self._follow(known, layer, chosen)
        else:
            # A prompt, or a batch: what followed whom is not known, and nobody is pointed to.
            known.used[layer] = self._experts
            known.pointed[layer] = None
            logs[3:-1] = logs[2]
        body = logs[:-1]
        np.log(body, out=body)
        forecast = self._forecast[layer]
        self._weights.dot(logs, out=forecast)
        np.exp(forecast, out=forecast)
        np.copyto(self._due[layer], forecast, where=self._resident[layer])
        self._changed.add(layer)
        self._layer = layer

    def ended(self, session: int) -> None:
        self._sessions.pop(session, None)
        self._count_active()

    def admitted(self, block: Block) -> None:
        self._resident[block] = True
        self._due[block] = self._forecast[block]
        self._changed.add(block[0])

    def removed(self, block: Block) -> None:
        self._resident[block] = False
        self._due[block] = -np.inf
        self._changed.add(block[0])

    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]:
        due, last, last_due = self._due, self._last, self._last_due
        for layer in self._changed:
            row = due[layer]
            last[layer] = latest = int(row.argmax())
            last_due[layer] = row[latest]
        self._changed.clear()
        phase = self._phase[self._layer]
        asked = last_due + phase
        if len(layers) < self._layers:
            others = np.ones(self._layers, bool)
            others[list(layers)] = False
            asked[others] = -np.inf
        chosen: list[Block] = []
        passed: list[Block] = []
        while len(chosen) < count:
            layer = int(asked.argmax())
            if asked[layer] == -np.inf:
                break
            row, block = due[layer], (layer, last[layer])
            (chosen if evictable(block) else passed).append(block)
            row[block[1]] = -np.inf
            last[layer] = latest = int(row.argmax())
            last_due[layer] = row[latest]
            asked[layer] = row[latest] + phase[layer]
        for block in (*chosen, *passed):  # naming a victim removes nothing
            due[block] = self._forecast[block]
            self._changed.add(block[0])
        return chosen

    def _count_active(self) -> None:
        """A session is generating if it ran in what is about the last two tokens of each."""
        recent = self._events - 2 * self._layers * max(1, len(self._sessions))
        self._active = max(1, sum(session.seen >= recent for session in self._sessions.values()))

    def _age(self, layer: int, chosen: NDArray[np.intp], again: bool) -> None:
        """Take one event into the rates of ``layer``, and put them into ``_logs``."""
        rates, logs = self._rates[layer], self._logs
        rates[3, chosen] = 1
        mix = self._mixes[min(self._clock[layer], len(self._mixes) - 1)]
        if len(chosen) > self._top_k:
            # Many tokens at once say of each block little more than one token does: they must not wash out the others.
            mix = mix.copy()
            mix[:, 3] *= self._top_k / len(chosen)
        if again:
            rates[:3] += mix[:, 3:4] * rates[3]
            logs[:3] = rates[:3]
        else:
            self._clock[layer] += 1
            mix.dot(rates, out=logs[:3])
            rates[:3] = logs[:3]
        rates[3, chosen] = 0

    def _follow(self, session: _Session, layer: int, chosen: NDArray[np.intp]) -> None:
        """Put the chances by what follows what into ``_logs``, and learn from what has followed."""
        if (pointed := session.pointed[layer]) is not None:
            self._lessons.append((layer, pointed, chosen))
            if len(self._lessons) >= self._layers:
                self._learn()
        session.used[layer] = chosen
        pointers = session.used.take(self._neighbours[layer], axis=0)
        pointers += self._first
        session.pointed[layer] = pointers = pointers.ravel()
        counts, mixing = self._counts, self._mixing
        self._follows[layer].take(pointers, axis=0, out=self._gathered, mode="clip")
        counts[:-1] = self._gathered
        counts[-1] = self._rates[layer, 2]
        np.multiply(self._own, self._trust[layer].take(pointers), out=mixing[:, :-1])
        mixing[:, -1] = 0
        mixing[:, -1] = mixing.sum(1) * SMOOTHING
        chances = self._logs[3:-1]
        mixing.dot(counts, out=chances)
        if self._active > 1:
            # Whoever runs next in this layer may be another session: what was forecast for that counts as well.
            mean = self._chances[layer]
            mean += (chances - mean) / self._active
            chances[:] = mean
        chances += FLOOR

    def _learn(self) -> None:
        """Count what has followed, for many events at once."""
        lessons, self._lessons = self._lessons, []
        layers, pointers, chosen = (np.array(each) for each in zip(*lessons, strict=True))
        contexts = self._follows.shape[1]
        pointed = layers[:, None] * contexts + pointers
        counts, seen = self._follows.reshape(-1), self._seen.reshape(-1)
        places = (pointed[:, :, None] * self._experts + chosen[:, None, :]).ravel()
        counted = counts.take(places) + COUNT(1)
        counts[places] = counted
        pointed = pointed.ravel()
        seen[pointed] += 1
        if counted.max() == MOST:
            full = np.unique(places[counted == MOST] // self._experts)
            self._follows.reshape(-1, self._experts)[full] >>= 1
            seen[full] /= 2
            pointed = np.concatenate((pointed, full))
        self._trust.reshape(-1)[pointed] = 1 / (seen.take(pointed) + SMOOTHING)


def _mixes() -> NDArray[np.float32]:
    """Of each number of tokens before, the matrix ``[3, 5]`` that takes an event into the rates of a layer."""
    out = np.zeros((STEADY, 3, 5), np.float32)
    for tokens in range(STEADY):
        for rate, share in enumerate((*(1 - 2 ** (-1 / half) for half in HALF_LIVES), 1 / (tokens + 4))):
            out[tokens, rate, rate] = 1 - share
            out[tokens, rate, 3] = share
            out[tokens, rate, 4] = share * FLOOR
    return out
