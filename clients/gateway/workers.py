"""The gateway's worker: starts the process, talks to it, notices its end, and ends it.

One asyncio loop owns everything here.  A worker that died is not restarted; its requests fail with a clear error and
so do all later ones.  What a worker does is ``expertd.worker``, which is never imported here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path
from types import TracebackType

import zmq
import zmq.asyncio

from expertd.clients.gateway.chat import ChatRequest
from expertd.protocol.errors import (
    ExpertdError,
    MessageInvalid,
    QueueFull,
    RequestTooLarge,
    WorkerUnavailable,
    from_code,
)
from expertd.protocol.messages import (
    FRAME_LIMIT,
    Cancel,
    Delta,
    Finished,
    Generate,
    Message,
    Refused,
    Shutdown,
    WorkerFailed,
    WorkerReady,
    decode,
    encode,
)
from expertd.protocol.paths import Home

__all__ = ["Answer", "Worker"]

log = logging.getLogger(__name__)

QUEUE_LIMIT = 64
SILENCE_S = 300.0
"""A worker with work that says nothing for so long counts as hung: even a piece of a prompt does not take that long."""
LAST_WORDS_S = 1.0
"""How long to wait for messages of a process that has ended already."""
END_S = 30.0
"""How long a worker may take to end (one step of a long prompt) before it is killed."""


class Answer:
    """One request's events.  Leaving its ``with`` block before the end cancels the request in the worker."""

    def __init__(self, worker: Worker, request: int) -> None:
        self._worker = worker
        self._events: asyncio.Queue[Delta | Finished | ExpertdError] = asyncio.Queue()
        self.request = request
        self.begun = False
        """Whether the worker has said anything about it."""
        self.ended = False
        self.since = asyncio.get_running_loop().time()

    async def receive(self, timeout_s: float) -> Delta | Finished | None:
        """The next event, or None after ``timeout_s``.

        Raises:
            ExpertdError: what the worker refused the request with.
            WorkerUnavailable: the worker died, hangs, or is being stopped.
        """
        try:
            async with asyncio.timeout(timeout_s):
                event = await self._events.get()
        except TimeoutError:
            silent_s = self._worker.silent_s(self.since)
            if silent_s < SILENCE_S:
                return None
            raise WorkerUnavailable(
                f"the worker has not answered for {silent_s:.0f} s; restart expertd serve"
            ) from None
        if isinstance(event, ExpertdError):
            raise event
        return event

    def put(self, event: Delta | Finished | ExpertdError) -> None:
        """For the worker's owner: hand over the next event."""
        self.begun = True
        self.ended = self.ended or not isinstance(event, Delta)
        self._events.put_nowait(event)

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.release(self)


class Worker:
    """One worker process and its requests.  Use ``start``, then ``ready``, then ``open``; at the end ``stop``."""

    def __init__(self, home: Home, model: Path, *, budget: str | None = None, queue_limit: int = QUEUE_LIMIT) -> None:
        self._home = home
        self._model = model
        self._budget = budget
        self._queue_limit = queue_limit
        self._path = home.gateway_socket(os.getpid())
        self._zmq = zmq.asyncio.Context()
        self._socket = self._zmq.socket(zmq.ROUTER)
        self._peer: bytes | None = None  # The worker's address on the socket, while it lives.
        self._taking = False
        self._answers: dict[int, Answer] = {}
        self._requests = 0
        self._dropped = 0
        self._heard = 0.0
        self._process: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._outcome: asyncio.Future[WorkerReady] = asyncio.get_running_loop().create_future()
        self._why_not = f"the worker is loading {model.name}; try again in a moment"

    async def start(self) -> None:
        """Bind the socket and start the process, in a process group of its own: Ctrl-C is the gateway's to handle."""
        _remove_dead_sockets(self._home)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(f"ipc://{self._path}")
        command = [sys.executable, "-m", "expertd.clients.cli", "worker", str(self._model)]
        command += ["--gateway", f"ipc://{self._path}", "--parent", str(os.getpid())]
        if self._budget is not None:
            command += ["--budget", self._budget]
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, "EXPERTD_HOME": str(self._home.root)},
            process_group=0,
        )
        self._tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._watch(self._process))]

    async def ready(self) -> WorkerReady:
        """Wait until the model is loaded.

        Raises:
            ExpertdError: the worker's reason why it cannot be.
            WorkerUnavailable: the process ended without one.
        """
        return await asyncio.shield(self._outcome)

    def check(self) -> None:
        """Whether a request would be taken.

        Raises:
            WorkerUnavailable: it is loading, dead, hanging, or being stopped.
        """
        if not self._taking:
            raise WorkerUnavailable(self._why_not)
        oldest = min((answer.since for answer in self._answers.values()), default=None)
        if oldest is not None and (silent_s := self.silent_s(oldest)) >= SILENCE_S:
            raise WorkerUnavailable(f"the worker has not answered for {silent_s:.0f} s; restart expertd serve")

    def silent_s(self, since: float) -> float:
        """Seconds since the worker said anything, or since ``since`` (on the loop's clock) if that is later."""
        return asyncio.get_running_loop().time() - max(self._heard, since)

    def open(self, chat: ChatRequest) -> Answer:
        """Send a request to the worker.

        Raises:
            WorkerUnavailable: see ``check``.
            QueueFull: ``queue_limit`` requests wait already.
            RequestTooLarge: the messages do not fit into a frame.
        """
        self.check()
        waiting = sum(not answer.begun for answer in self._answers.values())
        if waiting >= self._queue_limit:
            raise QueueFull(f"{waiting} requests wait already, which is the limit; try again later")
        self._requests += 1
        frame = encode(
            Generate(
                request=self._requests,
                messages=chat.messages,
                max_tokens=chat.max_tokens,
                temperature=chat.temperature,
                top_p=chat.top_p,
                stop=chat.stop,
            )
        )
        if len(frame) > FRAME_LIMIT:
            raise RequestTooLarge(f"the messages take {len(frame)} bytes, more than the {FRAME_LIMIT} that are allowed")
        answer = Answer(self, self._requests)
        self._answers[answer.request] = answer
        try:
            self._send(frame)
        except WorkerUnavailable:
            del self._answers[answer.request]
            raise
        return answer

    def release(self, answer: Answer) -> None:
        """Forget a request, and cancel it where it still runs."""
        self._answers.pop(answer.request, None)
        if not answer.ended:
            with contextlib.suppress(WorkerUnavailable):
                self._send(encode(Cancel(request=answer.request)))

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests; wait until those that run have ended, and end the rest after ``timeout_s``."""
        self._refuse("the gateway is being stopped")
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._answers and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self._fail_all(WorkerUnavailable("the gateway is being stopped"))

    async def stop(self, timeout_s: float = END_S) -> None:
        """End the process, with a kill after ``timeout_s``; leave no socket behind."""
        process = self._process
        if process is not None and process.returncode is None:
            try:
                self._send(encode(Shutdown()))
            except WorkerUnavailable:
                # It is still loading, and takes no messages yet.
                process.terminate()
            try:
                async with asyncio.timeout(timeout_s):
                    await process.wait()
            except TimeoutError:
                log.warning("the worker (process %d) did not end in %.0f s and is killed", process.pid, timeout_s)
                self.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._outcome.done():
            self._outcome.cancel()
        elif not self._outcome.cancelled():
            self._outcome.exception()
        self._socket.close(linger=0)
        self._zmq.term()
        self._path.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the process without asking."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _refuse(self, why_not: str) -> None:
        self._taking = False
        self._why_not = why_not

    def _fail_all(self, error: ExpertdError) -> None:
        for answer in self._answers.values():
            answer.put(error)

    def _send(self, frame: bytes) -> None:
        if self._peer is None:
            raise WorkerUnavailable(self._why_not)
        # With no limit on what may wait in the socket a send never blocks: its future is done at once.
        sent = asyncio.ensure_future(self._socket.send_multipart([self._peer, frame], flags=zmq.NOBLOCK))
        if (error := sent.exception()) is not None:
            raise WorkerUnavailable("the worker is gone; restart expertd serve") from error

    async def _listen(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                if len(frames) != 2:
                    raise MessageInvalid(f"a message of {len(frames)} frames came where two were expected")
                self._handle(frames[0], decode(frames[1]))
            except MessageInvalid as error:
                self._dropped += 1
                log.warning("dropped frame %d: %s", self._dropped, error.message)

    def _handle(self, peer: bytes, message: Message) -> None:
        assert self._process is not None
        if isinstance(message, WorkerReady | WorkerFailed):
            if message.pid != self._process.pid:
                raise MessageInvalid(f"process {message.pid} is not the worker that this gateway started")
            if self._outcome.done():
                raise MessageInvalid("the worker told twice how its loading went")
            self._peer = peer
            if isinstance(message, WorkerReady):
                self._taking = True
                self._outcome.set_result(message)
            else:
                self._why_not = message.message
                self._outcome.set_exception(from_code(message.code, message.message))
        elif peer != self._peer:
            raise MessageInvalid("a message came from somebody who is not the worker")
        elif isinstance(message, Delta | Finished | Refused):
            self._heard = asyncio.get_running_loop().time()
            # One that is unknown was released a moment ago, and its Cancel is under way.
            if (answer := self._answers.get(message.request)) is not None and not answer.ended:
                answer.put(_error(message) if isinstance(message, Refused) else message)
        else:
            raise MessageInvalid(f"a gateway takes no {type(message).__name__}")

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        if not self._outcome.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS_S):
                    await asyncio.wait([self._outcome])
        how = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
        if not self._outcome.done():
            self._outcome.set_exception(WorkerUnavailable(f"the worker {how} while it was loading {self._model.name}"))
        if self._taking:
            log.error("the worker (process %d) %s; restart expertd serve", process.pid, how)
        self._peer = None
        self._refuse(f"the worker {how}; restart expertd serve")
        self._fail_all(WorkerUnavailable(self._why_not))


def _error(refused: Refused) -> ExpertdError:
    error = from_code(refused.code, refused.message)
    error.param = refused.param
    return error


def _remove_dead_sockets(home: Home) -> None:
    """Remove what gateways left that were killed: zmq binds over a dead file, but nobody else would ever remove it."""
    for path in home.run.glob("gateway-*.sock"):
        pid = path.stem.removeprefix("gateway-")
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except OSError:
            continue
