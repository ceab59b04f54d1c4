"""The worker process: one model, one engine, one socket to the gateway that started it.

Loads the model, says that it is ready or why not, then turns messages into calls of ``expertd.worker.engine`` and its
events into messages.  It ends on Shutdown, on SIGTERM, and when the process that started it is gone.  It does not
restart anything, and it knows nothing of HTTP: see ``expertd.clients.gateway``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import zmq

from expertd.protocol.errors import ExpertdError, MessageInvalid
from expertd.protocol.messages import (
    Cancel,
    Generate,
    Message,
    Shutdown,
    WorkerFailed,
    WorkerReady,
    decode,
    encode,
)

if TYPE_CHECKING:
    from expertd.worker.engine import Engine
    from expertd.worker.load import Alias

__all__ = ["run"]

log = logging.getLogger(__name__)

LOOK_ROUND_MS = 1000
"""How often an idle worker looks whether its gateway lives and whether it was told to end."""
LINGER_MS = 2000
"""How long a worker that ends waits for its last words to leave."""


def run(
    model_path: str | Path,
    gateway: str,
    *,
    budget: str | None = None,
    alias: Alias = "auto",
    parent: int | None = None,
) -> int:
    """Work for the gateway at the ZeroMQ address ``gateway`` until told to end; return the exit status.

    Args:
        budget: for a daemon that has to be started, as ``2GiB``.
        alias: how shared pages become arrays, as in ``expertd.load``.
        parent: process whose end ends this one; by default the one that is the parent now.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.getLevelNamesMapping().get(os.environ.get("EXPERTD_LOG", "").upper(), logging.WARNING),
        format="expertd worker %(process)d: %(message)s",
    )
    # The model is a folder on this machine: nothing that loads it may ask the network, or chat about the attempt.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    worker = _Worker(gateway, parent or os.getppid())
    try:
        return worker.run(Path(model_path), budget, alias)
    finally:
        worker.close()


class _Worker:
    """The loop and what it owns."""

    def __init__(self, gateway: str, parent: int) -> None:
        self._parent = parent
        self._told_to_end = False
        self._bad_frames = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(gateway)

    def run(self, model_path: Path, budget: str | None, alias: Alias) -> int:
        try:
            # Here, because importing mlx takes a second in which the gateway could not be told that it failed.
            from expertd.worker.engine import Engine
            from expertd.worker.load import load

            model, tokenizer = load(model_path, budget=budget, alias=alias)
            engine = Engine(model, tokenizer)
        except ExpertdError as error:
            self._send(WorkerFailed(pid=os.getpid(), code=error.code, message=error.message))
            return error.exit_status
        except Exception as error:
            log.exception("%s could not be loaded", model_path)
            words = f"{model_path} could not be loaded ({type(error).__name__}: {error})"
            self._send(WorkerFailed(pid=os.getpid(), code=ExpertdError.code, message=words))
            return ExpertdError.exit_status
        # Only now: until a model is loaded there is nothing to end in order.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._send(WorkerReady(pid=os.getpid(), model=model_path.resolve().name, context=engine.context))
        try:
            while self._wanted():
                if self._socket.poll(0 if engine.busy else LOOK_ROUND_MS):
                    self._take_frames(engine)
                if engine.busy:
                    for event in engine.step():
                        self._send(event)
        finally:
            engine.close()
        return 0

    def close(self) -> None:
        """Let the last words leave, and give up the socket."""
        self._socket.close()
        self._context.term()

    def _wanted(self) -> bool:
        if not self._told_to_end and os.getppid() != self._parent:
            log.info("the gateway is gone")
            self._told_to_end = True
            self._socket.setsockopt(zmq.LINGER, 0)
        return not self._told_to_end

    def _take_frames(self, engine: Engine) -> None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise MessageInvalid(f"a message of {len(frames)} frames came where one was expected")
                self._handle(engine, decode(frames[0]))
            except MessageInvalid as error:
                self._bad_frames += 1
                log.warning("dropped frame %d: %s", self._bad_frames, error.message)

    def _handle(self, engine: Engine, message: Message) -> None:
        match message:
            case Generate():
                engine.submit(message)
            case Cancel():
                engine.cancel(message.request)
            case Shutdown():
                self._told_to_end = True
            case _:
                raise MessageInvalid(f"a worker takes no {type(message).__name__}")

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = True
