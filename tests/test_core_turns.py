"""What the core does when a session turns to another topic, one behaviour a test.

When it has turned is ``test_topics``'s business; here ``Told`` says so.  When reading for a topic pays is judged as all
reading ahead is (``test_foresight``).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.topics import drive, far_apart, stretches
from expertd.daemon.core.ahead import LIKELY_READS
from expertd.daemon.core.events import BudgetChanged, Ended, Fetch, PoolCreated, Recall, Routed
from expertd.daemon.core.foresight import Gate, Kind
from expertd.daemon.core.instructions import AskAck, Cancel, CreatePool, Instruction, Priority, Promote, StartRead
from expertd.daemon.core.state import Model
from expertd.daemon.core.topics import Topics
from expertd.daemon.core.turns import HORIZON, SHARE
from expertd.daemon.status import model_status
from expertd.protocol.layout import PAGE
from tests.test_core import Daemon, manifest, of

LAYERS, EXPERTS = 2, 32
ON = (20, 21, 22, 23)
"""Experts that the new topic uses in layer 1."""


class Told(Topics):
    """Topics that say that a session has turned when they are told to."""

    def __init__(self, experts: int = EXPERTS) -> None:
        super().__init__(LAYERS, experts, 2)
        self.next: NDArray[np.float32] | None = None

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> NDArray[np.float32] | None:
        turned, self.next = self.next, None
        return turned


def chances(likely: Iterable[tuple[int, int]], experts: int = EXPERTS) -> NDArray[np.float32]:
    """The blocks that are ``likely``, the first more than the second."""
    out = np.full((LAYERS, experts), 0.01, np.float32)
    for place, block in enumerate(likely):
        out[block] = 0.9 - 0.01 * place
    return out


def started(slots: int = 32, worth: bool = True, sessions: int = 1) -> tuple[Daemon, Model, Told]:
    """Two layers of 32 experts over one pool; reading for topics has proved itself or not."""
    daemon = Daemon(slots)
    for session in range(1, sessions + 1):
        daemon.attach(session, manifest(experts=EXPERTS))
    (model,) = daemon.core.models.values()
    model.topics = told = Told()
    gate(model).worth = worth
    return daemon, model, told


def gate(model: Model) -> Gate:
    return model.foresight.gates[Kind.TOPIC]


def turn(daemon: Daemon, told: Told, likely: Iterable[tuple[int, int]], session: int = 1) -> list[Instruction]:
    told.next = chances(likely)
    return daemon.feed(Routed(session, ((0, [0, 1]),)))


def token(daemon: Daemon, *experts: int, session: int = 1) -> list[Instruction]:
    """A token that all hits: it uses ``experts`` of layer 1."""
    return daemon.feed(Routed(session, ((0, [0, 1]), (1, list(experts or (0, 1))))))


def ahead(out: list[Instruction]) -> list[tuple[int, int]]:
    return [(read.layer, read.expert) for read in of(StartRead, out) if read.priority is Priority.AHEAD]


def test_what_is_likely_and_absent_is_read_the_likeliest_first_and_two_at_a_time() -> None:
    daemon, model, told = started()
    daemon.get(1, 1, 1, 21)
    out = turn(daemon, told, [(1, expert) for expert in ON])
    assert ahead(out) == [(1, 20), (1, 22)]
    assert len(ahead(out)) == LIKELY_READS
    assert ahead(daemon.done(1, 20)) == [(1, 23)]
    assert gate(model).announced == 3


def test_an_eighth_of_a_pool_is_read_for_a_turn_at_most() -> None:
    daemon, model, told = started(slots=32)
    turn(daemon, told, [(1, expert) for expert in range(2, 30)])
    daemon.finish()
    assert model.pools[0].sealed == 32 // SHARE == gate(model).announced


def test_where_it_is_not_known_to_pay_nothing_is_read_and_it_is_counted_all_the_same() -> None:
    daemon, model, told = started(worth=False)
    assert ahead(turn(daemon, told, [(1, expert) for expert in ON])) == []
    assert not model.pools[0].expected
    token(daemon, 20, 21)
    for _ in range(HORIZON):
        token(daemon)
    assert (gate(model).judged, gate(model).used) == (4, 2)
    assert (gate(model).useful_bytes, gate(model).wasted_bytes) == (0, 0)


def test_it_is_judged_by_the_tokens_that_follow_and_not_by_later_ones() -> None:
    daemon, model, told = started()
    turn(daemon, told, [(1, expert) for expert in ON])
    daemon.finish()
    for _ in range(HORIZON - 2):  # the token in which it turned counts too
        token(daemon)
    token(daemon, 20)
    assert gate(model).judged == 0
    token(daemon, 21)
    assert (gate(model).judged, gate(model).used) == (4, 1)
    assert (gate(model).useful_bytes, gate(model).wasted_bytes) == (PAGE, 3 * PAGE)
    assert not model.pools[0].expected
    assert model.sessions[1].turn is None


def test_a_fetch_uses_what_was_read_and_makes_what_is_on_its_way_demand() -> None:
    daemon, model, told = started()
    turn(daemon, told, [(1, expert) for expert in ON])
    daemon.done(1, 20)
    out = daemon.fetch(1, 1, 1, 20, 21)
    assert [promote.slot for promote in of(Promote, out)] == [daemon.reads[1, 21].slot]
    assert not of(Cancel, out)
    assert (model.hits, model.misses) == (3, 1)
    assert set(model.pools[0].expected) == {(1, 22), (1, 23)}
    assert gate(model).useful_bytes == 2 * PAGE, "whoever waits for the second waits less"


def test_it_goes_behind_what_is_announced_and_asks_nobody_for_an_ack() -> None:
    daemon, model, told = started(slots=16, sessions=2)
    daemon.get(1, 1, 0, *range(8))
    daemon.get(2, 1, 1, *range(8))
    out = turn(daemon, told, [(1, expert) for expert in ON])
    assert not of(AskAck, out)
    assert not ahead(out), "what left the table for it may still be read"
    pool = model.pools[0]
    assert list(pool.likely) == [(1, 20), (1, 21)]
    assert not pool.ahead
    out = [each for _ in range(2) for session in (1, 2) for each in daemon.ack(session, model.version, 1)]
    assert ahead(out) == [(1, 20), (1, 21)]


def test_a_pool_that_holds_all_learns_no_topics() -> None:
    daemon, model, told = started(slots=LAYERS * EXPERTS)
    told.next = chances([(1, 20)])
    daemon.feed(Routed(1, ((0, [0, 1]),)))
    assert told.next is not None, "nobody asked"
    assert model.sessions[1].turn is None


def test_a_prompt_ends_it_without_a_judgement() -> None:
    daemon, model, told = started()
    turn(daemon, told, [(1, expert) for expert in ON])
    daemon.done(1, 20)
    out = daemon.fetch(1, 1, 1, *range(10, 21))
    assert len(of(Cancel, out)) == 2
    assert gate(model).judged == 0
    assert gate(model).useful_bytes == PAGE
    assert model.sessions[1].turn is None
    assert not model.pools[0].expected


def test_another_turn_and_the_end_of_a_session_call_off_what_has_not_begun() -> None:
    daemon, model, told = started()
    turn(daemon, told, [(1, 20)])
    assert len(of(Cancel, turn(daemon, told, [(1, 24)]))) == 1
    assert len(of(Cancel, daemon.feed(Ended(1)))) == 1
    assert not model.pools[0].expected


def test_a_pool_that_moves_forgets_what_was_likely() -> None:
    daemon, model, told = started()
    turn(daemon, told, [(1, expert) for expert in ON])
    for create in of(CreatePool, daemon.feed(BudgetChanged(56 * PAGE))):
        daemon.feed(PoolCreated(create.segment))
    assert model.moves == 1
    found = model.sessions[1].turn
    assert found is not None
    assert (found.named, found.blocks, found.absent) == (0, set(), set())
    for _ in range(HORIZON + 1):
        token(daemon)
    assert gate(model).judged == 0


def test_a_daemon_that_does_not_read_ahead_only_tells_its_policy() -> None:
    daemon = Daemon(32)
    daemon.core = type(daemon.core)(33 * PAGE, reads_ahead=False)
    daemon.attach(1, manifest(experts=EXPERTS))
    (model,) = daemon.core.models.values()
    model.topics = told = Told()
    before = model.policy.chance((1, 20))
    turn(daemon, told, [(1, 20)])
    assert model.policy.chance((1, 20)) > before
    assert model.sessions[1].turn is None


def test_the_policy_keeps_what_the_new_topic_uses() -> None:
    daemon, model, told = started(slots=16, worth=False)
    for sequence in range(1, 9):
        daemon.get(1, sequence, 1, 2 * sequence - 2, 2 * sequence - 1)
    before = model.policy.ranked()
    turn(daemon, told, [(1, 0), (1, 1)])  # what was used longest ago
    after = model.policy.ranked()
    assert set(after[:2]) == {(1, 0), (1, 1)}
    assert set(before[:2]) != set(after[:2])


def test_profiles_of_the_home_are_topics() -> None:
    daemon, model, _ = started()
    model.topics = Topics(LAYERS, EXPERTS, 2)
    known = chances([(1, 20)])
    daemon.feed(Recall(model.key, (), {}, 0.0, topics=(known, np.ones((1, 3), np.float32))))
    assert model.topics.count == 1
    assert model.recalled is None


def test_changes_of_topic_are_seen_in_the_routing_of_real_sessions_and_told_by_status() -> None:
    """Two topics of eight experts a layer each, in turn."""
    daemon, model, _ = started(slots=24)
    model.topics = Topics(LAYERS, EXPERTS, 2)
    chance = random.Random(0)
    sequence = 0
    for stretch in range(6):
        own = range(8) if stretch % 2 else range(8, 16)
        for _ in range(100):
            for layer in range(LAYERS):
                sequence += 1
                daemon.fetch(1, sequence, layer, *chance.sample(own, 2))
                daemon.finish()
    (topic,) = [each for each in model_status(model).ahead if each.kind == "topic"]
    assert topic.turns == 5, "the first is found late, when enough is known of what is new"
    assert sum(each.turns for each in model_status(model).ahead) == 5


def test_where_topics_have_little_in_common_reading_ahead_proves_itself_and_saves_misses() -> None:
    parts = stretches(far_apart(3, 8, 64, 4, 640), 8, 80)
    without, reads = (drive(parts, 64, 4, 0.3, kind, 3) for kind in ("without", "reads"))
    assert (without.read, without.turns) == (0, 0)
    assert reads.turns >= 21, "every change but the first three"
    assert reads.read > 0
    assert reads.missed < without.missed
    assert reads.first < without.first


@pytest.mark.parametrize("routing", [((7, [0]),), ((0, [99]),), ((1, []),)])
def test_routing_that_makes_no_sense_is_ignored(routing: tuple[tuple[int, list[int]], ...]) -> None:
    daemon, model, told = started()
    turn(daemon, told, [(1, 20)])
    daemon.feed(Routed(1, routing))
    assert set(model.pools[0].expected) == {(1, 20)}
    daemon.feed(Fetch(1, 1, daemon.segment(1, 1), 1, (99,)))
    assert daemon.get(1, 2, 1, 20)
