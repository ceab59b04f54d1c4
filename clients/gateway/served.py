"""The models that a gateway serves: each with its queue, and a worker while somebody uses it.

A model's worker is started by the first request and ended when nobody has asked for ``ttl_s``; requests wait meanwhile.
Who comes next is ``expertd.clients.gateway.fair``; the worker's process is ``expertd.clients.gateway.workers``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from expertd.clients.gateway import awake
from expertd.clients.gateway.fair import FairQueue
from expertd.clients.gateway.wanted import ANY_MODEL, Wanted
from expertd.clients.gateway.workers import BEING_STOPPED, NORMAL, SILENCE_S, Event, Worker
from expertd.protocol.errors import (
    DeadlineExceeded,
    ExpertdError,
    ModelNotFound,
    QueueFull,
    WorkerUnavailable,
    from_code,
)
from expertd.protocol.logs import Log
from expertd.protocol.messages import Delta, Finished, Pressure, WorkerReady
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home

__all__ = ["Answers", "Limits", "Models", "Served"]

log = Log(__name__)

MORE_THAN_RUN = 4
"""Answers that a worker gets beyond those that it computes at a time, so that it never waits for its gateway."""
QUEUE_WAIT_S = 300.0
RETRY_LOAD_S, LONGEST_RETRY_S = 5.0, 60.0
"""When a load that failed is tried again at the earliest: after the first in a row, and after many."""


Passing = Callable[[int, Delta | Finished], bool]
"""Takes an event of the answer at a place, or says that it cannot now."""


class Events:
    """What comes of a request, for one reader; less than an asyncio.Queue and a timeout, because each token is one."""

    def __init__(self) -> None:
        self._items: deque[tuple[int, Event | Exception]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._pass_on: Passing | None = None

    def put(self, place: int, event: Event) -> None:
        """The next one, of the answer at ``place``: for whoever waits for it to pass it on, or else to get it."""
        item: Event | Exception = event
        waits = self._waiter is not None and not self._waiter.done() and not self._items
        if waits and self._pass_on is not None and not isinstance(event, ExpertdError):
            try:
                if self._pass_on(place, event):
                    return
            except Exception as error:
                item = error  # It is the reader's, and not of whoever brought the event.
        self._items.append((place, item))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def empty(self) -> bool:
        return not self._items

    async def get(self, timeout_s: float, pass_on: Passing | None = None) -> tuple[int, Event | Exception] | None:
        """The next one that ``pass_on`` has not taken meanwhile (or failed with), or None if there is none for long."""
        if not self._items:
            loop = asyncio.get_running_loop()
            waiter = self._waiter = loop.create_future()
            timer = loop.call_later(max(0.0, timeout_s), _wake, waiter)
            self._pass_on = pass_on
            try:
                await waiter
            finally:
                timer.cancel()
                self._waiter = self._pass_on = None
        return self._items.popleft() if self._items else None


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds of a machine that is awake.

    Attributes:
        ttl_s: a worker that nobody has asked for so long is ended; None: never.
        deadline_s: a request that takes longer, its wait included, is ended; None: never.
        queue_wait_s: a request that waits longer for its turn is refused.
        silence_s: a worker that was asked and says nothing for so long is killed.
    """

    ttl_s: float | None = None
    deadline_s: float | None = None
    queue_wait_s: float = QUEUE_WAIT_S
    silence_s: float = SILENCE_S


class Answer:
    """One of the answers to a request: which, and its events on their way to whoever asked."""

    def __init__(self, wanted: Wanted, number: int, place: int, events: Events) -> None:
        self.wanted, self.number = wanted, number
        self.request: int | None = None
        """Its number at the worker that has it."""
        self.ended = False
        self._place, self._events = place, events

    def put(self, event: Event) -> None:
        """Hand over the next event.  What comes after the last one is not taken."""
        if self.ended:
            return
        self.ended = not isinstance(event, Delta)
        self._events.put(self._place, event)


class Answers:
    """The answers to one request, as they come.  Leaving its ``with`` block early cancels what still runs.

    Attributes:
        count: how many there are.
    """

    def __init__(self, served: Served, answers: Sequence[Answer], events: Events, limits: Limits) -> None:
        self._served, self._answers, self._events, self._limits = served, answers, events, limits
        self._opened_at = asyncio.get_running_loop().time()
        self._watcher: Callable[[int, Delta | Finished], None] | None = None
        self.count = len(answers)

    def watch(self, watcher: Callable[[int, Delta | Finished], None]) -> None:
        """Have ``watcher`` told of every event that is received, and the place of its answer."""
        self._watcher = watcher

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return all(answer.ended for answer in self._answers) and self._events.empty

    async def receive(self, timeout_s: float, pass_on: Passing | None = None) -> tuple[int, Delta | Finished] | None:
        """The next event and the place of its answer, or None after ``timeout_s``.

        Events that come while nothing else waits are offered to ``pass_on`` first; those that it takes are not
        returned.

        Raises:
            ExpertdError: what the worker refused the request with.
            WorkerUnavailable: the worker died, hung, or is being stopped.
            QueueFull, DeadlineExceeded: it has waited, or taken, too long.
        """
        left_s = self._left_s()
        passing = None if pass_on is None else partial(self._passed, pass_on)
        found = await self._events.get(min(timeout_s, left_s), passing)
        if found is None:
            if left_s <= timeout_s and self._left_s() <= 0:
                raise self._late()
            return None
        place, event = found
        if isinstance(event, Exception):
            raise event
        if self._watcher is not None:
            self._watcher(place, event)
        return place, event

    def _passed(self, pass_on: Passing, place: int, event: Delta | Finished) -> bool:
        """Whether ``pass_on`` takes an event, which the watcher is told of then."""
        if not pass_on(place, event):
            return False
        if self._watcher is not None:
            self._watcher(place, event)
        return True

    @property
    def _waits(self) -> bool:
        """Whether none of the answers has had its turn."""
        return all(answer.request is None for answer in self._answers)

    def _left_s(self) -> float:
        """The seconds until the request has taken too long."""
        deadline_s = float("inf") if self._limits.deadline_s is None else self._limits.deadline_s
        limit_s = min(deadline_s, self._limits.queue_wait_s) if self._waits else deadline_s
        return limit_s - (asyncio.get_running_loop().time() - self._opened_at)

    def _late(self) -> ExpertdError:
        """What a request that has taken too long is refused with."""
        wait_s, deadline_s = self._limits.queue_wait_s, self._limits.deadline_s
        if deadline_s is not None and not (self._waits and wait_s < deadline_s):
            return DeadlineExceeded(
                f"the answer took more than the {deadline_s:g} s that this gateway allows; ask for fewer tokens, or "
                "start it with a longer --deadline"
            )
        if self._served.state != "ready":
            return WorkerUnavailable(f"the model has not been loaded within {wait_s:g} s; try again in a while")
        return QueueFull(f"the request waited {wait_s:g} s for its turn; try again later")

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._served.release(self._answers)


class Served:
    """One model, its names, its queue, and its worker while it has one.

    Use ``start`` once; at the end ``drain`` and ``stop``.

    Attributes:
        name: its hub id, or else its folder's name; ``names`` are all that it is listed under.
        always: whether it is loaded before anybody asks, and stays.
    """

    def __init__(
        self,
        home: Home,
        model: Path,
        *,
        number: int = 0,
        aliases: Sequence[str] = (),
        options: Sequence[str] = (),
        always: bool = True,
        limits: Limits = Limits(),
    ) -> None:
        """Nothing is started.  ``number`` and ``options`` are the worker's."""
        self.name = shown_name(model.resolve())
        self.names = list(dict.fromkeys([self.name, *aliases]))
        self.paths = {str(model), str(model.resolve())}
        self.always = always
        self._home, self._model, self._number, self._options, self._limits = home, model, number, options, limits
        self._queue: FairQueue[Answer] = FairQueue()
        self._worker: Worker | None = None
        self._former: Worker | None = None  # It is being stopped.
        self._asked = asyncio.Event()  # Somebody waits, or runs.
        self._idle = asyncio.Event()  # Nobody does.
        self._idle.set()
        self._ending = False
        self._life: asyncio.Task[None] | None = None
        self._failures, self._retry_at = 0, 0.0  # Loads on demand that have failed in a row, and when one is worth it.
        self._failure: ExpertdError | None = None
        self._loaded: asyncio.Future[WorkerReady] = asyncio.get_running_loop().create_future()

    # -- its life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Have a worker whenever one is needed; from now on, if it is ``always``."""
        if self.always:
            self._asked.set()
        self._life = asyncio.create_task(self._live())

    async def loaded(self) -> WorkerReady:
        """Wait until the model is loaded for the first time.

        Raises:
            ExpertdError: why it cannot be.
        """
        return await asyncio.shield(self._loaded)

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; wait until those that there are have ended, and end the rest after ``timeout_s``."""
        self._ending = True
        if self._worker is None or not self._worker.takes_requests:
            self._fail_waiting(WorkerUnavailable(BEING_STOPPED))
        if self._worker is not None:
            self._worker.end()
        with contextlib.suppress(TimeoutError):
            async with awake.timeout(timeout_s):
                await self._idle.wait()
        for running in (False, True):
            self._fail(WorkerUnavailable(BEING_STOPPED), running=running)

    async def stop(self) -> None:
        """End the worker, and leave nothing behind."""
        self._ending = True
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
        for worker in (self._worker, self._former):
            if worker is not None:
                await worker.stop()
        self._worker = self._former = None
        if not self._loaded.done():
            self._loaded.cancel()
        elif not self._loaded.cancelled():
            self._loaded.exception()

    def kill(self) -> None:
        """End the worker without asking."""
        for worker in (self._worker, self._former):
            if worker is not None:
                worker.kill()
        self._fail_waiting(WorkerUnavailable(BEING_STOPPED))

    async def _live(self) -> None:
        """One worker after the other, each from the first who asks until nobody has for long."""
        while True:
            await self._asked.wait()
            if self._ending:
                return
            worker = self._worker = Worker(
                self._home, self._model, number=self._number, options=self._options,
                silence_s=self._limits.silence_s, on_ready=self._on_ready, on_failed=self._fail_waiting,
            )  # fmt: skip
            try:
                await _start(worker)
                ready = await worker.ready()
                if not self._loaded.done():
                    self._loaded.set_result(ready)
                self._failures = 0
                await self._nobody_asked()
                log.info("nobody asked for long", model=self.name, seconds=self._limits.ttl_s)
            except ExpertdError as error:
                awaited = self.always and not self._loaded.done()  # whoever waits for it tells it
                tell = log.info if awaited else log.error
                tell("%s was not loaded: %s [%s]", self.name, error.message, error.code)
                if not self._loaded.done():
                    self._loaded.set_exception(error)
                self._asked.clear()
                self._failures += 1
                self._failure = error
                self._retry_at = _now() + min(RETRY_LOAD_S * 2.0 ** min(self._failures - 1, 16), LONGEST_RETRY_S)
                self._fail_waiting(error)
            self._worker, self._former = None, worker
            await worker.stop()
            self._former = None

    async def _nobody_asked(self) -> None:
        """Wait until nobody has asked for ``ttl_s``."""
        while True:
            await self._idle.wait()
            self._asked.clear()
            try:
                if self.always or self._limits.ttl_s is None:
                    await self._asked.wait()
                else:
                    async with awake.timeout(self._limits.ttl_s):
                        await self._asked.wait()
            except TimeoutError:
                if self._idle.is_set():
                    return

    # -- what is asked of it -------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """``asleep``, ``loading``, ``ready``, or ``restarting`` where the worker has died."""
        if self._worker is None:
            return "asleep"
        if self._worker.is_loading:
            return "loading"
        return "ready" if self._worker.takes_requests else "restarting"

    @property
    def waiting(self) -> int:
        """Answers that wait for their turn."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Answers that the worker has."""
        return self._queue.running

    @property
    def pressure(self) -> Pressure:
        """How short of memory the machine is, as its worker has passed it on; normal while there is none."""
        return NORMAL if self._worker is None else self._worker.pressure

    def check(self) -> None:
        """Whether a request would be taken, which may then have to wait.

        Raises:
            WorkerUnavailable: its worker has died and is being started again, or the gateway is being stopped.
            MemoryPressure: the machine is critically short of memory.
            ExpertdError: why it could not be loaded a moment ago.
        """
        if self._ending:
            raise WorkerUnavailable(BEING_STOPPED)
        if self._worker is None and self._failure is not None and _now() < self._retry_at:
            raise from_code(self._failure.code, self._failure.message)
        if self._worker is not None and not self._worker.is_loading:
            self._worker.check()

    def check_ready(self) -> None:
        """Whether a request would be computed at once, or as soon as its model has been loaded for it.

        Raises:
            WorkerUnavailable, MemoryPressure: as ``check``; or it is one that is ``always`` there, and is loading.
        """
        self.check()
        if self.always and self._worker is not None:
            self._worker.check()

    def retry_after_s(self) -> float:
        """After how many seconds a request that found no worker may find one."""
        if self._worker is None:
            return max(RETRY_LOAD_S, self._retry_at - _now())
        return self._worker.retry_after_s()

    def open(self, client: str, *wanted: Wanted) -> Answers:
        """Queue a request of ``client``: all answers to the first prompt, then those to the next.

        Raises:
            WorkerUnavailable, MemoryPressure: see ``check``.
            QueueFull: too many wait already.
        """
        self.check()
        events = Events()
        answers: list[Answer] = []
        try:
            for one in wanted:
                for number in range(one.answers):
                    answer = Answer(one, number, len(answers), events)
                    self._queue.add(client, answer)
                    answers.append(answer)
            self._idle.clear()
            self._asked.set()
            self._advance()
        except BaseException:
            self.release(answers)
            raise
        return Answers(self, answers, events, self._limits)

    def release(self, answers: Sequence[Answer]) -> None:
        """Forget answers, and cancel those that still run."""
        for answer in answers:
            if answer.request is not None and not answer.ended and self._worker is not None:
                self._worker.cancel(answer.request)
            answer.ended = True
            self._queue.done(answer)
        self._advance()

    # -- the queue -----------------------------------------------------------------------------------------------------

    def _on_ready(self, ready: WorkerReady) -> None:
        self._queue.room = ready.at_once + MORE_THAN_RUN
        self._advance()

    def _advance(self) -> None:
        """Send what has its turn; note whether anybody is left."""
        while self._worker is not None and self._worker.takes_requests and (answer := self._queue.take()) is not None:
            try:
                answer.request = self._worker.submit(answer.wanted, answer.number, partial(self._take, answer))
            except Exception as error:
                # Whatever it is, it must not keep the answer's place for ever.
                if not isinstance(error, ExpertdError):
                    log.exception("a request could not be sent")
                self._queue.done(answer)
                answer.put(error if isinstance(error, ExpertdError) else ExpertdError("the gateway failed"))
        if not self._queue.waiting and not self._queue.running:
            self._idle.set()

    def _take(self, answer: Answer, event: Event) -> None:
        """Pass on what the worker tells of ``answer``, and let the next one have its turn."""
        answer.put(event)
        if answer.ended:
            self._queue.done(answer)
        elif isinstance(event, Delta) and event.tokens:
            self._queue.begun(answer)
        else:
            return
        if self._queue.waiting or not self._queue.running:
            self._advance()

    def _fail_waiting(self, error: ExpertdError) -> None:
        self._fail(error, running=False)

    def _fail(self, error: ExpertdError, *, running: bool) -> None:
        for answer in self._queue.drop(running=running):
            answer.put(error)
        self._advance()


async def _start(worker: Worker) -> None:
    """Start it.

    Raises:
        WorkerUnavailable: the machine lacks what it takes: a folder, a descriptor, room on the disk.
    """
    try:
        await worker.start()
    except Exception as error:
        log.exception("a worker could not be started")
        raise WorkerUnavailable(f"the worker could not be started ({error}); the log says more") from error


def _now() -> float:
    return asyncio.get_running_loop().time()


class Models:
    """All that a gateway serves, by name.

    Attributes:
        all: in the order in which they were named; a request that names none is the first one's.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self.all = tuple(served)
        self._by_name: dict[str, Served] = {}
        shorts = [one.name.rpartition("/")[2] for one in self.all]
        for one, short in zip(self.all, shorts, strict=True):
            if shorts.count(short) == 1:
                self._by_name[short] = one
            self._by_name.update(dict.fromkeys(one.paths, one))
        for one in self.all:
            self._by_name.update(dict.fromkeys(one.names, one))
        self._by_name[ANY_MODEL] = self.all[0]

    def find(self, name: str) -> Served:
        """The one that is called ``name``, or ``ANY_MODEL``.

        Raises:
            ModelNotFound: none is.
        """
        try:
            return self._by_name[name]
        except KeyError:
            served = " and ".join(f"'{one.name}'" for one in self.all)
            verb = "are" if len(self.all) > 1 else "is"
            raise ModelNotFound(f"the model '{name}' is not served here; {served} {verb}", param="model") from None
