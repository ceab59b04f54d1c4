"""The budget among the pools that there are: what is used, and what each should have.  Pure.

How a model that is new is divided into pools is ``plan``; carrying a change out, by generations, is ``core.Core``.
"""

from __future__ import annotations

from collections.abc import Collection

from expertd.daemon.core.plan import divide, floor_of, largest_of, resized
from expertd.daemon.core.quotas import Size
from expertd.daemon.core.quotas import step as next_step
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


def in_use(models: Collection[Model]) -> list[Model]:
    """Those with sessions, or with some that are being opened."""
    return [model for model in models if model.sessions or model.opening]


def under_way(models: Collection[Model]) -> bool:
    """Whether memory is being created, or will be given back by sessions that answer."""
    return any(not model.ready or model.extra > model.held_by_silent for model in models)


def fewest(model: Model, pool: Pool, sessions: int = 1) -> int:
    """Bytes that ``pool`` has at least: one event of one session, or of each of so many ``sessions``."""
    return min(pool.layout.size, floor_of(model.manifest, pool.layers, sessions))


def smallest(models: Collection[Model]) -> int:
    """Bytes that the models in use need at least: one event of one session each."""
    return sum(fewest(model, pool) * (1 + model.copies) for model in in_use(models) for pool in model.pools)


def floor(models: Collection[Model]) -> int:
    """Bytes for one event of each session: what they keep under the worst pressure."""
    return sum(
        floor_of(model.manifest, pool.layers, len(model.sessions) + len(model.opening)) * (1 + model.copies)
        for model in in_use(models)
        for pool in model.pools
    )


def make_room(budget: int, models: Collection[Model], wanted: int) -> int:
    """A model comes that could use ``wanted`` bytes: what it should have; the others' quotas are set accordingly.

    What is free, or as much as each of the models in use may keep at least; those that have more give up the same part
    of what they have beyond that.
    """
    users = in_use(models)
    fair = budget // (len(users) + 1)
    has = {id(pool): _intended(pool) * (1 + model.copies) for model in users for pool in model.pools}
    free = budget - sum(has.values()) - sum(model.held_by_silent for model in models)
    needed = min(wanted, fair) - free
    if needed <= 0:
        return min(wanted, free)
    givers, wants = [], []
    for model in users:
        of_model = sum(has[id(pool)] for pool in model.pools)
        for pool in model.pools if of_model > fair else ():
            now = has[id(pool)]
            keeps = max(now * fair // of_model, fewest(model, pool) * (1 + model.copies))
            givers.append((model, pool))
            wants.append((min(keeps, now), now, now))
    kept = divide(sum(now for _, now, _ in wants) - needed, wants)
    for (model, pool), size in zip(givers, kept, strict=True):
        pool.quota = size // (1 + model.copies)
    return free + sum(now for _, now, _ in wants) - sum(kept)


def _intended(pool: Pool) -> int:
    """Bytes of ``pool`` when what was decided has been carried out."""
    if pool.quota is not None:
        return pool.quota
    return pool.layout.size if pool.next is None else pool.next.layout.size


def step(models: Collection[Model]) -> bool:
    """Let one pool give to another what that needs more, if it is time; whether it is.

    Models with a move under way have no part in it.
    """
    settled = [model for model in models if model.ready and not model.extra]
    pools = {(model.key, pool.name): (model, pool) for model in settled for pool in model.pools}
    sizes = {name: _size(model, pool) for name, (model, pool) in pools.items()}
    decided = next_step(sizes)
    if decided is None:
        return False
    giver, taker, size = decided
    for model, pool in pools.values():
        model.quotas.begin_again()
        pool.quota = None
    wanted = {giver: sizes[giver].now - size, taker: sizes[taker].now + size}
    quotas = {name: bytes_ // (1 + pools[name][0].copies) for name, bytes_ in wanted.items()}
    changed = [(*pools[name], quota) for name, quota in quotas.items()]
    if all(resized(model.manifest, pool.layers, quota).slots != pool.layout.slots for model, pool, quota in changed):
        for _, pool, quota in changed:
            pool.quota = quota
    return True


def forget_quotas(models: Collection[Model]) -> bool:
    """Leave pools what they have; whether one of them should have had something else."""
    pools = [pool for model in models for pool in model.pools if pool.quota is not None]
    for pool in pools:
        pool.quota = None
    return bool(pools)


def _size(model: Model, pool: Pool) -> Size:
    times = 1 + model.copies
    now = pool.layout.size * times
    most = max(now, largest_of(model.manifest, pool.layers) * times) if model.sessions else now
    least = fewest(model, pool, len(model.sessions)) * times
    return Size(now, least, most, model.quotas.saved(pool.name))


def shares(budget: int, models: Collection[Model]) -> list[tuple[Model, Pool, int]]:
    """The bytes that each pool of the open models should have.

    What sessions that answer still hold of older generations will be given back, and so will models that nobody uses
    any more when their last reads have ended: that is no reason to shrink, but no room to grow either.
    """
    open_ = [model for model in models if model.ready and (model.sessions or model.opening or not model.busy)]
    now, free = settled(open_), max(0, budget - used(models))
    each = floor(models) <= budget - committed(models)  # else there is one event for each model
    changed = waiting = 0
    pools, wants = [], []
    for model in open_:
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
            least = min(size, fewest(model, pool, len(model.sessions) if each else 1))
            wants.append((least * times, size * times, most * times))
    room = max(min(now + changed, budget - committed(models)), budget - (used(models) - now) - waiting)
    divided = divide(room, wants)
    return [(model, pool, share // (1 + model.copies)) for (model, pool), share in zip(pools, divided, strict=True)]
