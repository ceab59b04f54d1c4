"""What follows what: how likely each expert is, by the experts that ran last in its layer and in layers before it.

It is counted as the model runs.  The counts are believed as much as the steady rates when there are SMOOTHING of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy.rates import FLOOR

NEIGHBOURS = (0, -2, -1, -4, -8)
"""Which layers' last experts tell what a layer will use, counted from it (0: its own).

The first of them only, where a token uses many experts (LOOKED_AT) or there are very many (COUNTS).
"""
LOOKED_AT = 20
"""So many experts are looked at in an event of one token: what followed each of them has to be gathered."""
COUNTS = 32_000_000
"""So many counts of what follows what, a byte each, unless those of the layers' own experts are more."""
SMOOTHING = 4.0
MOST = 255
"""The counts of what followed one expert are halved when one of them is so large."""
NOTHING = np.array([], np.intp)


class Used:
    """What each of L layers used last in one session, K experts if that was one token.

    Attributes:
        experts: of each layer; NOTHING if that was a prompt: which of its experts followed whom is not known.
        unlike: how many of these are not K.
        of_token: ``[L, K]``: the same, where they are K.
        pointed: of each layer the rows of counts that these pointed to when it ran last.
    """

    def __init__(self, layers: int, top_k: int) -> None:
        self.experts = [NOTHING] * layers
        self.unlike = layers
        self.of_token = np.zeros((layers, top_k), np.intp)
        self.pointed = [NOTHING] * layers


class Follows:
    """The counts of a model: L layers, E experts in each, of which a token uses K; N neighbours.

    ``counts[l, n * E + i]`` is how often layer l used each expert in the event after its nth neighbour had used i, of
    ``seen[l, n * E + i]`` times.  ``trust`` is 1 / (seen + SMOOTHING).

    Attributes:
        width: the number of experts that are looked at after single tokens.
    """

    def __init__(self, layers: int, experts: int, top_k: int, batch: int) -> None:
        looked_at = min(LOOKED_AT // top_k, COUNTS // (layers * experts * experts))
        neighbours = NEIGHBOURS[: max(1, looked_at)]
        rows = len(neighbours) * experts
        self._counts = np.zeros((layers, rows, experts), np.uint8)
        self._seen = np.zeros((layers, rows), np.float32)
        self._trust = np.full((layers, rows), 1 / SMOOTHING, np.float32)
        self._counts_of, self._trust_of = list(self._counts), list(self._trust)
        self._neighbours = [[(layer + n) % layers for n in neighbours] for layer in range(layers)]
        self._places = [np.add.outer(np.array(each) * top_k, np.arange(top_k)).ravel() for each in self._neighbours]
        self._top_k = top_k
        self.width = len(neighbours) * top_k
        self._first = np.arange(len(neighbours)) * experts
        self._first_of_each = self._first.repeat(top_k)
        self._lessons: list[tuple[int, NDArray[np.intp], NDArray[np.intp]]] = []
        # Work space.  Chances are one product: of FLOOR, trust in the steady rates and in what follows each expert that
        # is looked at; with ones, the steady rates, and the counts.
        most = batch * self.width
        self._gathered = np.empty((most, experts), np.uint8)
        self._rows = np.ones((2 + most, experts), np.float32)
        self._steady = self._rows[1]
        self._views: dict[int, _View] = {}

    def after(
        self, used: Used, layer: int, experts: NDArray[np.intp], steady: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Learn that ``layer`` used ``experts``, and put its next chances, times ``width``, into ``out``, ``[E]``.

        ``experts`` is NOTHING for a prompt.
        """
        pointed = used.pointed[layer]
        if len(pointed) and len(experts):
            self._lessons.append((layer, pointed, experts))
            if len(self._lessons) >= len(self._neighbours):
                self._count()
        if len(experts) == self._top_k:
            used.of_token[layer] = experts
            used.unlike -= len(used.experts[layer]) != self._top_k
        else:
            used.unlike += len(used.experts[layer]) == self._top_k
        used.experts[layer] = experts
        if used.unlike:
            near = [used.experts[number] for number in self._neighbours[layer]]
            pointers = np.concatenate(near)
            pointers += self._first.repeat([len(each) for each in near])
        else:
            pointers = used.of_token.take(self._places[layer])
            pointers += self._first_of_each
        used.pointed[layer] = pointers
        width = len(pointers)
        if not width:
            np.multiply(steady, self.width, out)
            return
        view = self._views.get(width)
        if view is None:
            view = self._views[width] = _View(width, self._gathered, self._rows)
        self._counts_of[layer].take(pointers, 0, view.gathered, "clip")  # by place: names cost as much as the work
        view.counts[:] = view.gathered
        self._steady[:] = steady
        self._trust_of[layer].take(pointers, 0, view.trust_in_counts, "clip")
        view.trust_in[1] = view.trust_in_counts.dot(view.smoothing)
        view.trust_in.dot(view.rows, out)
        if width != self.width:
            out *= np.float32(self.width / width)

    def _count(self) -> None:
        """Count what has followed, for many events at once."""
        alike: dict[tuple[int, int], list[tuple[int, NDArray[np.intp], NDArray[np.intp]]]] = {}
        for lesson in self._lessons:
            alike.setdefault((len(lesson[1]), len(lesson[2])), []).append(lesson)
        self._lessons = []
        for lessons in alike.values():
            self._count_alike(*(np.array(each) for each in zip(*lessons, strict=True)))

    def _count_alike(self, layers: NDArray[np.intp], pointers: NDArray[np.intp], experts: NDArray[np.intp]) -> None:
        rows = layers[:, None] * self._seen.shape[1] + pointers
        places = (rows[:, :, None] * self._counts.shape[2] + experts[:, None, :]).ravel()
        rows = rows.ravel()
        counts, seen = self._counts.reshape(-1), self._seen.reshape(-1)
        counted = counts.take(places) + np.uint8(1)
        counts[places] = counted
        seen[rows] += 1
        if counted.max() == MOST:
            full = np.unique(places[counted == MOST] // self._counts.shape[2])
            self._counts.reshape(-1, self._counts.shape[2])[full] >>= 1
            seen[full] /= 2
            rows = np.concatenate((rows, full))
        self._trust.reshape(-1)[rows] = 1 / (seen.take(rows) + SMOOTHING)


class _View:
    """Work space for ``width`` experts that are looked at in an event."""

    def __init__(self, width: int, gathered: NDArray[np.uint8], rows: NDArray[np.float32]) -> None:
        self.gathered, self.counts, self.rows = gathered[:width], rows[2 : 2 + width], rows[: 2 + width]
        self.trust_in = np.full(2 + width, FLOOR * width, np.float32)
        self.trust_in_counts = self.trust_in[2:]
        self.smoothing = np.full(width, SMOOTHING, np.float32)
