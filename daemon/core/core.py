"""The state machine that owns residency: who may read what, which slot may be refilled, who waits for whom.

    instructions = core.handle(event)

No locks, no clock, no sockets, no memory: one loop owns the object, carries the instructions out in order, and feeds
back what came of them.  The rule that everything rests on (DESIGN section 5): no slot is refilled while a living
session might still read what was in it.  Here that means: a retired slot becomes free only when every session of its
model has acked the version at which it was retired, or waits in a Fetch, which holds nothing.

What it does not do: choose victims (``expertd.daemon.policy``), divide memory (``plan``), read, write or send
(``expertd.daemon.server``).
"""

from __future__ import annotations

from collections.abc import Iterable

from expertd.daemon.core import events, instructions
from expertd.daemon.core.plan import largest, plan_pools, smallest
from expertd.daemon.core.state import Model, Pool, Session, SlotState, Waiting
from expertd.daemon.policy import LRU, Block, PolicyFactory
from expertd.protocol.errors import BudgetTooSmall, ExpertdError, FetchInvalid, SessionUnknown
from expertd.protocol.messages import PoolInfo
from expertd.protocol.sizes import show_size

BACKGROUND_READS = 2
"""Reads of the background fill that may be on their way in one pool."""


class Core:
    """Owned by one loop; not thread-safe.

    Attributes:
        budget: bytes that all segments (and copies in sessions that cannot alias) may take.
        models: by key, in the order in which they came.
        sessions: by number, those that are open.
    """

    def __init__(self, budget: int, policy: PolicyFactory = LRU) -> None:
        self.budget = budget
        self.models: dict[str, Model] = {}
        self.sessions: dict[int, Session] = {}
        self._pools: dict[int, tuple[Model, Pool]] = {}
        self._policy = policy
        self._segments = 0
        self._events = 0
        self._postponed: list[events.Attach] = []
        self._out: list[instructions.Instruction] = []

    @property
    def used(self) -> int:
        """Bytes of all segments and of the copies that sessions in copy mode hold."""
        total = 0
        for model in self.models.values():
            modes = [session.mode for session in model.sessions.values()] + [opening.mode for opening in model.opening]
            total += model.size * (1 + modes.count("copy"))
        return total

    @property
    def keys(self) -> set[str]:
        """Keys of the models that exist or that somebody waits to open: their files are needed."""
        return self.models.keys() | {attach.manifest.key for attach in self._postponed}

    def handle(self, event: events.Event) -> list[instructions.Instruction]:
        """Take ``event`` in and return what has to be done about it, in order."""
        self._events += 1
        self._out = []
        match event:
            case events.Attach():
                self._attach(event)
            case events.PoolCreated(segment):
                self._pool_created(segment)
            case events.PoolFailed(segment, error):
                self._pool_failed(segment, error)
            case events.Fetch():
                self._fetch(event)
            case events.Ack():
                self._ack(event)
            case events.Routed(session, routing):
                if session in self.sessions:
                    self._observe_hits(self.models[self.sessions[session].model], routing)
            case events.ReadDone():
                self._read_done(event)
            case events.ReadFailed():
                self._read_failed(event)
            case events.Ended(session):
                self._ended(session)
        postponed, self._postponed = self._postponed, []
        for attach in postponed:
            self._attach(attach)
        out, self._out = self._out, []
        return out

    # -- models and sessions -------------------------------------------------------------------------------------------

    def _attach(self, event: events.Attach) -> None:
        model = self.models.get(event.manifest.key)
        if model is None:
            try:
                model = self._new_model(event)
            except ExpertdError as error:
                self._out.append(instructions.Refuse(event.session, error, None))
                return
            if model is None:
                self._postponed.append(event)
                return
        elif event.mode == "copy" and model.size > self.budget - self.used:
            refusal = BudgetTooSmall(
                f"a session in copy mode needs {show_size(model.size)} of its own beside the shared pools, and "
                f"{show_size(max(0, self.budget - self.used))} of the budget are free; "
                f"start the daemon with --budget {self.used + model.size} or more"
            )
            self._out.append(instructions.Refuse(event.session, refusal, None))
            return
        model.opening.append(event)
        if model.ready:
            self._open_sessions(model)

    def _new_model(self, event: events.Attach) -> Model | None:
        """A model for ``event``, or None if that has to wait until the last reads of unused models have ended."""
        manifest = event.manifest
        copies = 2 if event.mode == "copy" else 1
        wanted = largest(manifest) * copies
        needed = smallest(manifest) * copies
        idle = sum(model.size for model in self._idle())
        if needed > self.budget - self.used + idle:
            unused = sum(model.size for model in self.models.values() if not model.sessions and not model.opening)
            if needed <= self.budget - self.used + unused:
                return None
            held = self.used - idle
            others = f", and models in use hold {show_size(held)} of it" if held else ""
            raise BudgetTooSmall(
                f"the budget of {show_size(self.budget)} is too small for {manifest.folder}: one event of one session "
                f"needs at least {needed} bytes ({show_size(needed)}){others}; start the daemon with "
                f"--budget {held + needed} or more"
            )
        for model in self._idle():
            if self.budget - self.used >= wanted:
                break
            self._drop(model)
        plans = plan_pools(manifest, (self.budget - self.used) // copies)
        pools = []
        for plan in plans:
            self._segments += 1
            pools.append(Pool(self._segments, 1, plan.layers, plan.layout, self._policy()))
        pool_of_layer = {layer: pool for pool in pools for layer in pool.layers}
        model = Model(manifest.key, manifest, pools, pool_of_layer)
        self.models[model.key] = model
        for pool in pools:
            self._pools[pool.segment] = (model, pool)
            self._out.append(instructions.CreatePool(pool.segment, pool.generation, pool.layout))
        return model

    def _idle(self) -> list[Model]:
        """Models that nobody uses and nothing reads for, the longest unused first."""
        idle = [m for m in self.models.values() if not m.sessions and not m.opening and m.ready and not m.reading]
        return sorted(idle, key=lambda model: model.used_at)

    def _drop(self, model: Model) -> None:
        del self.models[model.key]
        for pool in model.pools:
            del self._pools[pool.segment]
            if pool.created:
                self._out.append(instructions.UnlinkPool(pool.segment))

    def _pool_created(self, segment: int) -> None:
        if segment not in self._pools:  # a sibling failed meanwhile and the model was given up
            self._out.append(instructions.UnlinkPool(segment))
            return
        model, pool = self._pools[segment]
        pool.created = True
        if model.ready:
            self._open_sessions(model)

    def _pool_failed(self, segment: int, error: ExpertdError) -> None:
        if segment not in self._pools:
            return
        model, _ = self._pools[segment]
        self._drop(model)
        for attach in model.opening:
            self._out.append(instructions.Refuse(attach.session, error, None))

    def _open_sessions(self, model: Model) -> None:
        opening, model.opening = model.opening, []
        for attach in opening:
            session = Session(attach.session, attach.pid, attach.mode, model.key, acked=model.version)
            self.sessions[session.number] = session
            model.sessions[session.number] = session
            pools = tuple(
                PoolInfo(
                    segment=pool.segment,
                    generation=pool.generation,
                    layers=list(pool.layers),
                    slots=pool.layout.slots,
                    complete=pool.complete,
                    nonce=bytes(16),
                )
                for pool in model.pools
            )
            self._out.append(instructions.Grant(session.number, model.key, model.version, pools))
        for pool in model.pools:
            pool.fill_from, pool.fill_failed = 0, False
            self._fill(model, pool)

    def _ended(self, number: int) -> None:
        self._postponed = [attach for attach in self._postponed if attach.session != number]
        for model in self.models.values():
            model.opening = [attach for attach in model.opening if attach.session != number]
        session = self.sessions.pop(number, None)
        if session is None:
            return
        model = self.models[session.model]
        del model.sessions[number]
        model.used_at = self._events
        self._abandon(model, session)
        self._pump_all(model)

    # -- fetch and ack -------------------------------------------------------------------------------------------------

    def _fetch(self, event: events.Fetch) -> None:
        session = self.sessions.get(event.session)
        if session is None:
            error = SessionUnknown(f"session {event.session} is not attached to this daemon; load the model again")
            self._out.append(instructions.Refuse(event.session, error, event.sequence))
            return
        if event.sequence <= session.sequence:
            self._repeat(session, event.sequence)
            return
        model = self.models[session.model]
        session.sequence = event.sequence
        session.fetches += 1
        session.answer = session.refusal = None
        self._observe_hits(model, event.routing)
        self._abandon(model, session)
        pool = model.pool_of_layer.get(event.layer)
        if problem := _problem(event, pool):
            self._refuse_fetch(model, session, FetchInvalid(problem))
            self._pump_all(model)
            return
        assert pool is not None
        pool.policy.observe(event.layer, event.experts)
        resident = sum(self._sealed(pool, (event.layer, expert)) is not None for expert in event.experts)
        model.hits += resident
        model.misses += len(event.experts) - resident
        session.waiting = Waiting(event)
        pool.queue.append(session.waiting)
        self._pump_all(model)

    def _repeat(self, session: Session, sequence: int) -> None:
        """The same Fetch again: its answer was lost, or is on its way."""
        if sequence != session.sequence:
            return
        if session.answer is not None:
            version = session.answered_version
            self._out.append(instructions.Answer(session.number, sequence, version, session.answer))
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
        self._out.append(instructions.Refuse(session.number, error, session.sequence))

    def _ack(self, event: events.Ack) -> None:
        session = self.sessions.get(event.session)
        if session is None:
            return
        model = self.models[session.model]
        self._observe_hits(model, event.routing)
        session.acked = max(session.acked, min(event.version, model.version))
        if event.sequence == session.sequence and session.waiting is None:
            self._release(session)
        self._pump_all(model)

    def _observe_hits(self, model: Model, routing: Iterable[tuple[int, list[int]]]) -> None:
        for layer, experts in routing:
            pool = model.pool_of_layer.get(layer)
            if pool is not None:
                pool.policy.observe(layer, experts)
                model.hits += len(experts)

    def _release(self, session: Session) -> None:
        if session.leased_pool is not None:
            for slot in session.leased:
                session.leased_pool.slots[slot].leases.discard(session.number)
        session.leased, session.leased_pool = [], None

    def _abandon(self, model: Model, session: Session) -> None:
        """Nobody wants what this session waits for or holds: it ended, or went on to another Fetch."""
        self._release(session)
        if session.waiting is not None:
            self._leave_queue(model, session.waiting)
            session.waiting = None

    def _leave_queue(self, model: Model, waiting: Waiting) -> None:
        pool = model.pool_of_layer[waiting.fetch.layer]
        pool.queue = type(pool.queue)(entry for entry in pool.queue if entry is not waiting)

    # -- slots ---------------------------------------------------------------------------------------------------------

    def _pump_all(self, model: Model) -> None:
        for pool in model.pools:
            self._pump(model, pool)

    def _pump(self, model: Model, pool: Pool) -> None:
        """Grant what can be granted: first come, first served, all or nothing."""
        self._reap(model, pool)
        for waiting in [entry for entry in pool.queue if not entry.granted]:
            if not self._grant(model, pool, waiting):
                break
        self._fill(model, pool)

    def _grant(self, model: Model, pool: Pool, waiting: Waiting) -> bool:
        """Give ``waiting`` all the slots it needs, evicting where it must; False if it has to wait for acks."""
        layer = waiting.fetch.layer
        wanted = {(layer, expert) for expert in waiting.fetch.experts}
        absent = [block for block in sorted(wanted) if block not in pool.where]
        short = len(absent) - pool.spare - len(pool.retired)
        if short > 0:
            self._evict(model, pool, short, wanted)
        if pool.spare < len(absent):
            self._reap(model, pool)
        if pool.spare < len(absent):
            self._ask_acks(model, pool)
            return False
        session = self.sessions[waiting.fetch.session]
        for block in absent:
            self._start_read(model, pool, block, demand=True)
        waiting.granted = True
        waiting.missing = {block for block in wanted if self._sealed(pool, block) is None}
        session.leased = [pool.where[block] for block in sorted(wanted)]
        session.leased_pool = pool
        for slot in session.leased:
            pool.slots[slot].leases.add(session.number)
        if not waiting.missing:
            self._answer(model, pool, waiting)
        return True

    def _evict(self, model: Model, pool: Pool, count: int, keep: set[Block]) -> None:
        def evictable(block: Block) -> bool:
            slot = pool.slots[pool.where[block]]
            return block not in keep and slot.state is SlotState.SEALED and not slot.leases

        victims = pool.policy.victims(count, evictable)
        if not victims:
            return
        model.version += 1
        for block in victims:
            number = pool.where.pop(block)
            slot = pool.slots[number]
            slot.move(SlotState.RETIRED)
            slot.retired_at = model.version
            pool.retired.add(number)
            pool.sealed -= 1
            pool.policy.removed(block)
            model.evictions += 1
            self._out.append(instructions.Publish(pool.segment, pool.row(block[0]), block[1], -1))

    def _reap(self, model: Model, pool: Pool) -> None:
        """Free the retired slots that no session can read any more."""
        if not pool.retired:
            return
        acked = min((s.acked for s in model.sessions.values() if s.waiting is None), default=model.version)
        for number in sorted(pool.retired):
            slot = pool.slots[number]
            if slot.retired_at <= acked:
                slot.move(SlotState.FREE)
                pool.retired.discard(number)
                pool.give_back(slot)

    def _ask_acks(self, model: Model, pool: Pool) -> None:
        """Ask every session that stands in the way of a grant, once for each version."""
        retired_at = max((pool.slots[number].retired_at for number in pool.retired), default=0)
        for session in model.sessions.values():
            behind = session.acked < retired_at
            holds = session.leased_pool is pool
            reason = (model.version, session.sequence)
            if session.waiting is None and (behind or holds) and session.asked != reason:
                session.asked = reason
                self._out.append(instructions.AskAck(session.number, model.version))

    def _start_read(self, model: Model, pool: Pool, block: Block, *, demand: bool) -> None:
        slot = pool.take(block)
        slot.block = block
        slot.move(SlotState.FILLING)
        pool.where[block] = slot.number
        if not demand:
            pool.background.add(block)
        self._out.append(
            instructions.StartRead(model.key, pool.segment, slot.number, block[0], block[1], demand=demand)
        )

    def _fill(self, model: Model, pool: Pool) -> None:
        """Read what is still absent from a pool that has room for everything, a little at a time, demand first."""
        if not (pool.holds_all and model.sessions) or pool.fill_failed or pool.queue:
            return
        total = pool.layout.layers * pool.layout.experts
        while len(pool.background) < BACKGROUND_READS and pool.fill_from < total:
            row, expert = divmod(pool.fill_from, pool.layout.experts)
            block = (pool.layers[row], expert)
            if block not in pool.where:
                self._start_read(model, pool, block, demand=False)
            pool.fill_from += 1

    def _sealed(self, pool: Pool, block: Block) -> int | None:
        """The slot of ``block`` if it is resident."""
        number = pool.where.get(block)
        return number if number is not None and pool.slots[number].state is SlotState.SEALED else None

    # -- reads ---------------------------------------------------------------------------------------------------------

    def _read_done(self, event: events.ReadDone) -> None:
        model, pool = self._pools[event.segment]
        slot = pool.slots[event.slot]
        block = slot.block
        assert block is not None
        slot.move(SlotState.SEALED)
        pool.sealed += 1
        pool.background.discard(block)
        pool.policy.admitted(block)
        model.bytes_read += event.size
        self._out.append(instructions.Publish(pool.segment, pool.row(block[0]), block[1], slot.number))
        for waiting in list(pool.queue):
            if block in waiting.missing:
                waiting.missing.discard(block)
                if not waiting.missing:
                    self._answer(model, pool, waiting)
        if pool.complete:
            for session in model.sessions.values():
                self._out.append(instructions.Announce(session.number, pool.segment))
        self._pump(model, pool)

    def _read_failed(self, event: events.ReadFailed) -> None:
        model, pool = self._pools[event.segment]
        slot = pool.slots[event.slot]
        block = slot.block
        assert block is not None
        if block in pool.background:
            pool.background.discard(block)
            pool.fill_failed = True
        slot.move(SlotState.FREE)
        slot.leases.clear()
        del pool.where[block]
        pool.give_back(slot)
        for waiting in [entry for entry in pool.queue if block in entry.missing]:
            session = self.sessions[waiting.fetch.session]
            self._release(session)
            self._leave_queue(model, waiting)
            session.waiting = None
            self._refuse_fetch(model, session, event.error)
        self._pump_all(model)

    def _answer(self, model: Model, pool: Pool, waiting: Waiting) -> None:
        session = self.sessions[waiting.fetch.session]
        layer = waiting.fetch.layer
        session.waiting = None
        session.acked = model.version
        session.answer = tuple(pool.where[layer, expert] for expert in waiting.fetch.experts)
        session.answered_version = model.version
        self._leave_queue(model, waiting)
        self._out.append(
            instructions.Answer(session.number, waiting.fetch.sequence, model.version, session.answer)
        )


def _problem(event: events.Fetch, pool: Pool | None) -> str | None:
    """What is wrong with a Fetch, as a sentence, or None."""
    if pool is None:
        return f"layer {event.layer} is no MoE layer of this model"
    if len(set(event.experts)) != len(event.experts):
        return f"a fetch for layer {event.layer} names an expert twice"
    if max(event.experts) >= pool.layout.experts:
        return f"layer {event.layer} has {pool.layout.experts} experts, there is no expert {max(event.experts)}"
    if len(event.experts) > pool.layout.slots:
        return f"a fetch for {len(event.experts)} blocks does not fit a pool of {pool.layout.slots} slots"
    return None
