"""A daemon that comes after one that died: what it takes of the pools that sessions hand back, and how it copies.

With real processes: ``test_warm_restart``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
import pytest

from expertd.daemon.core import events
from expertd.daemon.core.events import (
    Attach,
    Ended,
    Handed,
    HandedBack,
    PoolCreated,
    PoolFailed,
    ReadDone,
    Recall,
    Released,
)
from expertd.daemon.core.holdings import ASK_AGAIN
from expertd.daemon.core.instructions import (
    CreatePool,
    Grant,
    Instruction,
    Refuse,
    StartCopy,
    StartRead,
    UnlinkPool,
)
from expertd.daemon.core.slots import BACKGROUND_READS
from expertd.daemon.core.state import Model
from expertd.daemon.policy import Block
from expertd.daemon.pools import SharedPool, create_pool, handed_pool
from expertd.protocol import errors
from expertd.protocol.layout import PAGE, pool_layout
from expertd.protocol.messages import PoolInfo
from expertd.protocol.paths import Home
from expertd.protocol.segments import segment_name
from tests.test_core import ONE_PAGE, TWO_PAGES, Daemon, manifest, of, part
from tests.test_core_warmth import resident

WIDE = manifest(experts=16)
MIXED = manifest(experts=16, shapes=(ONE_PAGE, TWO_PAGES))
SLOTS = 8
OLD = 1 << 40
"""The number that an earlier daemon gave to its pool."""
THERE: dict[Block, int] = {(0, 3): 5, (1, 0): 0, (1, 9): 7, (0, 15): 2}


# -- what is taken -----------------------------------------------------------------------------------------------------


@contextmanager
def old_pool(home: Home, model: str = WIDE.key) -> Iterator[tuple[PoolInfo, SharedPool]]:
    """A pool as the daemon before has left it."""
    layout = pool_layout(2, 16, WIDE.layers[0].parts, SLOTS)
    pool = create_pool(segment_name(home.root), layout, 3, model, (0, 1))
    for (layer, expert), slot in THERE.items():
        pool.table[layer, expert] = slot
        pool.rows(slot)[0][:] = bytes([16 * layer + expert]) * PAGE
    info = PoolInfo(segment=99, generation=3, layers=[0, 1], slots=SLOTS, complete=False, nonce=pool.nonce)
    try:
        yield info, pool
    finally:
        pool.close()


def take(info: PoolInfo, pool: SharedPool, size: int | None = None) -> SharedPool | str:
    return handed_pool(WIDE, info, pool.layout.size if size is None else size, os.dup(pool.segment.readonly))


def test_a_pool_that_is_what_it_says_is_taken_with_its_blocks(home: Home) -> None:
    with old_pool(home) as (info, pool):
        taken = take(info, pool)
        assert isinstance(taken, SharedPool)
        assert {(row, expert) for row, expert in taken.resident} == THERE.keys()
        for (layer, expert), slot in THERE.items():
            assert taken.table[layer, expert] == slot
            assert bytes(taken.rows(slot)[0]) == bytes([16 * layer + expert]) * PAGE
            assert taken.rows(slot)[0].readonly
        taken.close()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"nonce": bytes(16)}, "its header is not that of such a pool"),
        ({"generation": 2}, "its header is not that of such a pool"),
        ({"layers": [1, 0]}, "its header is not that of such a pool"),
        ({"layers": [0]}, "its header is not that of such a pool"),
        ({"layers": []}, "it names layers that the model, which has 2, does not have"),
        ({"layers": [0, 0]}, "it names layers that the model"),
        ({"layers": [0, 2]}, "it names layers that the model"),
        ({"slots": SLOTS - 1}, "its segment has"),
        ({"slots": 0}, "it says to have 0 slots"),
        ({"slots": 33}, "it says to have 33 slots"),
    ],
)
def test_a_pool_that_is_not_what_it_says_is_left_alone(home: Home, changes: dict[str, object], why: str) -> None:
    with old_pool(home) as (info, pool):
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH208, PTH112
        found = take(msgspec.structs.replace(info, **changes), pool)
        assert isinstance(found, str) and found.startswith(why)
        if before:
            assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left"  # noqa: PTH208


def test_a_pool_of_another_model_is_left_alone(home: Home) -> None:
    with old_pool(home, model="0123456789abcdef") as (info, pool):
        assert take(info, pool) == "its header is not that of such a pool"


def test_layers_of_different_shapes_are_no_pool(home: Home) -> None:
    mixed = manifest(experts=16, shapes=((PAGE,), TWO_PAGES))
    with old_pool(home, model=mixed.key) as (info, pool):
        found = handed_pool(mixed, info, pool.layout.size, os.dup(pool.segment.readonly))
        assert found == "its layers have blocks of different shapes"


@pytest.mark.parametrize("spoilt", [{(0, 0): SLOTS}, {(0, 0): -2}, {(0, 0): 5}])
def test_a_table_that_makes_no_sense_is_left_alone(home: Home, spoilt: dict[Block, int]) -> None:
    with old_pool(home) as (info, pool):
        for block, slot in spoilt.items():
            pool.table[block] = slot
        assert take(info, pool) == "its table names slots that there are not, or one of them twice"


def test_a_segment_that_is_shorter_than_it_says_is_left_alone(home: Home) -> None:
    with old_pool(home) as (info, pool), open(os.memfd_create("short"), "wb") as short:  # noqa: PTH123
        short.write(b"short")
        short.flush()
        found = handed_pool(WIDE, info, pool.layout.size, os.dup(short.fileno()))
        assert isinstance(found, str) and "5 bytes where" in found


# -- how it is copied --------------------------------------------------------------------------------------------------


def come(
    slots: int, where: dict[Block, int] = THERE, recall: Recall | None = None, layers: tuple[int, ...] = (0, 1)
) -> tuple[Daemon, Model, list[StartCopy]]:
    """A model comes to a core of so many slots, with one pool of an earlier daemon; what is copied first."""
    daemon = Daemon(slots)
    created = of(CreatePool, daemon.ask(1, WIDE))
    if recall is not None:
        daemon.feed(recall)
    layout = pool_layout(len(layers), 16, WIDE.layers[0].parts, max(where.values()) + 1)
    handed = Handed(OLD, layers, layout, where)
    daemon.feed(HandedBack(1, WIDE.key, (handed,)))
    out = [each for create in created for each in daemon.feed(PoolCreated(create.segment))]
    assert len(of(Grant, out)) == 1
    (model,) = daemon.core.models.values()
    return daemon, model, of(StartCopy, out)


def copy_all(daemon: Daemon, copies: list[StartCopy]) -> list[StartCopy]:
    """Have all copies arrive, and those that begin meanwhile; returns them all."""
    done = []
    while copies:
        copy = copies.pop(0)
        done.append(copy)
        copies += of(StartCopy, daemon.feed(ReadDone(copy.segment, copy.slot, 0)))
    return done


def test_every_block_is_copied_and_none_is_read() -> None:
    daemon, model, copies = come(SLOTS)
    assert len(copies) == BACKGROUND_READS
    done = copy_all(daemon, copies)
    assert sorted(copy.source_slot for copy in done) == sorted(THERE.values())
    assert resident(model) == THERE.keys()
    assert (model.bytes_read, model.misses, model.copied) == (0, 0, 0)
    assert model.recalled is not None
    assert (model.recalled.adopted, len(model.recalled.back), len(model.recalled.blocks)) == (4, 4, 4)
    assert of(StartRead, daemon.said) == []


def test_the_old_segment_counts_until_all_is_copied_and_its_session_has_released_it() -> None:
    daemon, model, copies = come(SLOTS)
    (old,) = model.old
    assert daemon.core.used == model.size + old.layout.size
    copy_all(daemon, copies)
    assert daemon.core.used == model.size + old.layout.size, "its session has it still"
    assert daemon.core.holding == [1]
    assert daemon.feed(Released(1, OLD)) == [UnlinkPool(OLD)]
    assert model.old == []
    assert daemon.core.used == model.size


def test_a_session_that_releases_the_old_segment_early_does_not_end_the_copying() -> None:
    daemon, model, copies = come(SLOTS)
    assert daemon.feed(Released(1, OLD)) == []
    copy_all(daemon, copies)
    assert resident(model) == THERE.keys()
    assert of(UnlinkPool, daemon.said) == [UnlinkPool(OLD)]


def test_a_fetch_meanwhile_is_served_from_it_without_a_read() -> None:
    daemon, model, copies = come(SLOTS)
    waiting = [block for block in THERE if block not in {b for pool in model.pools for b in pool.where}]
    layer, expert = waiting[-1]
    out = daemon.fetch(1, 1, layer, expert)
    assert of(StartRead, out) == []
    copy_all(daemon, copies + of(StartCopy, out))
    assert resident(model) == THERE.keys()


def test_what_it_lacks_is_read() -> None:
    daemon, model, copies = come(SLOTS)
    out = daemon.fetch(1, 1, 0, 7)
    assert [(read.layer, read.expert) for read in of(StartRead, out)] == [(0, 7)]
    daemon.finish()
    copy_all(daemon, copies)
    assert resident(model) == {*THERE, (0, 7)}


def test_with_fewer_slots_what_the_record_puts_first_is_copied() -> None:
    known = Daemon(SLOTS)
    known.attach(1, WIDE)
    for sequence in range(1, 9):
        known.get(1, sequence, 1, 0, 9)
    (before,) = known.core.models.values()
    recall = Recall(WIDE.key, ((1, 0), (1, 9)), before.policy.statistics(), 5.0)
    daemon, model, copies = come(2, recall=recall)
    copy_all(daemon, copies)
    assert resident(model) == {(1, 0), (1, 9)}
    assert model.recalled is not None and model.recalled.recorded_at == 5.0


def test_what_is_recorded_and_was_not_handed_back_is_read_behind_it() -> None:
    daemon, model, copies = come(SLOTS, recall=Recall(WIDE.key, ((0, 1), (0, 3), (0, 2)), {}, 5.0))
    copy_all(daemon, copies)
    daemon.finish()
    assert resident(model) == {*THERE, (0, 1), (0, 2)}
    assert [(read.layer, read.expert) for read in of(StartRead, daemon.said)] == [(0, 1), (0, 2)]


def test_a_pool_that_holds_all_takes_every_block_to_its_natural_place() -> None:
    where = {(layer, expert): 16 * layer + expert for layer in (0, 1) for expert in range(16)}
    del where[1, 4]
    daemon, model, copies = come(32, where)
    done = copy_all(daemon, copies)
    assert len(done) == 31
    assert all(copy.slot == copy.source_slot for copy in done)
    daemon.finish()
    assert model.pools[0].complete
    assert [(read.layer, read.expert) for read in of(StartRead, daemon.said)] == [(1, 4)]


HANDED_POOL = Handed(OLD, (0, 1), pool_layout(2, 16, WIDE.layers[0].parts, SLOTS), THERE)


def test_what_nobody_of_the_model_hands_back_is_given_back() -> None:
    daemon = Daemon(SLOTS)
    daemon.attach(1, WIDE)
    assert daemon.feed(HandedBack(2, WIDE.key, (HANDED_POOL,))) == [UnlinkPool(OLD)]
    assert daemon.feed(HandedBack(1, "unknown", (HANDED_POOL,))) == [UnlinkPool(OLD)]


def survivor(daemon: Daemon, session: int = 2) -> list[StartCopy]:
    """A session that has an earlier daemon's pool comes to a model that is here; what is copied first."""
    daemon.attach(session, WIDE)
    return of(StartCopy, daemon.feed(HandedBack(session, WIDE.key, (HANDED_POOL,))))


def test_a_session_that_comes_late_still_brings_what_is_absent() -> None:
    """Somebody else was faster, has read two of its blocks and is reading a third."""
    daemon = Daemon(SLOTS)
    daemon.attach(1, WIDE)
    daemon.get(1, 1, 0, 3)
    daemon.get(1, 2, 1, 0)
    daemon.fetch(1, 3, 1, 9)
    copies = survivor(daemon)
    assert [copy.source_slot for copy in copies] == [THERE[0, 15]]
    copy_all(daemon, copies)
    daemon.finish()
    (model,) = daemon.core.models.values()
    assert resident(model) == THERE.keys()
    assert daemon.reads_begun() == [(0, 3), (1, 0), (1, 9)]
    assert model.recalled is not None and model.recalled.adopted == 1


def test_what_a_record_names_is_copied_if_it_is_handed_back_before_it_is_read() -> None:
    daemon = Daemon(SLOTS)
    created = of(CreatePool, daemon.ask(1, WIDE))
    daemon.feed(Recall(WIDE.key, tuple(sorted(THERE)), {}, 5.0))
    for create in created:
        daemon.feed(PoolCreated(create.segment))
    assert survivor(daemon) == [], "two at a time"
    copy_all(daemon, of(StartCopy, daemon.finish()))
    (model,) = daemon.core.models.values()
    assert resident(model) == THERE.keys()
    assert len(daemon.reads_begun()) == BACKGROUND_READS, "those that were under way"
    assert model.recalled is not None
    assert (model.recalled.recorded_at, model.recalled.back) == (5.0, set(THERE))


def test_where_nothing_is_free_what_is_missed_is_copied_as_long_as_it_is_there() -> None:
    daemon = Daemon(2)
    daemon.attach(1, WIDE)
    daemon.get(1, 1, 0, 0, 1)
    daemon.ack(1, 0, 1)
    assert survivor(daemon) == []
    (copy,) = of(StartCopy, daemon.fetch(2, 1, 0, 3) + daemon.ack(1, 1, 1))
    assert (copy.source, copy.source_slot) == (OLD, THERE[0, 3])
    daemon.feed(ReadDone(copy.segment, copy.slot, 0))
    assert of(UnlinkPool, daemon.feed(Released(2, OLD))) == [UnlinkPool(OLD)]
    daemon.fetch(2, 2, 0, 15)
    daemon.ack(1, daemon.core.models[WIDE.key].version, 1)
    assert daemon.reads_begun() == [(0, 0), (0, 1), (0, 15)]


def test_a_pool_that_two_sessions_hand_back_counts_once_and_stays_for_both() -> None:
    daemon, model, copies = come(SLOTS)
    copy_all(daemon, copies)
    assert survivor(daemon) == []
    assert daemon.core.used == model.size + HANDED_POOL.layout.size
    assert of(UnlinkPool, daemon.feed(Released(1, OLD))) == []
    assert of(UnlinkPool, daemon.feed(Ended(2))) == [UnlinkPool(OLD)]


def test_a_session_that_ends_before_it_is_open_leaves_nothing_behind() -> None:
    daemon = Daemon(SLOTS)
    (create,) = of(CreatePool, daemon.ask(1, WIDE))
    daemon.feed(HandedBack(1, WIDE.key, (HANDED_POOL,)))
    assert daemon.core.holding == []
    daemon.feed(Ended(1))
    copy_all(daemon, of(StartCopy, daemon.feed(PoolCreated(create.segment))))
    daemon.feed(events.Unwanted(WIDE.key))
    assert daemon.core.used == 0
    assert {unlink.segment for unlink in of(UnlinkPool, daemon.said)} == {OLD, create.segment}


# -- with how much memory a model begins whose pools are handed back ---------------------------------------------------


def begin(room: int, budget: int = 1 + SLOTS) -> tuple[Daemon, CreatePool]:
    """A model whose pool of so many pages is handed back comes to a daemon with that budget; all in pages."""
    daemon = Daemon(budget=budget * PAGE)
    (create,) = of(CreatePool, daemon.feed(Attach(1, 101, "shm", WIDE, HANDED_POOL.layout.size, room * PAGE)))
    daemon.feed(HandedBack(1, WIDE.key, (HANDED_POOL,)))
    return daemon, create


@pytest.mark.parametrize(
    ("room", "budget", "slots"),
    [
        (100, 1 + SLOTS, SLOTS),  # as in any move, both are there for a while
        (6, 1 + SLOTS, 5),  # what the machine has
        (0, 1 + SLOTS, 2),  # one event
        (0, 2 + SLOTS + 4, 4),  # what the budget leaves
        (0, 2 + 2 * SLOTS, SLOTS),
    ],
)
def test_it_begins_with_what_the_budget_leaves_or_the_machine_has(room: int, budget: int, slots: int) -> None:
    _, create = begin(room, budget)
    assert create.layout.slots == slots


def grow(daemon: Daemon, out: list[Instruction]) -> list[StartCopy]:
    """The pool moves on when its session has released the old one; what is copied then."""
    (create,) = of(CreatePool, out)
    assert create.layout.slots == SLOTS
    copies = of(StartCopy, daemon.feed(PoolCreated(create.segment)))
    return copy_all(daemon, copies)


def test_it_grows_when_the_old_pool_has_gone_and_the_rest_is_read() -> None:
    daemon, create = begin(0)
    done = copy_all(daemon, of(StartCopy, daemon.feed(PoolCreated(create.segment))))
    assert len(done) == 2
    assert of(CreatePool, daemon.said) == [create]
    copies = grow(daemon, daemon.feed(Released(1, OLD)))
    assert len(copies) == 2
    daemon.finish()
    (model,) = daemon.core.models.values()
    assert resident(model) == THERE.keys()
    assert len(daemon.reads_begun()) == 2


def failing(daemon: Daemon, create: CreatePool) -> list[int]:
    """The system gives no memory for any of this pool's sizes; the slots of those that were tried."""
    tried = []
    while True:
        tried.append(create.layout.slots)
        assert create.least is (create.layout.slots == WIDE.layers[0].top_k)
        creates = of(CreatePool, daemon.feed(PoolFailed(create.segment, NO_MEMORY)))
        if not creates:
            return tried
        (create,) = creates


NO_MEMORY = errors.SegmentFailed("no memory")


def test_where_the_system_gives_no_memory_for_both_half_is_tried_and_what_is_worth_most_is_copied() -> None:
    daemon, create = begin(100)
    (smaller,) = of(CreatePool, daemon.feed(PoolFailed(create.segment, NO_MEMORY)))
    assert smaller.layout.slots == 3
    out = daemon.feed(PoolCreated(smaller.segment))
    assert len(of(Grant, out)) == 1
    assert len(copy_all(daemon, of(StartCopy, out))) == 3
    (model,) = daemon.core.models.values()
    assert len(resident(model)) == 3
    assert len(grow(daemon, daemon.feed(Released(1, OLD)))) == 3
    daemon.finish()
    assert resident(model) == THERE.keys()


def test_where_it_gives_none_for_one_event_the_session_is_refused_and_nothing_is_left() -> None:
    daemon, create = begin(100)
    assert failing(daemon, create) == [SLOTS, 3, 2]
    assert [refusal.error for refusal in of(Refuse, daemon.said)] == [NO_MEMORY]
    assert of(UnlinkPool, daemon.said) == [UnlinkPool(OLD)]
    assert daemon.core.models == {} and daemon.core.used == 0


def test_memory_that_is_not_there_yet_when_the_pool_should_grow_is_asked_for_again() -> None:
    """Its session has said that it has released the old one, and the system is a little behind."""
    daemon, create = begin(0)
    copy_all(daemon, of(StartCopy, daemon.feed(PoolCreated(create.segment))))
    (create,) = of(CreatePool, daemon.feed(Released(1, OLD)))
    assert failing(daemon, create) == [SLOTS, 5, 3]
    assert daemon.core.wanting
    (model,) = daemon.core.models.values()
    begun = model.pools[0].segment
    assert len(grow(daemon, daemon.feed(events.MemoryWanted()))) == 2
    daemon.feed(Released(1, begun))
    assert not daemon.core.wanting
    daemon.finish()
    assert resident(model) == THERE.keys()


def test_memory_that_there_never_is_is_not_asked_for_for_ever() -> None:
    daemon, create = begin(0)
    copy_all(daemon, of(StartCopy, daemon.feed(PoolCreated(create.segment))))
    event: events.Event = Released(1, OLD)
    for _ in range(1 + ASK_AGAIN):
        (create,) = of(CreatePool, daemon.feed(event))
        assert failing(daemon, create) == [SLOTS, 5, 3]
        wanting, event = daemon.core.wanting, events.MemoryWanted()
    assert not wanting


def test_a_model_of_several_pools_begins_with_the_one_that_there_is_memory_for() -> None:
    daemon, created = come_mixed(100, ({(0, 1): 3, (0, 2): 0}, {(1, 5): 0}))
    daemon.feed(PoolCreated(created[1].segment))
    (smaller,) = of(CreatePool, daemon.feed(PoolFailed(created[0].segment, NO_MEMORY)))
    assert smaller.layers == created[0].layers and smaller.layout.size <= created[0].layout.size // 2
    out = daemon.feed(PoolCreated(smaller.segment))
    assert {copy.segment for copy in of(StartCopy, out)} == {smaller.segment, created[1].segment}


def test_a_session_that_ends_at_once_leaves_nothing_behind() -> None:
    daemon, model, copies = come(SLOTS)
    daemon.feed(Ended(1))
    copy_all(daemon, copies)
    assert model.old == []
    assert resident(model) == THERE.keys()
    daemon.feed(events.Unwanted(model.key))
    assert daemon.core.used == 0


def test_a_model_that_moves_meanwhile_keeps_what_it_has() -> None:
    """Its budget shrinks in the middle: what is left to copy is still copied, as far as there is room."""
    where = {(layer, expert): 4 * layer + expert for layer in (0, 1) for expert in range(4)}
    daemon, model, copies = come(SLOTS, where)
    out = daemon.feed(events.BudgetChanged(7 * PAGE))
    creates = of(CreatePool, out)
    assert len(creates) == 1
    copies += of(StartCopy, daemon.feed(PoolCreated(creates[0].segment)))
    copy_all(daemon, copies)
    daemon.finish()
    assert len(resident(model)) == 6 <= len(where)
    daemon.feed(events.Released(1, 1))
    assert model.bytes_read == 0


def come_mixed(slots: int, where: tuple[dict[Block, int], dict[Block, int]]) -> tuple[Daemon, list[CreatePool]]:
    """A model with a pool for each of its two layers comes, and both pools of an earlier daemon; nothing is created."""
    daemon = Daemon(budget=slots * PAGE)
    created = of(CreatePool, daemon.ask(1, MIXED))
    handed = []
    for layer, there in enumerate(where):
        layout = pool_layout(1, 16, MIXED.layers[layer].parts, 16)
        handed.append(Handed(OLD + layer, (layer,), layout, there))
    assert daemon.feed(HandedBack(1, MIXED.key, tuple(handed))) == []
    return daemon, created


def test_nothing_is_copied_before_the_whole_model_has_its_memory() -> None:
    """Somebody may pin blocks of it meanwhile, and it may be given up."""
    daemon, created = come_mixed(100, ({(0, 1): 3}, {(1, 5): 0}))
    assert daemon.feed(events.Pin(MIXED.key, ((0, 1), (1, 5)), True)) == []
    assert of(StartCopy, daemon.feed(PoolCreated(created[0].segment))) == []
    assert daemon.feed(events.Warm(MIXED.key, ((0, 1),))) == []
    copies = of(StartCopy, daemon.feed(PoolCreated(created[1].segment)))
    assert {(copy.segment, copy.source_slot) for copy in copies} == {(created[0].segment, 3), (created[1].segment, 0)}


def test_each_pool_copies_from_those_of_its_own_layers() -> None:
    daemon, _ = come_mixed(100, ({(0, 1): 3}, {(1, 5): 0}))
    (model,) = daemon.core.models.values()
    assert [[source.layers for source in pool.sources] for pool in model.pools] == [[(0,)], [(1,)]]


@pytest.mark.parametrize("early", [False, True])
def test_what_is_recorded_and_has_no_room_keeps_nothing_of_the_old_daemon(early: bool) -> None:
    """Its session goes while blocks are copied: all that has a place is, and the segment goes, whoever comes after."""
    where = {(layer, expert): 16 * layer + expert for layer in (0, 1) for expert in range(16)}
    daemon, model, copies = come(SLOTS, where, Recall(WIDE.key, tuple(where), {}, 5.0))
    daemon.feed(Ended(1) if early else Released(1, OLD))
    assert len(copy_all(daemon, copies)) == SLOTS
    assert model.old == []
    assert len(resident(model)) == SLOTS


def test_what_was_not_copied_before_a_move_is_copied_after_it_with_nobody_there() -> None:
    where = {(layer, expert): 16 * layer + expert for layer in (0, 1) for expert in range(6)}
    daemon, model, _ = come(14, where)
    creates = of(CreatePool, daemon.feed(events.BudgetChanged(12 * PAGE)))
    copies = of(StartCopy, daemon.feed(PoolCreated(creates[0].segment)))
    daemon.feed(Ended(1))
    copy_all(daemon, copies)
    assert len(resident(model)) == len(where) - BACKGROUND_READS  # these were on their way into the one before
    assert [pool.generation for pool in model.old] == [0, 1]  # as they still are
    assert of(StartRead, daemon.said) == []


def test_no_segment_is_numbered_as_one_that_was_handed_back() -> None:
    daemon = Daemon(SLOTS)
    daemon.attach(1, WIDE)
    daemon.feed(HandedBack(1, WIDE.key, (Handed(2, (0, 1), HANDED_POOL.layout, {}),)))
    (create,) = of(CreatePool, daemon.feed(events.BudgetChanged(4 * PAGE)))
    assert create.segment == 3


def test_a_pool_writes_down_what_it_is_for(home: Home) -> None:
    with old_pool(home) as (_, pool):
        assert np.frombuffer(pool.segment.mapping, np.uint8, 16, 40).tobytes() == WIDE.key.encode()
    assert part((PAGE,)).block_bytes == PAGE
