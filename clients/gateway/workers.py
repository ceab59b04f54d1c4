"""A model's worker: what it is sent and tells, and its process, which is started again when it has died.

One asyncio loop owns everything here.  When a process is started again, and after how long, is
``expertd.clients.gateway.supervision``; frames are ``expertd.clients.gateway.link``; which answer is sent when is
``expertd.clients.gateway.served``.  What a worker does is ``expertd.worker``, which is never imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from expertd.clients.gateway import awake
from expertd.clients.gateway.link import Link
from expertd.clients.gateway.supervision import Supervision
from expertd.clients.gateway.wanted import Wanted
from expertd.protocol.errors import (
    ExpertdError,
    MemoryPressure,
    MessageInvalid,
    QueueFull,
    RequestInvalid,
    RequestTooLarge,
    WorkerUnavailable,
    from_code,
)
from expertd.protocol.logs import Log
from expertd.protocol.messages import (
    FRAME_LIMIT,
    LONGEST_TEXT,
    Cancel,
    Delta,
    Finished,
    Generate,
    Message,
    Pressure,
    Refused,
    Shutdown,
    WorkerFailed,
    WorkerReady,
    decode,
    encode,
)
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home

__all__ = ["BEING_STOPPED", "SILENCE_S", "Event", "Worker"]

log = Log(__name__)

SILENCE_S = 300.0
"""A worker with work that says nothing for so long counts as hung: even a piece of a prompt does not take that long."""
LAST_WORDS_S = 1.0
"""How long to wait for messages of a process that has ended already."""
END_S = 30.0
"""How long a worker may take to end (one step of a long prompt) before it is killed."""
BEING_STOPPED = "the gateway is being stopped"
NORMAL = Pressure(level="normal", figure="")


Event = Delta | Finished | ExpertdError
Put = Callable[[Event], None]
"""Takes the next event of an answer; what is no Delta is its last."""


class Worker:
    """One model's worker, which is one process after the other and never two.

    Use ``start``, then ``ready``, then ``submit``; at the end ``end`` and ``stop``.  A model that cannot be loaded
    the first time is given up; after that every end of the process but ours is followed by a new start.
    """

    def __init__(
        self,
        home: Home,
        model: Path,
        *,
        number: int = 0,
        options: Sequence[str] = (),
        silence_s: float = SILENCE_S,
        on_ready: Callable[[WorkerReady], None] = lambda ready: None,
        on_failed: Callable[[ExpertdError], None] = lambda error: None,
    ) -> None:
        """Nothing is started yet.

        Args:
            number: tells this gateway's workers apart.
            options: of ``expertd worker``, beside those that this class gives.
            silence_s: how long a worker that was asked may say nothing.
            on_ready: called whenever a process takes requests.
            on_failed: called when one that was to take the place of another could not load the model either.
        """
        self._home = home
        self._model = model
        self._options = tuple(options)
        self._silence_s = silence_s
        self._told_ready, self._told_failed = on_ready, on_failed
        self._link = Link(home.gateway_socket(os.getpid(), number))
        self._supervision = Supervision()
        self._answers: dict[int, tuple[Wanted, Put]] = {}
        self._requests = 0
        self._process: asyncio.subprocess.Process | None = None
        self._spoken = asyncio.Event()  # Whether this process has told how its loading went.
        self._was_ready = False  # Whether this process has taken requests.
        self._peer: bytes | None = None  # Its address on the link, once it is ready and while it lives.
        self._cause: ExpertdError | None = None  # Why it ends, where its status does not tell.
        self._pressure = NORMAL
        self._silent_pieces = 0
        self._late_cancels: list[int] = []
        self._why_not = f"the worker is loading {shown_name(model)}; try again in a moment"
        self._ending = asyncio.Event()
        self._first: asyncio.Future[WorkerReady] = asyncio.get_running_loop().create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self._life: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind the socket and start the process."""
        _remove_dead_sockets(self._home)
        self._link.bind()
        self._tasks = [asyncio.create_task(self._link.listen(self._handle)), asyncio.create_task(self._mind_silence())]
        self._life = asyncio.create_task(self._supervise())

    async def ready(self) -> WorkerReady:
        """Wait until the model is loaded for the first time.

        Raises:
            ExpertdError: the worker's reason why it cannot be.
            WorkerUnavailable: the process ended without one.
        """
        return await asyncio.shield(self._first)

    def check(self) -> None:
        """Whether a request would be taken.

        Raises:
            WorkerUnavailable: it is loading, dead, or being stopped.
            MemoryPressure: the machine is critically short of memory.
        """
        if self._peer is None or self._ending.is_set():
            raise WorkerUnavailable(self._why_not)
        if self._pressure.level == "critical":
            raise MemoryPressure(
                f"the machine is short of memory: {self._pressure.figure}; close other apps or try again in a while"
            )

    @property
    def pressure(self) -> Pressure:
        """How short of memory the machine is, as the worker has passed it on; normal while there is no worker."""
        return self._pressure

    def retry_after_s(self) -> float:
        """After how many seconds a request that found no worker may find one."""
        return self._supervision.retry_after_s(_now())

    @property
    def is_loading(self) -> bool:
        """Whether the model is being loaded for the first time."""
        return not self._first.done()

    @property
    def takes_requests(self) -> bool:
        """Whether there is a process that has loaded the model."""
        return self._peer is not None

    def submit(self, wanted: Wanted, answer: int, put: Put) -> int:
        """Send the request for one answer of ``wanted``; return its number.  ``put`` gets all that comes of it.

        Raises:
            WorkerUnavailable: it is loading, or dead.
            QueueFull: the worker reads nothing.
            RequestInvalid: the request cannot be written as a message.
            RequestTooLarge: the message does not fit into a frame, or a text is too long.
        """
        self._requests += 1
        self._send(_frame(wanted.generate(self._requests, answer)))
        if not self._answers:
            self._silent_pieces = 0
        self._answers[self._requests] = wanted, put
        return self._requests

    def cancel(self, request: int) -> None:
        """Forget a request.  One that has ended is unknown, which is no error."""
        if self._answers.pop(request, None) is not None:
            self._cancel(request)

    def end(self) -> None:
        """From here on nothing is started; what runs goes on."""
        self._why_not = BEING_STOPPED
        self._ending.set()

    async def stop(self, timeout_s: float = END_S) -> None:
        """End the process, with a kill after ``timeout_s``; leave no socket behind."""
        self.end()
        self._ask_to_end()
        if self._life is not None:
            try:
                async with awake.timeout(timeout_s):
                    await asyncio.wait([self._life])
            except TimeoutError:
                log.warning("the worker did not end in %.0f s and is killed", timeout_s)
                self.kill()
            await self._life
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._first.done():
            self._first.cancel()
        elif not self._first.cancelled():
            self._first.exception()
        self._link.close()

    def kill(self) -> None:
        """End the process without asking, and for good."""
        self.end()
        self._kill()

    # -- requests ------------------------------------------------------------------------------------------------------

    def _send(self, frame: bytes) -> None:
        if self._peer is None:
            raise WorkerUnavailable(self._why_not)
        self._link.send(self._peer, frame)

    def _cancel(self, request: int) -> None:
        try:
            self._send(encode(Cancel(request=request)))
        except QueueFull:
            # It reads nothing now.  When it speaks again, it reads.
            self._late_cancels.append(request)
        except WorkerUnavailable as error:
            log.debug("request %d needs no cancelling: %s", request, error.message)

    def _handle(self, peer: bytes, message: Message) -> None:
        if isinstance(message, WorkerReady | WorkerFailed):
            if self._process is None or message.pid != self._process.pid:
                raise MessageInvalid(f"process {message.pid} is not the worker that this gateway started")
            if self._spoken.is_set():
                raise MessageInvalid("the worker told twice how its loading went")
            self._spoken.set()
            if isinstance(message, WorkerFailed):
                self._cause = from_code(message.code, message.message)
            else:
                self._on_ready(peer, message)
        elif peer != self._peer:
            raise MessageInvalid("a message came from somebody who is not the worker")
        elif isinstance(message, Delta | Finished | Refused):
            self._silent_pieces = 0
            # One that is unknown was cancelled a moment ago, and its Cancel is under way.
            take = self._answers.get if isinstance(message, Delta) else self._answers.pop
            if (asked := take(message.request, None)) is not None:
                wanted, put = asked
                put(wanted.renamed(_error(message)) if isinstance(message, Refused) else message)
            late, self._late_cancels = self._late_cancels, []
            for request in late:
                self._cancel(request)
        elif isinstance(message, Pressure):
            self._on_pressure(message)
        else:
            raise MessageInvalid(f"a gateway takes no {type(message).__name__}")

    def _on_pressure(self, told: Pressure) -> None:
        before, self._pressure = self._pressure, told
        if told.level == "critical":
            log.warning("no new requests are taken, because the machine is short of memory: %s", told.figure)
        elif before.level == "critical":
            log.warning("requests are taken again")

    def _fail_all(self, why: str) -> None:
        failed, self._answers = self._answers, {}
        for _, put in failed.values():
            put(WorkerUnavailable(why))

    # -- the process ---------------------------------------------------------------------------------------------------

    async def _supervise(self) -> None:
        """Keep a process alive until ``_ending``: the only place that starts one, and only when there is none."""
        while not self._ending.is_set():
            error = await self._live()
            if self._first.done() and not self._was_ready:
                self._told_failed(error)
            if not self._first.done():
                self._first.set_exception(error)
                return
            wait_s = self._supervision.died(_now())
            if self._ending.is_set():
                return
            if self._supervision.is_news(error.message):
                log.error("%s [%s]; the worker is being started again", error.message, error.code)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._ending.wait()

    async def _live(self) -> ExpertdError:
        """One process from its start to its end; return why it ended."""
        self._spoken.clear()
        self._was_ready = False
        self._cause = None
        self._supervision.started(_now())
        try:
            process = self._process = await self._start_process()
        except OSError as error:
            self._cause = WorkerUnavailable(f"the worker could not be started ({error.strerror})")
        else:
            if self._ending.is_set():
                self._ask_to_end()
            log.info("worker started", model=self._model.name, worker=process.pid)
            status = await process.wait()
            log.info("worker ended", model=self._model.name, worker=process.pid, status=status)
            if status >= 0 and not self._spoken.is_set():
                # Its last words may still be on their way.
                with contextlib.suppress(TimeoutError):
                    async with awake.timeout(LAST_WORDS_S):
                        await self._spoken.wait()
            self._cause = self._cause or WorkerUnavailable(self._how_it_ended(status))
        self._process = None
        self._lose(self._cause.message)
        return self._cause

    async def _start_process(self) -> asyncio.subprocess.Process:
        """In a process group of its own: Ctrl-C is the gateway's to handle."""
        command = [sys.executable, "-m", "expertd.clients.cli", "worker", str(self._model)]
        command += ["--gateway", self._link.address, "--parent", str(os.getpid())]
        command += self._options
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, "EXPERTD_HOME": str(self._home.root)},
            process_group=0,
        )

    def _how_it_ended(self, status: int) -> str:
        how = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
        when = "" if self._peer is not None else f" while it was loading {shown_name(self._model)}"
        return f"the worker {how}{when}"

    def _on_ready(self, peer: bytes, message: WorkerReady) -> None:
        self._peer = peer
        self._was_ready = True
        self._supervision.ready(_now())
        if not self._first.done():
            self._first.set_result(message)
        elif not self._ending.is_set():
            log.warning("the worker is ready again (process %d)", message.pid)
            self._told_ready(message)
            return
        log.info("worker ready", model=self._model.name, worker=message.pid)
        self._told_ready(message)

    def _lose(self, why: str) -> None:
        """There is no worker any more to send to or to hear from."""
        self._peer = None
        self._pressure = NORMAL
        self._late_cancels.clear()
        if not self._ending.is_set():
            self._why_not = f"{why}; the worker is being started again, try again in a moment"
        self._fail_all(self._why_not)

    async def _mind_silence(self) -> None:
        """Take a worker that was asked and says nothing for ``silence_s`` for hung, and kill it."""
        most, piece_s = awake.pieces(self._silence_s)
        while True:
            await asyncio.sleep(piece_s)
            self._silent_pieces = self._silent_pieces + 1 if self._peer is not None and self._answers else 0
            if self._silent_pieces >= most:
                self._cause = WorkerUnavailable(f"the worker said nothing for {self._silence_s:.0f} s and was killed")
                self._lose(self._cause.message)
                self._kill()

    def _ask_to_end(self) -> None:
        try:
            self._send(encode(Shutdown()))
        except ExpertdError:
            # It takes no messages: it is loading, or reads none.
            if self._process is not None and self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.terminate()

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _frame(message: Generate) -> bytes:
    """``message`` as the worker will take it: what it would drop, nobody would ever answer."""
    try:
        frame = encode(message)
        if len(frame) > FRAME_LIMIT:
            raise RequestTooLarge(f"the messages take {len(frame)} bytes, more than the {FRAME_LIMIT} that are allowed")
        decode(frame)
    except (OverflowError, RecursionError, TypeError, ValueError) as error:
        raise RequestInvalid(f"the request holds what cannot be passed on ({error})") from error
    except MessageInvalid as error:
        kind = RequestTooLarge if len(frame) > LONGEST_TEXT else RequestInvalid
        raise kind(f"the request holds what cannot be passed on ({error.message})") from error
    return frame


def _error(refused: Refused) -> ExpertdError:
    error = from_code(refused.code, refused.message)
    error.param = refused.param
    return error


def _remove_dead_sockets(home: Home) -> None:
    """Remove what gateways left that were killed: zmq binds over a dead file, but nobody else would ever remove it."""
    for path in home.run.glob("gateway-*.sock"):
        pid = path.stem.removeprefix("gateway-").partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except OSError:
            continue
