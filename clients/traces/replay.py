"""What a cache of a given size would have hit: event-atomic replay of a trace, by LRU and by Belady's optimum.

One event is one MoE layer of one forward pass.  Its blocks are looked up together, none of them is evicted for another
of the same event, and misses are admitted at its end.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from expertd.protocol.traces import Trace

Events = list[list[int]]
"""Of each event the blocks that it uses, numbered ``layer * experts + expert``, each once."""

NEVER = 1 << 62


def events_of(trace: Trace, tokens: int | None = None) -> Events:
    """The events of the first ``tokens`` tokens, in the order in which they ran."""
    chosen = trace.experts[:tokens].astype(np.int64)
    blocks = chosen + np.arange(trace.info.layers)[:, None] * trace.info.experts
    forward = trace.forward[:tokens]
    starts = np.flatnonzero(np.r_[True, forward[1:] != forward[:-1]])
    out: Events = []
    for start, end in zip(starts, np.r_[starts[1:], len(forward)], strict=True):
        if end - start == 1:
            out.extend(list(dict.fromkeys(layer)) for layer in blocks[start].tolist())
        else:
            out.extend(np.unique(blocks[start:end, layer]).tolist() for layer in range(trace.info.layers))
    return out


def lru(events: Events, capacity: int) -> int:
    """Hits of one pool of ``capacity`` blocks that evicts the least recently used.

    Within an event the router's first choice counts as the most recent.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for event in events:
        missed = 0
        for block in reversed(event):
            if block in cache:
                cache.move_to_end(block)
            else:
                missed += 1
        hits += len(event) - missed
        if missed:
            for _ in range(min(len(cache), len(cache) + missed - capacity)):
                cache.popitem(last=False)
            for block in reversed(event):
                cache[block] = None
                cache.move_to_end(block)
            while len(cache) > capacity:  # an event that is larger than the pool leaves its first choices
                cache.popitem(last=False)
    return hits


def belady(events: Events, capacity: int) -> int:
    """Hits of one pool of ``capacity`` blocks that evicts what is used again last, and admits every miss."""
    following = next_uses(events)
    cache: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits = 0
    for event, uses in zip(events, following, strict=True):
        missed = sum(block not in cache for block in event)
        hits += len(event) - missed
        # The event's own blocks are due now in the heap, so they come last and are never evicted for each other.
        for _ in range(min(len(cache), len(cache) + missed - capacity)):
            _evict_farthest(cache, farthest)
        for block, use in zip(event, uses, strict=True):
            cache[block] = use
            heapq.heappush(farthest, (-use, block))
        while len(cache) > capacity:
            _evict_farthest(cache, farthest)
    return hits


def _evict_farthest(cache: dict[int, int], farthest: list[tuple[int, int]]) -> None:
    """Drop the block that is used again last; entries of ``farthest`` that ``cache`` does not confirm are old."""
    while True:
        due, block = heapq.heappop(farthest)
        if cache.get(block) == -due:
            del cache[block]
            return


def next_uses(events: Events) -> list[list[int]]:
    """Of each block of each event, the number of the next event that uses it, or ``NEVER``."""
    out: list[list[int]] = []
    due: dict[int, int] = {}
    for number in range(len(events) - 1, -1, -1):
        out.append([due.get(block, NEVER) for block in events[number]])
        due.update(dict.fromkeys(events[number], number))
    out.reverse()
    return out


def hit_rates(trace: Trace, fractions: Sequence[float], tokens: int | None = None) -> list[dict[str, float]]:
    """For caches of these fractions of all blocks: ``fraction``, ``blocks``, and hits of ``lru`` and ``belady`` (0-1).

    Cold start, one pool for all layers; events whose blocks do not fit count what was there.
    """
    events = events_of(trace, tokens)
    looked = sum(map(len, events))
    out = []
    for fraction in fractions:
        blocks = max(1, round(fraction * trace.info.layers * trace.info.experts))
        out.append(
            {
                "fraction": fraction,
                "blocks": blocks,
                "lru": lru(events, blocks) / looked,
                "belady": belady(events, blocks) / looked,
            }
        )
    return out
