"""Reading ahead: what sessions expect to need soon is read where there is room, and stays until its event has passed.

Functions over a model, its pools and sessions, as in ``slots``.  Three things are expected: the rest of an event whose
first blocks a session fetches (that is known), what it announces of later events (that is foreseen), and what a topic
makes likely (``turns``).  Whether they pay is judged in ``foresight``.  All that is done here gives way to Fetches.
"""

from __future__ import annotations

from collections.abc import Collection

from expertd.daemon.core import events, slots, turns
from expertd.daemon.core.expected import expect, expect_no_more
from expertd.daemon.core.foresight import Kind
from expertd.daemon.core.instructions import Priority
from expertd.daemon.core.slots import Out
from expertd.daemon.core.state import Announced, Model, Pool, Session
from expertd.daemon.policy import Block

READS = 8
"""Reads ahead that may be on their way into one pool.  One is under way at a time; neighbours among them are merged."""
LIKELY_READS = 2
"""The same of what is only likely: nobody may have to wait long behind it."""
HELD = 2
"""Blocks that were read ahead and wait for their event take one in so many slots of a pool at most."""
STALE = 1000
"""A session that has said nothing for so many events of all sessions does not hold the room of what it expected."""
FEW = 4
"""An event of at most so many times the experts of one token is one of single tokens."""
SPARE = 64
"""One in so many slots is kept free, a token's experts at most: what is fetched, or read ahead, is needed too soon to
make room first."""


def begin_event(model: Model, pool: Pool, session: Session, event: events.Fetch, out: Out) -> bool:
    """Take in what a Fetch says of its event.

    Returns:
        Whether the event begins with it; otherwise it goes on with one that has begun.
    """
    now = {(event.layer, expert) for expert in event.experts}
    before, session.rest = session.rest, tuple((event.layer, expert) for expert in event.then)
    rest = set(session.rest)
    was = set(before)
    goes_on = bool(was) and rest | now == was
    expect(pool, [block for block in session.rest if block not in was], pool.ahead)
    if not goes_on:
        passed(model, session, event.layer, (*event.experts, *event.then), out)
    expect_no_more(model, [block for block in before if block not in rest], now, out)
    return not goes_on


def note_wait(model: Model, session: Session, event: events.Fetch) -> None:
    """Take in how long ``session`` has waited for single tokens since its last Fetch."""
    if session.few:
        model.foresight.comparison.waited(event.waited_s - session.waited_s)
    few = FEW * model.manifest.layers[event.layer].top_k
    session.few, session.waited_s = len(event.experts) + len(event.then) <= few, event.waited_s


def announce(model: Model, pool: Pool, session: Session, event: events.Ahead, out: Out) -> None:
    """Take an announcement in; where it pays, its blocks are expected from now on."""
    kind = Kind.PROMPT if event.prompt else Kind(event.distance)
    _judge(model, session, (event.layer, kind), None, out)
    could = [expert for expert in range(pool.layout.experts) if (event.layer, expert) not in pool.where]
    absent = set(event.experts).intersection(could)
    model.foresight.gates[kind].announced += len(absent)
    shuffled = model.foresight.without_knowledge(could, len(absent))
    experts = dict.fromkeys(event.experts if model.foresight.reads(kind) else ())
    session.announced[event.layer, kind] = Announced(set(experts), absent, shuffled)
    expect(pool, [(event.layer, expert) for expert in experts], pool.ahead)


def passed(model: Model, session: Session, layer: int, experts: Collection[int], out: Out) -> None:
    """An event of ``session`` in ``layer`` uses ``experts``: judge what was announced of it."""
    turns.passed(model, session, layer, experts, out)
    if session.announced:
        used = set(experts)
        for kind in Kind:
            _judge(model, session, (layer, kind), used, out)


def forget(model: Model, session: Session, out: Out) -> None:
    """Nothing is expected of ``session`` any more."""
    for place in list(session.announced):
        _judge(model, session, place, None, out)
    turns.forget(model, session, out)
    forget_rest(model, session, out)


def forget_rest(model: Model, session: Session, out: Out) -> None:
    """The event that ``session`` has begun does not go on."""
    rest, session.rest = session.rest, ()
    expect_no_more(model, rest, (), out)


def forget_pool(model: Model, pool: Pool) -> None:
    """``pool`` has another generation: what was expected in it is expected no more."""
    for session in model.sessions.values():
        turns.forget_pool(session, pool)
        for place in [place for place in session.announced if place[0] in pool.layers]:
            del session.announced[place]
        if session.rest and session.rest[0][0] in pool.layers:
            session.rest = ()
    pool.expected.clear()
    pool.ahead.clear()
    pool.likely.clear()
    pool.read_ahead.clear()


def read(model: Model, pool: Pool, out: Out, alone: bool, now: int) -> None:
    """Begin to read what is expected, as far as there is room; what is evicted for it is expected by nobody.

    ``now`` is the number of the core's event.
    """
    most = max(1, pool.layout.slots // HELD)
    if pool.ahead and len(pool.read_ahead) >= most:
        for session in model.sessions.values():
            if (session.announced or session.rest or session.turn) and now - session.heard_at > STALE:
                forget(model, session, out)
    while (pool.ahead or pool.likely) and len(pool.read_ahead) < most:
        queue, reads = (pool.ahead, READS) if pool.ahead else (pool.likely, LIKELY_READS)
        block = next(iter(queue))
        if block in pool.where:
            del queue[block]
            continue
        if len(pool.going_ahead) >= reads:
            return
        if not pool.spare:
            slots.make_room(model, pool, min(len(queue), reads), out, alone)
        if not pool.spare:
            return
        del queue[block]
        slots.bring(model, pool, block, out, Priority.AHEAD)
        pool.read_ahead.add(block)
        _note_begun(model, block)


def keep_spare(model: Model, pool: Pool, out: Out, alone: bool) -> None:
    """Keep some slots free."""
    if not pool.holds_all and not pool.wish:
        top_k = max(model.manifest.layers[layer].top_k for layer in pool.layers)
        slots.make_room(model, pool, min(top_k, pool.layout.slots // SPARE), out, alone)


def in_the_way(model: Model, pool: Pool) -> list[Session]:
    """Those whose ack would make room for what is to be read, and who will not come by themselves."""
    if not pool.ahead or pool.spare or not pool.retired:
        return []
    return [
        session
        for session in slots.in_the_way(model, pool)
        if session.leased_pool is not pool and not session.announced
    ]


def _judge(model: Model, session: Session, place: tuple[int, Kind], used: set[int] | None, out: Out) -> None:
    """The event that was announced has used ``used``; None: that is not known, or it will not be."""
    announced = session.announced.pop(place, None)
    if announced is None:
        return
    layer, kind = place
    pool, gate = model.pool_of_layer[layer], model.foresight.gates[kind]
    if used is not None:
        gate.judge(len(announced.absent), len(announced.absent & used), len(announced.shuffled & used))
    size = model.manifest.layers[layer].block_bytes
    for expert in announced.begun:
        block = layer, expert
        if used is not None and expert in used and block in pool.where:
            gate.useful_bytes += size
        elif block in pool.going_ahead:
            pool.late[block] = gate  # it may still be called off
        else:
            gate.wasted_bytes += size
    fetched = {(layer, expert) for expert in used or ()}
    expect_no_more(model, [(layer, expert) for expert in announced.experts], fetched, out)


def _note_begun(model: Model, block: Block) -> None:
    """Of the announcements that name ``block`` the first counts it as read because of it."""
    layer, expert = block
    for session in model.sessions.values():
        for kind in Kind:
            announced = session.announced.get((layer, kind))
            if announced is not None and expert in announced.experts:
                announced.begun.add(expert)
                return
    for session in model.sessions.values():
        if session.turn is not None and block in session.turn.blocks:
            session.turn.begun.add(block)
            return
