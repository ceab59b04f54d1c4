"""Fetches and the queue of a pool: what is wrong with one, which have no slots yet, how one leaves.

What a Fetch is granted, and when, is ``core.Core``'s business.
"""

from __future__ import annotations

from expertd.daemon.core import events
from expertd.daemon.core.state import Pool, Waiting


def problem(event: events.Fetch, pool: Pool | None) -> str | None:
    """What is wrong with a Fetch for a layer of ``pool`` (None: of no pool), as a sentence, or None."""
    if pool is None:
        return f"layer {event.layer} is no MoE layer of this model"
    named = (*event.experts, *event.then)
    if len(set(named)) != len(named):
        return f"a fetch for layer {event.layer} names an expert twice"
    if max(named) >= pool.layout.experts:
        return f"layer {event.layer} has {pool.layout.experts} experts, there is no expert {max(named)}"
    if len(event.experts) > pool.layout.slots:
        return f"a fetch for {len(event.experts)} blocks does not fit a pool of {pool.layout.slots} slots"
    return None


def absent(event: events.Fetch, pool: Pool) -> int:
    """How many of its blocks are neither resident nor on their way."""
    return sum((event.layer, expert) not in pool.where for expert in event.experts)


def ungranted(pool: Pool) -> list[Waiting]:
    """Those that hold nothing yet, the oldest first."""
    return [waiting for waiting in pool.queue if not waiting.granted]


def leave_queue(pool: Pool, waiting: Waiting) -> None:
    """``waiting`` was answered, or nobody wants its answer any more."""
    pool.queue = type(pool.queue)(entry for entry in pool.queue if entry is not waiting)
