"""How many lookups of single tokens find their block, if so much of a model is resident.

Three sources, the best first: what the running daemon has counted, a recorded trace, a curve fitted to recorded routing
of other models.  The daemon's figure is one point; the shape of the curve through it comes from one of the others.
Prompts are not reckoned: they are read ahead, and their speed is the disk's (docs/planning.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from expertd.clients.traces.replay import events_of
from expertd.protocol.messages import ModelStatus
from expertd.protocol.traces import DECODE, Trace

Block = tuple[int, int]

STEEPNESS = 4.3
"""How fast misses become rare with the resident share, in the curve for models of which nothing is known."""
TOGETHER = 0.9
"""Misses come together: so many times ``top_k`` independent lookups miss as often as the ``top_k`` of an event."""
LOOKUPS = 20_000
"""So many lookups after the cache has filled make a measured rate."""
EVENTS = 20_000
"""So many events of single tokens are replayed at most: more change the rate by a fraction of a point."""

TOKENS = 128
"""A trace with fewer decoded tokens tells nothing."""


class Policy(Protocol):
    """What is needed of ``expertd.daemon.policy.base.Policy``."""

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None: ...
    def admitted(self, block: Block) -> None: ...
    def removed(self, block: Block) -> None: ...
    def victims(self, layers: Sequence[int], count: int, evictable: Callable[[Block], bool]) -> list[Block]: ...


@dataclass(frozen=True)
class Misses:
    """Of single tokens: the part of all lookups that miss, and the part of all events in which at least one does."""

    lookups: float
    events: float

    def scaled(self, exponent: float) -> Misses:
        """On a curve that is as much higher or lower as another point of it: all on it to the power of ``exponent``."""
        lookups = self.lookups**exponent if self.lookups else 0.0
        return Misses(lookups, min(1.0, self.events * lookups / self.lookups) if self.lookups else 0.0)


Curve = Callable[[int], Misses]
"""What is missed if a pool has so many slots."""


def fitted(blocks: int, top_k: int) -> Curve:
    """The curve for a model of ``blocks`` blocks of which nothing has been measured (docs/planning.md)."""

    def at(slots: int) -> Misses:
        share = min(1.0, slots / blocks)
        last = math.exp(-STEEPNESS)
        lookups = (math.exp(-STEEPNESS * share) - last) / (1 - last)
        return Misses(lookups, 1 - (1 - lookups) ** (TOGETHER * top_k))

    return at


def replayed(trace: Trace, policy: Callable[[], Policy]) -> Curve:
    """The curve that a trace gives, replayed event by event through the daemon's policy with one pool for all layers.

    Only decoded tokens count, from the moment on when the pool has filled, or from half of the trace.
    """
    passes = _passes(trace)
    return lambda slots: _replay(passes, policy(), trace.info.layers, slots)


def anchored(curve: Curve, slots: int, lookups: float) -> Curve:
    """``curve``, raised or lowered so that with ``slots`` the part ``lookups`` of all lookups misses."""
    expected = curve(slots).lookups
    if not (0 < expected < 1 and 0 < lookups < 1):
        return curve
    exponent = math.log(lookups) / math.log(expected)
    return lambda where: curve(where).scaled(exponent)


def measured(model: ModelStatus) -> float | None:
    """The part of all lookups that missed since the daemon's cache of ``model`` had filled.

    None if it says too little: too few lookups, or all is resident.  Prompts are among them.
    """
    filling = min(model.misses, model.slots)
    looked = model.hits + model.misses - filling
    if looked < LOOKUPS or model.slots >= model.blocks:
        return None
    return (model.misses - filling) / looked


_Pass = tuple[bool, list[list[int]]]
"""Whether it is a single token's, and of each layer the experts."""


def _passes(trace: Trace) -> list[_Pass]:
    layers, experts = trace.info.layers, trace.info.experts
    events = events_of(trace)
    starts = np.flatnonzero(np.r_[True, trace.forward[1:] != trace.forward[:-1]])
    single = (trace.phase[starts] == DECODE).tolist()
    return [
        (alone, [[block % experts for block in event] for event in events[n * layers : (n + 1) * layers]])
        for n, alone in enumerate(single)
    ]


def _replay(passes: Sequence[_Pass], policy: Policy, layers: int, slots: int) -> Misses:
    held: set[Block] = set()
    everything = range(layers)
    looked = missed = events = missing = 0
    for number, (alone, chosen) in enumerate(passes):
        counts = alone and (len(held) >= slots or 2 * number >= len(passes))
        for layer, experts in enumerate(chosen):
            for start in range(0, len(experts), max(1, slots)):
                group = experts[start : start + slots]
                wanted = {(layer, expert) for expert in group}
                absent = [block for block in ((layer, expert) for expert in reversed(group)) if block not in held]
                policy.observe(0, layer, group)
                if absent:
                    short = len(held) + len(absent) - slots
                    for block in policy.victims(everything, short, _outside(wanted)) if short > 0 else ():
                        policy.removed(block)
                        held.discard(block)
                    for block in absent:
                        policy.admitted(block)
                    held.update(absent)
                if counts:
                    looked += len(group)
                    missed += len(absent)
                    events += 1
                    missing += bool(absent)
        if events >= EVENTS:
            break
    return Misses(missed / looked, missing / events) if events else Misses(0.0, 0.0)


def _outside(wanted: set[Block]) -> Callable[[Block], bool]:
    return lambda block: block not in wanted
