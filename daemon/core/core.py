"""The state machine that owns residency: who may read what, which slot may be refilled, who waits for whom.

    instructions = core.handle(event)  # or, as they come: core.handle(event, carry_out)

No locks, no clock, no sockets, no memory: one loop owns the object, carries the instructions out in order, and feeds
back what came of them.  The rule that everything rests on (DESIGN section 5): no slot is refilled while a living
session might still read what was in it.  Here that means: a retired slot becomes free only when every session that
may have its pool mapped has acked the version at which it was retired, or waits in a Fetch, which holds nothing, or has
promised to read its leases only.  And a pool is never resized or taken away: a new generation takes its place, and
nothing is written to the old one any more.

Attributes are those of ``holdings``, which adds models and gives them back.  What it does not do: choose victims
(``expertd.daemon.policy``), the life of slots (``slots``), what a Fetch may ask for (``fetches``), what sessions will
need soon (``ahead``), what they are about (``topics`` and ``turns``), what somebody wants to be resident (``warmth``),
what is taken of an earlier daemon's pools (``adoption``), divide memory (``plan`` and ``memory``), read, write or send
(``expertd.daemon.server``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from expertd.daemon.core import adoption, ahead, events, fetches, instructions, memory, slots, turns, warmth
from expertd.daemon.core.holdings import AtOnce, Holdings
from expertd.daemon.core.instructions import Priority
from expertd.daemon.core.plan import largest
from expertd.daemon.core.state import HANDED, Model, Pool, Session, Waiting
from expertd.protocol.errors import ExpertdError, FetchInvalid, PoolMoved, SessionUnknown

LEARNED_FORWARDS = 32
"""Of a routing log the policy is told about so many forwards, the last ones: a long log says that nothing missed for
long, and what others miss must not wait for it."""


class Core(Holdings):
    """Owned by one loop; not thread-safe."""

    def handle(
        self, event: events.Event, at_once: Callable[[instructions.Instruction], None] | None = None
    ) -> list[instructions.Instruction]:
        """Take ``event`` in and return what has to be done about it, in order.

        Args:
            at_once: does each of these as soon as it is known, and nothing is returned: what is to be read is known
                before the rest has been worked out.  It must not call back.
        """
        self._events += 1
        self._out = [] if at_once is None else AtOnce(at_once)
        match event:
            case events.Attach():
                self._attach(event)
            case events.PoolCreated(segment):
                self._pool_created(segment)
            case events.PoolFailed(segment, error):
                self._pool_failed(segment, error)
            case events.Fetch():
                self._fetch(event)
            case events.Ahead():
                self._ahead(event)
            case events.Ack():
                self._ack(event)
            case events.Routed(session, routing):
                if session in self.sessions:
                    self._heard(self.sessions[session])
                    self._learn(self.sessions[session], self._hits(self.sessions[session], routing))
            case events.Released(session, segment):
                self._released(session, segment)
            case events.Silent(session):
                self._silent(session)
            case events.Heard(session):
                if session in self.sessions:
                    self._heard(self.sessions[session])
            case events.BudgetChanged(size, drop, most, beside, going):
                self.budget, self.most, self.beside = size, size if most is None else most, beside
                self.going = dict(going)
                if drop:
                    memory.forget_quotas(self.models.values())
                self._divide_memory(drop)
            case events.MemoryWanted():
                self._divide_memory()
            case events.Unwanted(key):
                if key in self.models:
                    self._unwanted(self.models[key])
            case events.Warm(key, blocks) if key in self.models:
                warmth.wish(self.models[key], blocks)
                self._pump_all(self.models[key])
            case events.Recall() if event.model in self.models:
                warmth.recall(self.models[event.model], event)
            case events.HandedBack():
                self._handed_back(event)
            case events.Pin(key, blocks, pinned) if key in self.models:
                warmth.pin(self.models[key], blocks, pinned)
                self._pump_all(self.models[key])
            case events.ReadDone():
                self._read_done(event)
            case events.ReadFailed():
                self._read_failed(event)
            case events.ReadCancelled(segment, slot):
                self._read_cancelled(segment, slot)
            case events.Ended(session):
                self._ended(session)
        if self._memory_changed:
            self._memory_changed = False
            self._divide_memory()
        out, self._out = self._out, []
        return out

    # -- models and sessions -------------------------------------------------------------------------------------------

    def _attach(self, event: events.Attach) -> None:
        for other in self.models.values():
            if other.manifest.folder == event.manifest.folder and other.manifest.files != event.manifest.files:
                self._unwanted(other)  # its files have been replaced
        model = self.models.get(event.manifest.key)
        if model is None:
            try:
                model = self._new_model(event)
            except ExpertdError as error:
                self._out.append(instructions.Refuse(event.session, error, None))
                return
        elif event.mode == "copy" and model.size > self.budget - self.used:
            refusal = memory.no_room_for_a_copy(self.budget, self.used, model, self.beside)
            self._out.append(instructions.Refuse(event.session, refusal, None))
            return
        elif not model.in_use:
            self._drop_idle(largest(event.manifest) - model.size, model)
            memory.welcome(self.budget, self.models.values(), model, event.mode == "copy")
        model.unwanted = False
        model.opening.append(event)
        if model.ready:
            self._open_sessions(model)

    def _pool_created(self, segment: int) -> None:
        if segment not in self._pools:  # a sibling failed meanwhile and the model was given up
            self._out.append(instructions.UnlinkPool(segment))
            return
        model, pool = self._pools[segment]
        pool.created = True
        if pool.generation > 1:
            self._enter(model, pool)
        elif model.ready:
            self._open_sessions(model)

    def _pool_failed(self, segment: int, error: ExpertdError) -> None:
        if segment not in self._pools:
            return
        model, new = self._pools.pop(segment)
        old = next((pool for pool in model.pools if pool.next is new), None)
        less = memory.less(model.manifest, new, old)
        if old is not None:
            memory.forget_quotas([model])
            self._memory_changed |= old.outdated
            old.next, old.outdated = None, False
            if less is not None:
                self._move(model, old, less.size, fresh=new.fresh)  # what it lacks it gets when the old one has gone
            else:
                old.denied += new.layout.size > old.layout.size
                self._stay(model, old, error)
        elif less is not None:
            self._begin_smaller(model, new, less)
        else:
            for attach in model.opening:
                self._out.append(instructions.Refuse(attach.session, error, None))
            self._drop(model)

    def _open_sessions(self, model: Model) -> None:
        opening, model.opening = model.opening, []
        self._memory_changed = True
        for attach in opening:
            session = Session(attach.session, attach.pid, attach.mode, model.key, acked=model.version)
            self.sessions[session.number] = session
            model.sessions[session.number] = session
            for pool in model.pools:
                pool.holders[session.number] = model.version
            pools = tuple(pool.info for pool in model.pools)
            wanted = self._to_announce(model)
            self._out.append(instructions.Grant(session.number, model.key, model.version, pools, wanted))
        for pool in model.pools:
            if pool.holds_all:
                wished = dict.fromkeys((*pool.wish, *pool.blocks))
                pool.wish.clear()
                pool.wish.extend(block for block in wished if block not in pool.where)
            slots.fill(model, pool, self._out)

    def _ended(self, number: int) -> None:
        for model in self.models.values():
            if any(attach.session == number for attach in model.opening):
                model.opening = [attach for attach in model.opening if attach.session != number]
                self._leave(model, number)
        session = self.sessions.pop(number, None)
        if session is None:
            return
        model = self.models[session.model]
        self._abandon(model, session)
        ahead.forget(model, session, self._out)
        model.policy.ended(number)
        model.topics.ended(number)
        del model.sessions[number]
        self._leave(model, number)
        model.used_at = self._events
        self._memory_changed = True
        self._pump_all(model)
        self._sweep(model)
        if model.unwanted:
            self._call_off(model)

    def _unwanted(self, model: Model) -> None:
        """``model`` is given back as soon as nobody uses it."""
        if not model.unwanted:
            self._call_off(model)
        model.unwanted = self._memory_changed = True

    def _call_off(self, model: Model) -> None:
        """Nothing more is read for ``model`` if nobody uses it: that would have to be waited for."""
        if not model.in_use:
            for pool in model.pools:
                for block in sorted(pool.background):
                    self._out.append(instructions.Cancel(pool.segment, pool.where[block]))

    def _leave(self, model: Model, number: int) -> None:
        """A session that is over, opened or not, holds no generation of ``model`` any more."""
        for pool in (*model.pools, *model.old):
            pool.holders.pop(number, None)
        self._sweep(model)

    def _heard(self, session: Session) -> None:
        """A session has said something; if it was left behind, let it follow."""
        session.heard_at = self._events
        if session.silent:
            session.silent = session.owes = False
            session.asked = (0, 0)
            self._offer(self.models[session.model], session)
            self._memory_changed = True
            self._pump_all(self.models[session.model])

    def _silent(self, number: int) -> None:
        session = self.sessions.get(number)
        if session is None or session.silent:
            return
        model = self.models[session.model]
        if session.owes or model.held_by(number):
            session.silent = True
            ahead.forget(model, session, self._out)
            self._memory_changed = True
            self._pump_all(model)

    def _handed_back(self, event: events.HandedBack) -> None:
        """Copy from pools of an earlier daemon what is absent; they are there until their sessions release them."""
        model = self.models.get(event.model)
        new = [Pool.handed(what) for what in event.pools if what.segment not in self._pools]
        if model is None or not model.knows(event.session):
            for pool in new:
                self._out.append(instructions.UnlinkPool(pool.segment))
            return
        for pool in new:
            model.old.append(pool)
            self._pools[pool.segment] = (model, pool)
        for what in event.pools:
            self._pools[what.segment][1].holders[event.session] = model.version
        adoption.adopt(model, new)
        if model.ready:
            self._pump_all(model)

    # -- fetch and ack -------------------------------------------------------------------------------------------------

    def _fetch(self, event: events.Fetch) -> None:
        session = self.sessions.get(event.session)
        if session is None:
            error = SessionUnknown(f"session {event.session} is not attached to this daemon; load the model again")
            self._out.append(instructions.Refuse(event.session, error, event.sequence))
            return
        self._heard(session)
        if event.sequence <= session.sequence:
            self._repeat(session, event.sequence)
            return
        model = self.models[session.model]
        session.sequence = event.sequence
        session.fetches += 1
        session.leases_only = event.leases_only
        session.owes = False
        session.answer = session.refusal = None
        events_before = self._hits(session, event.routing)
        self._abandon(model, session)
        pool = model.pool_of_layer.get(event.layer)
        problem = fetches.problem(event, pool)
        if pool is not None and (event.segment != pool.segment or session.number not in pool.holders):
            self._offer(model, session)
            moved = PoolMoved(f"layer {event.layer} is in segment {pool.segment} now")
            self._refuse_fetch(model, session, moved)
        elif pool is None or problem is not None:
            self._refuse_fetch(model, session, FetchInvalid(problem or ""))
        else:
            ahead.note_wait(model, session, event)
            begins = ahead.begin_event(model, pool, session, event, self._out)
            session.waiting = Waiting(event)
            crowded = bool(fetches.ungranted(pool))
            pool.queue.append(session.waiting)
            if not crowded and fetches.absent(event, pool) <= pool.spare:
                self._grant(model, pool, session.waiting)  # its reads begin before anything else is worked out
            if begins:
                experts = (*event.experts, *event.then)
                resident = sum(pool.sealed_slot((event.layer, expert)) is not None for expert in experts)
                model.counts[event.layer].hits += resident
                model.counts[event.layer].misses += len(experts) - resident
                events_before.append((event.layer, experts))
        self._learn(session, events_before)
        self._pump_all(model)

    def _ahead(self, event: events.Ahead) -> None:
        session = self.sessions.get(event.session)
        if session is None:
            return
        self._heard(session)
        self._learn(session, self._hits(session, event.routing))
        model = self.models[session.model]
        pool = model.pool_of_layer.get(event.layer)
        fits = pool is not None and event.segment == pool.segment and max(event.experts) < pool.layout.experts
        if pool is not None and fits and session.number in pool.holders and self._reads_ahead:
            ahead.announce(model, pool, session, event, self._out)
            self._pump(model, pool)

    def _to_announce(self, model: Model) -> int:
        """What sessions should announce (``messages.Announce``)."""
        return model.foresight.wanted if self._reads_ahead else -1

    def _repeat(self, session: Session, sequence: int) -> None:
        """The same Fetch again: its answer was lost, or is on its way."""
        if sequence != session.sequence:
            return
        if session.answer is not None:
            version = session.answered_version
            wanted = self._to_announce(self.models[session.model])
            self._out.append(instructions.Answer(session.number, sequence, version, session.answer, wanted))
        elif session.refusal is not None:
            self._out.append(instructions.Refuse(session.number, session.refusal, sequence))
        else:  # it still waits: perhaps because a request for an ack was lost, or the ack
            model = self.models[session.model]
            for other in model.sessions.values():
                other.asked = (0, 0)
            self._pump_all(model)

    def _refuse_fetch(self, model: Model, session: Session, error: ExpertdError) -> None:
        session.acked = model.version
        session.refusal = error
        session.leases_only = False
        ahead.forget(model, session, self._out)
        self._out.append(instructions.Refuse(session.number, error, session.sequence))

    def _give_up(self, model: Model, pool: Pool, waiting: Waiting, error: ExpertdError) -> None:
        """Answer a Fetch that waits in ``pool`` with ``error``."""
        session = self.sessions[waiting.fetch.session]
        self._release(session)
        fetches.leave_queue(pool, waiting)
        session.waiting = None
        self._refuse_fetch(model, session, error)

    def _ack(self, event: events.Ack) -> None:
        session = self.sessions.get(event.session)
        if session is None:
            return
        self._heard(session)
        model = self.models[session.model]
        if event.version >= session.asked[0] and event.sequence >= session.asked[1]:
            session.owes = False  # else it was sent before the question
        self._learn(session, self._hits(session, event.routing))
        session.acked = max(session.acked, min(event.version, model.version))
        if event.sequence == session.sequence and session.waiting is None:
            self._release(session)
            ahead.forget_rest(model, session, self._out)  # no event goes on across an ack
            session.leases_only = False  # it may still read what it had, until it acks what is evicted from now on
        self._pump_all(model)

    def _hits(
        self, session: Session, routing: Iterable[tuple[int, Sequence[int]]]
    ) -> list[tuple[int, Sequence[int]]]:
        """Count the events of a routing log, and judge announcements by them; returns those that make sense."""
        model = self.models[session.model]
        hits: list[tuple[int, Sequence[int]]] = []
        for layer, experts in routing:
            pool = model.pool_of_layer.get(layer)
            if pool is not None and experts and max(experts) < pool.layout.experts:
                hits.append((layer, experts))
                model.counts[layer].hits += len(experts)
                ahead.passed(model, session, layer, experts, self._out)
        return hits

    def _learn(self, session: Session, ran: Sequence[tuple[int, Sequence[int]]]) -> None:
        """These events have run; now and then it is seen whether pools should give each other memory.

        Where something is absent it matters what they are about.
        """
        model = self.models[session.model]
        model.foresight.ran(len(ran))
        if model.quotas.ran(len(ran)):
            self._memory_changed |= memory.step(self.models.values())
        something_is_absent = not all(pool.holds_all for pool in model.pools)
        turned = False
        for layer, experts in ran[-LEARNED_FORWARDS * len(model.counts) :]:
            model.policy.observe(session.number, layer, experts)
            if something_is_absent:
                chances = model.topics.observe(session.number, layer, experts)
                if chances is not None:
                    turns.turn(model, session, layer, chances, self._reads_ahead, self._out)
                    turned = True
        if turned:
            self._pump_all(model)

    def _release(self, session: Session) -> None:
        if session.leased_pool is not None:
            for slot in session.leased:
                session.leased_pool.slots[slot].leases.discard(session.number)
        session.leased, session.leased_pool = [], None

    def _abandon(self, model: Model, session: Session) -> None:
        """Nobody wants what this session waits for or holds: it ended, or went on to another Fetch."""
        self._release(session)
        if session.waiting is not None:
            pool = self._pools[session.waiting.fetch.segment][1]
            fetches.leave_queue(pool, session.waiting)
            session.waiting = None

    def _pump_all(self, model: Model) -> None:
        for pool in model.pools:
            self._pump(model, pool)

    def _pump(self, model: Model, pool: Pool) -> None:
        """Grant what can be granted: first come, first served, all or nothing."""
        slots.reap(model, pool)
        alone = len(self._pools) == 1
        for waiting in fetches.ungranted(pool):
            if not self._grant(model, pool, waiting):
                break
        else:
            ahead.read(model, pool, self._out, alone, self._events)
            ahead.keep_spare(model, pool, self._out, alone)
            self._ask(model, ahead.in_the_way(model, pool), waiting=False)
        slots.fill(model, pool, self._out)

    def _grant(self, model: Model, pool: Pool, waiting: Waiting) -> bool:
        """Give ``waiting`` all the slots it needs, evicting where it must; False if it has to wait for others.

        What sessions expect to need soon goes last but one, and what is pinned last.
        """
        layer = waiting.fetch.layer
        wanted = {(layer, expert) for expert in waiting.fetch.experts}
        absent = [block for block in sorted(wanted) if block not in pool.where]
        alone = len(self._pools) == 1
        for expected, pins in ((pool.expected, True), ((), True), ((), False)):
            if (short := len(absent) - pool.spare - len(pool.retired)) <= 0:
                break
            slots.evict(model, pool, short, wanted.union(expected), self._out, alone, pins)
        if pool.spare < len(absent):
            slots.reap(model, pool)
        if pool.spare < len(absent):
            # What is read for nobody who waits may be read late, and its slots are waited for now.
            slots.demand(pool, pool.going_ahead | pool.background, self._out)
            self._ask_for_room(model, pool)
            return False
        session = self.sessions[waiting.fetch.session]
        for block in absent:
            slots.bring(model, pool, block, self._out, Priority.DEMAND)
        slots.demand(pool, wanted, self._out)
        waiting.granted = True
        waiting.missing = {block for block in wanted if pool.sealed_slot(block) is None}
        session.leased = [pool.where[block] for block in sorted(wanted)]
        session.leased_pool = pool
        for slot in session.leased:
            pool.slots[slot].leases.add(session.number)
        if not waiting.missing:
            self._answer(model, pool, waiting)
        return True

    def _ask_for_room(self, model: Model, pool: Pool) -> None:
        """A Fetch waits for slots: ask those who stand in the way; if only silent ones do, go on without them."""
        blockers = slots.in_the_way(model, pool)
        self._ask(model, blockers, waiting=True)
        if slots.only_silent(blockers):
            self._move(model, pool, self.budget - self.used)

    def _ask(self, model: Model, blockers: Iterable[Session], waiting: bool) -> None:
        """Ask those for an ack who have not been asked since they said something; they owe it if a Fetch waits."""
        for session in blockers:
            reason = (model.version, session.sequence)
            if session.silent:
                continue
            session.owes |= waiting
            if session.asked != reason:
                session.asked = reason
                self._out.append(instructions.AskAck(session.number, model.version))

    # -- generations ---------------------------------------------------------------------------------------------------

    def _enter(self, model: Model, new: Pool) -> None:
        """The memory of a new generation is there: everybody who is heard moves over, blocks follow."""
        old = next(pool for pool in model.pools if pool.next is new)
        model.pools[model.pools.index(old)] = new
        model.pool_of_layer.update(dict.fromkeys(new.layers, new))
        model.old.append(old)
        model.moves += 1
        old.next, old.superseded = None, True
        ahead.forget_pool(model, old)
        new.quota = old.quota if old.outdated else None
        slots.follow(model, old, new)
        for session in model.sessions.values():
            if not session.silent or session.waiting is not None:  # whoever is refused has to know where to go
                self._offer(model, session)
        moved = PoolMoved(f"the pool of segment {old.segment} is in segment {new.segment} now")
        for waiting in fetches.ungranted(old):
            self._give_up(model, old, waiting, moved)
        self._memory_changed = True
        self._pump(model, new)
        self._sweep(model)

    def _stay(self, model: Model, pool: Pool, error: ExpertdError) -> None:
        """There is no memory for another generation of ``pool``: refuse what cannot be served without one."""
        if slots.only_silent(slots.in_the_way(model, pool)):
            for waiting in fetches.ungranted(pool):
                self._give_up(model, pool, waiting, error)
        self._pump(model, pool)

    def _released(self, number: int, segment: int) -> None:
        session = self.sessions.get(number)
        if session is None:
            return
        self._heard(session)
        model = self.models[session.model]
        for pool in model.old:
            if pool.segment == segment:
                pool.holders.pop(number, None)
        self._sweep(model)

    def _divide_memory(self, drop: bool = False) -> None:
        """Let pools shrink where more is used than may be, and grow where there is room.

        If they have to ``drop`` what they hold, nothing is copied, not even for moves that have begun.
        """
        for model in self._idle():
            models = self.models.values()
            if model.unwanted or memory.committed(models) + memory.settled(models) > self.budget:
                self._drop(model)
        for model, pool, size in memory.shares(self.budget, self.models.values()):
            self._resize(model, pool, size)
            if drop and pool.next is not None:
                pool.next.fresh = True
            if drop and pool.carried:
                slots.forget_wishes(model, pool)
                self._sweep(model)
        ended = memory.end_quotas(self.budget, self.models.values())
        for model, pool, size in ended or ():
            self._move(model, pool, size)
        if ended == []:
            self._divide_memory(drop)

    # -- reads ---------------------------------------------------------------------------------------------------------

    def _read_done(self, event: events.ReadDone) -> None:
        model, pool = self._pools[event.segment]
        source, left = pool.slots[event.slot].source, model.recalled
        if source is not None and source.generation == HANDED and left is not None:
            left.adopted += pool.slots[event.slot].block not in left.back  # else it had gone, and was copied again
        elif source is not None:
            model.copied += 1
        block = slots.arrived(model, pool, event.slot)
        model.counts[block[0]].bytes_read += event.size
        self._out.append(instructions.Publish(pool.segment, pool.row(block[0]), block[1], event.slot))
        for waiting in list(pool.queue):
            if block in waiting.missing:
                waiting.missing.discard(block)
                if not waiting.missing:
                    self._answer(model, pool, waiting)
        if pool.complete and not pool.superseded:
            for number in pool.holders:
                self._out.append(instructions.Announce(number, pool.segment))
        if not pool.superseded:
            self._pump(model, pool)
        self._sweep(model)
        self._memory_changed |= not model.sessions

    def _read_failed(self, event: events.ReadFailed) -> None:
        model, pool = self._pools[event.segment]
        block = slots.failed(model, pool, event.slot)
        for waiting in [entry for entry in pool.queue if block in entry.missing]:
            self._give_up(model, pool, waiting, event.error)
        self._pump_all(model)
        self._sweep(model)
        self._memory_changed |= not model.sessions

    def _read_cancelled(self, segment: int, slot: int) -> None:
        model, pool = self._pools[segment]
        slots.called_off(model, pool, slot, self._out)
        self._pump_all(model)
        self._sweep(model)
        self._memory_changed |= not model.sessions

    def _answer(self, model: Model, pool: Pool, waiting: Waiting) -> None:
        session = self.sessions[waiting.fetch.session]
        layer = waiting.fetch.layer
        session.waiting = None
        session.acked = model.version
        session.answer = tuple(pool.where[layer, expert] for expert in waiting.fetch.experts)
        session.answered_version = model.version
        fetches.leave_queue(pool, waiting)
        wanted, sequence = self._to_announce(model), waiting.fetch.sequence
        self._out.append(instructions.Answer(session.number, sequence, model.version, session.answer, wanted))
