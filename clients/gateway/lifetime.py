"""A gateway from its start to its end: the port, the workers, the signals, the order in which things stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from aiohttp import web

from expertd.clients.gateway.access import Access
from expertd.clients.gateway.app import STALL_S, Gateway
from expertd.clients.gateway.connections import connection_limit, take_connections
from expertd.clients.gateway.discreet import server_log
from expertd.clients.gateway.served import Models
from expertd.clients.gateway.watch import DaemonWatch
from expertd.protocol.errors import ConfigInvalid, PortInUse
from expertd.protocol.logs import Log
from expertd.protocol.paths import Home

__all__ = ["listen", "serve"]

log = Log(__name__)

BACKLOG = 128
DRAIN_S = 10.0
"""How long requests may go on after the gateway was told to stop."""
HANGUP_S = 2.0
"""How long handlers get to write the error that ends them."""
KEEP_OPEN_S = 86400.0
"""How long an idle connection stays where nobody needs its place.  Long, because this one counts a machine's sleep."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ``port`` 0 takes any that is free.

    Raises:
        PortInUse: somebody else listens there.
        ConfigInvalid: there is no such address, it is not one of this machine's, or not allowed.
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
        raise ConfigInvalid(
            f"{host}:{port} cannot be listened on ({error.strerror}); --host takes an address or a name of this "
            "machine, as 127.0.0.1, and --port a number that you may use"
        ) from error
    except UnicodeError as error:
        raise ConfigInvalid(f"{host[:80]!r} cannot be a name; --host takes one, or an address") from error
    return listener


async def serve(
    listener: socket.socket,
    host: str,
    models: Callable[[], Models],
    home: Home,
    *,
    access: Access | None = None,
    stall_s: float = STALL_S,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve models on ``listener`` until SIGTERM, SIGINT or SIGHUP; a second signal kills the workers at once.

    From the first moment it answers: health says whether it is ready.  ``ready`` is called with the API's URL once
    those models are loaded that always are; a worker that dies later is started again.

    Args:
        models: makes them; called within the loop.
        home: whose daemon the status page and the metrics tell of.
        access: who may use it; None: who calls it by this machine's name, or ``host``.
        stall_s: how long a client may leave a full buffer unread.

    Raises:
        ExpertdError: a model that always has to be there could not be loaded.
    """
    served = models()
    watch = DaemonWatch(home)
    gateway = Gateway(served, access or Access(host), watch, stall_s=stall_s)
    runner = web.AppRunner(
        gateway.app,
        handler_cancellation=True,
        access_log=None,
        logger=server_log(),
        shutdown_timeout=HANGUP_S,
        keepalive_timeout=KEEP_OPEN_S,
    )
    url = _url(host, listener)
    with _stop_signals(served) as told_to_stop:
        try:
            await runner.setup()
            assert runner.server is not None
            async with (
                _background(take_connections(listener, runner.server, gateway.busy, connection_limit())),
                _background(watch.keep_looking(lambda: bool(gateway.observer.under_way))),
            ):
                for one in served.all:
                    one.start()
                loads = asyncio.ensure_future(_loaded(served))
                stopped = asyncio.create_task(told_to_stop.wait())
                await asyncio.wait([loads, stopped], return_when=asyncio.FIRST_COMPLETED)
                if loads.done():
                    loads.result()
                    log.info("the gateway is ready", models=[one.name for one in served.all], url=url)
                    ready(url)
                    await stopped
                loads.cancel()
                stopped.cancel()
                await asyncio.wait([loads, stopped])
            listener.close()
            await asyncio.gather(*[one.drain(DRAIN_S) for one in served.all])
        finally:
            await runner.cleanup()
            await asyncio.gather(*[one.stop() for one in served.all])
            await watch.close()
            log.info("the gateway has ended")


async def _loaded(models: Models) -> None:
    """Wait until all are loaded that always have to be there."""
    await asyncio.gather(*[one.loaded() for one in models.all if one.always])


@contextlib.asynccontextmanager
async def _background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do ``work`` beside the body, and end it with the body."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@contextlib.contextmanager
def _stop_signals(models: Models) -> Iterator[asyncio.Event]:
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()

    def on_signal(number: signal.Signals) -> None:
        log.info("the gateway was told to end", signal=number.name)
        if told_to_stop.is_set():
            for one in models.all:
                one.kill()
        told_to_stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield told_to_stop
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _url(host: str, listener: socket.socket) -> str:
    port = listener.getsockname()[1]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
