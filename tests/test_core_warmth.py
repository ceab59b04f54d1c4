"""What somebody wants to be resident: wishes fill free slots behind everybody who waits, and what is pinned stays.

Orders that nobody thought of are ``test_core_machine``'s business.
"""

from __future__ import annotations

from expertd.daemon.core import events, warmth
from expertd.daemon.core.events import (
    BudgetChanged,
    Ended,
    Pin,
    PoolCreated,
    ReadCancelled,
    ReadDone,
    Released,
    Unwanted,
    Warm,
)
from expertd.daemon.core.instructions import (
    Cancel,
    CreatePool,
    Instruction,
    Move,
    Priority,
    StartCopy,
    StartRead,
    UnlinkPool,
)
from expertd.daemon.core.slots import BACKGROUND_READS
from expertd.daemon.core.state import Model
from expertd.daemon.policy import Block
from expertd.protocol.layout import PAGE
from tests.core_runner import Runner, model_of
from tests.test_core import Daemon, manifest, of


def wide(slots: int) -> tuple[Daemon, Model]:
    """Two layers of 16 experts over one pool, with a session."""
    daemon = Daemon(slots)
    daemon.attach(1, manifest(experts=16))
    (model,) = daemon.core.models.values()
    return daemon, model


def begun(out: list[Instruction], priority: Priority = Priority.BACKGROUND) -> list[Block]:
    return [(read.layer, read.expert) for read in of(StartRead, out) if read.priority is priority]


def resident(model: Model) -> set[Block]:
    return {block for pool in model.pools for block in pool.where if pool.sealed_slot(block) is not None}


def resize(daemon: Daemon, slots: int) -> None:
    """Have the pool move to so many slots, all that is copied and read for that arrive, and the old one go."""
    out = daemon.feed(BudgetChanged((1 + slots) * PAGE))
    while out:
        what = out.pop(0)
        if isinstance(what, CreatePool):
            out += daemon.feed(PoolCreated(what.segment))
        elif isinstance(what, StartCopy):
            out += daemon.feed(ReadDone(what.segment, what.slot, 0))
        elif isinstance(what, Move):
            (model,) = daemon.core.models.values()
            for pool in list(model.old):
                out += daemon.feed(Released(what.session, pool.segment))
    daemon.finish()


def test_what_is_wished_for_is_read_in_its_order_a_little_at_a_time() -> None:
    daemon, model = wide(8)
    out = daemon.feed(Warm(model.key, ((1, 5), (0, 3), (0, 4), (1, 6))))
    assert begun(out) == [(1, 5), (0, 3)]
    assert len(begun(out)) == BACKGROUND_READS
    assert begun(daemon.finish()) == [(0, 4), (1, 6)]
    assert resident(model) == {(1, 5), (0, 3), (0, 4), (1, 6)}
    assert warmth.wished(model) == 0


def test_what_is_read_for_a_model_that_nobody_wants_any_more_is_called_off() -> None:
    daemon, model = wide(8)
    daemon.feed(Warm(model.key))
    (pool,) = model.pools
    on_their_way = [pool.where[block] for block in sorted(pool.background)]
    assert len(on_their_way) == BACKGROUND_READS
    assert of(Cancel, daemon.feed(Unwanted(model.key))) == []  # somebody uses it
    assert of(Cancel, daemon.feed(Ended(1))) == [Cancel(pool.segment, slot) for slot in on_their_way]
    assert of(Cancel, daemon.feed(Unwanted(model.key))) == []  # it was told before
    for slot in on_their_way:
        assert model.key in daemon.core.models
        out = daemon.feed(ReadCancelled(pool.segment, slot))
    assert out == [UnlinkPool(pool.segment)]
    assert daemon.core.models == {}


def test_without_names_free_slots_are_filled_over_all_layers() -> None:
    daemon, model = wide(8)
    daemon.feed(Warm(model.key))
    daemon.finish()
    assert resident(model) == {(layer, expert) for layer in (0, 1) for expert in range(4)}
    assert model.evictions == 0


def test_what_was_used_comes_first() -> None:
    daemon, model = wide(4)
    for sequence in range(1, 21):
        daemon.get(1, sequence, sequence % 2, 9)
    daemon.get(1, 21, 1, 10, 11, 12, 13)
    assert not {(0, 9), (1, 9)} & resident(model)
    resize(daemon, 6)
    daemon.feed(Warm(model.key))
    daemon.finish()
    assert {(0, 9), (1, 9)} <= resident(model)


def test_a_fetch_goes_before_wishes() -> None:
    daemon, model = wide(8)
    daemon.feed(Warm(model.key))
    out = daemon.fetch(1, 1, 1, 15)
    assert begun(out, Priority.DEMAND) == [(1, 15)]
    assert begun(out) == []


def test_wishes_evict_nothing_and_end_when_there_is_no_room() -> None:
    daemon, model = wide(4)
    daemon.get(1, 1, 0, 10, 11, 12)
    before = resident(model)
    daemon.feed(Warm(model.key))
    daemon.finish()
    assert before <= resident(model)
    assert warmth.wished(model) == 0


def test_a_wish_said_twice_is_one() -> None:
    daemon, model = wide(8)
    for _ in range(3):
        daemon.feed(Warm(model.key, ((0, 1), (0, 2), (0, 3))))
    assert warmth.wished(model) == 3


def test_wishes_wait_until_somebody_uses_the_model() -> None:
    daemon, model = wide(8)
    daemon.feed(Ended(1))
    assert begun(daemon.feed(Warm(model.key, ((0, 1),)))) == []
    daemon.attach(2, manifest(experts=16))
    daemon.finish()
    assert resident(model) == {(0, 1)}


def test_wishes_follow_into_a_new_generation() -> None:
    daemon, model = wide(8)
    daemon.feed(Warm(model.key, tuple((0, expert) for expert in range(6))))
    resize(daemon, 20)
    assert resident(model) == {(0, expert) for expert in range(2, 6)}  # two were being read into the one before


def test_what_is_pinned_is_brought_in_and_stays() -> None:
    daemon, model = wide(6)
    daemon.feed(Pin(model.key, ((0, 1), (1, 2)), True))
    daemon.finish()
    for sequence in range(1, 40):
        daemon.get(1, sequence, sequence % 2, 3 + sequence % 13)
    assert {(0, 1), (1, 2)} <= resident(model)


def test_what_is_pinned_no_more_goes_as_all_else() -> None:
    daemon, model = wide(6)
    daemon.feed(Pin(model.key, ((0, 1), (1, 2)), True))
    daemon.finish()
    daemon.feed(Pin(model.key, (), False))
    assert not model.pinned
    for sequence in range(1, 40):
        daemon.get(1, sequence, sequence % 2, 3 + sequence % 13)
    assert not {(0, 1), (1, 2)} & resident(model)


def test_a_fetch_that_finds_no_other_room_takes_that_of_pins() -> None:
    daemon, model = wide(4)
    daemon.feed(Pin(model.key, tuple((0, expert) for expert in range(4)), True))
    daemon.finish()
    answer = daemon.get(1, 1, 1, 5, 6, 7)
    assert len(answer.slots) == 3
    assert len(resident(model) & model.pinned) == 1


def test_pins_move_into_a_smaller_generation_before_all_else() -> None:
    daemon, model = wide(12)
    daemon.feed(Pin(model.key, ((0, 1), (1, 2)), True))
    daemon.finish()
    for sequence in range(1, 30):
        daemon.get(1, sequence, sequence % 2, 3 + sequence % 13)
    resize(daemon, 5)
    assert {(0, 1), (1, 2)} <= resident(model)


def test_what_does_not_exist_is_named() -> None:
    _, model = wide(8)
    assert warmth.unknown(model, [(0, 15), (1, 0)]) is None
    assert warmth.unknown(model, [(2, 0)]) == "the model has 2 MoE layers, there is no layer 2"
    assert warmth.unknown(model, [(1, 16)]) == "layer 1 has 16 experts, there is no expert 16"


def test_half_of_a_pool_may_be_pinned() -> None:
    daemon, model = wide(8)
    assert warmth.too_many_pins(model, [(0, expert) for expert in range(4)]) is None
    daemon.feed(Pin(model.key, ((0, 0), (0, 1)), True))
    problem = warmth.too_many_pins(model, [(1, expert) for expert in range(3)])
    assert problem == "5 pinned blocks would share a pool of 8 slots; 4 may be pinned there"


def test_all_may_be_pinned_where_there_is_room_for_all() -> None:
    _, model = wide(32)
    assert warmth.too_many_pins(model, [(layer, expert) for layer in (0, 1) for expert in range(16)]) is None


def test_what_is_pinned_in_a_full_pool_stays_once_somebody_has_used_it() -> None:
    daemon, model = wide(4)
    daemon.get(1, 1, 0, 10, 11, 12, 13)
    daemon.feed(Pin(model.key, ((0, 1),), True))
    daemon.finish()
    assert (0, 1) not in resident(model), "nothing goes for it"
    daemon.get(1, 2, 0, 1)
    for sequence in range(3, 12):
        daemon.get(1, sequence, 1, sequence)
    assert (0, 1) in resident(model)


def test_wishes_take_nobody_s_place() -> None:
    daemon, model = wide(4)
    daemon.get(1, 1, 0, 10, 11, 12, 13)
    daemon.feed(Warm(model.key, ((0, 1), (0, 2))))
    daemon.finish()
    assert resident(model) >= {(0, 10), (0, 11), (0, 12)}
    assert warmth.wished(model) == 0


def test_what_an_earlier_daemon_held_is_read_once_however_often_the_pool_grows() -> None:
    runner = Runner(5 * PAGE)
    recorded = model_of((1, 1), experts=16)
    model = runner.attach(1, recorded)
    runner.feed(events.Recall(recorded.key, tuple((0, expert) for expert in range(12)), {}, 5.0))
    read = []
    for pages in (9, 5, 21, 5, 21):
        runner.feed(events.BudgetChanged(pages * PAGE))
        read.append(model.bytes_read // PAGE)
    assert read == [8, 8, 12, 12, 12]
    assert model.recalled is not None and len(model.recalled.back) == 12
