"""The worker process: one model, one engine, one socket to the gateway that started it.

Loads the model, says that it is ready or why not, then turns messages into calls of ``expertd.worker.engine`` and its
events into messages, and passes on to the gateway what the daemon says of memory pressure.  It ends on Shutdown, on
SIGTERM, and when the process that started it is gone, whatever it is doing then.  It does not restart anything, and it
knows nothing of HTTP: see ``expertd.clients.gateway``.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import zmq

from expertd.protocol import logs
from expertd.protocol.config import Config, config_without_file, read_config
from expertd.protocol.errors import ExpertdError, MessageInvalid
from expertd.protocol.logs import Log, Sparsely
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
from expertd.protocol.model_names import find_model, shown_name
from expertd.protocol.paths import Home
from expertd.worker.doorbell import Doorbell

if TYPE_CHECKING:
    from expertd.worker.engine import Engine
    from expertd.worker.load import Alias
    from expertd.worker.pressure import Gauge

__all__ = ["run"]

log = Log(__name__)

LOOK_ROUND_MS = 1000
"""How often an idle worker looks whether it was told to end."""
GATEWAY_LOOK_S = 1.0
"""How often a worker looks whether its gateway lives."""
LINGER_MS = 2000
"""How long a worker that ends waits for its last words to leave."""
FRAMES_AT_A_TIME = 256
"""Frames that wait in the socket, and are taken between two steps."""
LONGEST_REASON = 200


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
        model_path: the model's folder or name, as in ``expertd.load``.
        budget: for a daemon that has to be started, as ``2GiB``.
        alias: how shared pages become arrays, as in ``expertd.load``.
        parent: process whose end ends this one; by default the one that is the parent now.
    """
    config = _settings(Home.current())
    # The model is a folder on this machine: nothing that loads it may ask the network, or chat about the attempt.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Until the loop takes them over there is nothing to end in order: the daemon sees any end by the lifeline.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: os._exit(0))
    threading.Thread(target=_end_with, args=[parent or os.getppid()], name="expertd-gateway-watch", daemon=True).start()
    worker = _Worker(gateway)
    try:
        return worker.run(model_path, budget, alias, config.serve_kv_bits.value)
    finally:
        worker.close()


def _settings(home: Home) -> Config:
    """The settings, with the log set up as they say.  The gateway has judged them, and passes on what it was given in
    the environment; one that has become wrong since ends no worker."""
    problem: ExpertdError | None = None
    try:
        config = read_config(home)
    except ExpertdError as error:
        config, problem = config_without_file(), error
    logs.set_up("worker", home.worker_log(os.getpid()), home, config)
    if problem is not None:
        log.warning("the settings cannot be used: %s", problem.message, code=problem.code)
    return config


def _end_with(parent: int) -> None:
    """End this process as soon as ``parent`` has ended.

    At once and from a thread, because the main one may be busy for long with loading, computing or waiting for the
    daemon, and nobody is left to whom an orderly end would matter: the daemon sees any end by the lifeline.
    """
    while os.getppid() == parent:
        time.sleep(GATEWAY_LOOK_S)
    log.info("the gateway is gone")
    os._exit(0)


class _Worker:
    """The loop and what it owns."""

    def __init__(self, gateway: str) -> None:
        self._told_to_end = False
        self._drops = Sparsely()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        # What is sent never waits for the gateway to read it; its memory is bounded by what the requests may generate.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        # What comes waits in the gateway, which counts it.
        self._socket.setsockopt(zmq.RCVHWM, FRAMES_AT_A_TIME)
        self._socket.connect(gateway)
        # Rung by the session's control thread, which may not use the socket.
        self._bell = Doorbell()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._bell.fileno(), zmq.POLLIN)
        self._passed_on = "normal"

    def run(self, model_path: str | Path, budget: str | None, alias: Alias, kv_bits: int | None) -> int:
        began = time.monotonic()
        try:
            # Here, because importing mlx takes a second in which the gateway could not be told that it failed.
            import mlx.core as mx

            from expertd.worker.engine import Engine
            from expertd.worker.kv_memory import CacheMemory
            from expertd.worker.load import events_of, load
            from expertd.worker.wired import WiredLimit

            folder = find_model(model_path)
            model, tokenizer = load(folder, budget=budget, alias=alias)
            events = events_of(model)
            memory = CacheMemory.of(model, kv_bits)
            engine = Engine(
                model, tokenizer, buffers=events.buffers, wired=WiredLimit(mx), memory=memory, kv_bits=kv_bits
            )
        except ExpertdError as error:
            log.info("the model was not loaded: %s", error.message, code=error.code)  # the gateway tells it, too
            self._send(WorkerFailed(pid=os.getpid(), code=error.code, message=error.message))
            return error.exit_status
        except Exception as error:
            log.exception("%s could not be loaded", model_path)
            words = f"{model_path} could not be loaded ({type(error).__name__}: {error})"
            self._send(WorkerFailed(pid=os.getpid(), code=ExpertdError.code, message=words))
            return ExpertdError.exit_status
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        name, seconds = shown_name(folder), round(time.monotonic() - began, 1)
        log.info("the worker is ready", model=name, mode=events.session.mode, context=engine.context, seconds=seconds)
        self._send(WorkerReady(pid=os.getpid(), model=name, context=engine.context, at_once=engine.at_once))
        gauge = events.session.pressure
        gauge.on_change = self._bell.ring
        self._pass_on(gauge)  # what was said while the model was loaded
        try:
            while not self._told_to_end:
                ready = dict(self._poller.poll(0 if engine.busy else LOOK_ROUND_MS))
                if self._bell.fileno() in ready:
                    self._bell.answer()
                    self._pass_on(gauge)
                    engine.relieve()
                if self._socket in ready:
                    self._take_frames(engine)
                if engine.busy:
                    for event in engine.step():
                        self._send(event)
        finally:
            engine.close()
        log.info("the worker has ended, as it was told to")
        return 0

    def close(self) -> None:
        """Let the last words leave, and give up the socket."""
        self._bell.close()
        self._socket.close()
        self._context.term()

    def _pass_on(self, gauge: Gauge) -> None:
        """Tell the gateway of the memory pressure, if its level has changed."""
        newest = gauge.newest
        if newest.level != self._passed_on:
            self._passed_on = newest.level
            self._send(newest)

    def _take_frames(self, engine: Engine) -> None:
        for _ in range(FRAMES_AT_A_TIME):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                if len(frames) != 1:
                    raise MessageInvalid(f"a message of {len(frames)} frames came where one was expected")
                self._handle(engine, decode(frames[0]))
            except MessageInvalid as error:
                self._drop(error.message)

    def _handle(self, engine: Engine, message: Message) -> None:
        match message:
            case Generate():
                log.debug("a request came", request=message.request)
                engine.submit(message)
            case Cancel():
                engine.cancel(message.request)
            case Shutdown():
                self._told_to_end = True
            case _:
                raise MessageInvalid(f"a worker takes no {type(message).__name__}")

    def _drop(self, why: str) -> None:
        if self._drops.add():
            log.warning("%d frames dropped so far; the last: %s", self._drops.total, why[:LONGEST_REASON])

    def _send(self, message: Message) -> None:
        self._socket.send(encode(message))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = True
