"""A gateway from its start to its end: the port, the worker, the signals, the order in which things stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from aiohttp import web

from expertd.clients.gateway.app import Gateway
from expertd.clients.gateway.workers import Worker
from expertd.protocol.errors import ExpertdError, PortInUse
from expertd.protocol.paths import Home

__all__ = ["listen", "serve"]

log = logging.getLogger(__name__)

BACKLOG = 128
DRAIN_S = 10.0
"""How long requests may go on after the gateway was told to stop."""
HANGUP_S = 2.0
"""How long handlers get to write the error that ends them."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ``port`` 0 takes any that is free.

    Raises:
        PortInUse: somebody else listens there.
        ExpertdError: the address is not one of this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(f"{host}:{port} is taken; choose another port with --port, or 0 for any") from error
        raise ExpertdError(
            f"{host}:{port} cannot be listened on ({error.strerror}); check --host and --port"
        ) from error
    return listener


async def serve(
    listener: socket.socket,
    host: str,
    model: Path,
    *,
    home: Home,
    budget: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve ``model`` on ``listener`` until SIGTERM, SIGINT or SIGHUP; a second signal kills the worker at once.

    From the first moment it answers: health says whether it is ready.  ``ready`` is called with the API's URL once the
    model is loaded.

    Raises:
        ExpertdError: the model could not be loaded.
    """
    worker = Worker(home, model, budget=budget)
    gateway = Gateway(worker, model, host)
    runner = web.AppRunner(gateway.app, handler_cancellation=True, access_log=None, shutdown_timeout=HANGUP_S)
    with _stop_signals(worker) as told_to_stop:
        try:
            await runner.setup()
            site = web.SockSite(runner, listener)
            await site.start()
            await worker.start()
            loaded, stopped = asyncio.create_task(worker.ready()), asyncio.create_task(told_to_stop.wait())
            await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
            if loaded.done():
                loaded.result()
                ready(_url(host, listener))
                await stopped
            loaded.cancel()
            stopped.cancel()
            await site.stop()
            await worker.drain(DRAIN_S)
        finally:
            await runner.cleanup()
            await worker.stop()


@contextlib.contextmanager
def _stop_signals(worker: Worker) -> Iterator[asyncio.Event]:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()

    def on_signal() -> None:
        if told_to_stop.is_set():
            worker.kill()
        told_to_stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield told_to_stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
