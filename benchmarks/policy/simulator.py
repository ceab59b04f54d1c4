"""Event-atomic replay of recorded routing through the daemon's own policies, as its core drives them.

One event is one MoE layer of one forward pass.  Its blocks are looked up together, none of them is evicted for another
of the same event, and misses are admitted at its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from expertd.daemon.policy import Policy
from expertd.protocol.traces import Trace


class Event(NamedTuple):
    """``experts`` of ``layer``, each once, in the router's order if one token chose them."""

    session: int
    layer: int
    experts: list[int]


@dataclass
class Replay:
    """What came of a replay: of each layer ``[hits, misses, evictions]``, and seconds for each event if measured."""

    layers: np.ndarray
    seconds: list[float] = field(default_factory=list)

    @property
    def hits(self) -> int:
        return int(self.layers[:, 0].sum())

    @property
    def misses(self) -> int:
        return int(self.layers[:, 1].sum())

    @property
    def hit_rate(self) -> float:
        """Share of blocks that were there when they were looked up."""
        return self.hits / max(1, self.hits + self.misses)


def events_of(trace: Trace, session: int = 0) -> Iterator[Event]:
    """The events of ``trace`` in the order in which they ran."""
    starts = np.flatnonzero(np.r_[True, trace.forward[1:] != trace.forward[:-1]])
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(trace.forward)], strict=True):
        if end - start == 1:
            for layer, experts in enumerate(trace.experts[start].tolist()):
                yield Event(session, layer, list(dict.fromkeys(experts)))
        else:
            for layer in range(trace.info.layers):
                yield Event(session, layer, np.unique(trace.experts[start:end, layer]).tolist())


def replay(
    events: Iterable[Event], policy: Policy, layers: int, pools: Sequence[tuple[Sequence[int], int]], *, timed: bool = False
) -> Replay:
    """Run ``events`` through pools that begin empty.

    Args:
        policy: for a model of so many ``layers``.
        pools: of each its layers and its slots.  An event with more blocks than that is computed by groups, resident
            blocks first, as workers do it.
    """
    pool_of = {layer: number for number, (members, _) in enumerate(pools) for layer in members}
    resident: list[set[tuple[int, int]]] = [set() for _ in pools]
    out = Replay(np.zeros((layers, 3), np.int64))
    counts = [[0, 0, 0] for _ in range(layers)]
    for session, layer, experts in events:
        members, slots = pools[pool_of[layer]]
        held = resident[pool_of[layer]]
        for group in _groups(layer, experts, held, slots):
            wanted = {(layer, expert) for expert in group}
            missing = [block for block in reversed([(layer, expert) for expert in group]) if block not in held]
            began = time.perf_counter() if timed else 0.0
            policy.observe(session, layer, group)
            if missing:
                short = len(held) + len(missing) - slots
                if short > 0:
                    victims = policy.victims(members, short, lambda block: block not in wanted)
                    for block in victims:
                        policy.removed(block)
                        counts[block[0]][2] += 1
                    held.difference_update(victims)
                for block in missing:
                    policy.admitted(block)
                held.update(missing)
            if timed:
                out.seconds.append(time.perf_counter() - began)
            counts[layer][0] += len(group) - len(missing)
            counts[layer][1] += len(missing)
    out.layers[:] = counts
    return out


def _groups(layer: int, experts: list[int], held: set[tuple[int, int]], slots: int) -> list[list[int]]:
    if len(experts) <= slots:
        return [experts]
    order = sorted(experts, key=lambda expert: (layer, expert) not in held)
    return [order[start : start + slots] for start in range(0, len(order), slots)]
