"""The daemon's shell: one asyncio loop that feeds the core and carries out what it says.

Everything that needs judgement is in ``expertd.daemon.core``; everything that blocks runs on other threads (reads, the
creation of segments, the parsing of headers).  Only this loop touches the core, the table and the sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass

import msgspec
import psutil
import zmq
import zmq.asyncio

from expertd.daemon.core import Core, events, instructions
from expertd.daemon.index import build_index
from expertd.daemon.lifelines import Lifelines
from expertd.daemon.pools import SharedPool, create_pool
from expertd.daemon.reader import OpenFiles, Reader
from expertd.daemon.status import model_status
from expertd.protocol import PROTOCOL, messages
from expertd.protocol.connection import package_version
from expertd.protocol.errors import (
    DaemonAlreadyRunning,
    DaemonBusy,
    ExpertdError,
    MessageInvalid,
    ProtocolMismatch,
    SessionUnknown,
)
from expertd.protocol.paths import Home
from expertd.protocol.routing import unpack
from expertd.protocol.segments import segment_name
from expertd.protocol.sizes import show_size

log = logging.getLogger("expertd.daemon")


@dataclass
class _Peer:
    """Where a session's messages go: its control thread, and the socket that its last Fetch came from."""

    control: bytes
    fetcher: bytes
    token: bytes


class Server:
    """One daemon in one home.  ``run`` returns when it was told to end."""

    def __init__(self, home: Home, budget: int, *, idle_exit_s: float | None = None) -> None:
        self._home = home
        self._core = Core(budget)
        self._idle_exit_s = idle_exit_s
        self._reader = Reader()
        self._lifelines = Lifelines(home.lifeline_socket, self._line_ended)
        self._pools: dict[int, SharedPool] = {}
        self._files: dict[str, OpenFiles] = {}
        self._peers: dict[int, _Peer] = {}
        self._events: deque[events.Event] = deque()
        # Numbers that no predecessor has granted: what its sessions still say must not be taken for one of ours.
        self._numbers = itertools.count(secrets.randbits(48))
        self._tasks: set[asyncio.Task[None]] = set()
        self._creating = asyncio.Lock()
        self._ending = asyncio.Event()
        self._began = time.monotonic()
        self._busy_at = time.monotonic()
        self._frames_dropped = 0
        self._attaching = 0  # sessions whose headers are being read

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, Stop or the idle time.

        Raises:
            DaemonAlreadyRunning: another daemon has this home.
            HomeError: the home cannot be used.
        """
        self._home.prepare()
        with _owned(self._home):
            self._loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._ending.set)
            context = zmq.asyncio.Context()
            self._router = context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.LINGER, 500)
            self._router.setsockopt(zmq.MAXMSGSIZE, messages.FRAME_LIMIT)
            for stale in (self._home.daemon_socket, self._home.lifeline_socket):
                stale.unlink(missing_ok=True)
            self._lifelines.listen()
            self._router.bind(f"ipc://{self._home.daemon_socket}")
            log.info(
                "expertd daemon (process %d) is ready: budget %s, home %s",
                os.getpid(), show_size(self._core.budget), self._home.root,
            )  # fmt: skip
            self._spawn(self._receive())
            self._spawn(self._watch_idle())
            try:
                await self._ending.wait()
            finally:
                await self._close(context)

    async def _close(self, context: zmq.asyncio.Context) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._reader.close)
        self._lifelines.close()
        self._router.close()
        context.term()
        for pool in self._pools.values():
            pool.close()
        for files in self._files.values():
            files.close()
        for socket in (self._home.daemon_socket, self._home.lifeline_socket):
            socket.unlink(missing_ok=True)
        log.info("expertd daemon (process %d) has ended", os.getpid())

    # -- what comes in -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            identity, *frames = await self._router.recv_multipart()
            try:
                if len(frames) != 1:
                    raise MessageInvalid(f"a message of {len(frames)} frames came where one was expected")
                await self._take(identity, messages.decode(frames[0]))
            except MessageInvalid as error:
                self._frames_dropped += 1
                log.warning("dropped a frame: %s", error)
                self._send(identity, messages.Error.of(error))
            except ExpertdError as error:
                self._send(identity, messages.Error.of(error))

    async def _take(self, identity: bytes, message: messages.Message) -> None:
        match message:
            case messages.Fetch():
                peer = self._peers.get(message.session)
                if peer is None:
                    error = SessionUnknown(f"session {message.session} is not attached here; load the model again")
                    self._send(identity, messages.Error.of(error, message.sequence))
                    return
                peer.fetcher = identity
                routing = tuple(unpack(message.routing))
                experts = tuple(message.experts)
                self._feed(events.Fetch(message.session, message.sequence, message.layer, experts, routing))
            case messages.Ack():
                routing = tuple(unpack(message.routing))
                self._feed(events.Ack(message.session, message.version, message.sequence, routing))
            case messages.RoutingLog():
                self._feed(events.Routed(message.session, tuple(unpack(message.routing))))
            case messages.Hello():
                self._hello(identity, message)
            case messages.Attach():
                self._attaching += 1
                self._spawn(self._attach(identity, message))
            case messages.Detach():
                self._end(message.session)
                self._send(identity, messages.Detached(session=message.session))
            case messages.AskStatus():
                self._send(identity, self._status())
            case messages.Stop(if_idle=if_idle):
                if if_idle and (self._peers or self._attaching):
                    raise DaemonBusy(f"the daemon (process {os.getpid()}) is in use")
                self._send(identity, messages.Stopping())
                self._ending.set()
            case _:
                raise MessageInvalid(f"a daemon takes no {type(message).__name__}")

    def _hello(self, identity: bytes, hello: messages.Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise ProtocolMismatch(
                f"this daemon (process {os.getpid()}, expertd {package_version()}) speaks protocol {PROTOCOL}, "
                f"the {hello.role} (expertd {hello.package}) speaks {hello.protocol}; "
                "restart it with: expertd daemon stop"
            )
        welcome = messages.Welcome(protocol=PROTOCOL, package=package_version(), pid=os.getpid())
        self._send(identity, welcome)

    async def _attach(self, identity: bytes, message: messages.Attach) -> None:
        try:
            if not self._lifelines.known(message.token):
                raise MessageInvalid("an Attach came whose lifeline is not open")
            index = await asyncio.to_thread(build_index, message.manifest)
        except ExpertdError as error:
            self._send(identity, messages.Error.of(error))
            return
        finally:
            self._attaching -= 1
        number = next(self._numbers)
        if not self._lifelines.bind(message.token, number):
            # It died while the headers were read (and nobody hears this), or it has a session already.
            taken = MessageInvalid("an Attach came whose lifeline has a session already")
            self._send(identity, messages.Error.of(taken))
            return
        self._peers[number] = _Peer(identity, identity, message.token)
        if message.manifest.key not in self._files:
            self._files[message.manifest.key] = OpenFiles(index)
        self._feed(events.Attach(number, message.pid, message.mode, message.manifest))

    def _line_ended(self, session: int) -> None:
        """The lifeline of ``session`` reached its end of file: its process is gone, or let go."""
        log.info("session %d has ended", session)
        self._end(session)

    def _end(self, session: int) -> None:
        peer = self._peers.pop(session, None)
        if peer is not None:
            self._lifelines.close_line(peer.token)
            self._feed(events.Ended(session))

    # -- what goes out -------------------------------------------------------------------------------------------------

    def _feed(self, event: events.Event) -> None:
        """Give ``event`` to the core and do what it says, after whatever is being done already."""
        self._events.append(event)
        if len(self._events) > 1:
            return
        try:
            while self._events:
                self._carry_out(self._core.handle(self._events[0]))
                self._events.popleft()
        except Exception:
            # What the core believes is no longer what is: end, so that nobody computes on it.
            log.critical("the daemon has an error in itself and ends", exc_info=True)
            self._ending.set()
            raise

    def _carry_out(self, todo: Iterable[instructions.Instruction]) -> None:
        for what in todo:
            match what:
                case instructions.Answer(session, sequence, version, slots):
                    self._to_fetcher(
                        session,
                        messages.Resident(session=session, sequence=sequence, version=version, slots=list(slots)),
                    )
                case instructions.Publish(segment, row, expert, slot):
                    self._pools[segment].table[row, expert] = slot
                case instructions.StartRead():
                    self._start_read(what)
                case instructions.AskAck(session, version):
                    self._to_control(session, messages.AckRequest(session=session, version=version))
                case instructions.Announce(session, segment):
                    self._to_control(session, messages.Complete(session=session, segment=segment))
                case instructions.Grant():
                    self._grant(what)
                case instructions.Refuse(session, error, sequence):
                    self._to_fetcher(session, messages.Error.of(error, sequence))
                    if sequence is None:
                        self._end(session)
                case instructions.CreatePool():
                    self._spawn(self._create_pool(what))
                case instructions.UnlinkPool(segment):
                    self._pools.pop(segment).close()
        for key in self._files.keys() - self._core.keys:
            self._files.pop(key).close()

    def _start_read(self, what: instructions.StartRead) -> None:
        def done(size: int, error: ExpertdError | None) -> None:
            event: events.Event
            if error is None:
                event = events.ReadDone(what.segment, what.slot, size)
            else:
                log.warning("%s", error)
                event = events.ReadFailed(what.segment, what.slot, error)
            # The loop may be closed already when the daemon ends; then nobody waits for this read.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._feed, event)

        rows = self._pools[what.segment].rows(what.slot)
        self._reader.submit(self._files[what.model], what.layer, what.expert, rows, done, demand=what.demand)

    def _grant(self, grant: instructions.Grant) -> None:
        peer = self._peers.get(grant.session)
        if peer is None:
            return
        pools = []
        try:
            for info in grant.pools:
                pool = self._pools[info.segment]
                self._lifelines.send_segment(peer.token, info.segment, pool.layout.size, pool.segment.readonly)
                pools.append(msgspec.structs.replace(info, nonce=pool.nonce))
        except OSError as error:
            log.warning("session %d took no segment (%s)", grant.session, error)
            self._end(grant.session)
            return
        log.info("session %d: model %s", grant.session, self._core.models[grant.model].manifest.folder)
        attached = messages.Attached(session=grant.session, model=grant.model, version=grant.version, pools=pools)
        self._send(peer.control, attached)

    async def _create_pool(self, what: instructions.CreatePool) -> None:
        event: events.Event
        async with self._creating:  # segments share one name while they are created
            try:
                pool = await asyncio.to_thread(
                    create_pool, segment_name(self._home.root), what.layout, what.generation
                )
            except ExpertdError as error:
                event = events.PoolFailed(what.segment, error)
            else:
                self._pools[what.segment] = pool
                event = events.PoolCreated(what.segment)
        self._feed(event)

    def _to_fetcher(self, session: int, message: messages.Message) -> None:
        if session in self._peers:
            self._send(self._peers[session].fetcher, message)

    def _to_control(self, session: int, message: messages.Message) -> None:
        if session in self._peers:
            self._send(self._peers[session].control, message)

    def _send(self, identity: bytes, message: messages.Message) -> None:
        # A ROUTER never blocks: it drops what is for a peer that is gone, so nothing is left to await.
        self._router.send_multipart([identity, messages.encode(message)])

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the daemon has an error in itself and ends", exc_info=error)
            self._ending.set()

    # -- state ---------------------------------------------------------------------------------------------------------

    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._peers or self._attaching:
                self._busy_at = time.monotonic()
            elif self._idle_exit_s is not None and time.monotonic() - self._busy_at > self._idle_exit_s:
                log.info("nobody was attached for %.0f s", self._idle_exit_s)
                self._ending.set()

    def _status(self) -> messages.Status:
        daemon = messages.DaemonStatus(
            pid=os.getpid(),
            version=package_version(),
            uptime_s=round(time.monotonic() - self._began, 3),
            rss_bytes=psutil.Process().memory_info().rss,
        )
        return messages.Status(
            protocol=PROTOCOL,
            home=str(self._home.root),
            daemon=daemon,
            budget_bytes=self._core.budget,
            used_bytes=self._core.used,
            pressure="normal",
            frames_dropped=self._frames_dropped,
            models=[model_status(model) for model in self._core.models.values()],
        )


@contextlib.contextmanager
def _owned(home: Home) -> Iterator[None]:
    """Hold the home's lock: one daemon a home.  The kernel releases it however this process ends."""
    with home.daemon_lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise DaemonAlreadyRunning(
                f"a daemon (process {owner}) already runs in {home.root}; stop it with: expertd daemon stop"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
