"""The core's rules, one behaviour a test: attaching, fetching, evicting, failing, ending, filling, planning.

Each test feeds events and looks at the instructions that come back.  Interleavings that nobody thought of are
``test_core_machine``'s business; which block a policy chooses is ``test_policy``'s.  Nothing here reads, maps or sends.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.daemon.core import Core
from expertd.daemon.core.core import LEARNED_FORWARDS
from expertd.daemon.core.events import (
    Ack,
    Attach,
    Ended,
    Event,
    Fetch,
    PoolCreated,
    PoolFailed,
    ReadDone,
    ReadFailed,
    Routed,
)
from expertd.daemon.core.instructions import (
    Announce,
    Answer,
    AskAck,
    CreatePool,
    Grant,
    Instruction,
    Priority,
    Publish,
    Refuse,
    StartRead,
    UnlinkPool,
)
from expertd.daemon.core.plan import largest, plan_pools, smallest
from expertd.daemon.core.slots import BACKGROUND_READS
from expertd.daemon.core.state import InvalidTransition, LayerCounts, Slot, SlotState
from expertd.daemon.policy import LRU
from expertd.daemon.status import model_status
from expertd.protocol import errors
from expertd.protocol.layout import PAGE, slot_limit
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.messages import AliasMode

Kind = TypeVar("Kind", bound=Instruction)
Shape = tuple[int, ...]
ONE_PAGE: Shape = (PAGE,)
TWO_PAGES: Shape = (2 * PAGE,)


def part(shape: Shape, dtype: str = "U8") -> Part:
    return Part("up_proj.weight", dtype, shape, ("tensor",), (0,))


def manifest(
    name: str = "m", *, experts: int = 4, top_k: int = 2, shapes: Sequence[Shape] = (ONE_PAGE, ONE_PAGE)
) -> Manifest:
    """A model with one layer for each of ``shapes``; a block of ONE_PAGE takes one page, a table one more."""
    layers = tuple(Layer(f"layers.{n}", experts, top_k, (part(shape),)) for n, shape in enumerate(shapes))
    return Manifest(f"/{name}", "family", (), layers)


def of(kind: type[Kind], out: Sequence[Instruction]) -> list[Kind]:
    return [instruction for instruction in out if isinstance(instruction, kind)]


def named_budget(error: errors.ExpertdError) -> int:
    """The budget that a message tells the user to set."""
    found = re.search(r"--budget (\d+)", error.message)
    assert found, error.message
    return int(found.group(1))


class Daemon:
    """A core and what it said so far; ``slots`` is the size of the one pool of a one-shape model."""

    def __init__(self, slots: int | None = None, *, budget: int | None = None) -> None:
        self.core = Core(budget if budget is not None else (1 + (slots or 0)) * PAGE)
        self.said: list[Instruction] = []
        self.reads: dict[tuple[int, int], StartRead] = {}

    def feed(self, event: Event) -> list[Instruction]:
        out = self.core.handle(event)
        self.said += out
        self.reads |= {(read.layer, read.expert): read for read in of(StartRead, out)}
        return out

    def ask(self, session: int, model: Manifest, mode: AliasMode = "shm") -> list[Instruction]:
        return self.feed(Attach(session, 100 + session, mode, model))

    def attach(self, session: int, model: Manifest, mode: AliasMode = "shm") -> Grant:
        """Attach, let all pools be created, and return the grant."""
        out = self.ask(session, model, mode)
        for create in of(CreatePool, out):
            out = self.feed(PoolCreated(create.segment))
        (grant,) = of(Grant, out)
        assert grant.session == session
        return grant

    def fetch(self, session: int, sequence: int, layer: int, *experts: int) -> list[Instruction]:
        return self.feed(Fetch(session, sequence, self.segment(session, layer), layer, experts))

    def segment(self, session: int, layer: int) -> int:
        """Where the layer is now, 0 if there is no such session or layer."""
        if session not in self.core.sessions:
            return 0
        pool = self.core.models[self.core.sessions[session].model].pool_of_layer.get(layer)
        return 0 if pool is None else pool.segment

    def ack(self, session: int, version: int, sequence: int) -> list[Instruction]:
        return self.feed(Ack(session, version, sequence))

    def done(self, layer: int, expert: int) -> list[Instruction]:
        read = self.reads.pop((layer, expert))
        return self.feed(ReadDone(read.segment, read.slot, 7))

    def fail(self, layer: int, expert: int) -> list[Instruction]:
        read = self.reads.pop((layer, expert))
        return self.feed(ReadFailed(read.segment, read.slot, errors.ReadFailed("bad sector")))

    def reads_begun(self) -> list[tuple[int, int]]:
        """The blocks of all reads so far, in their order."""
        return [(read.layer, read.expert) for read in of(StartRead, self.said)]

    def finish(self) -> list[Instruction]:
        """Finish all reads, and those that start meanwhile; returns what was said."""
        out: list[Instruction] = []
        while self.reads:
            out += self.done(*next(iter(self.reads)))
        return out

    def get(self, session: int, sequence: int, layer: int, *experts: int) -> Answer:
        """Fetch, finish the reads, and return the answer."""
        out = self.fetch(session, sequence, layer, *experts) + self.finish()
        (answer,) = of(Answer, out)
        return answer


def two_sessions(slots: int) -> Daemon:
    """Two open sessions of one model of 2 layers of 4 experts, over one pool."""
    daemon = Daemon(slots)
    daemon.attach(1, manifest())
    daemon.attach(2, manifest())
    return daemon


# -- attaching ---------------------------------------------------------------------------------------------------------


def test_attach_creates_the_pools_and_grants_when_all_are_there() -> None:
    model = manifest(shapes=(ONE_PAGE, TWO_PAGES))
    daemon = Daemon(budget=smallest(model))
    out = daemon.ask(1, model)
    first, second = of(CreatePool, out)
    assert len(out) == 2
    assert daemon.feed(PoolCreated(second.segment)) == []
    (grant,) = daemon.feed(PoolCreated(first.segment))
    assert isinstance(grant, Grant)
    assert (grant.session, grant.model, grant.version) == (1, model.key, 0)
    assert [(pool.segment, pool.layers, pool.slots, pool.complete) for pool in grant.pools] == [
        (first.segment, [0], 2, False),
        (second.segment, [1], 2, False),
    ]


def test_two_attaches_of_one_model_share_its_pools() -> None:
    daemon = Daemon(3)
    first = daemon.attach(1, manifest())
    out = daemon.ask(2, manifest())
    (second,) = out
    assert isinstance(second, Grant)
    assert [pool.segment for pool in second.pools] == [pool.segment for pool in first.pools]


def test_attaches_that_come_while_pools_are_created_wait_for_them() -> None:
    daemon = Daemon(3)
    (create,) = of(CreatePool, daemon.ask(1, manifest()))
    assert daemon.ask(2, manifest()) == []
    assert [grant.session for grant in of(Grant, daemon.feed(PoolCreated(create.segment)))] == [1, 2]


def test_two_models_share_nothing() -> None:
    daemon = Daemon(budget=40 * PAGE)
    first, second = daemon.attach(1, manifest("a")), daemon.attach(2, manifest("b"))
    assert not {pool.segment for pool in first.pools} & {pool.segment for pool in second.pools}


@pytest.mark.parametrize("mode", ["shm", "copy"])
@pytest.mark.parametrize("shapes", [(ONE_PAGE,) * 3, (ONE_PAGE, TWO_PAGES)])
def test_a_budget_too_small_names_the_smallest_that_works(mode: AliasMode, shapes: tuple[Shape, ...]) -> None:
    model = manifest(shapes=shapes)
    (refusal,) = Daemon(budget=1).ask(1, model, mode)
    assert isinstance(refusal, Refuse)
    assert refusal.sequence is None
    assert isinstance(refusal.error, errors.BudgetTooSmall)
    needed = named_budget(refusal.error)
    (again,) = Daemon(budget=needed - 1).ask(1, model, mode)
    assert isinstance(again, Refuse)
    assert named_budget(again.error) == needed
    daemon = Daemon(budget=needed)
    daemon.attach(1, model, mode)
    assert daemon.core.used <= needed


def test_an_idle_model_is_dropped_for_a_newcomer() -> None:
    daemon = Daemon(8)
    old = daemon.attach(1, manifest("a")).pools[0].segment
    daemon.finish()
    daemon.feed(Ended(1))
    out = daemon.ask(2, manifest("b"))
    assert [type(instruction) for instruction in out] == [UnlinkPool, CreatePool]
    assert of(UnlinkPool, out) == [UnlinkPool(old)]
    assert daemon.core.used <= daemon.core.budget


def test_of_idle_models_the_longest_unused_go_first_and_no_more_than_needed() -> None:
    daemon = Daemon(budget=3 * 9 * PAGE)
    segments = {}
    for session, name in enumerate("abc", start=1):
        segments[name] = daemon.attach(session, manifest(name)).pools[0].segment
        daemon.finish()
    for session in (2, 1, 3):
        daemon.feed(Ended(session))
    assert of(UnlinkPool, daemon.ask(4, manifest("d"))) == [UnlinkPool(segments["b"])]


def test_an_idle_model_stays_when_there_is_room_beside_it() -> None:
    daemon = Daemon(budget=18 * PAGE)
    daemon.attach(1, manifest("a"))
    daemon.finish()
    daemon.feed(Ended(1))
    daemon.attach(2, manifest("b"))
    assert not of(UnlinkPool, daemon.said)
    assert not of(CreatePool, daemon.ask(3, manifest("a")))


def test_a_newcomer_gets_the_memory_of_an_idle_model_after_its_last_reads() -> None:
    """It cannot go while a read fills it; the newcomer begins with what one event needs."""
    daemon = Daemon(8)
    daemon.attach(1, manifest("a"))
    assert daemon.reads
    daemon.feed(Ended(1))
    out = daemon.ask(2, manifest("b"))
    assert not of(UnlinkPool, out)
    (create,) = of(CreatePool, out)
    assert create.layout.size == smallest(manifest("b"))
    assert [grant.session for grant in of(Grant, daemon.feed(PoolCreated(create.segment)))] == [2]
    out = daemon.finish()
    assert len(of(UnlinkPool, out)) == 1
    (larger,) = of(CreatePool, out)
    assert larger.layout.slots == 8


@pytest.mark.parametrize("created", [False, True])
def test_a_model_in_use_is_not_dropped_for_a_newcomer_but_makes_room(created: bool) -> None:
    daemon = Daemon(8)
    first = of(CreatePool, daemon.ask(1, manifest("a")))
    if created:
        daemon.feed(PoolCreated(first[0].segment))
        daemon.finish()
    out = daemon.ask(2, manifest("b"))
    if not created:
        assert [type(instruction) for instruction in out] == [CreatePool]
        out += daemon.feed(PoolCreated(first[0].segment))
    assert [create.generation for create in of(CreatePool, out)] == [1, 2]
    assert not of(UnlinkPool, out)


def test_a_session_in_copy_mode_is_charged_a_copy_of_the_pools() -> None:
    model = manifest()
    daemon = Daemon(budget=3 * largest(model))
    daemon.attach(1, model, "copy")
    assert daemon.core.used == 2 * largest(model)
    daemon.attach(2, model, "shm")
    assert daemon.core.used == 2 * largest(model)
    daemon.attach(3, model, "copy")
    assert daemon.core.used == 3 * largest(model)
    daemon.feed(Ended(1))
    daemon.feed(Ended(3))
    assert daemon.core.used == largest(model)


def test_a_first_session_in_copy_mode_gets_pools_of_half_the_budget() -> None:
    daemon = Daemon(budget=8 * PAGE)
    assert daemon.attach(1, manifest(), "copy").pools[0].slots == 3
    assert daemon.core.used == 8 * PAGE


def test_a_session_in_copy_mode_without_room_is_refused_and_told_what_works() -> None:
    daemon = Daemon(3)
    daemon.attach(1, manifest())
    (refusal,) = daemon.ask(2, manifest(), "copy")
    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, errors.BudgetTooSmall)
    assert named_budget(refusal.error) == 2 * 4 * PAGE


def test_a_copy_is_charged_while_its_session_is_still_opening() -> None:
    daemon = Daemon(budget=12 * PAGE)
    daemon.ask(1, manifest("a"), "copy")
    assert 10 * PAGE <= daemon.core.used <= 12 * PAGE
    (other,) = of(CreatePool, daemon.ask(2, manifest("b")))
    assert other.layout.size == smallest(manifest("b")), "what the copy takes is not there for others"


def test_two_copies_that_are_opening_at_once_both_count() -> None:
    daemon = Daemon(budget=8 * PAGE)
    (create,) = of(CreatePool, daemon.ask(1, manifest(), "copy"))
    daemon.ask(2, manifest(), "copy")
    daemon.feed(PoolCreated(create.segment))
    assert daemon.core.used <= daemon.core.budget


def test_a_pool_that_could_not_be_created_refuses_all_who_wait_for_it() -> None:
    model = manifest(shapes=(ONE_PAGE, TWO_PAGES))
    daemon = Daemon(budget=smallest(model))
    first, second = of(CreatePool, daemon.ask(1, model))
    daemon.ask(2, model)
    daemon.feed(PoolCreated(first.segment))
    error = errors.SegmentFailed("no room")
    out = daemon.feed(PoolFailed(second.segment, error))
    assert of(UnlinkPool, out) == [UnlinkPool(first.segment)]
    assert of(Refuse, out) == [Refuse(1, error, None), Refuse(2, error, None)]
    assert daemon.core.used == 0
    assert daemon.attach(3, model)


def test_what_becomes_of_the_siblings_of_a_pool_that_failed() -> None:
    model = manifest(shapes=(ONE_PAGE, TWO_PAGES, (3 * PAGE,)))
    daemon = Daemon(budget=smallest(model))
    first, second, third = of(CreatePool, daemon.ask(1, model))
    error = errors.SegmentFailed("no room")
    assert len(daemon.feed(PoolFailed(first.segment, error))) == 1
    assert daemon.feed(PoolCreated(second.segment)) == [UnlinkPool(second.segment)]
    assert daemon.feed(PoolFailed(third.segment, error)) == []


def test_layers_of_different_shape_never_share_a_pool() -> None:
    model = manifest(shapes=(ONE_PAGE, TWO_PAGES, ONE_PAGE, TWO_PAGES))
    daemon = Daemon(budget=largest(model))
    assert [pool.layers for pool in daemon.attach(1, model).pools] == [[0, 2], [1, 3]]


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_a_miss_is_read_published_and_then_answered() -> None:
    daemon = Daemon(3)
    segment = daemon.attach(1, manifest()).pools[0].segment
    out = daemon.fetch(1, 1, 1, 3, 0)
    reads = of(StartRead, out)
    assert len(out) == 2
    assert {(read.layer, read.expert) for read in reads if read.priority is Priority.DEMAND} == {(1, 0), (1, 3)}
    slot = {read.expert: read.slot for read in reads}
    assert daemon.done(1, 3) == [Publish(segment, 1, 3, slot[3])]
    assert daemon.done(1, 0) == [Publish(segment, 1, 0, slot[0]), Answer(1, 1, 0, (slot[3], slot[0]), announce=2)]


def test_a_fetch_with_everything_resident_is_answered_at_once() -> None:
    daemon = two_sessions(3)
    first = daemon.get(1, 1, 0, 2, 1)
    assert daemon.fetch(2, 1, 0, 1, 2) == [Answer(2, 1, 0, first.slots[::-1], announce=2)]


def test_rows_of_the_table_count_the_layers_of_the_pool() -> None:
    model = manifest(shapes=(ONE_PAGE, TWO_PAGES, ONE_PAGE, TWO_PAGES))
    daemon = Daemon(budget=smallest(model))
    segments = [pool.segment for pool in daemon.attach(1, model).pools]
    daemon.fetch(1, 1, 3, 2)
    (published,) = of(Publish, daemon.done(3, 2))
    assert (published.segment, published.row, published.expert) == (segments[1], 1, 2)


def test_sessions_that_miss_the_same_block_share_one_read() -> None:
    daemon = two_sessions(3)
    assert len(of(StartRead, daemon.fetch(1, 1, 0, 0))) == 1
    assert daemon.fetch(2, 1, 0, 0) == []
    out = daemon.done(0, 0)
    assert [answer.session for answer in of(Answer, out)] == [1, 2]
    assert not of(StartRead, out)


def test_hits_and_misses_count_blocks_once_an_event() -> None:
    daemon = two_sessions(4)
    model = daemon.core.models[manifest().key]
    daemon.get(1, 1, 0, 0, 1)
    assert (model.hits, model.misses) == (0, 2)
    daemon.get(1, 2, 0, 1, 2)
    assert (model.hits, model.misses) == (1, 3)
    daemon.feed(Fetch(2, 1, 1, 0, (0,), ((0, [0, 1]), (1, [3]))))
    assert (model.hits, model.misses) == (5, 3)
    daemon.feed(Fetch(2, 1, 1, 0, (0,), ((0, [0, 1]), (1, [3]))))
    assert (model.hits, model.misses) == (5, 3)
    daemon.feed(Routed(1, ((0, [0]),)))
    daemon.feed(Ack(1, 0, 2, ((0, [0]),)))
    assert (model.hits, model.misses) == (7, 3)


def test_a_block_on_its_way_for_somebody_else_counts_as_a_miss() -> None:
    daemon = two_sessions(4)
    daemon.fetch(1, 1, 0, 0)
    daemon.fetch(2, 1, 0, 0)
    assert daemon.core.models[manifest().key].misses == 2


def test_each_layer_counts_its_own_hits_misses_and_bytes() -> None:
    daemon = two_sessions(4)
    daemon.get(1, 1, 0, 0, 1)
    daemon.get(1, 2, 0, 1, 2)
    daemon.get(1, 3, 1, 3)
    daemon.feed(Fetch(2, 1, 1, 0, (0,), ((1, [3]), (0, [1, 2]))))
    model = daemon.core.models[manifest().key]
    assert model.counts == [
        LayerCounts(hits=1 + 1 + 2, misses=3, bytes_read=3 * 7),
        LayerCounts(hits=1, misses=1, bytes_read=7),
    ]
    assert (model.hits, model.misses, model.bytes_read) == (5, 4, 4 * 7)


def test_lookups_of_what_the_model_does_not_have_are_not_counted() -> None:
    daemon = two_sessions(4)
    daemon.fetch(1, 1, 2, 0)
    daemon.fetch(1, 2, 1, 4)
    daemon.feed(Routed(1, ((2, [0]), (1, [4]))))
    assert daemon.core.models[manifest().key].counts == [LayerCounts(), LayerCounts()]


def test_an_eviction_counts_for_the_layer_whose_block_leaves() -> None:
    daemon = Daemon(2)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 0, 0, 1)
    daemon.get(1, 2, 1, 2)
    model = daemon.core.models[manifest().key]
    assert [layer.evictions for layer in model.counts] == [1, 0]
    daemon.get(1, 3, 1, 0, 1)
    assert [layer.evictions for layer in model.counts] == [2, 1]
    assert model.evictions == 3


def test_status_tells_of_each_layer_its_pool_and_how_many_of_its_slots_it_has_now() -> None:
    model = manifest(shapes=(ONE_PAGE, TWO_PAGES, ONE_PAGE))
    daemon = Daemon(budget=smallest(model))
    daemon.attach(1, model)

    def told() -> list[tuple[int, int, int]]:
        layers = model_status(daemon.core.models[model.key]).layers
        return [(layer.pool, layer.pool_slots, layer.resident_blocks) for layer in layers]

    daemon.fetch(1, 1, 0, 0, 1)
    assert told() == [(0, 2, 0), (1, 2, 0), (0, 2, 0)], "what is on its way is not resident"
    daemon.finish()
    daemon.get(1, 2, 1, 3)
    assert told() == [(0, 2, 2), (1, 2, 1), (0, 2, 0)]
    daemon.get(1, 3, 2, 1)
    assert told() == [(0, 2, 1), (1, 2, 1), (0, 2, 1)], "the slots of a pool follow demand"


def test_the_layers_of_a_status_add_up_to_the_model() -> None:
    daemon = Daemon(3)
    daemon.attach(1, manifest())
    for sequence, (layer, *experts) in enumerate([(0, 0, 1), (1, 2), (1, 2, 3), (0, 1, 2)], 1):
        daemon.get(1, sequence, layer, *experts)
    found = model_status(daemon.core.models[manifest().key])
    assert found.hits and found.evictions
    for name in ("hits", "misses", "bytes_read", "evictions", "resident_blocks"):
        assert sum(getattr(layer, name) for layer in found.layers) == getattr(found, name)


def test_a_fetch_that_waits_may_be_repeated() -> None:
    daemon = Daemon(3)
    daemon.attach(1, manifest())
    daemon.fetch(1, 1, 0, 0)
    assert daemon.fetch(1, 1, 0, 0) == []
    assert len(of(Answer, daemon.finish())) == 1


def test_a_fetch_that_was_answered_gets_the_same_answer_again() -> None:
    daemon = two_sessions(3)
    answer = daemon.get(1, 1, 0, 0, 1)
    daemon.get(2, 1, 1, 0)  # so that the version may have moved on
    assert daemon.fetch(1, 1, 0, 0, 1) == [answer]


def test_a_fetch_older_than_the_newest_is_ignored() -> None:
    daemon = Daemon(3)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 0, 0)
    daemon.get(1, 2, 0, 1)
    assert daemon.fetch(1, 1, 0, 0) == []


@pytest.mark.parametrize(
    ("layer", "experts"),
    [(2, (0,)), (0, (1, 1)), (0, (4,)), (0, (0, 1, 2, 3))],
    ids=["unknown layer", "an expert twice", "no such expert", "more than the pool"],
)
def test_a_bad_fetch_is_refused_and_disturbs_nobody(layer: int, experts: tuple[int, ...]) -> None:
    daemon = two_sessions(3)
    leased = daemon.get(2, 1, 0, 0, 1)
    daemon.fetch(2, 2, 1, 2)
    (refusal,) = daemon.fetch(1, 1, layer, *experts)
    assert isinstance(refusal, Refuse)
    assert (refusal.session, refusal.sequence) == (1, 1)
    assert isinstance(refusal.error, errors.FetchInvalid)
    assert len(of(Answer, daemon.finish())) == 1
    assert daemon.get(2, 3, 0, 0, 1).slots == leased.slots
    assert daemon.get(1, 2, 0, 0).slots == leased.slots[:1]


def test_a_bad_fetch_repeated_is_not_answered_with_somebody_elses_blocks() -> None:
    daemon = Daemon(3)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 0, 0)
    daemon.fetch(1, 2, 9, 0)
    assert not of(Answer, daemon.fetch(1, 2, 9, 0))


@pytest.mark.parametrize("why", ["bad fetch", "failed read"])
def test_a_refused_fetch_repeated_is_refused_again(why: str) -> None:
    """A router may drop a refusal as well as an answer; its session would wait for ever."""
    daemon = Daemon(3)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 0, 0)
    layer = 9 if why == "bad fetch" else 1
    out = daemon.fetch(1, 2, layer, 0)
    if why == "failed read":
        out = daemon.fail(1, 0)
    (refusal,) = of(Refuse, out)
    assert daemon.fetch(1, 2, layer, 0) == [refusal]


def test_a_fetch_of_an_unknown_session_is_refused() -> None:
    (refusal,) = Daemon(3).fetch(5, 8, 0, 0)
    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, errors.SessionUnknown)
    assert (refusal.session, refusal.sequence) == (5, 8)


def test_a_newer_fetch_takes_the_place_of_one_that_waits() -> None:
    """The asker was interrupted in the first fetch; an answer to it must never pass for the second's."""
    daemon = Daemon(4)
    daemon.attach(1, manifest())
    daemon.fetch(1, 1, 0, 0)
    second = {read.expert: read.slot for read in of(StartRead, daemon.fetch(1, 2, 1, 3))}
    daemon.done(0, 0)
    assert not of(Answer, daemon.fetch(1, 2, 1, 3))
    assert of(Answer, daemon.done(1, 3)) == [Answer(1, 2, 0, (second[3],), announce=2)]


def test_a_fetch_whose_place_was_taken_leaves_no_lease() -> None:
    daemon = two_sessions(2)
    daemon.get(2, 1, 0, 0, 1)
    daemon.fetch(1, 1, 1, 0)
    daemon.fetch(1, 2, 1, 1)
    daemon.ack(2, 0, 1)
    daemon.feed(Ended(2))
    daemon.finish()
    assert daemon.get(1, 3, 0, 2, 3)


def test_a_session_whose_fetch_took_the_place_of_another_may_end() -> None:
    daemon = two_sessions(3)
    daemon.fetch(1, 1, 0, 0)
    daemon.fetch(1, 2, 1, 0)
    daemon.feed(Ended(1))
    assert not of(Answer, daemon.finish())
    assert daemon.get(2, 1, 0, 1, 2, 3)


# -- evicting ----------------------------------------------------------------------------------------------------------


def test_an_evicted_block_leaves_the_table_before_its_slot_is_filled_again() -> None:
    daemon = Daemon(2)
    segment = daemon.attach(1, manifest()).pools[0].segment
    old = daemon.get(1, 1, 0, 0, 1)
    out = daemon.fetch(1, 2, 0, 2)
    removed, read = out
    assert removed == Publish(segment, 0, 0, -1)
    assert isinstance(read, StartRead)
    assert read.slot == old.slots[0]


def test_a_slot_is_filled_again_only_when_every_other_session_has_acked() -> None:
    daemon = two_sessions(2)
    daemon.attach(3, manifest())
    daemon.get(1, 1, 0, 0, 1)
    out = daemon.fetch(1, 2, 0, 2)
    assert [publish.slot for publish in of(Publish, out)] == [-1]
    assert of(AskAck, out) == [AskAck(2, 1), AskAck(3, 1)]
    assert not of(StartRead, out)
    assert not of(StartRead, daemon.ack(2, 1, 0))
    assert len(of(StartRead, daemon.ack(3, 1, 0))) == 1
    assert [answer.version for answer in of(Answer, daemon.finish())] == [1]


def test_an_ack_of_an_older_version_frees_nothing() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(1, 2, 0, 2)
    assert daemon.ack(2, 0, 0) == []
    assert daemon.ack(2, 1, 0) != []


def test_nobody_can_ack_what_has_not_happened() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.ack(2, 10**6, 0)
    assert not of(StartRead, daemon.fetch(1, 2, 0, 2))


def test_a_session_is_asked_for_an_ack_once_a_version() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    assert len(of(AskAck, daemon.fetch(1, 2, 0, 2))) == 1
    daemon.ack(2, 0, 0)
    daemon.feed(Routed(2, ()))
    assert len(of(AskAck, daemon.said)) == 1


def test_a_waiting_session_counts_as_acked() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    assert not of(StartRead, daemon.fetch(1, 2, 0, 2))
    assert {read.expert for read in of(StartRead, daemon.fetch(2, 1, 0, 3))} == {2, 3}
    assert {answer.session for answer in of(Answer, daemon.finish())} == {1, 2}


def test_an_answered_session_has_to_ack_what_is_evicted_later() -> None:
    daemon = two_sessions(2)
    daemon.get(2, 1, 0, 0)
    daemon.ack(2, 0, 1)
    daemon.get(1, 1, 1, 0)
    assert not of(StartRead, daemon.fetch(1, 2, 1, 1))
    assert len(of(StartRead, daemon.ack(2, 1, 1))) == 1


def test_a_session_that_attached_after_an_eviction_needs_no_ack() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(1, 2, 0, 2)
    assert daemon.attach(3, manifest()).version == 1
    assert len(of(StartRead, daemon.ack(2, 1, 0))) == 1


def test_the_hits_of_an_event_are_not_evicted_for_its_misses() -> None:
    daemon = two_sessions(2)
    hit = daemon.get(1, 1, 0, 0)
    daemon.get(2, 1, 0, 1)  # leased: all that could be evicted is the hit
    assert daemon.fetch(1, 2, 0, 0, 2) == [AskAck(2, 0)]
    out = daemon.ack(2, 0, 1) + daemon.ack(2, 1, 1) + daemon.finish()
    assert [answer.slots[0] for answer in of(Answer, out)] == list(hit.slots)


def test_slots_leased_to_another_session_are_not_evicted() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    out = daemon.fetch(2, 1, 0, 2)
    assert out == [AskAck(1, 0)]


@pytest.mark.parametrize("end", ["ack", "fetch"])
def test_a_lease_ends_with_the_next_ack_or_fetch(end: str) -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(2, 1, 0, 2)
    out = daemon.ack(1, 0, 1) if end == "ack" else daemon.fetch(1, 2, 0, 2)
    assert [publish.slot for publish in of(Publish, out)] == [-1]


def test_an_ack_that_a_newer_fetch_has_overtaken_frees_no_lease() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0)
    daemon.get(1, 2, 0, 0, 1)
    daemon.fetch(2, 1, 0, 2)
    assert not of(Publish, daemon.ack(1, 0, 1))
    assert of(Publish, daemon.ack(1, 0, 2))


def test_an_ack_of_a_session_that_waits_frees_nothing_that_it_was_granted() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0)
    daemon.fetch(1, 2, 0, 0, 1)  # granted: 0 is leased, 1 is on its way
    daemon.ack(1, 0, 2)
    assert not of(Publish, daemon.fetch(2, 1, 0, 2))
    assert len(of(Answer, daemon.finish())) == 1


def test_grants_are_first_come_first_served() -> None:
    daemon = two_sessions(3)
    daemon.attach(3, manifest())
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(2, 1, 1, 0, 1)  # one slot is free; waits for session 1's lease
    assert not of(StartRead, daemon.fetch(3, 1, 1, 2))
    out = daemon.ack(1, 0, 1) + daemon.ack(1, 1, 1)
    assert [(read.layer, read.expert) for read in of(StartRead, out)][:2] == [(1, 0), (1, 1)]


def test_two_sessions_that_want_more_than_half_of_a_pool_each_are_served_in_turn() -> None:
    daemon = two_sessions(4)
    model = {1: 0, 2: 1}
    for turn in range(1, 6):
        for session, layer in model.items():
            daemon.fetch(session, turn, layer, 0, 1, 2)
        for _ in range(8):
            answered = {answer.session for answer in of(Answer, daemon.said) if answer.sequence == turn}
            if answered == {1, 2}:
                break
            daemon.finish()
            asked = of(AskAck, daemon.said)
            daemon.said = [said for said in daemon.said if not isinstance(said, AskAck)]
            for ask in asked:
                daemon.ack(ask.session, ask.version, turn)
        assert answered == {1, 2}


def test_a_session_is_asked_for_leases_that_it_got_after_it_was_last_asked() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    assert of(AskAck, daemon.fetch(2, 1, 1, 0, 1)) == [AskAck(1, 0)]
    daemon.fetch(1, 2, 0, 0, 1)  # instead of an ack: releases, and queues up behind session 2
    out = daemon.finish()
    assert [answer.session for answer in of(Answer, out)] == [2]
    assert [ask.session for ask in of(AskAck, out)] == [2]


def test_an_ended_session_is_waited_for_no_longer() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(1, 2, 0, 2)
    assert len(of(StartRead, daemon.feed(Ended(2)))) == 1


# -- failing -----------------------------------------------------------------------------------------------------------


def test_a_failed_read_fails_exactly_the_fetches_that_waited_for_it() -> None:
    daemon = two_sessions(4)
    daemon.attach(3, manifest())
    daemon.fetch(1, 1, 0, 0, 1)
    daemon.fetch(2, 1, 0, 1, 2)
    daemon.fetch(3, 1, 0, 0)
    out = daemon.fail(0, 1)
    assert [(refusal.session, refusal.sequence) for refusal in of(Refuse, out)] == [(1, 1), (2, 1)]
    assert all(isinstance(refusal.error, errors.ReadFailed) for refusal in of(Refuse, out))
    assert not of(Publish, out)
    assert [answer.session for answer in of(Answer, daemon.finish())] == [3]


def test_the_slot_of_a_failed_read_can_be_used_again() -> None:
    daemon = Daemon(2)
    daemon.attach(1, manifest())
    daemon.fetch(1, 1, 0, 0, 1)
    daemon.fail(0, 0)
    daemon.finish()
    assert len(set(daemon.get(1, 2, 0, 0, 1).slots)) == 2
    assert len(set(daemon.get(1, 3, 1, 2, 3).slots)) == 2


def test_a_failed_fetch_repeated_gets_no_answer_of_an_earlier_one() -> None:
    daemon = Daemon(2)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 0, 0)
    daemon.fetch(1, 2, 0, 1)
    daemon.fail(0, 1)
    assert not of(Answer, daemon.fetch(1, 2, 0, 1))


def test_what_else_a_failed_fetch_had_on_its_way_arrives_without_a_lease() -> None:
    daemon = two_sessions(2)
    daemon.fetch(1, 1, 0, 0, 1)
    daemon.fail(0, 0)
    assert [publish.expert for publish in of(Publish, daemon.done(0, 1))] == [1]
    daemon.fetch(2, 1, 1, 0, 1)
    daemon.ack(1, 1, 1)
    assert [answer.session for answer in of(Answer, daemon.finish())] == [2]


def test_a_failed_read_lets_those_who_queue_go_on() -> None:
    daemon = two_sessions(2)
    daemon.fetch(1, 1, 0, 0, 1)
    assert daemon.fetch(2, 1, 1, 0) == []
    assert [read.layer for read in of(StartRead, daemon.fail(0, 0))] == [1]
    assert [answer.session for answer in of(Answer, daemon.finish())] == [2]


# -- ending ------------------------------------------------------------------------------------------------------------


def test_a_session_that_ends_while_it_queues_is_forgotten() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(2, 1, 0, 2)
    daemon.feed(Ended(2))
    daemon.ack(1, 0, 1)
    assert not of(Publish, daemon.ack(1, 0, 1))
    assert not daemon.reads


def test_a_session_that_ends_while_its_reads_are_on_their_way_leaves_blocks_for_others() -> None:
    daemon = two_sessions(2)
    daemon.fetch(1, 1, 0, 0, 1)
    daemon.feed(Ended(1))
    out = daemon.finish()
    assert {publish.expert for publish in of(Publish, out)} == {0, 1}
    assert not of(Answer, out)
    assert of(Answer, daemon.fetch(2, 1, 0, 0, 1))
    assert daemon.get(2, 2, 1, 0, 1)


def test_a_session_that_ends_gives_up_its_leases() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.fetch(2, 1, 1, 0, 1)
    assert len(of(StartRead, daemon.feed(Ended(1)))) == 2


def test_a_session_that_ends_while_it_opens_is_not_granted() -> None:
    daemon = Daemon(3)
    (create,) = of(CreatePool, daemon.ask(1, manifest("a")))
    daemon.feed(Ended(1))
    assert daemon.feed(PoolCreated(create.segment)) == []
    assert of(UnlinkPool, daemon.ask(2, manifest("b"))) == [UnlinkPool(create.segment)]


def test_the_end_of_a_stranger_and_messages_after_an_end_are_ignored() -> None:
    daemon = two_sessions(2)
    daemon.feed(Ended(1))
    assert daemon.feed(Ended(1)) == daemon.feed(Ended(77)) == []
    assert daemon.ack(1, 0, 0) == daemon.feed(Routed(1, ((0, [0]),))) == []


# -- filling in the background -----------------------------------------------------------------------------------------


def test_a_pool_that_holds_all_is_filled_a_few_reads_at_a_time() -> None:
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    seen = set()
    while daemon.reads:
        assert len(daemon.reads) <= BACKGROUND_READS
        assert not any(read.priority is Priority.DEMAND for read in daemon.reads.values())
        block = next(iter(daemon.reads))
        seen.add(block)
        daemon.done(*block)
    assert seen == {(layer, expert) for layer in range(2) for expert in range(4)}


def test_a_pool_that_cannot_hold_all_is_not_filled() -> None:
    daemon = Daemon(7)
    daemon.attach(1, manifest())
    assert not daemon.reads
    daemon.get(1, 1, 0, 0)
    assert not daemon.reads


def test_filling_yields_to_demand() -> None:
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    assert set(daemon.reads) == {(0, 0), (0, 1)}
    demand = of(StartRead, daemon.fetch(1, 1, 1, 3))
    assert [read.priority is Priority.DEMAND for read in demand] == [True]
    assert not of(StartRead, daemon.done(0, 0) + daemon.done(0, 1))
    out = daemon.done(1, 3)
    assert of(Answer, out)
    assert len(of(StartRead, out)) == BACKGROUND_READS


def test_a_block_that_is_being_filled_in_is_not_read_again_on_demand() -> None:
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    assert not of(StartRead, daemon.fetch(1, 1, 0, 0))
    assert of(Answer, daemon.done(0, 0))


def test_a_complete_pool_is_announced_once_to_each_session() -> None:
    daemon = Daemon(8)
    segment = daemon.attach(1, manifest()).pools[0].segment
    daemon.attach(2, manifest())
    daemon.get(1, 1, 1, 3)
    daemon.get(1, 2, 1, 3)
    assert of(Announce, daemon.said) == [Announce(1, segment), Announce(2, segment)]
    assert daemon.attach(3, manifest()).pools[0].complete
    daemon.get(3, 1, 0, 0, 1, 2, 3)
    assert len(of(Announce, daemon.said)) == 2


def test_pools_of_one_model_become_complete_each_for_itself() -> None:
    model = manifest(experts=2, shapes=(ONE_PAGE, TWO_PAGES))
    daemon = Daemon(budget=largest(model))
    segments = [pool.segment for pool in daemon.attach(1, model).pools]
    daemon.done(1, 0)
    assert of(Announce, daemon.done(1, 1)) == [Announce(1, segments[1])]
    daemon.finish()
    assert of(Announce, daemon.said) == [Announce(1, segments[1]), Announce(1, segments[0])]


def test_nothing_leaves_a_pool_that_holds_all() -> None:
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    for sequence, layer in enumerate([0, 1, 0, 1], start=1):
        daemon.get(1, sequence, layer, 0, 1, 2, 3)
    assert all(publish.slot >= 0 for publish in of(Publish, daemon.said))
    assert not of(AskAck, daemon.said)


def test_a_pool_that_holds_all_keeps_every_block_in_its_natural_place() -> None:
    """Workers compute on a complete pool without mapping ids to slots."""
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    daemon.fetch(1, 1, 1, 3, 1)
    daemon.fail(1, 3)
    daemon.finish()
    daemon.get(1, 2, 1, 3)
    assert {(publish.row, publish.expert): publish.slot for publish in of(Publish, daemon.said)} == {
        (row, expert): 4 * row + expert for row in range(2) for expert in range(4)
    }


def test_filling_rests_while_nobody_is_attached() -> None:
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    daemon.feed(Ended(1))
    assert not of(StartRead, daemon.finish())
    daemon.attach(2, manifest())
    daemon.finish()
    assert len(of(Announce, daemon.said)) == 1


def test_filling_gives_up_when_a_read_fails_and_demand_still_works() -> None:
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    assert daemon.fail(0, 0) == []
    assert not of(StartRead, daemon.finish())
    daemon.get(1, 1, 0, 0, 1, 2, 3)
    daemon.get(1, 2, 1, 0, 1, 2, 3)
    assert len(of(Announce, daemon.said)) == 1


# -- planning ----------------------------------------------------------------------------------------------------------


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Models of up to 100 layers of one or two shapes, some so large that no pool can hold all of their blocks."""
    experts = draw(st.integers(1, 256))
    kinds = [part(draw(st.sampled_from([(1, 1), (300, 70), (4096, 192), (7168, 256)])), "U32") for _ in range(2)]
    one = st.integers(1, 100).map(lambda count: [0] * count)
    choice = draw(one | st.lists(st.integers(0, 1), min_size=1, max_size=100))
    top_k = draw(st.integers(1, 8))
    layers = tuple(Layer(f"layers.{n}", experts, top_k, (kinds[kind],)) for n, kind in enumerate(choice))
    return Manifest("/m", "family", (), layers)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(model=manifests(), share=st.floats(0, 1.2))
def test_a_plan_keeps_to_its_bytes_its_floors_and_the_limit_of_a_slab(model: Manifest, share: float) -> None:
    size = max(smallest(model), int(share * largest(model)))
    plans = plan_pools(model, size)
    assert sum(plan.layout.size for plan in plans) <= size
    assert sorted(layer for plan in plans for layer in plan.layers) == list(range(len(model.layers)))
    for plan in plans:
        layers = [model.layers[layer] for layer in plan.layers]
        assert len({layer.shape_key for layer in layers}) == 1
        assert plan.layout.layers == len(layers)
        assert plan.layout.slots >= min(max(layer.top_k for layer in layers), layers[0].experts)
        assert plan.layout.slots <= len(layers) * layers[0].experts
        assert plan.layout.slots <= slot_limit(layers[0].parts)


def test_no_slab_of_a_large_model_reaches_the_limit_of_its_elements() -> None:
    """Four-bit experts of 4096 x 1536, 128 in each of 94 layers, in about 115 GB."""
    parts = (part((1536, 512), "U32"),)
    model = Manifest("/m", "family", (), tuple(Layer(f"layers.{n}", 128, 8, parts) for n in range(94)))
    plans = plan_pools(model, 10900 * parts[0].block_bytes)
    assert max(math.prod(slab.shape) for plan in plans for slab in plan.layout.slabs) < 2**31


def test_a_plan_below_the_smallest_size_is_refused() -> None:
    model = manifest()
    with pytest.raises(errors.BudgetTooSmall, match=f"--budget {smallest(model)} "):
        plan_pools(model, smallest(model) - 1)


# -- the life of a slot ------------------------------------------------------------------------------------------------


def test_a_slot_goes_through_its_life_in_order() -> None:
    slot = Slot(3)
    for state in (SlotState.FILLING, SlotState.FREE, SlotState.FILLING, SlotState.SEALED, SlotState.RETIRED):
        slot.move(state)
    slot.move(SlotState.FREE)


def test_a_step_that_a_slot_cannot_take_tells_its_story() -> None:
    slot = Slot(3, block=(1, 2))
    slot.move(SlotState.FILLING)
    slot.move(SlotState.SEALED)
    with pytest.raises(InvalidTransition, match=r"slot 3: sealed -> filling after filling \(1, 2\) -> sealed \(1, 2\)"):
        slot.move(SlotState.FILLING)
    assert slot.state is SlotState.SEALED


def test_a_read_that_is_reported_twice_is_caught() -> None:
    daemon = Daemon(2)
    daemon.attach(1, manifest())
    (read,) = of(StartRead, daemon.fetch(1, 1, 0, 0))
    daemon.feed(ReadDone(read.segment, read.slot, 7))
    with pytest.raises(InvalidTransition):
        daemon.feed(ReadDone(read.segment, read.slot, 7))


def test_a_miss_waits_for_one_event_of_a_long_prompt_at_most() -> None:
    """One session computes a prompt that needs every slot in every layer, the other decodes: they take turns."""
    model = manifest(experts=8, top_k=2, shapes=[ONE_PAGE] * 4)
    daemon = Daemon(slots=8)
    daemon.attach(1, model)
    daemon.attach(2, model)
    answered: list[int] = []

    def finish() -> None:
        answered.extend(answer.session for answer in of(Answer, daemon.finish()))

    def fetch(session: int, number: int, *experts: int) -> None:
        out = daemon.fetch(session, number, (number - 1) % 4, *experts)
        answered.extend(answer.session for answer in of(Answer, out))
        finish()

    fetch(1, 1, *range(8))
    for number in range(1, 41):
        fetch(2, number, number % 7, 7)  # waits: the other one computes with all slots
        fetch(1, number + 1, *range(8))  # it goes on to its next layer, and waits behind
        daemon.ack(2, daemon.core.models[model.key].version, number)
        finish()
    daemon.ack(2, daemon.core.models[model.key].version, 40)  # what was evicted meanwhile
    finish()
    assert (answered.count(1), answered.count(2)) == (41, 40)
    turns = [number for number, session in enumerate(answered) if session == 2]
    assert all(later - sooner <= 2 for sooner, later in itertools.pairwise(turns))


def test_of_a_long_log_every_hit_counts_and_the_last_forwards_teach_the_policy() -> None:
    told: list[tuple[int, int, Sequence[int]]] = []

    class Told(LRU):
        def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
            told.append((session, layer, experts))

    model = manifest()
    daemon = Daemon(slots=4)
    daemon.core = Core(daemon.core.budget, Told)
    daemon.attach(1, model)
    log = [(layer, [number % 3]) for number in range(1000) for layer in range(2)]
    daemon.feed(Routed(1, (*log[:-1], (1, [4]), (2, [0]), (1, []), log[-1])))  # no such expert, no such layer, nothing
    assert sum(counts.hits for counts in daemon.core.models[model.key].counts) == 2000
    assert told == [(1, layer, experts) for layer, experts in log[-2 * LEARNED_FORWARDS :]]
