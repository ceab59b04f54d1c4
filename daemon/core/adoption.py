"""Pools of an earlier daemon that sessions hand back: sources for what is absent here, as long as somebody has them.

Functions over a model.  Such a pool is treated as a generation before the model's own: it counts from the first moment,
nothing is looked up or written there, blocks are copied from it before any is read, and it goes when the last session
that has it has released it and nothing is to be copied any more.  It may come at any time: the session that hands it
back need not be the model's first.  Whether it is what it says has been looked at (``expertd.daemon.pools``).
"""

from __future__ import annotations

from collections.abc import Sequence

from expertd.daemon.core import events
from expertd.daemon.core.state import Model, Pool, Recalled
from expertd.daemon.policy import Block


def beginning_with(free: int, attach: events.Attach) -> int:
    """Bytes that a model may begin with whose first session hands pools back; ``free``: of the budget, without these.

    The new pools take the place of the old ones, and as in any move, both are there while blocks are copied.  So they
    may go beyond the budget by so much, if the machine has room; else they begin with what is left beside the old ones,
    and grow when these have gone.
    """
    return max(free - attach.holding, min(free, attach.room))


def adopt(model: Model, handed: Sequence[Pool]) -> None:
    """Have what is absent here and in ``handed`` copied before all else, as far as there are free slots for it.

    Where there is no room for all, what the policy thinks the most of comes.  What is being read already is let be.
    """
    for pool in model.pools:
        pool.sources += [source for source in handed if not set(source.layers).isdisjoint(pool.layers)]
    absent = dict.fromkeys(block for source in handed for block in source.where if _absent(model, block))
    for block in absent:
        model.policy.admitted(block)
    of_pool: dict[int, list[Block]] = {pool.segment: [] for pool in model.pools}
    for block in model.policy.ranked():
        if block in absent:
            of_pool[model.pool_of_layer[block[0]].segment].append(block)
    stay: list[Block] = []
    later: list[Block] = []
    for pool in model.pools:
        here, free = of_pool[pool.segment], max(0, pool.spare - len(pool.carried))
        for block in here[free:]:
            model.policy.removed(block)
        first = here[:free]
        stay += first
        later += [] if pool.quota is None else here[free:]  # read when it has grown, if they are not there any more
        pool.carried.update(first)
        others = [block for block in pool.wish if block not in pool.carried]
        earlier = [block for block in pool.wish if block in pool.carried and block not in absent]
        pool.wish.clear()
        pool.wish.extend((*earlier, *first, *others))
    if stay:
        _note(model, (*stay, *later))


def shrink(model: Model, pool: Pool) -> None:
    """``pool`` begins smaller than it was to: count no more blocks as coming than it has slots."""
    here = [block for block in pool.wish if block in pool.carried]
    for block in here[pool.layout.slots :]:
        pool.carried.discard(block)
        model.policy.removed(block)


def _absent(model: Model, block: Block) -> bool:
    pool = model.pool_of_layer[block[0]]
    return block not in pool.where and block not in pool.carried


def _note(model: Model, handed: Sequence[Block]) -> None:
    """Blocks that an earlier daemon's pools hold come before those that only its record names."""
    left = model.recalled or Recalled((), 0.0)
    blocks = tuple(dict.fromkeys((*handed, *left.blocks)))
    told = left.told and len(blocks) == len(left.blocks)
    model.recalled = Recalled(blocks, left.recorded_at, left.back, left.adopted, told)
