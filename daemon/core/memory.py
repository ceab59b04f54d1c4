"""The budget among the pools that there are: what is used, and what each should have.  Pure.

How a model that is new is divided into pools is ``plan``; carrying a change out, by generations, is ``core.Core``.
"""

from __future__ import annotations

from collections.abc import Collection

from expertd.daemon.core.plan import divide, largest_of, resized
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


def shares(budget: int, models: Collection[Model]) -> list[tuple[Model, Pool, int]]:
    """The bytes that each pool of the open models should have.

    What sessions that answer still hold of older generations will be given back: that is no reason to shrink, but no
    room to grow either.
    """
    now = settled(models)
    room = max(min(now, budget - committed(models)), budget - (used(models) - now))
    pools, wants = [], []
    for model in models:
        if not model.ready:
            continue
        times = 1 + model.copies
        for pool in model.pools:
            size = pool.layout.size
            most = max(size, largest_of(model.manifest, pool.layers)) if model.sessions else size
            pools.append((model, pool))
            wants.append((fewest(model, pool) * times, size * times, most * times))
    divided = divide(room, wants)
    return [
        (model, pool, share // (1 + model.copies)) for (model, pool), share in zip(pools, divided, strict=True)
    ]
