"""What the core reads ahead, one behaviour a test: the rest of an event, and what sessions announce of later ones.

Orders that nobody thought of are ``test_core_machine``'s business; when announcements pay is ``test_foresight``'s.
"""

from __future__ import annotations

from expertd.daemon.core import foresight
from expertd.daemon.core.ahead import READS, STALE
from expertd.daemon.core.events import (
    Ahead,
    BudgetChanged,
    Ended,
    Fetch,
    PoolCreated,
    ReadCancelled,
    ReadFailed,
    Routed,
    Silent,
)
from expertd.daemon.core.foresight import Kind
from expertd.daemon.core.instructions import (
    Answer,
    AskAck,
    Cancel,
    CreatePool,
    Instruction,
    Priority,
    Promote,
    Refuse,
    StartRead,
)
from expertd.protocol import errors
from expertd.protocol.layout import PAGE
from tests.test_core import Daemon, manifest, of, two_sessions


def wide(slots: int = 16, sessions: int = 1) -> Daemon:
    """Two layers of 16 experts over one pool."""
    daemon = Daemon(slots)
    for session in range(1, sessions + 1):
        daemon.attach(session, manifest(experts=16))
    return daemon


def group(
    daemon: Daemon, session: int, sequence: int, layer: int, experts: tuple[int, ...], then: tuple[int, ...] = ()
) -> list[Instruction]:
    segment = daemon.segment(session, layer)
    return daemon.feed(Fetch(session, sequence, segment, layer, experts, then=then, leases_only=True))


def announce(
    daemon: Daemon, layer: int, *experts: int, session: int = 1, prompt: bool = True, distance: int = 1
) -> list[Instruction]:
    return daemon.feed(Ahead(session, daemon.segment(session, layer), layer, experts, distance, prompt))


def ahead(out: list[Instruction]) -> list[int]:
    """The experts whose reads ahead are begun in ``out``."""
    return [read.expert for read in of(StartRead, out) if read.priority is Priority.AHEAD]


def gate(daemon: Daemon, kind: Kind = Kind.PROMPT) -> foresight.Gate:
    (model,) = daemon.core.models.values()
    return model.foresight.gates[kind]


# -- the rest of an event ----------------------------------------------------------------------------------------------


def test_the_rest_of_an_event_is_read_in_its_order_behind_what_is_fetched() -> None:
    daemon = wide()
    out = group(daemon, 1, 1, 0, (3, 1), then=(7, 5, 6))
    reads = of(StartRead, out)
    assert [(read.expert, read.priority) for read in reads] == [
        (1, Priority.DEMAND),
        (3, Priority.DEMAND),
        (7, Priority.AHEAD),
        (5, Priority.AHEAD),
        (6, Priority.AHEAD),
    ]


def test_a_fetch_of_what_is_being_read_ahead_makes_it_demand_and_reads_nothing_twice() -> None:
    daemon = wide()
    group(daemon, 1, 1, 0, (3, 1), then=(7, 5, 6))
    daemon.done(0, 3), daemon.done(0, 1), daemon.done(0, 7)
    out = group(daemon, 1, 2, 0, (7, 5), then=(6,))
    assert not of(StartRead, out)
    assert [promote.slot for promote in of(Promote, out)] == [daemon.reads[0, 5].slot]
    assert of(Answer, daemon.done(0, 5))


def test_an_event_of_groups_is_one_event_and_what_was_absent_at_its_beginning_is_missed() -> None:
    daemon = wide()
    daemon.get(1, 1, 0, 0, 1)
    (model,) = daemon.core.models.values()
    before = model.hits, model.misses
    for sequence, (experts, then) in enumerate([((0, 1), (4, 5, 6)), ((4, 5), (6,)), ((6,), ())], start=2):
        group(daemon, 1, sequence, 0, experts, then)
        daemon.finish()
    assert (model.hits - before[0], model.misses - before[1]) == (2, 3)


def test_slots_are_filled_again_at_once_beside_a_session_that_reads_its_leases_only() -> None:
    daemon = wide(8)
    daemon.get(1, 1, 1, *range(8))
    group(daemon, 1, 2, 0, (5, 6), then=(7, 8))
    assert of(Answer, daemon.finish())
    assert not of(AskAck, daemon.said)
    assert {read.expert for read in of(StartRead, daemon.said) if read.layer == 0} == {5, 6, 7, 8}


def test_the_leases_of_a_group_are_never_given_away_to_read_the_next() -> None:
    daemon = wide(4)
    answer = daemon.get(1, 1, 0, 0, 1)
    group(daemon, 1, 2, 0, (0, 1), then=(2, 3, 4, 5))
    daemon.finish()
    taken = {read.slot for read in of(StartRead, daemon.said) if read.expert in (2, 3, 4, 5)}
    assert taken
    assert taken.isdisjoint(answer.slots)


def test_a_session_that_leaves_an_event_in_the_middle_ends_it_with_another_fetch() -> None:
    daemon = wide()
    group(daemon, 1, 1, 0, (3,), then=(7, 5))
    daemon.done(0, 3)
    out = group(daemon, 1, 2, 0, (3,))
    assert {(cancel.slot) for cancel in of(Cancel, out)} == {daemon.reads[0, 7].slot, daemon.reads[0, 5].slot}
    assert of(Answer, out)


def test_what_follows_must_be_experts_of_the_layer_that_are_not_asked_for_yet() -> None:
    daemon = wide()
    for sequence, then in enumerate([(3,), (16,), (5, 5)], start=1):
        (refusal,) = of(Refuse, group(daemon, 1, sequence, 0, (3,), then))
        assert isinstance(refusal.error, errors.FetchInvalid)


def test_a_group_whose_read_fails_ends_its_event() -> None:
    daemon = wide()
    group(daemon, 1, 1, 0, (3,), then=(7,))
    read = daemon.reads.pop((0, 3))
    out = daemon.feed(ReadFailed(read.segment, read.slot, errors.ReadFailed("bad sector")))
    assert of(Refuse, out)
    assert [cancel.slot for cancel in of(Cancel, out)] == [daemon.reads[0, 7].slot]
    assert daemon.get(1, 2, 0, 3, 7)


# -- announcements -----------------------------------------------------------------------------------------------------


def test_what_is_announced_is_read_ahead_and_then_hit() -> None:
    daemon = wide()
    assert ahead(announce(daemon, 1, 4, 9)) == [4, 9]
    daemon.finish()
    daemon.get(1, 1, 1, 4, 9)
    (model,) = daemon.core.models.values()
    assert (model.hits, model.misses) == (2, 0)
    assert (gate(daemon).announced, gate(daemon).useful_part) == (2, 1.0)
    assert gate(daemon).useful_bytes == 2 * model.manifest.layers[1].block_bytes


def test_what_is_resident_or_on_its_way_is_no_announcement() -> None:
    daemon = wide()
    daemon.get(1, 1, 1, 4)
    assert ahead(announce(daemon, 1, 4)) == []
    assert gate(daemon).announced == 0


def test_reading_ahead_waits_for_a_fetch_that_waits_for_room() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    assert not of(StartRead, daemon.fetch(2, 1, 1, 0, 1))
    assert ahead(announce(daemon, 1, 2, session=1)) == []


def test_what_is_announced_stays_until_its_event_has_passed() -> None:
    daemon = wide(8)
    announce(daemon, 1, 4, 9)
    daemon.finish()
    daemon.get(1, 1, 0, 0, 1, 2, 3, 4, 5)
    daemon.get(1, 2, 0, 6, 7, 8, 9, 10, 11)
    assert not of(StartRead, daemon.fetch(1, 3, 1, 4, 9)), "both are there"


def test_a_fetch_that_finds_nothing_else_takes_what_is_expected() -> None:
    daemon = wide(4)
    announce(daemon, 1, 4, 9)
    daemon.finish()
    assert daemon.get(1, 1, 0, 0, 1, 2, 3).slots


def test_half_of_a_pool_at_most_holds_what_waits_for_its_event() -> None:
    daemon = wide(8)
    announce(daemon, 1, *range(12))
    daemon.finish()
    (model,) = daemon.core.models.values()
    assert model.pools[0].sealed == 4


def test_a_few_reads_ahead_are_on_their_way_at_a_time() -> None:
    daemon = Daemon(40)
    daemon.attach(1, manifest(experts=32))
    assert len(ahead(announce(daemon, 1, *range(16)))) == READS
    assert len(ahead(daemon.done(1, 0))) == 1


def test_reads_that_have_not_begun_are_called_off_when_the_event_has_passed_without_them() -> None:
    daemon = wide()
    announce(daemon, 1, 4, 9)
    out = daemon.fetch(1, 1, 1, 9)
    assert [promote.slot for promote in of(Promote, out)] == [daemon.reads[1, 9].slot]
    (cancel,) = of(Cancel, out)
    assert cancel.slot == daemon.reads[1, 4].slot
    read = daemon.reads.pop((1, 4))
    daemon.feed(ReadCancelled(read.segment, read.slot))
    assert gate(daemon).wasted_bytes == 0
    (model,) = daemon.core.models.values()
    assert model.pools[0].spare == 15


def test_a_read_that_had_begun_when_its_event_passed_is_wasted() -> None:
    daemon = wide()
    announce(daemon, 1, 4)
    daemon.fetch(1, 1, 1, 9)
    daemon.done(1, 4)
    assert gate(daemon).wasted_bytes == PAGE


def test_a_read_that_was_called_off_too_early_begins_again() -> None:
    daemon = wide()
    announce(daemon, 1, 4)
    daemon.fetch(1, 1, 1, 9)
    daemon.fetch(1, 2, 1, 4)
    read = daemon.reads.pop((1, 4))
    out = daemon.feed(ReadCancelled(read.segment, read.slot))
    assert [(again.slot, again.priority) for again in of(StartRead, out)] == [(read.slot, Priority.DEMAND)]
    assert of(Answer, daemon.done(1, 4))


def test_events_that_all_hit_are_told_by_the_routing_log_and_judge_announcements_too() -> None:
    daemon = wide()
    announce(daemon, 1, 4, 5)
    daemon.finish()
    daemon.feed(Routed(1, ((1, [4]),)))
    assert (gate(daemon).judged, gate(daemon).used) == (2, 1)
    assert gate(daemon).wasted_bytes == PAGE


def test_nothing_is_expected_of_sessions_that_have_ended_or_are_silent() -> None:
    daemon = wide(8, sessions=2)
    announce(daemon, 1, 4, session=1)
    assert len(of(Cancel, daemon.feed(Ended(1)))) == 1
    daemon.get(2, 1, 0, 0, 1)
    announce(daemon, 1, 5, session=2)
    daemon.attach(3, manifest(experts=16))
    daemon.fetch(3, 1, 0, 0, 1, 2, 3, 4, 6, 7, 8)
    assert 2 in daemon.core.owing
    daemon.feed(Silent(2))
    (model,) = daemon.core.models.values()
    assert not model.pools[0].expected


def test_two_sessions_that_expect_the_same_share_one_read_and_it_stays_for_the_later_one() -> None:
    daemon = wide(8, sessions=2)
    assert ahead(announce(daemon, 1, 4, session=1)) == [4]
    assert ahead(announce(daemon, 1, 4, session=2)) == []
    assert not of(Cancel, daemon.fetch(1, 1, 1, 9)), "the other one still expects it"
    assert len(of(Cancel, daemon.fetch(2, 1, 1, 9))) == 1


def test_a_fetch_that_waits_for_the_slots_of_reads_ahead_makes_them_demand() -> None:
    """They may begin late or never: it may be too hot for them."""
    daemon = wide(8, sessions=2)
    announce(daemon, 1, 1, 2, session=1)
    daemon.ack(1, 0, 0)
    out = daemon.fetch(2, 1, 0, *range(8))
    assert {promote.slot for promote in of(Promote, out)} == {daemon.reads[1, 1].slot, daemon.reads[1, 2].slot}
    daemon.finish()
    daemon.ack(1, 2, 0)
    assert of(Answer, daemon.finish())


def test_what_was_called_off_in_a_pool_that_holds_all_is_filled_in_all_the_same() -> None:
    daemon = Daemon(32)
    daemon.attach(1, manifest(experts=16))
    announce(daemon, 1, 4, 5, 6)
    for cancel in of(Cancel, daemon.fetch(1, 1, 1, 9)):
        daemon.reads = {block: read for block, read in daemon.reads.items() if read.slot != cancel.slot}
        daemon.feed(ReadCancelled(cancel.segment, cancel.slot))
    daemon.finish()
    (model,) = daemon.core.models.values()
    assert model.pools[0].complete


def test_an_event_does_not_go_on_across_an_ack() -> None:
    daemon = wide(16, sessions=2)
    group(daemon, 1, 1, 0, (3,), then=(7, 5))
    daemon.finish()
    daemon.ack(1, 0, 1)
    (model,) = daemon.core.models.values()
    assert not model.pools[0].expected


def test_a_session_that_has_long_been_silent_does_not_keep_others_from_reading_ahead() -> None:
    daemon = wide(8, sessions=2)
    announce(daemon, 1, 1, 2, session=1)
    daemon.finish()
    for sequence in range(1, STALE + 2):
        daemon.get(2, sequence, 0, sequence % 4)
    assert ahead(announce(daemon, 1, 8, 9, session=2)) == [8, 9]


def test_announcements_again_and_again_take_no_more_room_than_there_are_blocks() -> None:
    daemon = wide(8)
    for _ in range(50):
        announce(daemon, 1, *range(16))
    (model,) = daemon.core.models.values()
    assert len(model.pools[0].ahead) <= 16


def test_a_promise_ends_with_an_error_and_then_slots_wait_for_acks_again() -> None:
    daemon = wide(4, sessions=2)
    daemon.get(1, 1, 1, 0, 1)
    group(daemon, 1, 2, 0, (3,), then=())
    read = daemon.reads.pop((0, 3))
    daemon.feed(ReadFailed(read.segment, read.slot, errors.ReadFailed("bad sector")))
    looked_up = {slot for (layer, _), slot in daemon.core.models[manifest(experts=16).key].pools[0].where.items()}
    out = daemon.fetch(2, 1, 0, 5, 6, 7, 8)
    assert [ask.session for ask in of(AskAck, out)] == [1]
    assert looked_up.isdisjoint(read.slot for read in of(StartRead, out))


def test_announcements_that_make_no_sense_are_ignored() -> None:
    daemon = wide()
    for event in (
        Ahead(9, 1, 1, (4,), 1, True),
        Ahead(1, 77, 1, (4,), 1, True),
        Ahead(1, 1, 2, (4,), 1, True),
        Ahead(1, 1, 1, (16,), 1, True),
    ):
        assert daemon.feed(event) == []


def test_a_core_that_does_not_read_ahead_wants_no_announcements() -> None:
    daemon = Daemon(8)
    daemon.core = type(daemon.core)(9 * PAGE, reads_ahead=False)
    assert daemon.attach(1, manifest(experts=16)).announce == -1
    assert announce(daemon, 1, 4) == []
    assert daemon.get(1, 1, 0, 3).announce == -1


def test_single_tokens_are_on_trial_first_and_nothing_is_read_for_them() -> None:
    daemon = wide()
    assert ahead(announce(daemon, 1, 4, prompt=False)) == []
    daemon.get(1, 1, 1, 4)
    assert gate(daemon, Kind.NEXT).judged == 1
    assert gate(daemon, Kind.NEXT).useful_part == 1.0


def test_some_slots_are_kept_free_and_what_is_fetched_is_read_into_them_at_once() -> None:
    """No victim has to be found first, and nobody's ack waited for."""
    daemon = Daemon(128)
    for session in (1, 2):
        daemon.attach(session, manifest(experts=100))
    for sequence in range(1, 65):
        daemon.get(1, sequence, 0, sequence - 1)
        daemon.get(2, sequence, 1, sequence - 1)
    (model,) = daemon.core.models.values()
    assert model.pools[0].spare + len(model.pools[0].retired) == 2
    out = daemon.fetch(1, 65, 0, 70)
    assert isinstance(out[0], StartRead)


def test_a_pool_that_moves_forgets_what_was_expected() -> None:
    daemon = wide(8)
    announce(daemon, 1, 4, 5)
    out = daemon.feed(BudgetChanged(16 * PAGE))
    for create in of(CreatePool, out):
        daemon.feed(PoolCreated(create.segment))
    (model,) = daemon.core.models.values()
    assert model.moves == 1
    assert not any(session.announced for session in model.sessions.values())
    assert not any(pool.expected for pool in (*model.pools, *model.old))


def test_what_is_called_off_and_expected_again_waits_for_its_turn() -> None:
    daemon = wide(slots=3)  # so one block that was read ahead may wait for its event
    assert ahead(announce(daemon, 0, 0)) == [0]
    out = announce(daemon, 0, 0, 1)
    (cancel,) = of(Cancel, out)
    begun = ahead(out)
    assert len(begun) == 1
    assert ahead(daemon.feed(ReadCancelled(cancel.segment, cancel.slot))) == []
    (pool,) = next(iter(daemon.core.models.values())).pools
    assert list(pool.ahead) == [block for block in ((0, 0), (0, 1)) if block[1] not in begun]
