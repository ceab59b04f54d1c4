"""The budget among the pools that there are: what is used, and what each should have.  Pure.

How a model that is new is divided into pools is ``plan``; carrying a change out, by generations, is ``core.Core``.
"""

from __future__ import annotations

from collections.abc import Collection

from expertd.daemon.core.plan import GROWTH, divide, floor_of, largest_of, resized
from expertd.daemon.core.quotas import Size
from expertd.daemon.core.quotas import step as next_step
from expertd.daemon.core.state import Model, Pool
from expertd.protocol.errors import BudgetTooSmall
from expertd.protocol.layout import PAGE, PoolLayout
from expertd.protocol.manifest import Manifest
from expertd.protocol.sizes import show_size


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
    """Those that have sessions, or that some are being opened of."""
    return [model for model in models if model.in_use]


def under_way(models: Collection[Model]) -> bool:
    """Whether memory is being created, or will be given back by sessions that answer."""
    return any(not model.ready or model.extra > model.held_by_silent for model in models)


def stuck(model: Model, pool: Pool) -> bool:
    """Whether a session that does not answer has ``pool``: to move on would give nothing back."""
    return any(model.sessions[number].silent for number in pool.holders)


def quota_change(pool: Pool) -> int:
    """Bytes of its quota that ``pool`` does not have yet; below zero where it has to give."""
    return 0 if pool.quota is None else pool.quota - pool.layout.size


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


def welcome(budget: int, models: Collection[Model], model: Model, copies: int) -> None:
    """``model``, which nobody used, is used again: its pools should have what they would get if it were new."""
    times = 1 + copies
    most = [largest_of(model.manifest, pool.layers) for pool in model.pools]
    should_have = make_room(budget, [other for other in models if other is not model], sum(most) * times) // times
    sizes = [(fewest(model, pool), pool.layout.size, largest) for pool, largest in zip(model.pools, most, strict=True)]
    for pool, size in zip(model.pools, divide(max(should_have, model.size), sizes), strict=True):
        if resized(model.manifest, pool.layers, size).slots > pool.layout.slots:
            pool.quota = size


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
        for pool in (pool for pool in model.pools if of_model > fair and not stuck(model, pool)):
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

    Models with a move under way have no part in it, and while some pool waits for its quota, there is no step.
    """
    if any(pool.quota is not None for model in models for pool in model.pools):
        return False
    calm = [model for model in models if model.ready and not model.extra]
    pools = {(model.key, pool.name): (model, pool) for model in calm for pool in model.pools}
    sizes = {name: _size(model, pool) for name, (model, pool) in pools.items()}
    decided = next_step(sizes, max((_slot(model, pool) for model, pool in pools.values()), default=1))
    if decided is None:
        return False
    giver, taker, size = decided
    wanted = {giver: sizes[giver].now - size, taker: sizes[taker].now + size}
    changed = [(*pools[name], all_copies // (1 + pools[name][0].copies)) for name, all_copies in wanted.items()]
    if any(resized(model.manifest, pool.layers, quota).slots == pool.layout.slots for model, pool, quota in changed):
        return False
    for model in calm:
        model.quotas.begin_again()
    for _, pool, quota in changed:
        pool.quota = quota
    return True


def no_room(most: int, others: int, manifest: Manifest, needed: int, beside: int) -> BudgetTooSmall:
    """Why a model that needs ``needed`` bytes is refused, beside ``others`` that the models in use need.

    ``beside``: what their base weights take, which ``most`` is without.
    """
    most, others = most + beside, others + beside
    in_use = f", and models in use need at least {others} bytes ({show_size(others)}) of it" if others else ""
    return BudgetTooSmall(
        f"the budget of {show_size(most)} is too small for {manifest.folder}: one event of one session needs at least "
        f"{needed} bytes ({show_size(needed)}){in_use}; start the daemon with --budget {others + needed} or more"
    )


def no_room_for_a_copy(budget: int, used: int, model: Model, beside: int) -> BudgetTooSmall:
    """Why a session of ``model`` is refused that needs a copy of its own; ``beside``: see ``no_room``."""
    return BudgetTooSmall(
        f"a session in copy mode needs {show_size(model.size)} of its own beside the shared pools, and "
        f"{show_size(max(0, budget - used))} of the budget are free; "
        f"start the daemon with --budget {used + model.size + beside} or more"
    )


def end_quotas(budget: int, models: Collection[Model]) -> list[tuple[Model, Pool, int]] | None:
    """If nobody makes room any more: the bytes that pools get of their quotas, as far as that is free.

    None if somebody does, or there are no quotas.
    """
    pools = [(model, pool) for model in models for pool in model.pools if pool.quota is not None]
    if not pools or under_way(models):
        return None
    wants = []
    for model, pool in pools:
        times, size = 1 + model.copies, pool.layout.size
        more = 0 if stuck(model, pool) else max(0, quota_change(pool))
        wants.append((size * times, size * times, (size + more) * times))
    room = max(0, budget - used(models)) + sum(size for size, _, _ in wants)
    sizes = divide(room, wants)
    forget_quotas(models)
    shares = [(model, pool, size // (1 + model.copies)) for (model, pool), size in zip(pools, sizes, strict=True)]
    return [
        (model, pool, size)
        for model, pool, size in shares
        if resized(model.manifest, pool.layers, size).slots > pool.layout.slots
    ]


def less(manifest: Manifest, new: Pool, old: Pool | None) -> PoolLayout | None:
    """What to try in the place of ``new``, for which the system gave no memory; None: nothing.

    ``old`` is the generation before, if there is one.  Where it was to grow, half of the growth, as long as that is
    worth a move and wanted still; else half of the size, down to one event.
    """
    if old is None or new.layout.size <= old.layout.size:
        smaller = resized(manifest, new.layers, new.layout.size // 2)
        return smaller if smaller.slots < new.layout.slots else None
    smaller = resized(manifest, new.layers, (old.layout.size + new.layout.size) // 2)
    worth = old.layout.slots * GROWTH <= smaller.slots < new.layout.slots
    return smaller if worth and not old.outdated else None


def forget_quotas(models: Collection[Model]) -> None:
    """Leave all pools what they have."""
    for model in models:
        for pool in model.pools:
            pool.quota = None


def _slot(model: Model, pool: Pool) -> int:
    """Bytes by which ``pool`` must grow or shrink to have another number of slots."""
    layer = model.manifest.layers[pool.layers[0]]
    return (layer.block_bytes + len(layer.parts) * PAGE) * (1 + model.copies)


def _size(model: Model, pool: Pool) -> Size:
    times = 1 + model.copies
    now = pool.layout.size * times
    most = max(now, largest_of(model.manifest, pool.layers) * times) if model.sessions else now
    least = fewest(model, pool, len(model.sessions)) * times
    return Size(now, least, most, model.quotas.saved(pool.name))


def shares(budget: int, models: Collection[Model]) -> list[tuple[Model, Pool, int]]:
    """The bytes that each pool of the open models should have.

    What sessions that answer still hold of older generations will be given back, and so will models that nobody uses
    any more when their last reads have ended: that is no reason to shrink, but no room to grow either.  A generation
    that a silent session has too stays: another one beside it would only cost more.
    """
    open_ = [model for model in models if model.ready and (model.in_use or not model.busy)]
    now, free = settled(open_), max(0, budget - used(models))
    each = floor(models) <= budget - committed(models)  # else there is one event for each model
    changed = stays = 0
    opening = [model for model in models if not model.ready]
    waiting = sum(quota_change(pool) * (1 + model.copies) for model in opening for pool in model.pools)
    pools, wants = [], []
    for model in open_:
        times = 1 + model.copies
        for pool in model.pools:
            size = pool.layout.size
            if stuck(model, pool):
                now -= size * times
                stays += size * times
                continue
            change = quota_change(pool) * times
            if change <= free:
                size += change // times
                changed += change
                free -= max(0, change)
            else:
                waiting += change  # it can have that when another pool has given it
            most = max(size, largest_of(model.manifest, pool.layers)) if model.sessions else size
            pools.append((model, pool))
            least = min(size, fewest(model, pool, len(model.sessions) if each else 1))
            wants.append((least * times, size * times, most * times))
    room = max(min(now + changed, budget - committed(models) - stays), budget - (used(models) - now) - waiting)
    divided = divide(room, wants)
    return [(model, pool, share // (1 + model.copies)) for (model, pool), share in zip(pools, divided, strict=True)]
