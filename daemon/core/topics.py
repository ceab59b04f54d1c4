"""What sessions are about: topics, told apart by which blocks their tokens use, and when a session turns to another.

Of each topic it is known how often a token uses each block.  Topics are learned as the model runs.  Every CHAPTER
tokens of a session are compared with those before them: where the two are clearly more like each other than like any
topic that is known, they begin one.  Only MOST are kept; then the two go together whose union loses least (Ward's rule:
small ones and similar ones first).  Profiles may be known from the start.

A session has turned when its last few tokens are clearly nearer to another topic than to its own.  How near is the
cosine of the angle between uses, over all blocks.

Pure: what is done about a turn is ``turns``.  Most events only note what they use; the work is done every other token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MOST = 6
CHAPTER = 16
"""Tokens, enough to see what a session is about."""
STRANGE = 0.1
"""Two chapters that are by so much nearer to each other than to any topic are about something new."""
TURNED = 0.1
"""A session has turned to what it is by so much nearer to than to its own topic."""
HALF_LIFE = 4.0
"""Of a token in what a session does now, in tokens: a change shows after about five."""
STEADY = 1000
"""A topic follows what its last so many tokens do."""
RIPE = 48
"""Tokens of a topic before a session can turn to it."""
KNOWN = 256
"""A topic that comes from a profile counts as so many tokens."""
TOKENS = 4
"""An event of more than so many times the experts of one token is a prompt, which uses nearly everything."""
LOOKED_AT = 2
"""Of so many tokens of a session, one is compared with the topics."""

Vector = NDArray[np.float32]


@dataclass
class _Reader:
    """A session.

    Attributes:
        layer: that ran last; ``uses``: what the token that runs has used so far.
        tokens: so far; ``now``: what the last few used, each half as much as one HALF_LIFE after it.
        chapter: uses of the chapter that runs, ``length`` tokens of it; ``before``: the chapter before, per token.
        topic: number of its topic, None as long as there is nothing to tell apart.
    """

    now: Vector
    chapter: Vector
    layer: int = -1
    uses: list[int] = field(default_factory=list)
    tokens: int = 0
    length: int = 0
    before: Vector | None = None
    topic: int | None = None


class Topics:
    """Of one model with L layers, E experts in each, of which a token uses K.

    Attributes:
        count: how many topics are known.
        turns: how often sessions have turned.
    """

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        self.count = self.turns = 0
        self._shape = layers, experts
        self._most_experts = TOKENS * top_k
        self._rates = np.zeros((MOST + 1, layers * experts), np.float32)
        self._lengths = np.ones(MOST + 1, np.float32)  # of these vectors
        self._tokens = [0] * (MOST + 1)  # that they were made of
        self._readers: dict[int, _Reader] = {}
        self._kept = np.float32(0.5 ** (1 / HALF_LIFE))

    def know(self, chances: NDArray[np.float32]) -> None:
        """A topic is known from elsewhere: how likely a token of it is to use each block, ``[L, E]``."""
        if chances.shape == self._shape and chances.any():
            self._begin(chances.reshape(-1).astype(np.float32), KNOWN)

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> NDArray[np.float32] | None:
        """One event, in the order in which the session's events happened.

        Returns:
            None, but if the session is found to have turned: how likely a token of its new topic is to use each block,
            ``[L, E]``; not to be written to.
        """
        reader = self._readers.get(session)
        if reader is None:
            size = self._rates.shape[1]
            reader = self._readers[session] = _Reader(np.zeros(size, np.float32), np.zeros(size, np.float32))
        turned = None
        if layer <= reader.layer and reader.uses:
            turned = self._token(reader)
        reader.layer = layer
        if len(experts) <= self._most_experts:
            first = layer * self._shape[1]
            reader.uses += [first + expert for expert in experts]
        return None if turned is None else self._rates[turned].reshape(self._shape)

    def ended(self, session: int) -> None:
        """``session`` is over."""
        self._readers.pop(session, None)

    def _token(self, reader: _Reader) -> int | None:
        """A token is complete; returns the topic that its session has turned to with it."""
        uses = np.array(reader.uses, np.intp)
        reader.uses = []
        reader.tokens += 1
        reader.length += 1
        reader.now *= self._kept
        reader.now[uses] += 1
        reader.chapter[uses] += 1
        turned = None
        if self.count > 1 and not reader.tokens % LOOKED_AT:
            turned = self._turn(reader)
        if turned is not None:
            self.turns += 1
            reader.chapter[:] = 0  # what is learned of the new topic begins here
            reader.length = 0
        elif reader.length == CHAPTER:
            self._close_chapter(reader)
        return turned

    def _turn(self, reader: _Reader) -> int | None:
        near = self._near(reader.now)
        ripe = [number for number in range(self.count) if self._tokens[number] >= RIPE]
        nearest = max(ripe, key=near.__getitem__, default=None)
        if reader.topic is None or nearest is None:
            reader.topic = nearest
            return None
        if near[nearest] <= near[reader.topic] + TURNED:
            return None
        reader.topic = nearest
        return nearest

    def _close_chapter(self, reader: _Reader) -> None:
        """A chapter is complete: it begins a topic, or the nearest learns from it."""
        chapter = reader.chapter / np.float32(reader.length)
        before, reader.before = reader.before, chapter
        reader.chapter[:] = 0
        reader.length = 0
        if not self.count:
            self._begin(chapter, CHAPTER)
            return
        near = self._near(chapter)
        nearest = max(range(self.count), key=near.__getitem__)
        # Two chapters of one topic have the luck of both between them, a chapter and its topic that of one.
        if before is not None and _cosine(chapter, before) ** 0.5 > near[nearest] + STRANGE:
            self._begin(chapter, CHAPTER)  # the one before may have begun about something else
        else:
            self._learn(nearest, chapter, CHAPTER)

    def _near(self, uses: Vector) -> list[float]:
        """The cosine of the angle between ``uses`` and each topic."""
        length = float(np.sqrt(uses.dot(uses))) or 1.0
        near: list[float] = (self._rates[: self.count].dot(uses) / (self._lengths[: self.count] * length)).tolist()
        return near

    def _begin(self, rates: Vector, tokens: int) -> None:
        self._put(self.count, rates, tokens)
        self.count += 1
        if self.count > MOST:
            self._join_two()

    def _learn(self, number: int, rates: Vector, tokens: int) -> None:
        known = self._tokens[number]
        share = np.float32(tokens / (min(known, STEADY) + tokens))
        self._put(number, self._rates[number] + share * (rates - self._rates[number]), known + tokens)

    def _put(self, number: int, rates: Vector, tokens: int) -> None:
        self._rates[number] = rates
        self._lengths[number] = np.sqrt(rates.dot(rates)) or 1
        self._tokens[number] = tokens

    def _join_two(self) -> None:
        """Make one of the two topics whose union loses least."""
        tokens = np.minimum(self._tokens, STEADY).astype(float)
        apart = 1 - self._rates.dot(self._rates.T) / np.outer(self._lengths, self._lengths)
        loss = apart * np.outer(tokens, tokens) / np.add.outer(tokens, tokens)
        loss[np.tril_indices(len(loss))] = np.inf
        one, other = divmod(int(loss.argmin()), len(loss))
        self._learn(one, self._rates[other], self._tokens[other])
        self.count -= 1
        last = self.count
        if other != last:
            self._put(other, self._rates[last], self._tokens[last])
        for reader in self._readers.values():
            if reader.topic == other:
                reader.topic = one
            elif reader.topic == last:
                reader.topic = other


def _cosine(one: Vector, other: Vector) -> float:
    product = float(one.dot(other))
    return product / (float(np.sqrt(one.dot(one) * other.dot(other))) or 1.0)
