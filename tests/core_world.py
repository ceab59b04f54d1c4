"""The world around the core, for ``test_core_machine``: memory, a server, and workers that hold on to what they may.

It keeps, without looking into the core, the tables that it was told to publish, what bytes each slot holds, and what
each session might still read: all that it looked up or was answered until it has promised otherwise.  Sessions hold on
to as much as the protocol lets them: an ack gives up only what was looked up before they were told its version; a
generation is theirs until they say that they have released it; what they compute on a complete one they compute when
they like.  Each session has two channels to the core with no order between them, as a worker has two sockets; a
message on either may come late, and a session that is stopped says nothing and hears nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from hypothesis import note

from expertd.daemon.core import Core, events, instructions
from expertd.daemon.core.ahead import HELD
from expertd.daemon.core.ahead import READS as AHEAD_READS
from expertd.daemon.core.plan import resized, smallest
from expertd.daemon.core.slots import BACKGROUND_READS, in_the_way
from expertd.daemon.core.state import HANDED, SlotState
from expertd.protocol.errors import (
    BudgetTooSmall,
    ExpertdError,
    FetchInvalid,
    PoolMoved,
    SegmentFailed,
    SessionUnknown,
)
from expertd.protocol.layout import PAGE, pool_layout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import PoolInfo
from tests.core_parts import (
    GARBAGE,
    LAYERS,
    MODELS,
    POOLS,
    UNTIL_EVALUATED,
    Block,
    Channel,
    Kind,
    Place,
    Segment,
    WatchedLRU,
    Worker,
)


class World:
    """Server, workers and memory around one core."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core(0, WatchedLRU)
        self.segments: dict[int, Segment] = {}
        self.current: dict[Kind, int] = {}
        self.workers: dict[int, Worker] = {}
        self.reads: dict[Place, instructions.StartRead | instructions.StartCopy] = {}
        self.ghosts: list[events.Event] = []
        self.called_off: list[Place] = []
        self.abandoned: set[int] = set()
        self.failed: Block = GARBAGE
        self.no_memory = False  # a new generation could not be created: sizes need not be what the budget asks for
        self.broken = False
        self.steps = 0
        self.moves = 0
        self.handed = 1 << 40  # numbers of segments of daemons that have died
        self.left: dict[int, events.Handed] = {}  # by these

    # -- what workers do -----------------------------------------------------------------------------------------------

    def pool_of(self, worker: Worker, layer: int) -> tuple[int, Segment]:
        """The segment where the worker looks ``layer`` up, by its number."""
        for number in worker.adopted.values():
            if layer in self.segments[number].layers:
                return number, self.segments[number]
        raise AssertionError(f"layer {layer} has no pool")

    def look_up(self, worker: Worker, layer: int, experts: Iterable[int]) -> list[int | None]:
        """The slots of an event's blocks; the worker reads them from now on if all are there."""
        assert worker.looks_up
        number, segment = self.pool_of(worker, layer)
        slots = [segment.table.get((segment.layers.index(layer), expert)) for expert in experts]
        if None not in slots:
            until = UNTIL_EVALUATED if number in worker.complete else worker.told
            for expert, slot in zip(experts, slots, strict=True):
                assert slot is not None
                worker.reading[number, slot] = ((layer, expert), until)
        return slots

    def new_fetch(
        self,
        worker: Worker,
        segment: int,
        layer: int,
        experts: tuple[int, ...],
        then: tuple[int, ...] = (),
        leases_only: bool = False,
    ) -> events.Fetch:
        """The next fetch of a worker; by sending one it promises that it reads nothing any more."""
        worker.sequence += 1
        worker.fetching = events.Fetch(
            worker.number, worker.sequence, segment, layer, experts, then=then, leases_only=leases_only
        )
        worker.rest, worker.leases_only = then, leases_only
        worker.requests[worker.sequence] = worker.fetching
        worker.again = None
        worker.asked = False
        worker.answer_lost = False
        worker.reading = {p: held for p, held in worker.reading.items() if held[1] == UNTIL_EVALUATED}
        worker.leased.clear()
        return worker.fetching

    def send_fetch(self, worker: Worker, layer: int, experts: Iterable[int], late: bool) -> None:
        number, segment = self.pool_of(worker, layer)
        distinct = tuple(dict.fromkeys(experts))[: segment.layout.slots]
        self.send(worker, "data", self.new_fetch(worker, number, layer, distinct), late)

    def send_group(
        self, worker: Worker, layer: int, experts: Iterable[int], size: int, leases_only: bool, late: bool
    ) -> None:
        """Fetch the first ``size`` of the experts of an event; the rest is to follow."""
        number, segment = self.pool_of(worker, layer)
        distinct = tuple(dict.fromkeys(experts))
        size = min(size, segment.layout.slots)
        fetch = self.new_fetch(worker, number, layer, distinct[:size], distinct[size:], leases_only)
        self.send(worker, "data", fetch, late)

    def send_rest(self, worker: Worker, size: int, leases_only: bool, late: bool) -> None:
        """Fetch the next group of the event that was begun, where it was begun."""
        before = worker.requests[worker.sequence]
        size = min(size, self.segments[before.segment].layout.slots)
        group, then = worker.rest[:size], worker.rest[size:]
        fetch = self.new_fetch(worker, before.segment, before.layer, group, then, leases_only)
        self.send(worker, "data", fetch, late)

    def send_ack(self, worker: Worker, channel: Channel, late: bool) -> None:
        worker.asked = False
        worker.leased.clear()
        worker.reading = {place: held for place, held in worker.reading.items() if held[1] >= worker.told}
        self.send(worker, channel, events.Ack(worker.number, worker.told, worker.sequence), late)

    def adopt(self, worker: Worker, kind: Kind) -> None:
        """Look up in the newest generation from now on."""
        note(f"   session {worker.number} adopts segment {worker.offers[kind]} and leaves {worker.adopted[kind]}")
        worker.spare.append(worker.adopted[kind])
        worker.adopted[kind] = worker.offers.pop(kind)

    def releasable(self, worker: Worker) -> list[int]:
        """Generations that it has left and that no graph of it reads."""
        read = {segment for segment, _ in worker.reading}
        return [segment for segment in worker.spare if segment not in read]

    def release(self, worker: Worker, segment: int, channel: Channel, late: bool) -> None:
        worker.spare.remove(segment)
        worker.leased = {place: block for place, block in worker.leased.items() if place[0] != segment}
        self.send(worker, channel, events.Released(worker.number, segment), late)

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
            case instructions.Move(_, pool):
                kind = self.segments[pool.segment].kind
                if kind in worker.offers:
                    worker.spare.append(worker.offers[kind])
                worker.offers[kind] = pool.segment
                if pool.complete:
                    worker.complete.add(pool.segment)
            case instructions.Refuse(_, error, sequence):
                if worker.fetching is not None and worker.fetching.sequence == sequence:
                    sensible = len(set(worker.fetching.experts)) == len(worker.fetching.experts)
                    worker.again = worker.fetching if isinstance(error, PoolMoved) and sensible else None
                    worker.rest, worker.leases_only = (), False
                    worker.fetching = None
            case instructions.Answer(_, sequence, version, slots):
                self.hear_answer(worker, sequence, version, slots)

    def hear_answer(self, worker: Worker, sequence: int, version: int, slots: tuple[int, ...]) -> None:
        fetch = worker.fetching
        if fetch is None or fetch.sequence != sequence:
            return
        worker.told = max(worker.told, version)
        segment = self.segments[fetch.segment]
        for expert, slot in zip(fetch.experts, slots, strict=True):
            block = (fetch.layer, expert)
            assert segment.content.get(slot) == block, f"session {worker.number} computes with wrong bytes"
            worker.reading[fetch.segment, slot] = (block, worker.told)
        worker.fetching = None

    # -- what an earlier daemon left -----------------------------------------------------------------------------------

    def left_behind(self, manifest: Manifest, left: Iterable[Block], spare: int) -> list[events.Handed]:
        """Pools of a daemon that has died, which hold ``left``; nobody knows them yet."""
        blocks = [block for block in dict.fromkeys(left) if block[1] < manifest.layers[block[0]].experts]
        handed = []
        for (folder, _), layers in POOLS.items():
            here = [block for block in blocks if block[0] in layers]
            if folder == manifest.folder and here:
                first = manifest.layers[layers[0]]
                layout = pool_layout(len(layers), first.experts, first.parts, len(here) + spare)
                where = {block: slot for slot, block in enumerate(here, spare)}
                self.handed += 1
                handed.append(events.Handed(self.handed, layers, layout, where))
        self.left |= {what.segment: what for what in handed}
        return handed

    def still_held(self, manifest: Manifest) -> list[events.Handed]:
        """Pools of daemons that have died that somebody has handed back already, and that are still there."""
        return [self.left[n] for n, segment in self.segments.items() if n in self.left and segment.manifest is manifest]

    def hand_back(self, worker: Worker, handed: Iterable[events.Handed]) -> None:
        """A session hands pools back that it still has, which others may have handed back before."""
        manifest = worker.manifest
        pools = [what for what in handed if what.segment not in worker.held]
        for what in pools:
            worker.held.add(what.segment)
            worker.spare.append(what.segment)
            if what.segment in self.segments:
                continue
            segment = Segment(manifest, HANDED, what.layout, what.layers, created=True, superseded=True)
            segment.table = {(what.layers.index(layer), expert): slot for (layer, expert), slot in what.where.items()}
            segment.content = {slot: block for block, slot in what.where.items()}
            self.segments[what.segment] = segment
        self.feed(events.HandedBack(worker.number, manifest.key, tuple(pools)))

    # -- what the server does ------------------------------------------------------------------------------------------

    def creating(self) -> list[int]:
        return sorted(number for number, segment in self.segments.items() if not segment.created)

    def segment_created(self, number: int) -> None:
        """The system gave the memory: from now on nothing changes in the generation before, if there is one."""
        segment = self.segments[number]
        segment.created = True
        if number not in self.abandoned:
            if segment.generation > 1:
                self.segments[self.current[segment.kind]].superseded = True
            self.current[segment.kind] = number
        self.feed(events.PoolCreated(number))

    def segment_failed(self, number: int) -> None:
        segment = self.segments.pop(number)
        smallest = resized(segment.manifest, segment.layers, 0).slots == segment.layout.slots
        if segment.generation == 1 and number not in self.abandoned and smallest:
            others = {n for n in self.creating() if self.segments[n].manifest is segment.manifest}
            self.abandoned |= others
        elif number not in self.abandoned:
            self.no_memory = True
        self.abandoned.discard(number)
        self.feed(events.PoolFailed(number, SegmentFailed("no memory")))

    def read_done(self, place: Place) -> None:
        """All bytes have come, from disk or from an older generation that still has them."""
        read = self.reads.pop(place)
        segment = self.segments[read.segment]
        if isinstance(read, instructions.StartRead):
            segment.content[read.slot] = (read.layer, read.expert)
            self.feed(events.ReadDone(read.segment, read.slot, PAGE))
        else:
            segment.content[read.slot] = self.source_of(read)
            self.feed(events.ReadDone(read.segment, read.slot, 0))

    def read_failed(self, place: Place, error: ExpertdError) -> None:
        read = self.reads.pop(place)
        copy = isinstance(read, instructions.StartCopy)
        self.failed = self.source_of(read) if copy else (read.layer, read.expert)
        self.feed(events.ReadFailed(read.segment, read.slot, error))

    def source_of(self, copy: instructions.StartCopy) -> Block:
        """The block that a copy reads: its table must name it."""
        source = self.segments[copy.source]
        layer, expert = block = source.content[copy.source_slot]
        assert block != GARBAGE, "a copy of what is not sealed"
        assert source.table.get((source.layers.index(layer), expert)) == copy.source_slot, "a copy of what has left"
        return block

    def feed(self, event: events.Event) -> None:
        """One event, what the core wants done, and what must hold then."""
        self.steps += 1
        note(f"   {short(event)}")
        broken, self.broken = self.broken, True
        if isinstance(event, events.Released) and event.session in self.workers:
            self.workers[event.session].held.discard(event.segment)
        for instruction in self.core.handle(event):
            note(f"     -> {short(instruction)}")
            self.carry_out(event, instruction)
        if broken:  # in the middle of another event's instructions
            return
        self.bytes_that_somebody_may_read_stay()
        self.the_table_names_sealed_bytes_only()
        self.memory_is_accounted_for()
        self.slots_are_conserved()
        self.policies_know_what_is_resident()
        self.what_is_expected_is_expected_by_somebody()
        self.whoever_stands_in_the_way_owes()
        self.broken = broken
        while self.called_off:
            place = self.called_off.pop()
            if place in self.reads:
                del self.reads[place]
                self.feed(events.ReadCancelled(*place))

    def carry_out(self, event: events.Event, instruction: instructions.Instruction) -> None:
        match instruction:
            case instructions.CreatePool():
                self.create(instruction)
            case instructions.UnlinkPool(number):
                self.unlink(number)
            case instructions.StartRead(_, _, _, layer, expert):
                self.start_read(instruction, (layer, expert))
            case instructions.Promote(segment, slot):
                read = self.reads[segment, slot]
                if isinstance(read, instructions.StartRead):
                    assert read.priority is not instructions.Priority.DEMAND, "demand became demand"
                    self.reads[segment, slot] = replace(read, priority=instructions.Priority.DEMAND)
            case instructions.Cancel(segment, slot):
                read = self.reads[segment, slot]
                if isinstance(read, instructions.StartRead) and self.steps % 3:  # else it has begun
                    self.called_off.append((segment, slot))
            case instructions.StartCopy():
                assert self.segments[instruction.source].superseded, "a copy of what may still change"
                assert instruction.source != instruction.segment
                self.start_read(instruction, self.source_of(instruction))
            case instructions.Publish():
                self.publish(instruction)
            case instructions.Grant():
                self.grant(instruction)
            case instructions.Move(session, pool):
                assert pool.generation > 1
                self.hand_over(self.workers[session], pool)
                self.tell(session, "control", instruction)
            case instructions.Refuse(number, error, sequence):
                self.refuse(event, number, error, sequence)
            case instructions.Answer():
                self.answer(instruction)
            case instructions.AskAck(number, _):
                self.tell(number, "control", instruction)
            case instructions.Announce(number, segment):
                worker = self.workers[number]
                assert self.segments[segment].complete
                assert segment in worker.held, "what the session does not have was announced"
                assert segment not in worker.promised, "complete was announced twice"
                worker.promised.add(segment)
                self.tell(number, "control", instruction)

    def tell(self, number: int, channel: Channel, message: instructions.Instruction) -> None:
        worker = self.workers[number]
        assert worker.granted
        worker.inbox[channel].append(message)
        while worker.prompt and not worker.stopped and worker.inbox[channel]:
            self.hear(worker, channel)

    def create(self, pool: instructions.CreatePool) -> None:
        assert pool.segment not in self.segments
        manifest = next(m for m in MODELS.values() if m.layers[0].experts == pool.layout.experts)
        layers = POOLS[manifest.folder, pool.layout.layers]
        self.segments[pool.segment] = segment = Segment(manifest, pool.generation, pool.layout, layers)
        if pool.generation == 1:
            assert segment.kind not in self.current
            fits = self.planned() <= self.core.budget or pool.layout.size == segment.smallest
            assert fits, "a new model is given more than it needs of memory that is not there"
            return
        self.moves += 1
        before = self.segments[self.current[segment.kind]]
        assert pool.generation == before.generation + 1
        assert self.creating_of(segment.kind) == [pool.segment], "a pool moves to two generations at once"
        if pool.layout.size > max(segment.smallest, before.layout.size):
            assert self.planned() <= self.core.budget, "a pool grows beyond the budget"

    def creating_of(self, kind: Kind) -> list[int]:
        return [number for number in self.creating() if self.segments[number].kind == kind]

    def planned(self) -> int:
        """Bytes that all pools and copies take when every move under way is over."""
        ours = {n: s for n, s in self.segments.items() if n not in self.abandoned and s.generation != HANDED}
        newest = {s.kind: s for _, s in sorted(ours.items())}
        copies = [w.manifest.key for w in self.workers.values() if w.granted and w.mode == "copy"]
        return sum(s.layout.size * (1 + copies.count(s.manifest.key)) for s in newest.values())

    def unlink(self, number: int) -> None:
        segment = self.segments.pop(number)
        assert segment.created
        assert not any(place[0] == number for place in self.reads), "unlinked while a read fills it"
        copies = [read for read in self.reads.values() if isinstance(read, instructions.StartCopy)]
        assert not any(copy.source == number for copy in copies), "unlinked while it is copied from"
        for worker in self.workers.values():
            assert number not in worker.held, f"unlinked while session {worker.number} has it"
        if number in self.abandoned:
            self.abandoned.discard(number)
        elif self.current.get(segment.kind) == number:
            for worker in self.workers.values():
                assert not (worker.granted and worker.manifest is segment.manifest), "unlinked while in use"
            del self.current[segment.kind]

    def start_read(self, read: instructions.StartRead | instructions.StartCopy, block: Block) -> None:
        """A read or a copy of ``block`` begins: nobody may need what is in its slot."""
        segment, place = self.segments[read.segment], (read.segment, read.slot)
        row = segment.layers.index(block[0])
        assert segment.created
        assert not segment.superseded, "something is brought into a generation that the pool has left"
        assert 0 <= read.slot < segment.layout.slots
        assert place not in self.reads, "two reads into one slot"
        for other in self.reads.values():
            if other.segment == read.segment:
                theirs = (
                    self.source_of(other) if isinstance(other, instructions.StartCopy) else (other.layer, other.expert)
                )
                assert theirs != block, "one block is brought in twice at once"
        assert (row, block[1]) not in segment.table, "a resident block is read again"
        assert read.slot not in segment.table.values(), "a slot in the table is filled again"
        if segment.layout.slots == segment.blocks:
            assert read.slot == row * segment.layout.experts + block[1], "not in its natural place"
        for worker in self.workers.values():
            assert place not in worker.reading, f"session {worker.number} may still read what is overwritten"
            assert place not in worker.leased, f"session {worker.number} has a lease on what is overwritten"
        segment.content[read.slot] = GARBAGE
        self.reads[place] = read
        here = [r for r in self.reads.values() if isinstance(r, instructions.StartRead) and r.segment == read.segment]
        of = Counter(r.priority for r in here)
        assert of[instructions.Priority.BACKGROUND] <= BACKGROUND_READS
        assert of[instructions.Priority.AHEAD] <= AHEAD_READS

    def publish(self, entry: instructions.Publish) -> None:
        segment, key = self.segments[entry.segment], (entry.row, entry.expert)
        if entry.slot >= 0:
            assert segment.content.get(entry.slot) == (segment.layers[entry.row], entry.expert), "published garbage"
            segment.table[key] = entry.slot
            return
        assert key in segment.table, "an absent block was removed from the table"
        assert not segment.superseded, "something left a generation that the pool has left"
        place = (entry.segment, segment.table.pop(key))
        for worker in self.workers.values():
            assert place not in worker.leased, f"what is leased to session {worker.number} was evicted"
            assert entry.segment not in worker.promised, "something left a pool that was announced as complete"

    def grant(self, grant: instructions.Grant) -> None:
        worker = self.workers[grant.session]
        assert not worker.granted
        assert grant.model == worker.manifest.key
        worker.granted = True
        worker.told = grant.version
        for pool in grant.pools:
            self.hand_over(worker, pool)
            worker.adopted[self.segments[pool.segment].kind] = pool.segment
        worker.complete |= worker.promised
        assert {layer for pool in grant.pools for layer in pool.layers} == set(range(LAYERS))

    def hand_over(self, worker: Worker, pool: PoolInfo) -> None:
        """The core gives a session a segment, by Grant or Move."""
        segment = self.segments[pool.segment]
        assert segment.created
        assert segment.manifest is worker.manifest
        assert self.current[segment.kind] == pool.segment, "a generation that is old already"
        assert pool.segment not in worker.held, "a generation was handed over twice"
        assert pool.slots == segment.layout.slots
        assert pool.generation == segment.generation
        assert tuple(pool.layers) == segment.layers
        assert pool.complete == segment.complete
        worker.held.add(pool.segment)
        if pool.complete:
            worker.promised.add(pool.segment)

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
        elif isinstance(error, PoolMoved):
            now = self.current[self.segments[request.segment].kind]
            assert now != request.segment, "the pool has not moved"
            assert now in worker.held, "refused, and not told where the pool is now"
        elif len(set(request.experts)) < len(request.experts):
            assert isinstance(error, FetchInvalid)
        elif isinstance(event, events.PoolFailed):
            assert error is event.error
            assert any(self.core.sessions[n].silent for n in self.workers if n in self.core.sessions)
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
            segment = self.segments[request.segment]
            for expert, slot in zip(request.experts, answer.slots, strict=True):
                assert segment.content.get(slot) == (request.layer, expert), "answered with a slot of something else"
                assert segment.table.get((segment.layers.index(request.layer), expert)) == slot
                if answer.sequence == worker.sequence:
                    worker.leased[request.segment, slot] = (request.layer, expert)
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

    def memory_is_accounted_for(self) -> None:
        """Segments that were given up while they were being created do not count: they go as soon as they come.

        When no pool is on its way to another size, all but models that nobody uses and that are still read keep within
        the budget, or are as small as can be.
        """
        models = self.core.models.values()
        counted = [segment.layout.size for n, segment in self.segments.items() if n not in self.abandoned]
        assert sum(counted) == sum(model.size + model.extra for model in models)
        staying = [model for model in models if model.sessions or model.opening or not model.busy]
        if any(model.sessions[number].silent for model in models for pool in model.pools for number in pool.holders):
            return  # what a silent session has too stays as it is
        if self.creating() or self.no_memory or sum(m.size * (1 + m.copies) for m in staying) <= self.core.budget:
            return
        for model in staying:
            assert model.size == smallest(model.manifest), "more memory is taken than the budget allows"
            assert model.sessions or model.opening, "a model that nobody uses keeps its memory"

    def slots_are_conserved(self) -> None:
        """The one look into the core: every slot is free, retired, or some block's."""
        for model in self.core.models.values():
            for pool in (*model.pools, *model.old):
                taken = {*pool.retired, *pool.where.values()}
                assert len(taken) == len(pool.retired) + len(pool.where)
                assert {slot.number for slot in pool.slots if slot.state is SlotState.FREE}.isdisjoint(taken)
                assert len(taken) + pool.spare == pool.layout.slots
                if not pool.holds_all and pool.generation != HANDED:  # nothing is ever brought into these
                    assert sorted([*taken, *pool.free]) == list(range(pool.layout.slots))

    def policies_know_what_is_resident(self) -> None:
        """And what is on its way from the generation before, which they have known all along."""
        for model in self.core.models.values():
            assert isinstance(model.policy, WatchedLRU)
            known = set()
            for pool in model.pools:
                known |= {block for block in pool.where if pool.sealed_slot(block) is not None}
                known |= {block for block, slot in pool.where.items() if pool.slots[slot].carried}
                known |= pool.carried
            assert model.policy.known == known

    def what_is_expected_is_expected_by_somebody(self) -> None:
        """A look into the core, and no more is read ahead than there may be."""
        for model in self.core.models.values():
            for pool in model.pools:
                expected: Counter[Block] = Counter()
                for session in model.sessions.values():
                    expected.update(block for block in session.rest if block[0] in pool.layers)
                    for (layer, _), announced in session.announced.items():
                        if layer in pool.layers:
                            expected.update((layer, expert) for expert in announced.experts)
                    if session.turn is not None:
                        expected.update(block for block in session.turn.blocks if block[0] in pool.layers)
                assert pool.expected == expected
                assert pool.read_ahead <= expected.keys() & pool.where.keys()
                assert len(pool.read_ahead) <= max(1, pool.layout.slots // HELD)
            for pool in (*model.pools, *model.old):
                filling = {b for b, n in pool.where.items() if pool.slots[n].state is SlotState.FILLING}
                assert pool.going_ahead | pool.background | pool.late.keys() <= filling

    def whoever_stands_in_the_way_owes(self) -> None:
        """A look into the core: only who owes an ack is missed when it says nothing, and so it does not block."""
        for model in self.core.models.values():
            for pool in model.pools:
                if pool.next is None and any(not waiting.granted for waiting in pool.queue):
                    for session in in_the_way(model, pool):
                        owes = session.silent or session.number in self.core.owing
                        assert owes, f"session {session.number} is waited for and was not asked"


def short(thing: object) -> str:
    """An event or instruction on one line."""
    match thing:
        case events.Attach(session, _, mode, manifest):
            return f"Attach(session={session}, mode={mode}, manifest={manifest.folder})"
        case events.BudgetChanged(size):
            return f"BudgetChanged({size // PAGE} pages)"
        case instructions.CreatePool(segment, generation, layout, _, _):
            what = f"segment={segment}, generation={generation}, layers={layout.layers}, slots={layout.slots}"
            return f"CreatePool({what}: {layout.size // PAGE} pages)"
        case instructions.Grant(session, _, version, pools):
            return f"Grant(session={session}, version={version}, segments={[pool.segment for pool in pools]})"
        case instructions.Move(session, pool):
            what = f"segment={pool.segment}, layers={pool.layers}, slots={pool.slots}, complete={pool.complete}"
            return f"Move(session={session}, {what})"
        case instructions.StartRead(_, segment, slot, layer, expert, priority):
            return f"StartRead(segment={segment}, slot={slot}, layer={layer}, expert={expert}, {priority.name})"
        case _:
            return repr(thing)
