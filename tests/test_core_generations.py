"""The core's rules for generations, silence and budgets, one behaviour a test.

What a new generation is, who follows, what is copied, who is waited for no longer, where memory goes.  Orders that
nobody thought of are ``test_core_machine``'s business.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from expertd.daemon.core.events import (
    Attach,
    BudgetChanged,
    Ended,
    Fetch,
    Heard,
    MemoryWanted,
    PoolCreated,
    PoolFailed,
    ReadDone,
    Released,
    Silent,
    Unwanted,
)
from expertd.daemon.core.instructions import (
    Answer,
    AskAck,
    CreatePool,
    Instruction,
    Move,
    Refuse,
    StartCopy,
    UnlinkPool,
)
from expertd.daemon.core.plan import largest, smallest
from expertd.daemon.status import model_status
from expertd.protocol import errors
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import Manifest
from tests.test_core import ONE_PAGE, TWO_PAGES, Daemon, manifest, of, two_sessions


def warm() -> Daemon:
    """Sixteen slots, half of them in use."""
    daemon = Daemon(16)
    daemon.attach(1, manifest(experts=16))
    for sequence in range(1, 9):
        daemon.fetch(1, sequence, 0, sequence)
        daemon.finish()
    return daemon


def created(daemon: Daemon, out: list[Instruction]) -> list[Instruction]:
    """Let every segment of ``out`` be created; returns what was said."""
    return [said for create in of(CreatePool, out) for said in daemon.feed(PoolCreated(create.segment))]


def copied(daemon: Daemon, out: list[Instruction]) -> list[Instruction]:
    """Finish the copies of ``out`` and those that start meanwhile; returns what was said."""
    said: list[Instruction] = []
    copies = of(StartCopy, out)
    while copies:
        copy = copies.pop(0)
        more = daemon.feed(ReadDone(copy.segment, copy.slot, 0))
        copies += of(StartCopy, more)
        said += more
    return said


def budget(daemon: Daemon, pages: int) -> list[Instruction]:
    return daemon.feed(BudgetChanged(pages * PAGE))


def blocked_by_silence() -> tuple[Daemon, list[Instruction]]:
    """Session 1 holds a lease on all of a pool and is silent, session 2 waits; and what was said at last."""
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    assert of(AskAck, daemon.fetch(2, 1, 0, 2))
    assert daemon.core.owing == [1]
    return daemon, daemon.feed(Silent(1))


# -- silence -----------------------------------------------------------------------------------------------------------


def test_a_pool_goes_on_in_a_new_generation_without_a_session_that_is_silent() -> None:
    daemon, out = blocked_by_silence()
    out = created(daemon, out)
    assert [move.session for move in of(Move, out)] == [2]
    (refusal,) = of(Refuse, out)
    assert isinstance(refusal.error, errors.PoolMoved)
    copied(daemon, out)
    assert daemon.get(2, 2, 0, 2).slots
    assert not of(UnlinkPool, daemon.said)


def test_a_session_that_is_heard_again_is_offered_the_new_generation_and_gives_the_old_one_back() -> None:
    daemon, out = blocked_by_silence()
    created(daemon, out)
    assert [move.session for move in of(Move, daemon.feed(Heard(1)))] == [1]
    daemon.feed(Released(2, 1))
    copied(daemon, daemon.said)
    assert of(UnlinkPool, daemon.feed(Released(1, 1))) == [UnlinkPool(1)]


def test_silence_of_a_session_that_owes_nothing_is_no_news() -> None:
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    assert daemon.feed(Silent(1)) == daemon.feed(Silent(77)) == []
    assert not daemon.core.sessions[1].silent


def test_a_pool_that_a_stopped_session_has_too_stays_as_it_is() -> None:
    """It stands in nobody's way and owes no ack; a smaller pool would give nothing back of what it holds."""
    daemon = two_sessions(8)
    copied(daemon, created(daemon, budget(daemon, 7)))
    daemon.feed(Released(2, 1))
    assert (daemon.core.owing, daemon.core.holding) == ([], [1])
    assert not of(CreatePool, daemon.feed(Silent(1)))
    assert daemon.core.holding == [], "what is silent is not asked again"
    assert not of(CreatePool, budget(daemon, 4))
    (create,) = of(CreatePool, daemon.feed(Heard(1)))
    assert create.layout.slots == 3
    assert daemon.core.holding == [1]


def test_a_session_that_answers_slowly_is_waited_for_even_if_another_is_silent() -> None:
    daemon = two_sessions(4)
    daemon.attach(3, manifest())
    daemon.get(1, 1, 0, 0, 1)
    daemon.get(2, 1, 0, 2, 3)
    daemon.fetch(3, 1, 1, 0, 1, 2, 3)
    assert not of(CreatePool, daemon.feed(Silent(1)))
    assert of(CreatePool, daemon.feed(Silent(2)))


def test_a_fetch_that_only_silence_blocks_is_refused_when_there_is_no_memory() -> None:
    daemon, out = blocked_by_silence()
    (create,) = of(CreatePool, out)
    error = errors.SegmentFailed("no memory")
    out = daemon.feed(PoolFailed(create.segment, error))
    assert [(refusal.session, refusal.error) for refusal in of(Refuse, out)] == [(2, error)]
    assert not of(CreatePool, out)


def test_an_ack_that_was_sent_before_the_question_does_not_answer_it() -> None:
    """If the session stops now, it has to be missed: it owes the answer still."""
    daemon = two_sessions(2)
    daemon.get(1, 1, 0, 0, 1)
    daemon.ack(1, 0, 1)
    daemon.fetch(2, 1, 0, 2)  # one block retires at version 1
    assert of(AskAck, daemon.said)[-1] == AskAck(1, 1)
    daemon.ack(1, 0, 1)  # under way since before
    assert daemon.core.owing == [1]


def test_a_session_that_wakes_and_stops_again_is_asked_and_missed_again() -> None:
    daemon, out = blocked_by_silence()
    (create,) = of(CreatePool, out)
    daemon.feed(Heard(1))
    daemon.feed(PoolFailed(create.segment, errors.SegmentFailed("no memory")))
    if daemon.core.sessions[2].waiting is None:
        daemon.fetch(2, 2, 0, 2)
    assert daemon.core.owing == [1]


# -- a new generation --------------------------------------------------------------------------------------------------


def test_a_larger_budget_moves_the_pool_and_what_is_resident_is_copied() -> None:
    daemon = Daemon(4)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 0, 0, 1)
    out = created(daemon, budget(daemon, 20))
    copies = of(StartCopy, out)
    assert len(copies) == 2
    assert {copy.source for copy in copies} == {1}
    assert [slot.number for slot in daemon.core.models[manifest().key].pools[0].slots] == list(range(8))


def test_what_is_copied_into_a_new_generation_was_read_only_once() -> None:
    daemon = Daemon(4)
    daemon.attach(1, manifest())
    daemon.get(1, 1, 1, 0, 1)
    model = daemon.core.models[manifest().key]
    read = model.bytes_read
    copied(daemon, created(daemon, budget(daemon, 7)))
    assert [(layer.pool_slots, layer.resident_blocks) for layer in model_status(model).layers] == [(6, 0), (6, 2)]
    assert [layer.bytes_read for layer in model.counts] == [0, read]


def test_a_fetch_for_a_generation_that_the_pool_has_left_is_refused() -> None:
    daemon = Daemon(4)
    daemon.attach(1, manifest())
    (create,) = of(CreatePool, budget(daemon, 20))
    before = daemon.segment(1, 0)
    daemon.feed(PoolCreated(create.segment))
    assert daemon.segment(1, 0) == create.segment != before
    (refusal,) = of(Refuse, daemon.feed(Fetch(1, 1, before, 0, (0,))))
    assert isinstance(refusal.error, errors.PoolMoved)


def test_a_fetch_that_was_granted_is_answered_in_the_generation_that_its_pool_has_left() -> None:
    daemon = Daemon(4)
    daemon.attach(1, manifest())
    daemon.fetch(1, 1, 0, 0, 1)
    reads = list(daemon.reads.values())
    assert not of(Refuse, created(daemon, budget(daemon, 20)))
    out = [said for read in reads for said in daemon.feed(ReadDone(read.segment, read.slot, 7))]
    assert [answer.session for answer in of(Answer, out)] == [1]


def test_a_generation_is_offered_once() -> None:
    daemon = two_sessions(4)
    created(daemon, budget(daemon, 20))
    for session in (1, 2, 1):
        daemon.feed(Heard(session))
    assert [move.session for move in of(Move, daemon.said)] == [1, 2]


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_what_a_model_that_nobody_uses_left_in_an_old_generation_is_given_back() -> None:
    """The session ends while its pool moves: the copies go on, or the old segment would stay for ever."""
    daemon = Daemon(8)
    daemon.attach(1, manifest())
    daemon.finish()
    (create,) = of(CreatePool, budget(daemon, 6))
    daemon.feed(Ended(1))
    out = daemon.feed(PoolCreated(create.segment))
    copied(daemon, out)
    assert of(UnlinkPool, daemon.said)[0] == UnlinkPool(1)
    assert daemon.core.used <= daemon.core.budget


def test_memory_that_a_model_is_being_opened_in_is_not_given_to_others() -> None:
    a, b = manifest("a", experts=16), manifest("b")
    daemon = Daemon(16)
    daemon.attach(1, a)
    daemon.core.budget = daemon.core.most = daemon.core.used + largest(b)
    daemon.ask(2, b)  # its segment is being created
    assert not of(CreatePool, daemon.feed(BudgetChanged(daemon.core.budget + PAGE)))
    (larger,) = of(CreatePool, daemon.feed(BudgetChanged(daemon.core.budget + 6 * PAGE)))
    assert larger.layout.size + largest(b) <= daemon.core.budget


def test_a_budget_that_shrinks_while_a_model_is_opened_is_kept_when_it_is_open() -> None:
    model = manifest()
    daemon = Daemon(8)
    (create,) = of(CreatePool, daemon.ask(1, model))
    daemon.feed(BudgetChanged(smallest(model)))
    (smaller,) = of(CreatePool, daemon.feed(PoolCreated(create.segment)))
    assert smaller.layout.size == smallest(model)


def test_a_budget_that_grew_while_nobody_used_the_model_is_used_when_somebody_comes() -> None:
    daemon = Daemon(4)
    daemon.attach(1, manifest())
    daemon.feed(Ended(1))
    assert not of(CreatePool, budget(daemon, 20))
    (create,) = of(CreatePool, daemon.feed(Attach(2, 102, "shm", manifest())))
    assert create.layout.slots == 8


def test_a_budget_that_shrinks_while_a_pool_grows_is_kept_though_the_growth_fails() -> None:
    daemon = Daemon(5)
    daemon.attach(1, manifest())
    (create,) = of(CreatePool, budget(daemon, 20))
    budget(daemon, 4)
    out = daemon.feed(PoolFailed(create.segment, errors.SegmentFailed("no memory")))
    (smaller,) = of(CreatePool, out)
    assert smaller.layout.slots == 3
    (half,) = of(CreatePool, daemon.feed(PoolFailed(smaller.segment, errors.SegmentFailed("no memory"))))
    assert half.layout.slots == 2, "perhaps there is memory for less"
    assert not of(CreatePool, daemon.feed(PoolFailed(half.segment, errors.SegmentFailed("no memory"))))
    (again,) = of(CreatePool, daemon.feed(MemoryWanted()))
    assert again.layout.slots == 3
    assert not of(CreatePool, daemon.feed(MemoryWanted()))


def test_a_model_that_was_still_read_for_is_dropped_when_the_budget_is_too_small_for_it() -> None:
    daemon = Daemon(budget=6 * PAGE)
    a, b = manifest("a"), manifest("b")
    daemon.core.budget = smallest(a)
    daemon.attach(1, a)
    daemon.core.budget = smallest(a) + smallest(b)
    daemon.attach(2, b)
    daemon.fetch(1, 1, 0, 0)
    daemon.feed(Ended(1))
    daemon.feed(BudgetChanged(smallest(b)))
    assert a.key in daemon.core.models
    daemon.finish()
    assert a.key not in daemon.core.models
    assert daemon.core.used <= daemon.core.budget


@pytest.mark.parametrize("end", [smallest, largest])
def test_pools_of_one_model_get_what_there_is_to_the_last(end: Callable[[Manifest], int]) -> None:
    """Each by its own floor and room: not in proportion to what they happen to have."""
    model = manifest(experts=3, shapes=(ONE_PAGE, TWO_PAGES, ONE_PAGE))
    daemon = Daemon(budget=largest(model))
    daemon.attach(1, model)
    for size in (largest(model) - 3 * PAGE, end(model)):
        out = daemon.feed(BudgetChanged(size))
        while out:
            out = created(daemon, out)
            out += copied(daemon, out)
            for old in list(daemon.core.models[model.key].old):
                out += daemon.feed(Released(1, old.segment))
            out += daemon.finish()
    assert daemon.core.used == end(model)


def test_what_has_to_be_dropped_is_not_copied_nor_are_moves_that_have_begun() -> None:
    daemon = warm()
    (create,) = of(CreatePool, daemon.feed(BudgetChanged(12 * PAGE)))
    assert not of(CreatePool, daemon.feed(BudgetChanged(6 * PAGE, drop=True))), "it has not entered the first one yet"
    out = daemon.feed(PoolCreated(create.segment))
    assert not of(StartCopy, out)
    (smaller,) = of(CreatePool, out)
    out = daemon.feed(PoolCreated(smaller.segment))
    assert not of(StartCopy, out)
    assert smaller.layout.size <= 6 * PAGE


def test_copies_end_when_everything_has_to_be_dropped() -> None:
    daemon = warm()
    (create,) = of(CreatePool, daemon.feed(BudgetChanged(12 * PAGE)))
    copies = of(StartCopy, daemon.feed(PoolCreated(create.segment)))
    assert copies
    out = daemon.feed(BudgetChanged(6 * PAGE, drop=True))
    for copy in copies:
        out += daemon.feed(ReadDone(copy.segment, copy.slot, 0))
    assert not of(StartCopy, out)


def test_a_model_that_is_not_wanted_goes_unless_somebody_uses_it() -> None:
    daemon = Daemon(8)
    model = manifest()
    daemon.attach(1, model)
    daemon.finish()
    daemon.feed(Unwanted(model.key))
    assert model.key in daemon.core.models, "it is in use"
    daemon.attach(2, model)
    daemon.feed(Ended(1))
    daemon.feed(Ended(2))
    assert model.key in daemon.core.models, "somebody wanted it again"
    out = daemon.feed(Unwanted(model.key))
    assert of(UnlinkPool, out) and not daemon.core.models
    assert not daemon.feed(Unwanted(model.key))


def test_under_pressure_a_model_can_be_loaded_with_what_it_needs_at_least() -> None:
    model = manifest()
    daemon = Daemon(8)
    daemon.feed(BudgetChanged(0, drop=True, most=9 * PAGE))
    daemon.attach(1, model)
    assert daemon.core.used == daemon.core.smallest_budget == smallest(model)
    daemon.feed(BudgetChanged(9 * PAGE))
    assert of(CreatePool, daemon.said)[-1].layout.size > smallest(model)
