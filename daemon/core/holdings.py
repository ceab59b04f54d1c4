"""What there is: models, the generations of their pools, sessions, and the memory that they take.

``core.Core`` decides what becomes of them; how memory is divided is in ``plan`` and ``memory``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from expertd.daemon.core import adoption, events, instructions, memory
from expertd.daemon.core.plan import GROWTH, beginning, largest, plan_pools, resized, smallest
from expertd.daemon.core.state import Model, Pool, Session
from expertd.daemon.policy import Forecast, PolicyFactory
from expertd.protocol.layout import PoolLayout
from expertd.protocol.manifest import Manifest

ASK_AGAIN = 3
"""So often it is tried again to let a pool grow for which there was no memory; after that when some is given back."""


class AtOnce(list[instructions.Instruction]):
    """Has each instruction carried out when it is appended, and keeps none."""

    def __init__(self, carry_out: Callable[[instructions.Instruction], None]) -> None:
        super().__init__()
        self._carry_out = carry_out

    def append(self, instruction: instructions.Instruction, /) -> None:
        self._carry_out(instruction)


class Holdings:
    """The part of the core that adds models and pools and gives them back.

    Attributes:
        budget: bytes that all segments (and copies in sessions that cannot alias) may take.  Exceeded only while pools
            move (from those of an earlier daemon, too), by one event of one session for each pool of a model that comes
            meanwhile, or that has to go on without a silent session, and by what silent sessions keep.
        most: bytes that the user allows; more than the budget under memory pressure.
        beside: bytes that the user allows beyond that, and that base weights have.
        going: bytes by which the budget grows when a model that nobody uses is given back, by its key.
        models: by key, in the order in which they came.
        sessions: by number, those that are open.
    """

    def __init__(
        self, budget: int, policy: PolicyFactory = Forecast, *, first_segment: int = 1, reads_ahead: bool = True
    ) -> None:
        self.budget = self.most = budget
        self.beside = 0
        self.going: dict[str, int] = {}
        self.models: dict[str, Model] = {}
        self.sessions: dict[int, Session] = {}
        self._pools: dict[int, tuple[Model, Pool]] = {}
        self._policy = policy
        self._reads_ahead = reads_ahead
        self._segments = itertools.count(first_segment)
        self._events = 0
        self._memory_changed = False
        self._out: list[instructions.Instruction] = []

    @property
    def used(self) -> int:
        """Bytes of all segments and of the copies that sessions in copy mode hold."""
        return memory.used(self.models.values())

    @property
    def smallest_budget(self) -> int:
        """Bytes that the models in use need at least: one event of one session each."""
        return memory.smallest(self.models.values())

    @property
    def floor(self) -> int:
        """Bytes for one event of each session: what they keep under the worst pressure."""
        return memory.floor(self.models.values())

    @property
    def wanting(self) -> bool:
        """Whether it makes sense to ask the system again for memory that it did not give (``events.MemoryWanted``).

        Too much is used, or a pool was to grow; what others still held a moment ago may be there now.
        """
        denied = (pool.denied for model in self.models.values() for pool in model.pools)
        return self.used > self.budget or any(0 < times <= ASK_AGAIN for times in denied)

    @property
    def owing(self) -> list[int]:
        """Sessions that were asked for an ack and have not answered."""
        return [session.number for session in self.sessions.values() if session.owes and not session.silent]

    @property
    def holding(self) -> list[int]:
        """Sessions that have not given back an older generation yet; they do so at a moment of their own choosing."""
        return [
            number
            for model in self.models.values()
            for number in {number for old in model.old for number in old.holders}
            if number in model.sessions and not model.sessions[number].silent
        ]

    def _new_model(self, event: events.Attach) -> Model:
        """A model for ``event``, with the memory that is free; where that is too little, others make room meanwhile.

        It begins with what one event needs at least, even if pools in use or the last reads of unused models still
        take the whole budget: it is short, and nobody has to wait.
        """
        manifest, copies = event.manifest, 2 if event.mode == "copy" else 1
        wanted, needed = largest(manifest) * copies, smallest(manifest) * copies
        if needed > self.most - self.smallest_budget:
            raise memory.no_room(self.most, self.smallest_budget, manifest, needed, self.beside)
        self._drop_idle(wanted + event.holding)
        should_have = max(needed, memory.make_room(self.budget, self.models.values(), wanted))
        plans = plan_pools(manifest, should_have // copies)
        pools = []
        begins_with = adoption.beginning_with(self.budget - self.used, event)
        for plan, layout in beginning(manifest, plans, begins_with // copies):
            pools.append(self._new_pool(manifest, 1, plan.layers, layout))
            pools[-1].quota = plan.layout.size if layout.slots < plan.layout.slots else None
        pool_of_layer = {layer: pool for pool in pools for layer in pool.layers}
        layers = manifest.layers
        experts, top_k = max(layer.experts for layer in layers), max(layer.top_k for layer in layers)
        model = Model(manifest.key, manifest, pools, pool_of_layer, self._policy(len(layers), experts, top_k))
        self.models[model.key] = model
        self._memory_changed = True
        for pool in pools:
            self._pools[pool.segment] = (model, pool)
        return model

    def _begin_smaller(self, model: Model, pool: Pool, layout: PoolLayout) -> None:
        """There is no memory for what ``pool`` should begin with: begin with less, and grow when something is free."""
        quota = pool.layout.size if pool.quota is None else pool.quota
        begun = self._new_pool(model.manifest, 1, pool.layers, layout)
        begun.quota, begun.wish, begun.carried, begun.sources = quota, pool.wish, pool.carried, pool.sources
        model.pools[model.pools.index(pool)] = begun
        model.pool_of_layer.update(dict.fromkeys(begun.layers, begun))
        self._pools[begun.segment] = model, begun
        adoption.shrink(model, begun)

    def _new_pool(self, manifest: Manifest, generation: int, layers: tuple[int, ...], layout: PoolLayout) -> Pool:
        segment = next(number for number in self._segments if number not in self._pools)
        least = layout == resized(manifest, layers, 0)
        self._out.append(instructions.CreatePool(segment, generation, layout, manifest.key, layers, least))
        return Pool(segment, generation, layers, layout)

    def _idle(self) -> list[Model]:
        """Models that nobody uses and nothing reads for, the longest unused first."""
        idle = [m for m in self.models.values() if not m.in_use and m.ready and not m.busy]
        return sorted(idle, key=lambda model: model.used_at)

    @property
    def longest_idle(self) -> str | None:
        """The key of the model that nobody has used for longest, of those that are not given back anyway."""
        idle = [model for model in self.models.values() if not (model.in_use or model.unwanted)]
        return min(idle, key=lambda model: model.used_at).key if idle else None

    def _drop_idle(self, wanted: int, but: Model | None = None) -> None:
        """Give models back that nobody uses, until so many bytes are free."""
        for model in self._idle():
            if model is not but and self.budget - self.used < wanted:
                self._drop(model)

    def _drop(self, model: Model) -> None:
        del self.models[model.key]
        self.budget += self.going.pop(model.key, 0)
        for pool in (*model.pools, *model.old):
            self._pools.pop(pool.segment, None)  # one that could not be created is not there any more
            if pool.created:
                self._out.append(instructions.UnlinkPool(pool.segment))

    def _move(self, model: Model, pool: Pool, size: int, fresh: bool = False) -> None:
        """Begin a new generation of ``pool`` in ``size`` bytes, as near as that is possible."""
        if pool.next is None:
            layout = resized(model.manifest, pool.layers, size)
            pool.next = self._new_pool(model.manifest, pool.generation + 1, pool.layers, layout)
            pool.next.fresh = fresh
            self._pools[pool.next.segment] = (model, pool.next)

    def _offer(self, model: Model, session: Session) -> None:
        """Hand over the current generations that ``session`` does not have."""
        for pool in model.pools:
            if session.number not in pool.holders:
                pool.holders[session.number] = model.version
                self._out.append(instructions.Move(session.number, pool.info))

    def _sweep(self, model: Model) -> None:
        """Give back the older generations that nobody holds, reads into or copies from any more."""
        if not model.old:
            return
        wanted = {source.segment for pool in model.pools if pool.carried for source in pool.sources}
        for old in list(model.old):
            if not (old.holders or old.filling or old.copies_from or old.segment in wanted or old.queue):
                model.old.remove(old)
                del self._pools[old.segment]
                for pool in (*model.pools, *model.old):
                    if old in pool.sources:
                        pool.sources.remove(old)
                self._out.append(instructions.UnlinkPool(old.segment))
                self._memory_changed = True

    def _resize(self, model: Model, pool: Pool, size: int) -> None:
        """Begin another generation of ``pool`` if ``size`` bytes differ enough from what it has."""
        before, now = pool.layout.slots, resized(model.manifest, pool.layers, size).slots
        everything = now >= pool.layout.layers * pool.layout.experts
        pool.outdated = pool.next is not None and now != pool.next.layout.slots
        wanted = everything or 0 < memory.quota_change(pool) <= size - pool.layout.size
        grows = now >= before * GROWTH or (now > before and wanted)
        if now < before or grows:
            self._move(model, pool, size)
