"""Event-atomic replay of traffic through the daemon's own policies, as its core drives them.

One event is one MoE layer of one forward pass.  Its blocks are looked up together, none of them is evicted for another
of the same event, and misses are admitted at its end.  Topics, which the core tells the policy of, are not here: see
``benchmarks.topics``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

from benchmarks.policy.traffic import Pass
from expertd.daemon.core.quotas import Quotas, Size, step
from expertd.daemon.core.state import LayerCounts
from expertd.daemon.policy import Block, Policy

Pools = list[tuple[range, int]]
"""Of each pool its layers and its slots."""


@dataclass
class Replay:
    """What came of a replay.

    Attributes:
        layers: counts of each layer.
        seconds: that the policy took for each event, if they were measured.
        steps: how often a pool gave slots to another; ``copied``: blocks that had to be copied for that.
        slots: of each pool, at the end.
    """

    layers: list[LayerCounts]
    seconds: list[float] = field(default_factory=list)
    steps: int = 0
    copied: int = 0
    slots: list[int] = field(default_factory=list)

    @property
    def hits(self) -> int:
        """Blocks that were there when they were looked up."""
        return sum(layer.hits for layer in self.layers)

    @property
    def misses(self) -> int:
        """Blocks that were not."""
        return sum(layer.misses for layer in self.layers)

    @property
    def hit_rate(self) -> float:
        """Share of the hits."""
        return self.hits / max(1, self.hits + self.misses)


def even_pools(layers: int, pools: int, slots: int) -> Pools:
    """Pools of neighbouring layers, all of the same size as near as that is possible."""
    return [
        (range(layers * n // pools, layers * (n + 1) // pools), slots * (n + 1) // pools - slots * n // pools)
        for n in range(pools)
    ]


def replay(
    passes: Iterable[Pass],
    policy: Policy,
    pools: Pools,
    *,
    timed: bool = False,
    experts: int | None = None,
    before: Iterable[Pass] = (),
) -> Replay:
    """Run ``passes`` through ``pools`` that begin empty, or with what the passes ``before`` left, which do not count.

    An event with more blocks than its pool has slots is computed by groups, resident blocks first, as workers do it.
    If the number of ``experts`` in a layer is given, pools give each other slots as in the daemon.
    """
    pool_of = {layer: pool for pool, (members, _) in enumerate(pools) for layer in members}
    held: list[set[Block]] = [set() for _ in pools]
    out = Replay([LayerCounts() for _ in pool_of], slots=[slots for _, slots in pools])
    quotas = Quotas(len(pool_of)) if experts and len(pools) > 1 else None
    for each in chain(before, [None], passes):
        if each is None:
            out.layers, out.seconds = [LayerCounts() for _ in pool_of], []
            continue
        for session, layer, chosen in each:
            number = pool_of[layer]
            members, resident = pools[number][0], held[number]
            for group in _groups(layer, chosen, resident, out.slots[number]):
                wanted = {(layer, expert) for expert in group}
                missing = [(layer, expert) for expert in reversed(group) if (layer, expert) not in resident]
                began = time.perf_counter() if timed else 0.0
                policy.observe(session, layer, group)
                victims = []
                if missing:
                    short = len(resident) + len(missing) - out.slots[number]
                    if short > 0:
                        victims = policy.victims(members, short, _outside(wanted))
                    for block in victims:
                        if quotas is not None:
                            quotas.evicted(number, policy.chance(block))
                        policy.removed(block)
                    for block in missing:
                        policy.admitted(block)
                if timed:
                    out.seconds.append(time.perf_counter() - began)
                resident.difference_update(victims)
                resident.update(missing)
                assert len(resident) <= out.slots[number], "the policy named fewer victims than it was asked for"
                counts = out.layers[layer]
                counts.hits += len(group) - len(missing)
                counts.misses += len(missing)
                for victim, _ in victims:
                    out.layers[victim].evictions += 1
                if quotas is not None and quotas.ran(1):
                    assert experts is not None
                    most = [len(members) * experts for members, _ in pools]
                    _step(quotas, policy, pools, held, most, out)
    return out


def _step(quotas: Quotas, policy: Policy, pools: Pools, held: list[set[Block]], most: list[int], out: Replay) -> None:
    """Let a pool give slots to another, if it is time: both go on with copies of what they keep."""
    decided = step({n: Size(slots, 1, most[n], quotas.saved(n)) for n, slots in enumerate(out.slots)})
    if decided is None:
        return
    quotas.begin_again()
    giver, taker, slots = decided
    out.slots[giver] -= slots
    out.slots[taker] += slots
    leaving = policy.victims(pools[giver][0], max(0, len(held[giver]) - out.slots[giver]), lambda _: True)
    for block in leaving:
        policy.removed(block)
    held[giver].difference_update(leaving)
    out.steps += 1
    out.copied += len(held[giver]) + len(held[taker])


def _outside(wanted: set[Block]) -> Callable[[Block], bool]:
    return lambda block: block not in wanted


def _groups(layer: int, experts: list[int], resident: set[Block], slots: int) -> Sequence[list[int]]:
    if len(experts) <= slots:
        return [experts]
    order = sorted(experts, key=lambda expert: (layer, expert) not in resident)
    return [order[start : start + slots] for start in range(0, len(order), slots)]
