"""What clients ask of a running daemon: another budget, warmth, pins, memory back, traces.

Each question is checked here and answered with a message; what it changes is the core's (``expertd.daemon.core``) and
the governor's.  What sessions say is not in here, nor who hears the answer: that is ``expertd.daemon.server``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from expertd.daemon.core import Core, events, warmth
from expertd.daemon.core.bases import Bases
from expertd.daemon.core.state import Model
from expertd.daemon.holders import Holders
from expertd.daemon.machine import Machine, default_budget, this_machine
from expertd.daemon.memory_watch import MemoryWatch
from expertd.daemon.policy import Block
from expertd.daemon.tracing import Tracing
from expertd.protocol import messages
from expertd.protocol.errors import BlocksInvalid, BudgetTooSmall, MessageInvalid, ModelInUse, ModelNotLoaded
from expertd.protocol.logs import Log
from expertd.protocol.model_names import shown_name
from expertd.protocol.routing import unpack
from expertd.protocol.sizes import show_size

log = Log("expertd.daemon")

TRACE_END_S = 20.0
"""So long sessions have to write what they recorded, before whoever ends it hears of the others."""


class Steering:
    """Owned by the daemon's loop."""

    def __init__(
        self,
        core: Core,
        memory: MemoryWatch,
        bases: Bases,
        holders: Holders,
        tracing: Tracing,
        *,
        feed: Callable[[events.Event], None],
        share_out: Callable[[], None],
        tell: Callable[[int, messages.Message], None],
        forget: Callable[[str], None],
        machine: Callable[[], Machine] = this_machine,
    ) -> None:
        """Nothing is asked yet.

        Args:
            feed: gives an event to the core, and has done what that says.
            share_out: gives the core what there is to divide, after the budget has changed.
            tell: sends a message to a session.
            forget: removes what is recorded of the model with that key.
            machine: tells the memory that there is.
        """
        self._core, self._memory, self._bases, self._holders, self._tracing = core, memory, bases, holders, tracing
        self._feed, self._share_out, self._tell, self._forget = feed, share_out, tell, forget
        self._machine = machine

    def answer(self, message: messages.Message) -> messages.Message:
        """Do what a client asks, and return what to say.

        Raises:
            ExpertdError: it cannot be done, and nothing has changed; each message in PROTOCOL.md names the errors.
            MessageInvalid: it is not for a daemon.
        """
        match message:
            case messages.SetBudget(budget=budget):
                return self._set_budget(budget)
            case messages.Unload(model=model):
                return self._unload(self._loaded(model))
            case messages.Warm(model=model, blocks=blocks):
                return self._warm(self._loaded(model), _blocks(blocks))
            case messages.Pin(model=model, blocks=blocks, pinned=pinned):
                return self._pin(self._loaded(model), _blocks(blocks), pinned)
            case messages.StartTrace(folder=folder):
                return self._start_trace(Path(folder))
            case _:
                raise MessageInvalid(f"a daemon takes no {type(message).__name__}")

    def _set_budget(self, wanted: int | None) -> messages.BudgetSet:
        needed, before = self._core.smallest_budget + self._bases.in_use, self._memory.governor.budget
        budget = self._spare() if wanted is None else wanted
        if budget < needed:
            raise BudgetTooSmall(
                f"the models in use need at least {needed} bytes ({show_size(needed)}); give that much, or end them"
            )
        log.info("budget changed", before=show_size(before), now=show_size(budget))
        self._memory.set_budget(budget, "the budget was changed")
        self._share_out()
        return messages.BudgetSet(before=before, budget=budget)

    def _spare(self) -> int:
        """Bytes that the machine can spare, in which what is held already is included."""
        own = self._core.used + self._bases.used + self._holders.before
        return default_budget(self._machine(), own).size

    def _loaded(self, name: str) -> Model:
        """The model with that key, folder, hub id, or name of a folder; of several the one that came last.

        There are several if somebody still uses a model whose files have been replaced.
        """
        models = [*reversed(self._core.models.values())]
        for named in _NAMES:
            for model in models:
                if named(model) == name:
                    return model
        loaded = ", ".join(shown_name(Path(model.manifest.folder)) for model in self._core.models.values()) or "none"
        raise ModelNotLoaded(f"the daemon holds nothing of {name[:200]!r}; what it holds: {loaded}")

    def _unload(self, model: Model) -> messages.Unloaded:
        folder = model.manifest.folder
        if model.in_use:
            users = ", ".join(map(str, dict.fromkeys(session.pid for session in model.sessions.values())))
            raise ModelInUse(
                f"{folder} is used by process {users}; end that, or close the model there (a program that has kept a "
                "weight or a result still uses it)"
            )
        size = model.size + model.extra + sum(base.size for base in self._bases.of_model(model.key))
        self._feed(events.Unwanted(model.key))
        self._forget(model.key)  # who wants it gone does not want it back by itself
        return messages.Unloaded(path=folder, bytes=size)

    def _warm(self, model: Model, blocks: tuple[Block, ...]) -> messages.Warming:
        if (problem := warmth.unknown(model, blocks)) is not None:
            raise BlocksInvalid(problem)
        self._feed(events.Warm(model.key, blocks))
        return messages.Warming(path=model.manifest.folder, blocks=warmth.wished(model))

    def _pin(self, model: Model, blocks: tuple[Block, ...], pinned: bool) -> messages.Pinned:
        problem = warmth.unknown(model, blocks) or (warmth.too_many_pins(model, blocks) if pinned else None)
        if problem is not None:
            raise BlocksInvalid(problem)
        self._feed(events.Pin(model.key, blocks, pinned))
        return messages.Pinned(path=model.manifest.folder, blocks=len(model.pinned))

    def _start_trace(self, folder: Path) -> messages.TraceStarted:
        self._tracing.start(folder)
        sessions = len(self._core.sessions)
        log.info("recording of routing began", folder=folder, sessions=sessions)
        for session in self._core.sessions:
            self.opened(session)
        return messages.TraceStarted(sessions=sessions)

    def opened(self, number: int) -> None:
        """A session is open: it is traced too, if any are."""
        session = self._core.sessions[number]
        folder = Path(self._core.models[session.model].manifest.folder)
        name = shown_name(folder).rpartition("/")[2]  # it becomes part of a file's name
        record = self._tracing.begin(number, session.pid, name)
        if record is not None:
            self._tell(number, record)

    async def stop_trace(self) -> messages.TraceStopped:
        """End all recording; returns when the sessions have written their files, or the time for that is over."""
        for record in self._tracing.stop():
            self._tell(record.session, record)
        deadline = time.monotonic() + TRACE_END_S
        while self._tracing.waiting and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        report = self._tracing.report()
        log.info("recording of routing ended", files=len(report.ended), unfinished=len(report.unfinished))
        return report


_NAMES: tuple[Callable[[Model], str], ...] = (
    lambda model: model.key,
    lambda model: model.manifest.folder,
    lambda model: shown_name(Path(model.manifest.folder)),
    lambda model: Path(model.manifest.folder).name,
)
"""What a model may be called, what says it exactly first."""


def _blocks(packed: bytes) -> tuple[Block, ...]:
    return tuple((layer, expert) for layer, experts in unpack(packed) for expert in experts)
