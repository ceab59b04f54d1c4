"""The budget among the pools that there are: what is used, and what each should have.  Pure.

How a model that is new is divided into pools is ``plan``; carrying a change out, by generations, is ``core.Core``.
"""

from __future__ import annotations

from collections.abc import Collection

from expertd.daemon.core.plan import divide, largest_of, resized
from expertd.daemon.core.quotas import Size
from expertd.daemon.core.state import Model, Pool


def used(models: Collection[Model]) -> int:
    """Bytes of all segments, and of the copies that sessions in copy mode hold."""
    return sum(model.size * (1 + model.copies) + model.extra for model in models)


def settled(models: Collection[Model]) -> int:
    """The part of ``used`` that is current generations of models that are open."""
    return sum(model.size * (1 + model.copies) for model in models if model.ready)


def committed(models: Collection[Model]) -> int:
    """The part of ``used`` that dividing cannot change soon: models being opened, and what silent sessions hold."""
    opening = sum(model.size * (1 + model.copies) for model in models if not model.ready)
    return opening + sum(model.held_by_silent for model in models)


def coming_back(models: Collection[Model]) -> int:
    """Bytes of models that nobody uses: a new model can have them once their last reads have ended."""
    return sum(model.size + model.extra for model in models if not model.sessions and not model.opening)


def fewest(model: Model, pool: Pool) -> int:
    """Bytes of the smallest generation of ``pool``: one event of one session."""
    return min(pool.layout.size, resized(model.manifest, pool.layers, 0).size)


def step(model: Model) -> None:
    """Let one pool of ``model`` give to another what that needs more, if it is time."""
    sizes = {
        pool.name: Size(pool.layout.size, fewest(model, pool), largest_of(model.manifest, pool.layers))
        for pool in model.pools
    }
    decided = model.quotas.step(sizes)
    if decided is not None:
        giver, taker, size = decided
        wanted = {giver: sizes[giver].now - size, taker: sizes[taker].now + size}
        changed = [pool for pool in model.pools if pool.name in wanted]
        for pool in model.pools:
            pool.quota = None
        if all(resized(model.manifest, pool.layers, wanted[pool.name]).slots != pool.layout.slots for pool in changed):
            for pool in changed:
                pool.quota = wanted[pool.name]


def shares(budget: int, models: Collection[Model]) -> list[tuple[Model, Pool, int]]:
    """The bytes that each pool of the open models should have.

    What sessions that answer still hold of older generations will be given back: that is no reason to shrink, but no
    room to grow either.
    """
    now, free = settled(models), max(0, budget - used(models))
    changed = waiting = 0
    pools, wants = [], []
    for model in models:
        if not model.ready:
            continue
        times = 1 + model.copies
        for pool in model.pools:
            size = pool.layout.size
            change = 0 if pool.quota is None else (pool.quota - size) * times
            if change <= free:
                size += change // times
                changed += change
            else:
                waiting += change  # it can have that when another pool has given it
            most = max(size, largest_of(model.manifest, pool.layers)) if model.sessions else size
            pools.append((model, pool))
            wants.append((fewest(model, pool) * times, size * times, most * times))
    room = max(min(now + changed, budget - committed(models)), budget - (used(models) - now) - waiting)
    divided = divide(room, wants)
    return [(model, pool, share // (1 + model.copies)) for (model, pool), share in zip(pools, divided, strict=True)]
