"""The life of the slots of one pool: who may still read them, what is evicted, what is brought in.

Functions over a model and one of its pools; each appends to ``out`` what has to be done.  Which Fetch is granted, and
when a pool moves to another generation, is ``core.Core``'s business.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator

from expertd.daemon.core import instructions, warmth
from expertd.daemon.core.instructions import Priority
from expertd.daemon.core.state import HANDED, Model, Pool, Session, SlotState
from expertd.daemon.policy import Block
from expertd.protocol.layout import ABSENT

BACKGROUND_READS = 2
"""Background reads and copies that may be on their way into one pool."""

Out = list[instructions.Instruction]


def acked(pool: Pool, session: Session) -> int:
    """The version up to which ``session`` uses nothing that left this pool's table.

    It cannot have looked up here what had left the table before the pool was handed to it.
    """
    return max(session.acked, pool.holders[session.number])


def readers(model: Model, pool: Pool) -> Iterator[Session]:
    """The sessions that may be reading what left the table of ``pool``.

    One that waits in a Fetch reads nothing, and one that has promised so its leases only.
    """
    for number in pool.holders:
        session = model.sessions[number]
        if session.waiting is None and not session.leases_only:
            yield session


def in_the_way(model: Model, pool: Pool) -> list[Session]:
    """The sessions without whose ack some slot of ``pool`` cannot be used again."""
    retired_at = max((pool.slots[number].retired_at for number in pool.retired), default=0)
    late = {session.number for session in readers(model, pool) if acked(pool, session) < retired_at}
    holders = (model.sessions[number] for number in pool.holders)
    return [
        session
        for session in holders
        if session.number in late or (session.leased_pool is pool and session.waiting is None)
    ]


def only_silent(blockers: Collection[Session]) -> bool:
    """Whether silent sessions stand in the way, and nobody who will answer."""
    return any(session.silent for session in blockers) and not any(
        session.owes for session in blockers if not session.silent
    )


def reap(model: Model, pool: Pool) -> None:
    """Free the retired slots that no session can read any more."""
    if not pool.retired:
        return
    safe = min((acked(pool, session) for session in readers(model, pool)), default=model.version)
    for number in sorted(pool.retired):
        slot = pool.slots[number]
        if slot.retired_at <= safe:
            slot.move(SlotState.FREE)
            pool.retired.discard(number)
            pool.give_back(slot)


def make_room(model: Model, pool: Pool, count: int, out: Out, alone: bool) -> None:
    """See that ``count`` slots are free, now or when sessions have acked; what is expected by somebody stays."""
    short = count - pool.spare - len(pool.retired)
    if short > 0:
        evict(model, pool, short, pool.expected, out, alone)
        reap(model, pool)


def evict(
    model: Model, pool: Pool, count: int, keep: Collection[Block], out: Out, alone: bool, pins: bool = True
) -> None:
    """Take up to ``count`` blocks out of the table, none of ``keep``; their slots retire at a new version.

    What is pinned stays too, but for a Fetch that finds no other room (``pins`` false).

    What they were worth is not worked out for a pool that is ``alone``: no other could give it memory.
    """

    pinned: Collection[Block] = model.pinned if pins else ()

    def evictable(block: Block) -> bool:
        number = pool.sealed_slot(block)
        return block not in keep and block not in pinned and number is not None and not pool.slots[number].leases

    victims = model.policy.victims(pool.layers, count, evictable)
    if not victims:
        return
    model.version += 1
    for block in victims:
        if not alone:
            model.quotas.evicted(pool.name, model.policy.chance(block))
        number = pool.where.pop(block)
        pool.read_ahead.discard(block)
        slot = pool.slots[number]
        slot.move(SlotState.RETIRED)
        slot.retired_at = model.version
        pool.retired.add(number)
        pool.sealed -= 1
        model.policy.removed(block)
        model.counts[block[0]].evictions += 1
        out.append(instructions.Publish(pool.segment, pool.row(block[0]), block[1], ABSENT))


def bring(model: Model, pool: Pool, block: Block, out: Out, priority: Priority) -> None:
    """Begin to fill a free slot with ``block``: from one of the pool's sources if it is there, else from disk."""
    slot = pool.take(block)
    slot.block = block
    slot.move(SlotState.FILLING)
    pool.filling += 1
    pool.where[block] = slot.number
    slot.carried = block in pool.carried
    pool.carried.discard(block)
    if priority is Priority.AHEAD:
        pool.going_ahead.add(block)
    elif priority is Priority.BACKGROUND:
        pool.background.add(block)
    for source in pool.sources:
        source_slot = source.sealed_slot(block)
        if source_slot is not None:
            slot.source = source
            source.copies_from += 1
            out.append(instructions.StartCopy(source.segment, source_slot, pool.segment, slot.number))
            break
    else:
        out.append(instructions.StartRead(model.key, pool.segment, slot.number, block[0], block[1], priority))


def demand(pool: Pool, blocks: Collection[Block], out: Out) -> None:
    """A Fetch waits for ``blocks``, which are on their way already: from now on that is demand."""
    for kind in (pool.going_ahead, pool.background):
        for block in sorted(kind.intersection(blocks)):
            kind.discard(block)
            pool.late.pop(block, None)
            out.append(instructions.Promote(pool.segment, pool.where[block]))


def fill(model: Model, pool: Pool, out: Out) -> None:
    """Bring in what is wished for, a little at a time, where there is room; before demand go only copies.

    They are quick, and the memory that they come from is given back when they are done.  Nothing is brought in before
    the whole model has its memory: until then it may still be given up.
    """
    if pool.wish and not model.ready:
        return
    while pool.wish and len(pool.background) < BACKGROUND_READS:
        if not pool.carried and (pool.queue or not model.sessions):
            return
        if not pool.spare:
            forget_wishes(model, pool)
            return
        block = pool.wish.popleft()
        if block not in pool.where:
            bring(model, pool, block, out, Priority.BACKGROUND)


def forget_wishes(model: Model, pool: Pool) -> None:
    """Bring in nothing more in the background."""
    pool.wish.clear()
    for block in pool.carried:
        model.policy.removed(block)
    pool.carried.clear()


def carry(model: Model, pool: Pool, blocks: Iterable[Block]) -> None:
    """Count the first of ``blocks`` as resident, as many as there is room for: they are copied before demand is met."""
    for block in itertools.islice(blocks, pool.layout.slots - len(pool.carried)):
        model.policy.admitted(block)
        pool.carried.add(block)


def hand_over(model: Model, old: Pool, new: Pool) -> list[Block]:
    """The blocks of ``old`` that should stay in ``new``, the least worth first; the others are resident no more."""
    for slot in old.slots:
        if slot.carried and slot.block is not None:  # known as resident, and not here in time
            model.policy.removed(slot.block)
            slot.carried = False
    known = model.policy.victims(old.layers, len(old.where), lambda block: old.sealed_slot(block) is not None)
    known.sort(key=model.pinned.__contains__)
    leaving = len(known) if new.fresh else max(0, len(known) - new.layout.slots)
    for block in known[:leaving]:
        model.policy.removed(block)
    return known[leaving:]


def follow(model: Model, old: Pool, new: Pool) -> None:
    """``new`` takes the place of ``old``: what it is to hold, from where, and in which order.

    First what stays, the most valuable first; then what was wished for, of which what can be copied counts as resident
    already.
    """
    handed = [source for source in old.sources if source.generation == HANDED]

    def can_be_copied(block: Block) -> bool:
        return any(block in source.where for source in handed)

    wished = [] if new.fresh else [block for block in old.wish if block not in old.carried or can_be_copied(block)]
    forget_wishes(model, old)
    stay = hand_over(model, old, new)
    new.carried.update(stay)
    new.wish.extend(reversed(stay))
    if old.layout.slots < new.layout.slots and not new.fresh:  # there may have been no room for all of that
        wished += warmth.still_out(model, new)
    wished = [block for block in dict.fromkeys(wished) if block not in new.carried]
    if not new.fresh:
        carry(model, new, filter(can_be_copied, wished))
    new.wish.extend(sorted(wished, key=lambda block: block not in new.carried))
    if new.holds_all:
        new.wish.extend(block for block in new.blocks if block not in new.carried)
    new.sources = [old, *handed]


def arrived(model: Model, pool: Pool, number: int) -> Block:
    """The slot's bytes are complete: seal it; returns its block."""
    slot = pool.slots[number]
    block = slot.block
    assert block is not None
    slot.move(SlotState.SEALED)
    pool.sealed += 1
    _no_longer_filling(model, pool, number)
    if not (slot.carried or pool.superseded):
        model.policy.admitted(block)
    if model.recalled is not None and block in model.recalled:
        model.recalled.back.add(block)
    slot.carried = False
    return block


def failed(model: Model, pool: Pool, number: int) -> Block:
    """The slot's bytes did not come: free it; returns the block that they should have been."""
    slot = pool.slots[number]
    block = slot.block
    assert block is not None
    if block in pool.background:
        forget_wishes(model, pool)
    pool.read_ahead.discard(block)
    if slot.carried and not pool.superseded:
        model.policy.removed(block)
    _no_longer_filling(model, pool, number)
    slot.move(SlotState.FREE)
    slot.leases.clear()
    del pool.where[block]
    pool.give_back(slot)
    return block


def called_off(model: Model, pool: Pool, number: int, out: Out) -> None:
    """The read into a slot was called off: free it, or read again if somebody has come to wait for its block."""
    block = pool.slots[number].block
    assert block is not None
    if any(block in waiting.missing for waiting in pool.queue):
        pool.late.pop(block, None)
        out.append(instructions.StartRead(model.key, pool.segment, number, block[0], block[1], Priority.DEMAND))
        return
    failed(model, pool, number)
    if block in pool.expected:
        pool.ahead[block] = None  # it is read again when its turn comes
    elif pool.holds_all and not pool.superseded:
        pool.wish.append(block)


def _no_longer_filling(model: Model, pool: Pool, number: int) -> None:
    slot = pool.slots[number]
    assert slot.block is not None
    pool.filling -= 1
    pool.background.discard(slot.block)
    pool.going_ahead.discard(slot.block)
    gate = pool.late.pop(slot.block, None)
    if gate is not None and slot.state is SlotState.SEALED:
        gate.wasted_bytes += model.manifest.layers[slot.block[0]].block_bytes
    if slot.source is not None:
        slot.source.copies_from -= 1
        slot.source = None
