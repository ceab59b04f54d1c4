"""The layer that stands in for SwitchGLU / SwitchMLP: look blocks up, fetch what is absent, compute on the slabs.

The model's own switch module does the arithmetic, unchanged; its tensors are the pool's slabs, and the router's expert
ids are mapped to slots before it sees them (it sorts by the ids that it is given).

What makes reclaim safe is here too: the output of each event is remembered and evaluated before the next lookup, fetch
or ack and before the forward returns.  So whatever a session acks, no unevaluated graph reads a pool, in any model and
whatever its caller does with its logits and caches.  Only complete pools are computed from lazily: nothing is ever
evicted from them.
"""

from __future__ import annotations

import logging
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from mmap import mmap
from pathlib import Path
from threading import get_ident
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import ExpertdError, PoolMoved, SessionClosed
from expertd.protocol.layout import ABSENT, PoolLayout
from expertd.protocol.pace import Pace, write_pace
from expertd.worker.alias import CopiedSlabs, Holdings, Slabs
from expertd.worker.attach import Session
from expertd.worker.groups import plan_groups
from expertd.worker.link import MappedPool
from expertd.worker.pace import PaceMeter
from expertd.worker.pressure import Buffers
from expertd.worker.recording import Recorder
from expertd.worker.routers import Foresight

log = logging.getLogger("expertd.worker")

FEW = 128
"""Up to so many ids are looked up one by one.  With cold caches, as they are after each layer, that takes half the time
of NumPy's shortest way, because it touches less code; for long prompts NumPy is faster."""

LOG_AFTER_CALLS = 2
"""The routing of complete layers is read so many calls later, when it has long been computed."""


class Events:
    """What the layers of one model share while it runs: the session, the last event's output, and the lazy log.

    Used under the session's forward lock only.  The model and its layers hold it and it holds none of them, so it ends
    with the last of them, wherever that is, without waiting for the garbage collector.
    """

    def __init__(
        self, session: Session, make_slabs: Callable[[mmap, PoolLayout], Slabs], holdings: Holdings
    ) -> None:
        self.session = session
        self.make_slabs = make_slabs
        self.buffers = Buffers(session.pressure)
        self.slabs = holdings.slabs  # all that are mapped: always the same list
        self.base_paths: tuple[str, ...] = ()  # of the parameters that are shared
        self.of_layer: weakref.WeakValueDictionary[int, _Parts] = weakref.WeakValueDictionary()
        self.unevaluated: Any = None  # or still being computed
        self.recorder: Recorder | None = None
        self.pace = PaceMeter()
        self.complete = False  # all layers compute without looking
        self.model: weakref.ref[Any] | None = None
        # The daemon's wish to have this model's traffic recorded that was seen to last, and the recorder that does it.
        self._wanted: tuple[int, str | None] = (0, None)
        self._live: Recorder | None = None
        self._news = 0
        self._calls = 0
        self._left: list[tuple[int, Slabs]] = []
        self._lazy: list[list[tuple[int, Any]]] = [[]]

    @property
    def layers(self) -> list[_Parts]:
        """Those that there are."""
        return list(self.of_layer.values())

    def let_go(self) -> None:
        """The session is closed: forget what was to be logged, whose graphs read the slabs, and the layers."""
        self._lazy, self.unevaluated = [[]], None
        self._left.clear()
        self.of_layer.clear()

    def settle(self) -> None:
        """Evaluate the last event's output: after this no graph reads a partial pool."""
        if self.unevaluated is not None:
            mx.eval(self.unevaluated)
            self.unevaluated = None

    def begin_call(self) -> None:
        """A forward starts: take news in, and read what routers chose some calls ago."""
        self.buffers.relieve()
        if self.recorder is not None:
            self.recorder.collect_many(LOG_AFTER_CALLS - 1)
            if self.recorder.failed and self.recorder is self._live:
                self.stop_recording()  # the daemon is to hear of it now
        self.take_news()
        self._calls += 1
        if self._left:
            self._let_left_go(LOG_AFTER_CALLS)
        self._lazy.append([])
        if len(self._lazy) > LOG_AFTER_CALLS:
            for layer, indices in self._lazy.pop(0):
                self.session.routing.append((layer, np.unique(np.array(indices, copy=False)).tolist()))

    def take_news(self) -> None:
        """Between two events: adopt new generations of pools, and let layers of complete ones compute without looking.

        Noted last, so that an interrupt makes it happen again.
        """
        news = self.session.news
        if self._news != news:
            offered = self.session.offered()
            if offered:
                self._adopt(offered)
            for parts in self.layers:
                parts.become_complete()
            self.complete = all(parts.complete for parts in self.layers)
            if self.session.to_record != self._wanted:
                self._wanted = self.session.to_record
                self._record(self._wanted[1])
            self._news = news

    def while_idle(self) -> None:
        """No forward runs: take news in, and give back what has been left."""
        if self.recorder is not None:
            self.recorder.collect(0)
        self.take_news()
        if self._left:
            self._let_left_go(0)
        self._keep_pace()

    def closing(self) -> None:
        """The session is about to be closed."""
        self.stop_recording()
        self._keep_pace()

    def measure_call(self, single: bool) -> None:
        """A call of the model begins, of a single token or of more."""
        session = self.session
        self.pace.begin(single, self.complete, time.monotonic(), session.waited_s, session.fetches)

    def _keep_pace(self) -> None:
        if self.pace.news():
            manifest = self.session.manifest
            partial_us, fetch_us = self.pace.partial_us()
            write_pace(
                self.session.home,
                Pace(
                    folder=manifest.folder,
                    files=manifest.files,
                    complete_us=round(self.pace.complete_us(), 1),
                    partial_us=round(partial_us, 1),
                    fetch_us=round(fetch_us, 1),
                ),
            )

    def _record(self, wanted: str | None) -> None:
        """Begin or end to record this model's traffic, as the daemon wants."""
        if self._live is not None:
            self.stop_recording()
        model = self.model() if self.model is not None else None
        if wanted is None or model is None:
            return
        if self.recorder is not None:
            self.session.recorded(wanted, 0, f"the process records the model itself, in {self.recorder.path}")
            return
        try:
            self.recorder = self._live = Recorder(Path(wanted), model, self.session.manifest)
        except ExpertdError as error:
            self.session.recorded(wanted, 0, error.message)

    def stop_recording(self) -> None:
        """End the recording of this model, if there is one."""
        recorder, live = self.recorder, self._live
        self.recorder = self._live = None
        if recorder is None:
            return
        try:
            tokens, problem = recorder.finish().tokens, ""
        except ExpertdError as error:
            log.error("%s", error.message)
            tokens, problem = recorder.tokens, error.message
        if recorder is live:
            self.session.recorded(str(recorder.path), tokens, problem)

    def follow(self) -> None:
        """A layer's pool has moved, or the daemon is gone: wait for what comes in its place, and adopt it."""
        self.session.follow(self._news)
        self.take_news()

    def _adopt(self, offered: list[MappedPool]) -> None:
        for pool in offered:
            slabs = self.make_slabs(pool.mapping, pool.layout)
            self.slabs.append(slabs)
            for parts in self.layers:
                if parts.layer in pool.layers:
                    parts.move_to(pool, slabs)
        self.session.adopted(offered)
        known: list[Slabs] = [parts.slabs for parts in self.layers] + [slabs for _, slabs in self._left]
        self._left += [(self._calls, slabs) for slabs in self.slabs if slabs not in known]

    def _let_left_go(self, calls: int) -> None:
        """Unmap what was left at least so many forwards ago: lazy graphs over complete pools may have read it since."""
        if calls == 0:
            self._lazy = [[]]  # their graphs read the slabs; what they would log is lost
        for left in list(self._left):
            if self._calls - left[0] >= calls and left[1].let_go():
                self._left.remove(left)
                self.slabs.remove(left[1])

    def log_lazily(self, layer: int, indices: Any) -> None:
        """Log the choice of a complete layer without evaluating it now."""
        self._lazy[-1].append((layer, indices))


class CachedExperts(nn.Module):  # type: ignore[misc]
    """Called as the switch it replaces: ``(x[..., hidden], indices[..., k]) -> [..., k, hidden]``."""

    def __init__(
        self,
        events: Events,
        layer: int,
        switch: Any,
        pool: MappedPool,
        slabs: Slabs,
        foresight: Foresight | None = None,
        *,
        last: bool,
    ) -> None:
        """``layer`` counts the model's MoE layers in forward order; ``last`` is true for the last of them.

        ``foresight`` guesses what the layer's router will choose; None: nobody does.
        """
        super().__init__()
        # Kept outside the module's tree: the slabs are no parameters of this model, they belong to everybody.
        self._parts: _Parts | None = _Parts(events, layer, switch, pool, slabs, foresight, last)
        events.of_layer[layer] = self._parts

    def __call__(self, x: Any, indices: Any) -> Any:
        parts = self._parts
        if parts is None:
            raise SessionClosed("the model was closed; load it again")
        if parts.events.session.owner != get_ident():
            return parts.lone_event(x, indices)
        if parts.events.recorder is not None:
            parts.events.recorder.note(parts.layer, indices)
        if not parts.complete:
            return parts.event(x, indices)
        if not (parts.last and indices.shape[-2] > 1):
            # In a prompt's chunks mlx-lm never evaluates the last layer, so its choice must not be asked for.
            parts.events.log_lazily(parts.layer, indices)
        return parts.switch(x, indices)

    def let_go(self) -> None:
        """Forget pool and slabs: the session is closed."""
        self._parts = None


Guess = tuple["_Parts", Any]
"""A layer to come, and the ids that its router may choose, ``[..., k]``."""


class _Parts:
    """The state of one CachedExperts, and its event in a partially resident pool."""

    def __init__(
        self,
        events: Events,
        layer: int,
        switch: Any,
        pool: MappedPool,
        slabs: Slabs,
        foresight: Foresight | None,
        last: bool,
    ) -> None:
        self.events = events
        self.layer = layer
        self.switch = switch
        self.foresight = foresight
        self.last = last
        # The mapped slots of an event are written into one array of this layer: by the next event the graph that read
        # it has been evaluated.
        self._shape: tuple[int, ...] | None = None
        self._slots: Any = None
        self._slots_here: NDArray[np.uint32] = np.empty(0, np.uint32)
        self._few: struct.Struct | None = None
        self.move_to(pool, slabs)

    def move_to(self, pool: MappedPool, slabs: Slabs) -> None:
        """From now on look up and compute in ``pool``; between two events only."""
        self.complete = False
        self.slabs = slabs
        self._pool = pool
        self._copies = isinstance(slabs, CopiedSlabs)
        self._row = pool.table[pool.layers.index(self.layer)]
        self._slot_of = self._row.data.__getitem__
        place_slabs(self.switch, slabs.arrays)

    def become_complete(self) -> None:
        """Go over to computing without looking, if the pool is complete; between two forwards only.

        There every block has its natural place, so this layer's rows of the slabs are its experts in order, and the
        switch computes what plain mlx-lm would: same ids, same shapes, same kernels.
        """
        if self.complete or not self._pool.complete:
            return
        experts = self._row.size
        start = self._pool.layers.index(self.layer) * experts
        self.slabs.bring(self.layer, np.arange(experts), np.arange(start, start + experts))
        place_slabs(self.switch, {name: slab[start : start + experts] for name, slab in self.slabs.arrays.items()})
        self.complete = True

    def lone_event(self, x: Any, indices: Any) -> Any:
        """An event of somebody who calls a layer or an inner module and not the model: a forward of its own."""
        session = self.events.session
        session.begin()
        settled = False
        try:
            self.events.take_news()
            out = self.switch(x, indices) if self.complete else self.event(x, indices)
            self.events.settle()
            settled = True
        finally:
            session.end(settled)
        return out

    def event(self, x: Any, indices: Any) -> Any:
        """One event of a partial pool: evaluate the router, look up, fetch what is absent, compute."""
        events, session = self.events, self.events.session
        many = indices.size > FEW
        guesses = self._guess(x, many) if session.announces >= (0 if many else 1) else []
        mx.eval(events.unevaluated, indices, [guess for _, guess in guesses])
        events.unevaluated = None
        if session.asked != session.acked:
            session.ack()
        chosen = memoryview(indices)
        if chosen.shape != self._shape:
            self._take_shape(chosen)
        if self._few is not None and not session.leases_only:
            ids = self._few.unpack(chosen.tobytes())
            slots = [*map(self._slot_of, ids)]
            if ABSENT not in slots:
                self._few.pack_into(self._slots_here.data, 0, *slots)
                session.routing.append((self.layer, ids))
                if self._copies:
                    self.slabs.bring(self.layer, np.asarray(chosen), self._slots_here)
                out = self._compute(x)
                self._announce(self._missing(guesses), many)
                return out
        while True:
            try:
                return self._event_of_many(x, indices, np.asarray(chosen), guesses)
            except PoolMoved:
                events.follow()
                if self.complete:
                    return self.switch(x, indices)

    def _take_shape(self, chosen: memoryview) -> None:
        """Make ready for events of the shape of ``chosen``, a router's ids."""
        # As uint32, which gather_qmm takes without converting.
        self._slots = mx.zeros(chosen.shape or (), mx.uint32)
        mx.eval(self._slots)
        self._slots_here = np.array(self._slots, copy=False)
        count = self._slots_here.size
        self._few = struct.Struct(f"={count}I") if count <= FEW and chosen.itemsize == 4 else None
        self._shape = chosen.shape

    def _event_of_many(self, x: Any, indices: Any, ids: NDArray[np.integer], guesses: list[Guess]) -> Any:
        """The rest of an event with misses, or with many ids."""
        session, many = self.events.session, indices.size > FEW
        wanted = np.unique(ids)
        slot_of = self._row.copy()  # read once: the daemon may evict at any moment
        resident = slot_of[wanted] != ABSENT
        missing = self._missing(guesses)
        overlap = many and session.announces >= 0 and bool(missing or not resident.all())
        if resident.all() and not overlap and not session.leases_only:
            session.routing.append((self.layer, wanted.tolist()))
        else:
            groups = plan_groups(wanted, resident, self._pool.layout.slots, overlap)
            if len(groups) > 1:
                return self._in_groups(x, indices, ids, groups, overlap, missing)
            slot_of = self._fetch(wanted, (), overlap)
        slot_of.view(np.uint32).take(ids, out=self._slots_here, mode="clip")
        if self._copies:
            self.slabs.bring(self.layer, ids, self._slots_here)
        out = self._compute(x)
        self._announce(missing, many)
        return out

    def _guess(self, x: Any, many: bool) -> list[Guess]:
        """What the next layers will use, by their own routers on what goes into this one; nothing is evaluated."""
        guesses = []
        for distance in range(1, 2 if many else self.events.session.announces + 1):
            parts = self.events.of_layer.get(self.layer + distance)
            if parts is None or parts.foresight is None or parts.complete or ABSENT not in parts._row:
                continue
            if not parts.foresight.takes(x):
                parts.foresight = None
                continue
            guesses.append((parts, parts.foresight(x)))
        return guesses

    def _missing(self, guesses: list[Guess]) -> list[tuple[_Parts, list[int]]]:
        """What is absent of what was guessed, and evaluated: of each layer, if there is any, the likeliest first."""
        missing = []
        for parts, guess in guesses:
            experts, uses = np.unique(np.array(guess, copy=False), return_counts=True)
            experts = experts[np.argsort(-uses, kind="stable")]
            absent = experts[parts._row[experts] == ABSENT].tolist()
            if absent:
                missing.append((parts, absent))
        return missing

    def _announce(self, missing: list[tuple[_Parts, list[int]]], many: bool) -> None:
        """Tell the daemon what later events may miss."""
        for parts, absent in missing:
            self.events.session.announce(parts._pool, parts.layer, absent, parts.layer - self.layer, many)

    def _compute(self, x: Any) -> Any:
        """The output of an event whose slots are in their array, already being computed.

        It has to be computed before the next event can look up.  Begun here, it is computed while Python builds the
        graph of what follows, which takes longer than the looking up (``benchmarks hitpath``).
        """
        self.events.unevaluated = out = self.switch(x, self._slots)  # noted first: an interrupt may come any time
        mx.async_eval(out)  # type: ignore[no-untyped-call]
        return out

    def _fetch(self, wanted: NDArray[np.integer], then: Sequence[int], leases_only: bool) -> NDArray[np.int32]:
        """Fetch ``wanted`` and return ``slot[expert]`` (absent for the others)."""
        slot_of = np.full(self._row.size, ABSENT, np.int32)
        slot_of[wanted] = self.events.session.fetch(self._pool, self.layer, wanted, then, leases_only)
        return slot_of

    def _in_groups(
        self,
        x: Any,
        indices: Any,
        ids: NDArray[np.integer],
        groups: list[NDArray[np.integer]],
        overlap: bool,
        missing: list[tuple[_Parts, list[int]]],
    ) -> Any:
        """An event whose blocks are computed group after group; ``overlap``: the next are read meanwhile.

        Each group computes its own (token, k) rows, which are put in their places at the end.  Rows are independent of
        each other in every kernel, so this is bit-equal to computing them together; adding up partial sums is not.
        """
        flat = ids.ravel()
        group_of = np.empty(self._row.size, np.int64)
        for number, group in enumerate(groups):
            group_of[group] = number
        group_of_row = group_of[flat]
        tokens = mx.broadcast_to(x, (*indices.shape[:-1], x.shape[-1])).reshape(-1, x.shape[-1])
        rows, outs = [], []
        for number, group in enumerate(groups):
            mine = np.flatnonzero(group_of_row == number)
            then = [expert for later in groups[number + 1 :] for expert in later.tolist()] if overlap else []
            slot_of = self._fetch(group, then, overlap)
            slots = slot_of[flat[mine]].view(np.uint32)
            self.slabs.bring(self.layer, flat[mine], slots)
            out = self.switch(tokens[mx.array(mine // ids.shape[-1])], mx.array(slots[:, None]))
            self.events.unevaluated = out  # noted first: an interrupt may come any time
            if number == 0:
                mx.async_eval(out)  # type: ignore[no-untyped-call]
                self._announce(missing, many=True)
            self.events.settle()  # the next fetch gives these slots away
            rows.append(mine)
            outs.append(out)
        place = np.argsort(np.concatenate(rows))
        together = mx.concatenate(outs)[mx.array(place)]
        return together.reshape(*indices.shape, together.shape[-1])


def place_slabs(switch: Any, arrays: dict[str, Any]) -> None:
    """Make ``arrays`` the tensors of ``switch`` (part names are paths below it)."""
    mx.eval(arrays)
    for name, array in arrays.items():
        *path, last = name.split(".")
        module = switch
        for step in path:
            module = getattr(module, step)
        setattr(module, last, array)
