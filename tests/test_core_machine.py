"""The core against a model of the world: several sessions, two small models, messages and reads in any order.

The harness plays the server and the workers.  It keeps, without looking into the core, the tables that it was told to
publish, what bytes each slot holds, and what each session might still read: all that it looked up or was answered until
it has promised otherwise.  Sessions hold on to as much as the protocol lets them: an ack gives up only what was looked
up before they were told its version.  Each session has two channels to the core with no order between them, as a worker
has two sockets; a message on either may come late.

Checked after every event: bytes that somebody may read stay; the table names sealed bytes only; slots are conserved;
memory stays within the budget.  Checked when everybody has had their say: no fetch is left unanswered, and every slot
of a pool can still be used.

Not covered: several generations of a pool and memory pressure (the core has neither yet), and how a worker keeps its
promises (``worker.attach``, ``worker.experts``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from expertd.daemon.core import Core, events, instructions
from expertd.daemon.core.core import BACKGROUND_READS
from expertd.daemon.core.state import SlotState
from expertd.protocol.errors import (
    BudgetTooSmall,
    ExpertdError,
    FetchInvalid,
    ReadFailed,
    SegmentFailed,
    SessionUnknown,
)
from expertd.protocol.layout import PAGE, PoolLayout
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.messages import AliasMode

Block = tuple[int, int]
Place = tuple[int, int]
"""A slot of a segment: (segment, slot)."""

Channel = Literal["data", "control"]
CHANNELS: tuple[Channel, ...] = ("data", "control")
GARBAGE: Block = (-1, -1)


def _manifest(name: str, experts: int, pages: Iterable[int]) -> Manifest:
    """A model with one layer for each of ``pages``, the size of a block in it."""
    layers = tuple(
        Layer(f"layers.{n}", experts, 2, (Part("w", "U8", (count * PAGE,), ("tensor",), (0,)),))
        for n, count in enumerate(pages)
    )
    return Manifest(name, "family", (), layers)


MODELS = {"plain": _manifest("/plain", 4, (1, 1, 1)), "mixed": _manifest("/mixed", 3, (1, 2, 1))}
LAYERS = 3
"""Of each model."""


def _model_with(experts: int) -> str:
    """The key of the model with so many experts in a layer: that tells them apart."""
    return next(manifest.key for manifest in MODELS.values() if manifest.layers[0].experts == experts)


@dataclass
class Segment:
    """One pool as its memory: what the table says and what the slots hold (GARBAGE from StartRead to ReadDone)."""

    model: str
    layout: PoolLayout
    created: bool = False
    layers: tuple[int, ...] = ()
    table: dict[Block, int] = field(default_factory=dict)
    content: dict[int, Block] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return self.layout.layers * self.layout.experts


@dataclass
class Worker:
    """One session as its process sees it.

    Attributes:
        prompt: whether it hears what it is told at once.
        told: newest version that a message told it.
        asked: whether it owes an ack.
        fetching: its newest Fetch while it has no answer; it looks nothing up meanwhile.
        reading: what it might still read, and what it had been told when it looked that up.
        leased: what the newest answer gave it, even if it has not heard of it yet.
    """

    number: int
    manifest: Manifest
    mode: AliasMode
    prompt: bool
    granted: bool = False
    told: int = 0
    asked: bool = False
    sequence: int = 0
    fetching: events.Fetch | None = None
    answer_lost: bool = False
    requests: dict[int, events.Fetch] = field(default_factory=dict)
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    refusals: dict[int, ExpertdError] = field(default_factory=dict)
    reading: dict[Place, tuple[Block, int]] = field(default_factory=dict)
    leased: dict[Place, Block] = field(default_factory=dict)
    complete: set[int] = field(default_factory=set)
    outbox: dict[Channel, deque[events.Event]] = field(default_factory=lambda: {c: deque() for c in CHANNELS})
    inbox: dict[Channel, deque[instructions.Instruction]] = field(
        default_factory=lambda: {c: deque() for c in CHANNELS}
    )


def _some(choose: Callable[[CacheMachine], list[int]]) -> st.SearchStrategy[int]:
    """One of the session numbers that ``choose`` finds in the machine."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choose(machine)))


def _any_of(choose: Callable[[CacheMachine], list[int]]) -> Callable[[CacheMachine], bool]:
    return lambda machine: bool(choose(machine))


def _everybody(machine: CacheMachine) -> list[int]:
    return sorted(machine.workers)


def _open(machine: CacheMachine) -> list[int]:
    return sorted(number for number, worker in machine.workers.items() if worker.granted)


def _free(machine: CacheMachine) -> list[int]:
    return [number for number in _open(machine) if machine.workers[number].fetching is None]


def _reading(machine: CacheMachine) -> list[int]:
    return [number for number in _open(machine) if machine.workers[number].reading]


def _with_requests(machine: CacheMachine) -> list[int]:
    return [number for number in _open(machine) if machine.workers[number].requests]


def _sending(channel: Channel) -> Callable[[CacheMachine], list[int]]:
    return lambda machine: [n for n in _open(machine) if machine.workers[n].outbox[channel]]


def _deaf(channel: Channel) -> Callable[[CacheMachine], list[int]]:
    return lambda machine: [n for n in _open(machine) if machine.workers[n].inbox[channel]]


_layer = st.integers(0, LAYERS - 1)
_experts = st.sets(st.integers(0, 3), min_size=1, max_size=2) | st.sets(st.integers(0, 3), min_size=1, max_size=4)
_seldom = st.sampled_from([False, False, False, True])
_late = _seldom
_which = st.integers(0, 9)


class CacheMachine(RuleBasedStateMachine):
    """Server, workers and memory around one core."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(0)
        self.segments: dict[int, Segment] = {}
        self.workers: dict[int, Worker] = {}
        self.reads: dict[Place, instructions.StartRead] = {}
        self.ghosts: list[events.Event] = []
        self.abandoned: set[int] = set()
        self.attached = 0
        self.broken = False
        self.steps = 0
        self.last: dict[str, int] = {}

    @initialize(
        pages=st.integers(3, 9) | st.integers(8, 12) | st.integers(3, 30),
        model=st.sampled_from(sorted(MODELS)),
        prompt=st.lists(st.booleans(), min_size=2, max_size=3),
    )
    def start(self, pages: int, model: str, prompt: list[bool]) -> None:
        """A core with a few sessions open, so that runs get somewhere."""
        self.core = Core(pages * PAGE)
        for hears_at_once in prompt:
            self.attach(model, copy=False, prompt=hears_at_once, slow=False)

    def is_time_for(self, what: str, steps: int) -> bool:
        """Whether ``what`` was so many events ago: it would take up too much of a run."""
        return self.steps > self.last.get(what, 0) + steps

    # -- the rules: sessions -------------------------------------------------------------------------------------------

    @precondition(lambda self: not self.workers or (len(self.workers) < 4 and self.is_time_for("attach", 5)))
    @rule(model=st.sampled_from(sorted(MODELS)), copy=_seldom, prompt=st.booleans(), slow=_seldom)
    def attach(self, model: str, copy: bool, prompt: bool, slow: bool) -> None:
        self.last["attach"] = self.steps
        self.attached += 1
        mode: AliasMode = "copy" if copy else "shm"
        self.workers[self.attached] = Worker(self.attached, MODELS[model], mode, prompt)
        self.feed(events.Attach(self.attached, 100 + self.attached, mode, MODELS[model]))
        while self.creating() and not slow:
            self.create_pool(0)

    @precondition(lambda self: self.workers and self.is_time_for("end", 10))
    @rule(session=_some(_everybody))
    def end(self, session: int) -> None:
        self.last["end"] = self.steps
        worker = self.workers.pop(session)
        self.ghosts += [message for channel in CHANNELS for message in worker.outbox[channel]]
        self.feed(events.Ended(session))

    @precondition(lambda self: self.ghosts)
    @rule()
    def hear_from_the_dead(self) -> None:
        self.feed(self.ghosts.pop(0))

    @precondition(_any_of(_free))
    @rule(session=_some(_free), layer=_layer, experts=_experts, late=_late)
    def run_event(self, session: int, layer: int, experts: set[int], late: bool) -> None:
        """Look the experts of an event up; fetch all of them if one is absent."""
        worker = self.workers[session]
        number, segment = self.pool_of(worker, layer)
        wanted = sorted({expert % segment.layout.experts for expert in experts})
        row = segment.layers.index(layer)
        slots = {expert: segment.table.get((row, expert)) for expert in wanted}
        for expert, slot in slots.items():
            if slot is None:
                self.send_fetch(worker, layer, wanted, late)
                return
            worker.reading[number, slot] = ((layer, expert), worker.told)
        note(f"   session {session} hits {slots} in segment {number}")
        self.feed(events.Routed(session, ((layer, wanted),)))

    @precondition(_any_of(_free))
    @rule(session=_some(_free))
    def run_hits(self, session: int) -> None:
        """An event in each layer, of one expert that is resident there."""
        worker = self.workers[session]
        for layer in range(LAYERS):
            _, segment = self.pool_of(worker, layer)
            for row, expert in sorted(segment.table):
                if row == segment.layers.index(layer):
                    self.run_event(session, layer, {expert}, late=False)
                    break

    @precondition(_any_of(_free))
    @rule(session=_some(_free), experts=st.tuples(*[_experts] * LAYERS))
    def run_forward(self, session: int, experts: tuple[set[int], ...]) -> None:
        """Events of all layers, each fetched block read at once, until one has to wait for other sessions."""
        for layer, chosen in enumerate(experts):
            if self.workers[session].fetching is None:
                self.run_event(session, layer, chosen, late=False)
                self.finish_reads()

    @precondition(_any_of(_open))
    @rule(session=_some(_open), layer=_layer, experts=_experts, late=_late)
    def fetch(self, session: int, layer: int, experts: set[int], late: bool) -> None:
        """Fetch without looking; if another fetch waits (its asker was interrupted), it gives that one up."""
        worker = self.workers[session]
        _, segment = self.pool_of(worker, layer)
        self.send_fetch(worker, layer, [expert % segment.layout.experts for expert in experts], late)

    @precondition(lambda self: _open(self) and self.is_time_for("nonsense", 10))
    @rule(session=_some(_open), layer=st.sampled_from([0, LAYERS]), expert=st.integers(3, 5))
    def fetch_nonsense(self, session: int, layer: int, expert: int) -> None:
        self.last["nonsense"] = self.steps
        worker = self.workers[session]
        self.send(worker, "data", self.new_fetch(worker, layer, (expert, 2, expert)), late=False)

    @precondition(_any_of(_with_requests))
    @rule(session=_some(_with_requests), back=st.integers(0, 1), late=_late)
    def fetch_again(self, session: int, back: int, late: bool) -> None:
        """Send the newest fetch or the one before it once more, whether it was answered or not."""
        worker = self.workers[session]
        sequence = max(1, worker.sequence - back)
        self.send(worker, "data", worker.requests[sequence], late)

    @precondition(_any_of(_free))
    @rule(session=_some(_free), channel=st.sampled_from(CHANNELS), late=_late)
    def ack(self, session: int, channel: Channel, late: bool) -> None:
        self.send_ack(self.workers[session], channel, late)

    @precondition(_any_of(_reading))
    @rule(session=_some(_reading))
    def evaluate(self, session: int) -> None:
        """Finish computing without telling anybody."""
        self.workers[session].reading.clear()

    # -- the rules: messages that took their time ----------------------------------------------------------------------

    @precondition(_any_of(_sending("data")))
    @rule(session=_some(_sending("data")))
    def deliver_data(self, session: int) -> None:
        self.feed(self.workers[session].outbox["data"].popleft())

    @precondition(_any_of(_sending("control")))
    @rule(session=_some(_sending("control")))
    def deliver_control(self, session: int) -> None:
        self.feed(self.workers[session].outbox["control"].popleft())

    @precondition(_any_of(_deaf("data")))
    @rule(session=_some(_deaf("data")))
    def hear_data(self, session: int) -> None:
        self.hear(self.workers[session], "data")

    @precondition(_any_of(_deaf("control")))
    @rule(session=_some(_deaf("control")))
    def hear_control(self, session: int) -> None:
        self.hear(self.workers[session], "control")

    @precondition(_any_of(_deaf("data")))
    @rule(session=_some(_deaf("data")))
    def lose_an_answer(self, session: int) -> None:
        worker = self.workers[session]
        worker.inbox["data"].popleft()
        worker.answer_lost = True

    # -- the rules: memory and reads -----------------------------------------------------------------------------------

    def creating(self) -> list[int]:
        return sorted(number for number, segment in self.segments.items() if not segment.created)

    @precondition(lambda self: self.creating())
    @rule(which=_which)
    def create_pool(self, which: int) -> None:
        number = self.creating()[which % len(self.creating())]
        self.segments[number].created = True
        self.feed(events.PoolCreated(number))

    @precondition(lambda self: self.creating())
    @rule(which=_which)
    def fail_to_create_pool(self, which: int) -> None:
        number = self.creating()[which % len(self.creating())]
        model = self.segments.pop(number).model
        self.abandoned.discard(number)
        self.abandoned |= {n for n, segment in self.segments.items() if segment.model == model and not segment.created}
        self.feed(events.PoolFailed(number, SegmentFailed("no memory")))

    @precondition(lambda self: self.reads)
    @rule(which=_which)
    def finish_read(self, which: int) -> None:
        place = sorted(self.reads)[which % len(self.reads)]
        read = self.reads.pop(place)
        segment = self.segments[read.segment]
        segment.content[read.slot] = (read.layer, read.expert)
        self.feed(events.ReadDone(read.segment, read.slot, PAGE))

    @precondition(lambda self: self.reads)
    @rule()
    def finish_reads(self) -> None:
        while self.reads:
            self.finish_read(0)

    @precondition(lambda self: self.reads)
    @rule(which=_which)
    def fail_read(self, which: int) -> None:
        place = sorted(self.reads)[which % len(self.reads)]
        read = self.reads.pop(place)
        self.failed = (read.layer, read.expert)
        self.feed(events.ReadFailed(read.segment, read.slot, ReadFailed("bad sector")))

    @precondition(lambda self: self.is_time_for("quiesce", 25))
    @rule()
    def quiesce(self) -> None:
        """Everything under way arrives, everybody who is asked acks; then nobody may be left waiting."""
        self.last["quiesce"] = self.steps
        before = -1
        rounds = 0
        while before != self.steps:
            before = self.steps
            rounds += 1
            assert rounds < 500, "the core and its sessions talk for ever"
            while self.ghosts:
                self.hear_from_the_dead()
            while self.creating():
                self.create_pool(0)
            self.finish_reads()
            for session in _open(self):
                self.catch_up(self.workers[session])
        for worker in self.workers.values():
            assert worker.granted, f"session {worker.number} waits for ever to be opened"
            assert worker.fetching is None, f"session {worker.number} waits for ever for {worker.fetching}"
            for number, segment in self.segments.items():
                if segment.model == worker.manifest.key and len(segment.table) == segment.blocks:
                    assert number in worker.complete, f"session {worker.number} was not told that {number} is complete"

    def catch_up(self, worker: Worker) -> None:
        for channel in CHANNELS:
            while worker.outbox[channel]:
                self.feed(worker.outbox[channel].popleft())
            while worker.inbox[channel]:
                self.hear(worker, channel)
        if worker.fetching is not None and worker.answer_lost:
            worker.answer_lost = False
            self.feed(worker.fetching)
        elif worker.fetching is None and worker.asked:
            worker.reading.clear()
            self.send_ack(worker, "control", late=False)

    # -- what workers do -----------------------------------------------------------------------------------------------

    def pool_of(self, worker: Worker, layer: int) -> tuple[int, Segment]:
        """The segment of ``layer``, by its number, as the worker was told."""
        for number, segment in self.segments.items():
            if segment.model == worker.manifest.key and layer in segment.layers:
                return number, segment
        raise AssertionError(f"layer {layer} has no pool")

    def new_fetch(self, worker: Worker, layer: int, experts: tuple[int, ...]) -> events.Fetch:
        """The next fetch of a worker; by sending one it promises that it reads nothing any more."""
        worker.sequence += 1
        worker.fetching = worker.requests[worker.sequence] = events.Fetch(
            worker.number, worker.sequence, layer, experts
        )
        worker.asked = False
        worker.answer_lost = False
        worker.reading.clear()
        worker.leased.clear()
        return worker.fetching

    def send_fetch(self, worker: Worker, layer: int, experts: list[int], late: bool) -> None:
        _, segment = self.pool_of(worker, layer)
        distinct = tuple(dict.fromkeys(experts))[: segment.layout.slots]
        self.send(worker, "data", self.new_fetch(worker, layer, distinct), late)

    def send_ack(self, worker: Worker, channel: Channel, late: bool) -> None:
        worker.asked = False
        worker.leased.clear()
        worker.reading = {place: held for place, held in worker.reading.items() if held[1] >= worker.told}
        self.send(worker, channel, events.Ack(worker.number, worker.told, worker.sequence), late)

    def send(self, worker: Worker, channel: Channel, message: events.Event, late: bool) -> None:
        if late or worker.outbox[channel]:
            worker.outbox[channel].append(message)
        else:
            self.feed(message)

    def hear(self, worker: Worker, channel: Channel) -> None:
        """Take one message in."""
        self.steps += 1
        message = worker.inbox[channel].popleft()
        match message:
            case instructions.AskAck(_, version):
                worker.told = max(worker.told, version)
                worker.asked = True
            case instructions.Announce(_, segment):
                worker.complete.add(segment)
            case instructions.Refuse(_, _, sequence):
                if worker.fetching is not None and worker.fetching.sequence == sequence:
                    worker.fetching = None
            case instructions.Answer(_, sequence, version, slots):
                if worker.fetching is None or worker.fetching.sequence != sequence:
                    return
                worker.told = max(worker.told, version)
                number, segment = self.pool_of(worker, worker.fetching.layer)
                for expert, slot in zip(worker.fetching.experts, slots, strict=True):
                    block = (worker.fetching.layer, expert)
                    assert segment.content.get(slot) == block, f"session {worker.number} computes with wrong bytes"
                    worker.reading[number, slot] = (block, worker.told)
                worker.fetching = None

    # -- what the server does ------------------------------------------------------------------------------------------

    def feed(self, event: events.Event) -> None:
        self.steps += 1
        note(f"   {_short(event)}")
        broken, self.broken = self.broken, True
        for instruction in self.core.handle(event):
            note(f"     -> {_short(instruction)}")
            self.carry_out(event, instruction)
        self.bytes_that_somebody_may_read_stay()
        self.the_table_names_sealed_bytes_only()
        self.memory_stays_within_the_budget()
        self.slots_are_conserved()
        self.broken = broken

    def carry_out(self, event: events.Event, instruction: instructions.Instruction) -> None:
        match instruction:
            case instructions.CreatePool(number, _, layout):
                assert number not in self.segments
                self.segments[number] = Segment(_model_with(layout.experts), layout)
            case instructions.UnlinkPool(number):
                self.unlink(number)
            case instructions.StartRead():
                self.start_read(instruction)
            case instructions.Publish():
                self.publish(instruction)
            case instructions.Grant():
                self.grant(instruction)
            case instructions.Refuse(number, error, sequence):
                self.refuse(event, number, error, sequence)
            case instructions.Answer():
                self.answer(instruction)
            case instructions.AskAck(number, _):
                self.tell(number, "control", instruction)
            case instructions.Announce(number, segment):
                worker = self.workers[number]
                assert len(self.segments[segment].table) == self.segments[segment].blocks
                assert segment not in worker.complete, "complete was announced twice"
                assert instruction not in worker.inbox["control"], "complete was announced twice"
                self.tell(number, "control", instruction)

    def tell(self, number: int, channel: Channel, message: instructions.Instruction) -> None:
        worker = self.workers[number]
        assert worker.granted
        worker.inbox[channel].append(message)
        while worker.prompt and worker.inbox[channel]:
            self.hear(worker, channel)

    def unlink(self, number: int) -> None:
        segment = self.segments.pop(number)
        assert segment.created
        assert not any(place[0] == number for place in self.reads), "unlinked while a read fills it"
        if number in self.abandoned:
            self.abandoned.discard(number)
            return
        for worker in self.workers.values():
            assert not (worker.granted and worker.manifest.key == segment.model), "unlinked while in use"

    def start_read(self, read: instructions.StartRead) -> None:
        segment, place = self.segments[read.segment], (read.segment, read.slot)
        block = (read.layer, read.expert)
        assert segment.created
        assert 0 <= read.slot < segment.layout.slots
        assert place not in self.reads, "two reads into one slot"
        assert not any(
            (other.segment, other.layer, other.expert) == (read.segment, *block) for other in self.reads.values()
        ), "one block is read twice at once"
        assert (segment.layers.index(read.layer), read.expert) not in segment.table, "a resident block is read again"
        assert read.slot not in segment.table.values(), "a slot in the table is filled again"
        if segment.layout.slots == segment.blocks:
            row = segment.layers.index(read.layer)
            assert read.slot == row * segment.layout.experts + read.expert, "not in its natural place"
        for worker in self.workers.values():
            assert place not in worker.reading, f"session {worker.number} may still read what is overwritten"
            assert place not in worker.leased, f"session {worker.number} has a lease on what is overwritten"
        segment.content[read.slot] = GARBAGE
        self.reads[place] = read
        background = [r for r in self.reads.values() if r.segment == read.segment and not r.demand]
        assert len(background) <= BACKGROUND_READS

    def publish(self, entry: instructions.Publish) -> None:
        segment, key = self.segments[entry.segment], (entry.row, entry.expert)
        if entry.slot < 0:
            assert key in segment.table, "an absent block was removed from the table"
            place = (entry.segment, segment.table.pop(key))
            for worker in self.workers.values():
                assert place not in worker.leased, f"what is leased to session {worker.number} was evicted"
                assert entry.segment not in worker.complete, "something left a pool that was announced as complete"
        else:
            assert segment.content.get(entry.slot) == (segment.layers[entry.row], entry.expert), "published garbage"
            segment.table[key] = entry.slot

    def grant(self, grant: instructions.Grant) -> None:
        worker = self.workers[grant.session]
        assert not worker.granted
        assert grant.model == worker.manifest.key
        worker.granted = True
        worker.told = grant.version
        for pool in grant.pools:
            segment = self.segments[pool.segment]
            assert segment.created
            assert segment.model == grant.model
            assert pool.slots == segment.layout.slots
            segment.layers = tuple(pool.layers)
            assert pool.complete == (len(segment.table) == segment.blocks)
            if pool.complete:
                worker.complete.add(pool.segment)

    def refuse(self, event: events.Event, number: int, error: ExpertdError, sequence: int | None) -> None:
        if sequence is None:
            assert isinstance(error, BudgetTooSmall | SegmentFailed)
            assert not self.workers.pop(number).granted
            self.feed(events.Ended(number))  # as the server does
            return
        if number not in self.workers:
            assert isinstance(error, SessionUnknown)
            return
        worker = self.workers[number]
        request = worker.requests[sequence]
        if sequence in worker.refusals:
            assert worker.refusals[sequence] is error, "a repeated refusal is another one"
        elif len(set(request.experts)) < len(request.experts):
            assert isinstance(error, FetchInvalid)
        else:
            assert isinstance(event, events.ReadFailed)
            assert error is event.error
            assert self.failed in {(request.layer, expert) for expert in request.experts}, "refused for another's read"
        worker.refusals[sequence] = error
        self.tell(number, "data", instructions.Refuse(number, error, sequence))

    def answer(self, answer: instructions.Answer) -> None:
        worker = self.workers[answer.session]
        request = worker.requests[answer.sequence]
        assert len(answer.slots) == len(request.experts)
        if answer.sequence in worker.answers:
            assert worker.answers[answer.sequence] == answer.slots, "a repeated answer is another one"
        else:
            worker.answers[answer.sequence] = answer.slots
            number, segment = self.pool_of(worker, request.layer)
            for expert, slot in zip(request.experts, answer.slots, strict=True):
                assert segment.content.get(slot) == (request.layer, expert), "answered with a slot of something else"
                assert segment.table.get((segment.layers.index(request.layer), expert)) == slot
                if answer.sequence == worker.sequence:
                    worker.leased[number, slot] = (request.layer, expert)
        self.tell(answer.session, "data", answer)

    # -- what must hold after every event ------------------------------------------------------------------------------

    def bytes_that_somebody_may_read_stay(self) -> None:
        for worker in self.workers.values():
            held = {place: block for place, (block, _) in worker.reading.items()} | worker.leased
            for (segment, slot), block in held.items():
                assert self.segments[segment].content[slot] == block, f"session {worker.number} reads wrong bytes"

    def the_table_names_sealed_bytes_only(self) -> None:
        for segment in self.segments.values():
            assert len(set(segment.table.values())) == len(segment.table), "two blocks in one slot"
            for (row, expert), slot in segment.table.items():
                assert segment.content[slot] == (segment.layers[row], expert)

    def memory_stays_within_the_budget(self) -> None:
        """Segments that were given up while they were being created are not counted: they go as soon as they come."""
        counted = [segment for number, segment in self.segments.items() if number not in self.abandoned]
        used = sum(segment.layout.size for segment in counted)
        for worker in self.workers.values():
            if worker.granted and worker.mode == "copy":
                used += sum(segment.layout.size for segment in counted if segment.model == worker.manifest.key)
        assert used <= self.core.budget
        assert self.core.used <= self.core.budget

    def slots_are_conserved(self) -> None:
        """The one look into the core: every slot is free, retired, or some block's."""
        for model in self.core.models.values():
            for pool in model.pools:
                taken = {*pool.retired, *pool.where.values()}
                assert len(taken) == len(pool.retired) + len(pool.where)
                assert {slot.number for slot in pool.slots if slot.state is SlotState.FREE}.isdisjoint(taken)
                assert len(taken) + pool.spare == pool.layout.slots
                if not pool.holds_all:
                    assert sorted([*taken, *pool.free]) == list(range(pool.layout.slots))

    def teardown(self) -> None:
        """Nobody waits for ever, and no slot was lost: fetching everything once fills every pool to the brim."""
        if self.broken:
            return
        self.quiesce()
        for session in _open(self):
            worker = self.workers[session]
            for layer in range(LAYERS):
                number, segment = self.pool_of(worker, layer)
                for expert in range(segment.layout.experts):
                    self.send_fetch(worker, layer, [expert], late=False)
                    self.quiesce()
                assert number in self.segments
            for number, segment in self.segments.items():
                if segment.model == worker.manifest.key:
                    filled = min(segment.layout.slots, segment.blocks)
                    assert len(segment.table) == filled, f"segment {number} has lost slots"


def _short(thing: object) -> str:
    """An event or instruction on one line."""
    match thing:
        case events.Attach(session, _, mode, manifest):
            return f"Attach(session={session}, mode={mode}, manifest={manifest.folder})"
        case instructions.CreatePool(segment, _, layout):
            return f"CreatePool(segment={segment}, layers={layout.layers}, slots={layout.slots})"
        case instructions.Grant(session, _, version, pools):
            return f"Grant(session={session}, version={version}, segments={[pool.segment for pool in pools]})"
        case instructions.StartRead(_, segment, slot, layer, expert, demand):
            return f"StartRead(segment={segment}, slot={slot}, layer={layer}, expert={expert}, demand={demand})"
        case _:
            return repr(thing)


TestCore = CacheMachine.TestCase
TestCore.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
