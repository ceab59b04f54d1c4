"""The core against a model of the world: sessions, two small models, messages, reads and budgets in any order.

``core_world`` plays the server and the workers, and checks after every event: bytes that somebody may read stay; the
table names sealed bytes only; nothing changes in a generation that its pool has left, and it stays as long as somebody
has it; slots are conserved; memory is accounted for and keeps within the budget.  Here are the things that happen, and
what must hold when everybody has had their say: no fetch is left unanswered, whoever may be stopped; and once those
who were stopped are awake, one generation of each pool is left, as large as the budget lets it be, and every slot of
it can be used.

Not covered: how a worker keeps its promises (``worker.attach``, ``worker.experts``).
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from expertd.daemon.core import Core, events, foresight, instructions, quotas, topics, turns, warmth
from expertd.daemon.core.plan import GROWTH, largest, resized
from expertd.protocol.errors import ReadFailed
from expertd.protocol.layout import PAGE
from expertd.protocol.messages import AliasMode
from tests.core_parts import CHANNELS, LAYERS, MODELS, Block, Kind, WatchedLRU, Worker
from tests.core_world import World

MOVES = 24
"""More than this often no pool may move while nothing happens to it."""

Choice = Callable[["CacheMachine"], list[int]]


def _some(choose: Choice) -> st.SearchStrategy[int]:
    """One of the session numbers that ``choose`` finds in the machine."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choose(machine)))


def _any_of(choose: Choice) -> Callable[[CacheMachine], bool]:
    return lambda machine: bool(choose(machine))


def _who(condition: Callable[[Worker], object]) -> Choice:
    return lambda machine: sorted(number for number, worker in machine.workers.items() if condition(worker))


_everybody = _who(lambda worker: True)
_free = _who(lambda worker: worker.free)
_awake = _who(lambda worker: worker.granted and not worker.stopped)
_stopped = _who(lambda worker: worker.stopped)
_looking_up = _who(lambda worker: worker.looks_up)
_reading = _who(lambda worker: worker.reading and not worker.stopped)
_with_requests = _who(lambda worker: worker.requests and not worker.stopped)
_with_offers = _who(lambda worker: worker.free and worker.offers)
_with_spare = _who(lambda worker: worker.granted and worker.spare and not worker.stopped)
_in_an_event = _who(lambda worker: worker.granted and worker.rest and not worker.stopped and worker.fetching is None)
_to_fetch_again = _who(lambda worker: worker.free and worker.again)
_sending = {channel: _who(lambda worker, c=channel: worker.outbox[c]) for channel in CHANNELS}
_deaf = {channel: _who(lambda worker, c=channel: worker.inbox[c] and not worker.stopped) for channel in CHANNELS}


def _owing(machine: CacheMachine) -> list[int]:
    return sorted(machine.core.owing)


def _owing_and_stopped(machine: CacheMachine) -> list[int]:
    return [number for number in _owing(machine) if machine.workers[number].stopped]


_layer = st.integers(0, LAYERS - 1)
_experts = st.sets(st.integers(0, 3), min_size=1, max_size=2) | st.sets(st.integers(0, 3), min_size=1, max_size=4)
_blocks = st.lists(st.tuples(_layer, st.integers(0, 3)), max_size=6)
_seldom = st.sampled_from([False, False, False, True])
_often = st.sampled_from([True, True, True, False])
_late = _seldom
_which = st.integers(0, 9)
_pages = st.integers(3, 9) | st.integers(8, 16) | st.integers(3, 30) | st.sampled_from([3, 8, 11, 13, 14, 27])


class CacheMachine(World, RuleBasedStateMachine):
    """What may happen, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.attached = 0
        self.last: dict[str, int] = {}

    @initialize(
        pages=_pages,
        model=st.sampled_from(sorted(MODELS)),
        prompt=st.lists(st.booleans(), min_size=2, max_size=3),
    )
    def start(self, pages: int, model: str, prompt: list[bool]) -> None:
        """A core with a few sessions open, so that runs get somewhere."""
        self.core = Core(pages * PAGE, WatchedLRU)
        self.patched = pytest.MonkeyPatch()  # pools should give each other memory as often as they can
        for name, value in (("WINDOW", 1), ("STEP", 0.4), ("COPYING", 0.0)):
            self.patched.setattr(quotas, name, value)
        for name in ("WORTH", "WORTH_LASTING", "BETTER"):  # whatever is announced is read
            self.patched.setattr(foresight, name, 0.0)
        self.patched.setattr(foresight, "EVIDENCE", 1)
        for name, value in (("CHAPTER", 1), ("STRANGE", -1.0), ("TURNED", -1.5), ("RIPE", 0), ("LOOKED_AT", 1)):
            self.patched.setattr(topics, name, value)  # sessions turn all the time
        for name, value in (("LIKELY", 0.0), ("SHARE", 1), ("HORIZON", 1)):  # and all that is absent is likely
            self.patched.setattr(turns, name, value)
        for hears_at_once in prompt:
            self.attach(model, False, hears_at_once, slow=False, recorded=[], left=[], spare=0, again=False, room=0)

    def is_time_for(self, what: str, steps: int) -> bool:
        """Whether ``what`` was so many events ago: it would take up too much of a run."""
        return self.steps > self.last.get(what, 0) + steps

    # -- sessions ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.workers or (len(self.workers) < 4 and self.is_time_for("attach", 5)))
    @rule(
        model=st.sampled_from(sorted(MODELS)), copy=_seldom, prompt=st.booleans(), slow=st.booleans(),
        recorded=_blocks, left=_blocks, spare=st.integers(0, 2), again=st.booleans(), room=_pages,
    )  # fmt: skip
    def attach(
        self, model: str, copy: bool, prompt: bool, slow: bool, recorded: list[Block], left: list[Block], spare: int,
        again: bool, room: int,
    ) -> None:  # fmt: skip
        """A session opens a model.

        It may have pools of a daemon that has died, which others have too (``again``) or which are new here; and of a
        model that is new such a daemon may have left a record.
        """
        self.last["attach"] = self.steps
        key = MODELS[model].key
        known = key in self.core.models
        self.attached += 1
        mode: AliasMode = "copy" if copy else "shm"
        worker = self.workers[self.attached] = Worker(self.attached, MODELS[model], mode, prompt)
        handed = self.left_behind(MODELS[model], left, spare)
        holding = sum(what.layout.size for what in handed)
        if again:
            handed += self.still_held(MODELS[model])
        self.feed(events.Attach(self.attached, 100 + self.attached, mode, MODELS[model], holding, room * PAGE))
        if not known and key in self.core.models:
            self.feed(events.Recall(key, tuple(recorded), {}, 1.0))
        if handed:
            self.hand_back(worker, handed)
        if not slow:
            self.create_pools()

    @precondition(lambda self: self.workers and self.is_time_for("hand back", 20))
    @rule(session=_some(_everybody), left=_blocks, spare=st.integers(0, 2), again=st.booleans())
    def hand_back_late(self, session: int, left: list[Block], spare: int, again: bool) -> None:
        self.last["hand back"] = self.steps
        worker = self.workers[session]
        handed = self.left_behind(worker.manifest, left, spare)
        self.hand_back(worker, [*handed, *(self.still_held(worker.manifest) if again else ())])

    @precondition(lambda self: self.workers and self.is_time_for("end", 10))
    @rule(session=_some(_everybody))
    def end(self, session: int) -> None:
        self.last["end"] = self.steps
        worker = self.workers.pop(session)
        self.ghosts += [message for channel in CHANNELS for message in worker.outbox[channel]]
        self.feed(events.Ended(session))

    @precondition(lambda self: self.workers and self.is_time_for("end", 40))
    @rule()
    def end_all(self) -> None:
        for session in _everybody(self):
            self.end(session)

    @precondition(lambda self: self.ghosts)
    @rule()
    def hear_from_the_dead(self) -> None:
        self.feed(self.ghosts.pop(0))

    @precondition(_any_of(_looking_up))
    @rule(session=_some(_looking_up), layer=_layer, experts=_experts, late=_late)
    def run_event(self, session: int, layer: int, experts: set[int], late: bool) -> None:
        """Look the experts of an event up; fetch all of them if one is absent."""
        worker = self.workers[session]
        number, segment = self.pool_of(worker, layer)
        wanted = sorted({expert % segment.layout.experts for expert in experts})
        slots = self.look_up(worker, layer, wanted)
        if None in slots:
            self.send_fetch(worker, layer, wanted, late)
            return
        note(f"   session {session} hits {wanted} of layer {layer} in slots {slots} of segment {number}")
        self.feed(events.Routed(session, ((layer, wanted),)))

    @precondition(_any_of(_looking_up))
    @rule(session=_some(_looking_up), acks=st.booleans(), stops=_seldom)
    def run_hits(self, session: int, acks: bool, stops: bool) -> None:
        """Compute with everything that is resident, and tell nobody; perhaps ack before, perhaps stop then."""
        worker = self.workers[session]
        if acks:
            self.send_ack(worker, "data", late=False)
        for number in sorted(worker.adopted.values()):
            segment = self.segments[number]
            for row, expert in sorted(segment.table):
                self.look_up(worker, segment.layers[row], [expert])
            note(f"   session {session} hits (row, expert) {sorted(segment.table)} of segment {number}")
        if stops and self.is_time_for("stop", 10):
            self.stop(session)

    @precondition(_any_of(_looking_up))
    @rule(session=_some(_looking_up), experts=st.tuples(*[_experts] * LAYERS))
    def run_forward(self, session: int, experts: tuple[set[int], ...]) -> None:
        """Events of all layers, each fetched block read at once, until one has to wait for other sessions."""
        for layer, chosen in enumerate(experts):
            if self.workers[session].looks_up:
                self.run_event(session, layer, chosen, late=False)
                self.finish_reads()

    @precondition(_any_of(_awake))
    @rule(session=_some(_awake), layer=_layer, experts=_experts, late=_late)
    def fetch(self, session: int, layer: int, experts: set[int], late: bool) -> None:
        """Fetch without looking; if another fetch waits (its asker was interrupted), it gives that one up."""
        worker = self.workers[session]
        _, segment = self.pool_of(worker, layer)
        self.send_fetch(worker, layer, [expert % segment.layout.experts for expert in experts], late)

    @precondition(_any_of(_awake))
    @rule(
        session=_some(_awake), layer=_layer, experts=st.permutations(range(4)), size=st.integers(1, 2),
        leases_only=_often, late=_late,
    )  # fmt: skip
    def begin_in_groups(
        self, session: int, layer: int, experts: list[int], size: int, leases_only: bool, late: bool
    ) -> None:
        """Fetch some of an event's experts and say what will follow."""
        worker = self.workers[session]
        _, segment = self.pool_of(worker, layer)
        wanted = [expert % segment.layout.experts for expert in experts]
        self.send_group(worker, layer, wanted, size, leases_only, late)

    @precondition(_any_of(_in_an_event))
    @rule(session=_some(_in_an_event), size=st.integers(1, 3), leases_only=_often, late=_late)
    def go_on_in_groups(self, session: int, size: int, leases_only: bool, late: bool) -> None:
        self.send_rest(self.workers[session], size, leases_only, late)

    @precondition(_any_of(_awake))
    @rule(
        session=_some(_awake), layer=st.integers(0, LAYERS), experts=st.permutations(range(5)), count=st.integers(1, 3),
        distance=st.integers(1, 2), prompt=st.booleans(), late=_late,
    )  # fmt: skip
    def announce(
        self, session: int, layer: int, experts: list[int], count: int, distance: int, prompt: bool, late: bool
    ) -> None:
        """Say what a later event may need, perhaps of a layer or an expert that there is not."""
        worker = self.workers[session]
        number, _ = self.pool_of(worker, min(layer, LAYERS - 1))
        ahead = events.Ahead(session, number, layer, tuple(experts[:count]), distance, prompt)
        self.send(worker, "data", ahead, late)

    @precondition(lambda self: _awake(self) and self.is_time_for("nonsense", 10))
    @rule(session=_some(_awake), layer=st.sampled_from([0, LAYERS]), expert=st.integers(3, 5))
    def fetch_nonsense(self, session: int, layer: int, expert: int) -> None:
        self.last["nonsense"] = self.steps
        worker = self.workers[session]
        number, _ = self.pool_of(worker, 0)
        self.send(worker, "data", self.new_fetch(worker, number, layer, (expert, 2, expert)), late=False)

    @precondition(lambda self: _with_requests(self) and self.is_time_for("again", 5))
    @rule(session=_some(_with_requests), back=st.integers(0, 1), late=_late)
    def fetch_again(self, session: int, back: int, late: bool) -> None:
        """Send the newest fetch or the one before it once more, whether it was answered or not."""
        self.last["again"] = self.steps
        worker = self.workers[session]
        sequence = max(1, worker.sequence - back)
        self.send(worker, "data", worker.requests[sequence], late)

    @precondition(_any_of(_free))
    @rule(session=_some(_free), channel=st.sampled_from(CHANNELS), late=_late)
    def ack(self, session: int, channel: str, late: bool) -> None:
        self.send_ack(self.workers[session], "data" if channel == "data" else "control", late)

    @precondition(_any_of(_reading))
    @rule(session=_some(_reading))
    def evaluate(self, session: int) -> None:
        """Finish computing without telling anybody."""
        self.workers[session].reading.clear()

    # -- moving to other generations, stopping, waking -----------------------------------------------------------------

    @precondition(_any_of(_with_offers))
    @rule(session=_some(_with_offers), which=_which)
    def follow(self, session: int, which: int) -> None:
        worker = self.workers[session]
        kinds = sorted(worker.offers)
        self.adopt(worker, kinds[which % len(kinds)])
        if worker.looks_up:
            self.run_hits(session, acks=False, stops=False)

    @precondition(_any_of(_with_spare))
    @rule(session=_some(_with_spare), channel=st.sampled_from(CHANNELS), late=_late)
    def leave(self, session: int, channel: str, late: bool) -> None:
        worker = self.workers[session]
        for segment in self.releasable(worker)[:1]:
            self.release(worker, segment, "data" if channel == "data" else "control", late)

    @precondition(_any_of(_to_fetch_again))
    @rule(session=_some(_to_fetch_again))
    def fetch_where_the_pool_is(self, session: int) -> None:
        """What a worker does whose pool had moved: wait for the new generation, adopt it, fetch again."""
        worker = self.workers[session]
        fetch, worker.again = worker.again, None
        assert fetch is not None
        kind: Kind = self.segments[fetch.segment].kind if fetch.segment in self.segments else ("", 0)
        if worker.adopted.get(kind) == fetch.segment:
            if kind not in worker.offers:  # it has not heard of it yet
                worker.again = fetch
                return
            self.adopt(worker, kind)
        self.send_fetch(worker, fetch.layer, fetch.experts, late=False)

    @precondition(lambda self: _awake(self) and self.is_time_for("stop", 10))
    @rule(session=_some(_awake))
    def stop(self, session: int) -> None:
        self.last["stop"] = self.steps
        note(f"   session {session} is stopped")
        self.workers[session].stopped = True

    @precondition(_any_of(_stopped))
    @rule(session=_some(_stopped))
    def wake(self, session: int) -> None:
        worker = self.workers[session]
        note(f"   session {session} is awake")
        worker.stopped = False
        while worker.prompt and any(worker.inbox.values()):
            for channel in CHANNELS:
                if worker.inbox[channel]:
                    self.hear(worker, channel)

    @precondition(_any_of(_owing_and_stopped))
    @rule(session=_some(_owing_and_stopped))
    def miss(self, session: int) -> None:
        """The server's patience with a session that is stopped is at an end."""
        self.feed(events.Silent(session))

    @precondition(lambda self: self.workers and self.is_time_for("suspect", 20))
    @rule(session=_some(_everybody))
    def suspect(self, session: int) -> None:
        """It is at an end with one that is only slow, or that has just answered."""
        self.last["suspect"] = self.steps
        self.feed(events.Silent(session))

    @precondition(lambda self: _awake(self) and self.is_time_for("ping", 10))
    @rule(session=_some(_awake), late=_late)
    def ping(self, session: int, late: bool) -> None:
        self.last["ping"] = self.steps
        self.send(self.workers[session], "control", events.Heard(session), late)

    # -- messages that took their time ---------------------------------------------------------------------------------

    @precondition(_any_of(_sending["data"]))
    @rule(session=_some(_sending["data"]))
    def deliver_data(self, session: int) -> None:
        self.feed(self.workers[session].outbox["data"].popleft())

    @precondition(_any_of(_sending["control"]))
    @rule(session=_some(_sending["control"]))
    def deliver_control(self, session: int) -> None:
        self.feed(self.workers[session].outbox["control"].popleft())

    @precondition(_any_of(_deaf["data"]))
    @rule(session=_some(_deaf["data"]))
    def hear_data(self, session: int) -> None:
        self.hear(self.workers[session], "data")

    @precondition(_any_of(_deaf["control"]))
    @rule(session=_some(_deaf["control"]))
    def hear_control(self, session: int) -> None:
        self.hear(self.workers[session], "control")

    @precondition(_any_of(_deaf["data"]))
    @rule(session=_some(_deaf["data"]))
    def lose_an_answer(self, session: int) -> None:
        worker = self.workers[session]
        worker.inbox["data"].popleft()
        worker.answer_lost = True

    # -- memory and reads ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_time_for("budget", 3))
    @rule(pages=_pages, slow=st.booleans())
    def change_budget(self, pages: int, slow: bool) -> None:
        self.last["budget"] = self.steps
        self.set_budget(max(pages * PAGE, self.core.smallest_budget))
        if not slow:
            self.create_pools()

    def set_budget(self, size: int) -> None:
        self.no_memory = self.no_memory and bool(self.creating())
        self.feed(events.BudgetChanged(size))

    def create_pools(self) -> None:
        """Everything that is being created, and what follows from it; that must come to an end."""
        self.moves = 0
        while self.creating():
            self.create_pool(0)
            assert self.moves < MOVES, "pools move for ever"

    @precondition(lambda self: self.creating())
    @rule(which=_which)
    def create_pool(self, which: int) -> None:
        self.segment_created(self.creating()[which % len(self.creating())])

    @precondition(lambda self: self.creating())
    @rule(which=_which)
    def fail_to_create_pool(self, which: int) -> None:
        self.segment_failed(self.creating()[which % len(self.creating())])

    @precondition(lambda self: self.core.models and self.is_time_for("warm", 5))
    @rule(which=_which, blocks=_blocks)
    def warm(self, which: int, blocks: list[tuple[int, int]]) -> None:
        self.last["warm"] = self.steps
        key = self.some_model(which)
        self.feed(events.Warm(key, tuple(self.known(key, blocks))))

    @precondition(lambda self: self.core.models and self.is_time_for("pin", 5))
    @rule(which=_which, blocks=_blocks, pinned=_often)
    def pin(self, which: int, blocks: list[tuple[int, int]], pinned: bool) -> None:
        self.last["pin"] = self.steps
        key = self.some_model(which)
        self.feed(events.Pin(key, tuple(self.known(key, blocks)), pinned))

    def some_model(self, which: int) -> str:
        return list(self.core.models)[which % len(self.core.models)]

    def known(self, key: str, blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [block for block in blocks if warmth.unknown(self.core.models[key], [block]) is None]

    @precondition(lambda self: self.reads)
    @rule(which=_which)
    def finish_read(self, which: int) -> None:
        self.read_done(sorted(self.reads)[which % len(self.reads)])

    @precondition(lambda self: self.reads)
    @rule()
    def finish_reads(self) -> None:
        while self.reads:
            self.finish_read(0)

    @precondition(lambda self: self.reads)
    @rule(which=_which)
    def fail_read(self, which: int) -> None:
        self.read_failed(sorted(self.reads)[which % len(self.reads)], ReadFailed("bad sector"))

    # -- when everybody has had their say ------------------------------------------------------------------------------

    @precondition(lambda self: self.is_time_for("quiesce", 25))
    @rule()
    def quiesce(self) -> None:
        """Everything under way arrives, everybody who is asked acks; then nobody who is awake may be left waiting."""
        self.last["quiesce"] = self.steps
        note("   everything arrives")
        self.until_nothing_happens(self.catch_up)
        for worker in self.workers.values():
            assert worker.granted, f"session {worker.number} waits for ever to be opened"
            if not worker.stopped:
                assert worker.fetching is None, f"session {worker.number} waits for ever for {worker.fetching}"
                assert worker.again is None, f"session {worker.number} waits for ever for where {worker.again} is"
                self.knows_what_is_complete(worker)

    @precondition(lambda self: self.is_time_for("quiesce", 25))
    @rule()
    def settle(self) -> None:
        """Those who were stopped wake, and everybody follows: nothing old is left, and memory is put to use."""
        self.quiesce()
        for session in _stopped(self):
            self.wake(session)
        if self.no_memory:
            self.set_budget(self.core.budget)  # there is memory again
        note("   everybody follows")
        self.until_nothing_happens(self.catch_up_and_leave)
        assert not self.creating()
        assert sorted(self.segments) == sorted(self.current.values()), "an old generation is left for ever"
        for worker in self.workers.values():
            assert worker.fetching is worker.again is None
            assert sorted(worker.adopted.values()) == sorted(worker.held), f"session {worker.number} was left behind"
            assert all(self.current[self.segments[number].kind] == number for number in worker.held)
            self.knows_what_is_complete(worker)
        assert self.core.used <= max(self.core.budget, self.core.smallest_budget)
        self.pools_have_grown()

    def until_nothing_happens(self, act: Callable[[Worker], None]) -> None:
        """First only what somebody waits for is read: nobody may wait for what is read for nobody."""
        self.let_things_happen(act, self.finish_demand)
        for worker in self.workers.values():
            if worker.granted and not worker.stopped:
                assert worker.fetching is None, f"session {worker.number} waits for reads that nobody waits for"
        self.let_things_happen(act, self.finish_reads)

    def finish_demand(self) -> None:
        for place in sorted(self.reads):
            read = self.reads.get(place)
            if read is not None and getattr(read, "priority", instructions.Priority.DEMAND) == 0:  # copies are demand
                self.read_done(place)

    def let_things_happen(self, act: Callable[[Worker], None], read: Callable[[], None]) -> None:
        before = -1
        rounds = 0
        while before != self.steps:
            before = self.steps
            rounds += 1
            assert rounds < 200, "the core and its sessions talk for ever"
            while self.ghosts:
                self.hear_from_the_dead()
            self.create_pools()
            read()
            for session in _everybody(self):
                if session in self.workers and self.workers[session].granted:
                    act(self.workers[session])

    def catch_up(self, worker: Worker) -> None:
        """A worker that is awake reads its messages and answers; one that is stopped is missed in the end."""
        for channel in CHANNELS:
            while worker.outbox[channel]:
                self.feed(worker.outbox[channel].popleft())
            while worker.inbox[channel] and not worker.stopped:
                self.hear(worker, channel)
        if worker.stopped:
            if worker.number in self.core.owing:
                self.miss(worker.number)
        elif worker.fetching is not None and worker.answer_lost:
            worker.answer_lost = False
            self.feed(worker.fetching)
        elif worker.again is not None:
            self.fetch_where_the_pool_is(worker.number)
        elif worker.fetching is None and worker.rest:
            self.send_rest(worker, 2, leases_only=True, late=False)
        elif worker.fetching is None and worker.asked:
            worker.reading.clear()
            self.send_ack(worker, "control", late=False)

    def catch_up_and_leave(self, worker: Worker) -> None:
        if self.core.sessions[worker.number].silent:
            self.feed(events.Heard(worker.number))  # it answers a Ping
        self.catch_up(worker)
        if worker.free:
            worker.reading.clear()
            for kind in sorted(worker.offers):
                self.adopt(worker, kind)
            for segment in self.releasable(worker):
                self.release(worker, segment, "control", late=False)

    def knows_what_is_complete(self, worker: Worker) -> None:
        for number in sorted(worker.held):
            segment = self.segments[number]
            if segment.complete and self.current[segment.kind] == number:
                assert number in worker.complete, f"session {worker.number} was not told that {number} is complete"

    def pools_have_grown(self) -> None:
        """Where there is room for everything, everything is held; one pool alone takes what is worth a move."""
        used = [model for model in self.core.models.values() if model.sessions]
        idle = sum(model.size for model in self.core.models.values() if not model.sessions)
        if idle + sum(largest(model.manifest) * (1 + model.copies) for model in used) <= self.core.budget:
            for model in used:
                assert all(pool.holds_all for pool in model.pools), "memory lies idle and would hold everything"
        elif len(used) == 1 and len(used[0].pools) == 1:
            (pool,) = used[0].pools
            room = (self.core.budget - self.core.used) // (1 + used[0].copies)
            could = resized(used[0].manifest, pool.layers, pool.layout.size + room).slots
            assert could < pool.layout.slots * GROWTH, "memory lies idle"

    def teardown(self) -> None:
        try:
            if not self.broken:
                self.nothing_is_lost()
        finally:
            self.patched.undo()

    def nothing_is_lost(self) -> None:
        """Nobody waits for ever, and no slot was lost: fetching everything once fills every pool to the brim."""
        self.settle()
        self.fetch_all()
        self.patched.setattr(quotas, "COPYING", inf)  # no pool moves any more
        self.patched.setattr(topics, "TURNED", inf)  # and nobody turns: a slot stays free when a turn is called off
        self.settle()
        self.fetch_all()
        for session in _awake(self):
            for number in self.workers[session].held:
                segment = self.segments[number]
                filled = min(segment.layout.slots, segment.blocks)
                assert len(segment.table) == filled, f"segment {number} has lost slots"

    def fetch_all(self) -> None:
        for session in _awake(self):
            worker = self.workers[session]
            for layer in range(LAYERS):
                _, segment = self.pool_of(worker, layer)
                for expert in range(segment.layout.experts):
                    self.send_fetch(worker, layer, [expert], late=False)
                    self.quiesce()


TestCore = CacheMachine.TestCase
TestCore.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
