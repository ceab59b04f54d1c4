"""The daemon's shell: one asyncio loop that feeds the core and carries out what it says.

Everything that needs judgement is in ``expertd.daemon.core``; everything that blocks runs on other threads (reads, the
creation of segments, the parsing of headers).  Only this loop touches the core, the table and the sockets.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Coroutine, Iterable

import msgspec
import zmq
import zmq.asyncio

from expertd.daemon import memory_watch
from expertd.daemon.attaching import Attaching, Ground, Peer
from expertd.daemon.bases import SharedBases
from expertd.daemon.blocks import OpenFiles
from expertd.daemon.core import Core, events, instructions
from expertd.daemon.core.instructions import Priority
from expertd.daemon.core.state import Model
from expertd.daemon.diary import Diary
from expertd.daemon.files import Read
from expertd.daemon.filling import Filling
from expertd.daemon.hearing import Hearing
from expertd.daemon.holders import Holders, held_now
from expertd.daemon.idleness import Idleness
from expertd.daemon.large_pages import LargePages, system_collapse
from expertd.daemon.lifelines import Lifelines
from expertd.daemon.liveness import TICK_S, Liveness
from expertd.daemon.memory_watch import MemoryWatch
from expertd.daemon.ownership import owned
from expertd.daemon.policy import Forecast, PolicyFactory
from expertd.daemon.pools import SharedPool, create_pool
from expertd.daemon.pressure import Source, system_source
from expertd.daemon.reader import Reader
from expertd.daemon.remembering import Remembering, recall, record_of
from expertd.daemon.status import as_line, daemon_status
from expertd.daemon.steering import Steering
from expertd.daemon.subscribers import Subscribers
from expertd.daemon.thermal import system_thermal
from expertd.daemon.tokens import TokenCounts
from expertd.daemon.tracing import Tracing
from expertd.daemon.waits import Waited, Waits
from expertd.daemon.warm_record import Records
from expertd.protocol import PROTOCOL, messages
from expertd.protocol.connection import package_version
from expertd.protocol.errors import (
    DaemonBusy,
    ExpertdError,
    MessageInvalid,
    ProtocolMismatch,
    SessionUnknown,
)
from expertd.protocol.logs import Log
from expertd.protocol.paths import Home
from expertd.protocol.segments import remove, segment_name
from expertd.protocol.sizes import show_size
from expertd.protocol.traces import trace_exists

log = Log("expertd.daemon")


FAIR_FRAMES = 64
"""After so many frames in a row the loop sees to everything else: a flood may not keep reads and deaths waiting."""


class Server:
    """One daemon in one home.  ``run`` returns when it was told to end."""

    def __init__(
        self,
        home: Home,
        budget: int,
        policy: PolicyFactory = Forecast,
        *,
        idle_exit_s: float | None = None,
        keep_alive_s: float | None = None,
        pressure: Source | None = None,
        read: Read = os.preadv,
        simulated_ssd: str = "",
        reads_ahead: bool = True,
        background_rate: int | None = None,
        remembers: bool = True,
    ) -> None:
        """Not started yet.

        Args:
            keep_alive_s: models that nobody has used for so long are given back; None: when memory is needed.
            pressure: what tells how short of memory the machine is; None: the system.
            read: reads the model's files; there for those who want to see it fail, or to have it slower.
            simulated_ssd: how slow, for the status.
            reads_ahead: read what sessions will need soon, where that pays.
            background_rate: bytes a second that are read at most while nobody waits for them; None: no limit.
            remembers: record what is worth keeping, and bring it in again when a model comes back.
        """
        self._home = home
        # Numbers that no predecessor has granted: what its sessions still say must not be taken for one of ours.
        self._core = Core(budget, policy, first_segment=secrets.randbits(48), reads_ahead=reads_ahead)
        self._memory = MemoryWatch(budget, pressure or system_source())
        self._idleness = Idleness(time.monotonic(), exit_s=idle_exit_s, keep_alive_s=keep_alive_s)
        self._reader = Reader(read=read, background_rate=background_rate, hot=system_thermal())
        self._simulated_ssd = simulated_ssd
        self._policy_name = getattr(policy, "__name__", "")
        self._lifelines = Lifelines(home.lifeline_socket, self._line_ended, lambda: as_line(self._status()))
        self._pools: dict[int, SharedPool] = {}
        self._large_pages = LargePages(system_collapse(), short=lambda: self._memory.pressure.level != "normal")
        self._files: dict[str, OpenFiles] = {}
        self._liveness = Liveness()
        self._waits = Waits()
        self._waited: dict[str, Waited] = {}  # In sessions that have ended, by models' keys.
        self._tokens = TokenCounts()
        self._tracing = Tracing(taken=trace_exists)
        self._hearing = Hearing(self._waits, self._tokens, self._tracing, self._feed)
        self._peers: dict[int, Peer] = {}
        self._events: deque[events.Event] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._creating = asyncio.Lock()
        name = segment_name(home.root)
        self._bases = SharedBases(name, self._reader, self._creating, self._large_pages, self._share_out)
        self._ending = asyncio.Event()
        self._fault: BaseException | None = None  # an error in ourselves, which ends us
        self._began = time.monotonic()
        self._diary = Diary()
        self._remembering = Remembering() if remembers else None
        ground = Ground(
            home, self._core, self._bases, self._lifelines, self._peers, self._pools, self._files,
            feed=self._feed, share_out=self._share_out, budget=lambda: self._memory.governor.budget,
            room=lambda: memory_watch.room() if self._memory.pressure.level == "normal" else 0,
            recall=lambda manifest: recall(home, manifest, self._policy_name, remembers),
            awaited=lambda model, but: self._holders.awaited(model, but),
        )  # fmt: skip
        self._attaching = Attaching(ground)
        self._records = Records(home)
        self._holders = Holders(home.daemon_holders)
        self._steering = Steering(
            self._core, self._memory, self._bases.known, self._holders, self._tracing,
            feed=self._feed, share_out=self._share_out, tell=self._to_control, forget=self._records.forget,
        )  # fmt: skip
        self._why_ended = ""
        self._frame_at: float | None = None  # when the frame came that is being handled

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT, Stop or the idle time.

        Raises:
            DaemonAlreadyRunning: another daemon has this home.
            HomeError: the home cannot be used.
            ExpertdError: the daemon found an error in itself; so its service manager starts it again.
        """
        self._home.prepare()
        with owned(self._home):
            self._loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._end_because, number.name)
            context = zmq.asyncio.Context()
            self._router = context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.LINGER, 500)
            self._router.setsockopt(zmq.MAXMSGSIZE, messages.FRAME_LIMIT)
            for stale in (self._home.daemon_socket, self._home.lifeline_socket):
                stale.unlink(missing_ok=True)
            self._subscribers = Subscribers(self._send)
            self._filling = Filling(self._reader, self._pools, self._files, self._waits, self._diary, self._feed)
            logging.getLogger("expertd.daemon").addHandler(self._subscribers)
            self._lifelines.listen()
            self._router.bind(f"ipc://{self._home.daemon_socket}")
            self._home.daemon_socket.chmod(0o600)
            remove(segment_name(self._home.root))
            budget = show_size(self._core.budget)
            log.info("the daemon is ready", version=package_version(), budget=budget, home=self._home.root)
            self._spawn(self._receive())
            self._spawn(self._watch_idle())
            self._spawn(self._watch_sessions())
            self._spawn(self._watch_memory())
            self._spawn(self._watch_warmth())
            try:
                await self._ending.wait()
            finally:
                await self._close(context)
            if self._fault is not None:
                raise ExpertdError("the daemon ended by an error in itself; the lines above say where") from self._fault

    async def _close(self, context: zmq.asyncio.Context) -> None:
        logging.getLogger("expertd.daemon").removeHandler(self._subscribers)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._remembering is not None and self._fault is None:  # else nobody knows what is true
            changed = self._remembering.changed(self._core.models.values())
            await self._record(changed)
        await self._bases.close()
        await asyncio.to_thread(self._reader.close)
        await asyncio.to_thread(self._large_pages.close)
        self._lifelines.close()
        self._router.close()
        context.term()
        for pool in self._pools.values():
            pool.close()
        for files in self._files.values():
            files.close()
        for socket in (self._home.daemon_socket, self._home.lifeline_socket):
            socket.unlink(missing_ok=True)
        log.info("the daemon has ended", why=self._why_ended, up_s=round(time.monotonic() - self._began))

    def _end_because(self, why: str) -> None:
        self._why_ended = self._why_ended or why
        self._ending.set()

    # -- what comes in -------------------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        for number in itertools.count(1):
            identity, *frames = await self._router.recv_multipart()
            self._frame_at = time.monotonic()
            try:
                if len(frames) != 1:
                    raise MessageInvalid(f"a message of {len(frames)} frames came where one was expected")
                self._take(identity, messages.decode(frames[0]))
            except MessageInvalid as error:
                self._diary.dropped(error.message)
                self._send(identity, messages.Error.of(error))
            except ExpertdError as error:
                self._send(identity, messages.Error.of(error))
            finally:
                self._frame_at = None
            if number % FAIR_FRAMES == 0:
                await asyncio.sleep(0)  # awaiting a frame that is there already gives nobody else a turn

    def _check_sender(self, identity: bytes, session: int, sequence: int | None = None) -> bool:
        """Whether ``session`` is open, and what speaks for it is one of its own two sockets.

        Raises:
            MessageInvalid: somebody else does.
        """
        peer = self._peers.get(session)
        if peer is None:
            if sequence is not None:
                error = SessionUnknown(f"session {session} is not attached here; load the model again")
                self._send(identity, messages.Error.of(error, sequence))
            return False
        if identity not in (peer.control, peer.data):
            raise MessageInvalid(f"a message about session {session} came from somebody else")
        self._liveness.heard(session)
        return True

    def _take_session(self, identity: bytes, message: messages.Message) -> None:
        """A message of an open session."""
        match message:
            case messages.Fetch(session=session, sequence=sequence):
                if self._check_sender(identity, session, sequence):
                    self._hearing.take(message)
            case (
                messages.Ahead() | messages.Ack() | messages.RoutingLog() | messages.Released() | messages.Recorded()
                | messages.Pong()
            ):  # fmt: skip
                if self._check_sender(identity, message.session):
                    self._hearing.take(message)
            case messages.Ping(session=session):
                if self._check_sender(identity, session):
                    self._send(identity, messages.Pong(session=session))
            case messages.Detach(session=session):
                if self._check_sender(identity, session):
                    self._end(session)
                self._send(identity, messages.Detached(session=session))
            case _:
                raise MessageInvalid(f"a daemon takes no {type(message).__name__}")

    def _take(self, identity: bytes, message: messages.Message) -> None:
        match message:
            case messages.Hello():
                self._hello(identity, message)
            case messages.Attach():
                self._spawn(self._open(identity, self._attaching.begin(identity, message)))
            case messages.SetBudget() | messages.Unload() | messages.Warm() | messages.Pin() | messages.StartTrace():
                self._send(identity, self._steering.answer(message))
            case messages.Subscribe():
                self._subscribers.subscribe(identity)
                self._send(identity, messages.Subscribed())
            case messages.AskStatus():
                self._send(identity, self._status())
            case messages.StopTrace():
                self._spawn(self._stop_trace(identity))
            case messages.Stop(if_idle=if_idle):
                if if_idle and (self._peers or self._attaching.under_way):
                    raise DaemonBusy(f"the daemon (process {os.getpid()}) is in use")
                self._send(identity, messages.Stopping())
                self._end_because("it was told to")
            case _:
                self._take_session(identity, message)

    async def _stop_trace(self, identity: bytes) -> None:
        self._send(identity, await self._steering.stop_trace())

    def _hello(self, identity: bytes, hello: messages.Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise ProtocolMismatch(
                f"this daemon (process {os.getpid()}, expertd {package_version()}) speaks protocol {PROTOCOL}, "
                f"the {hello.role} (expertd {hello.package}) speaks {hello.protocol}; "
                f"end it with 'expertd daemon stop' or 'kill {os.getpid()}' and try again"
            )
        welcome = messages.Welcome(protocol=PROTOCOL, package=package_version(), pid=os.getpid())
        self._send(identity, welcome)

    async def _open(self, identity: bytes, opening: Coroutine[object, object, None]) -> None:
        try:
            await opening
        except ExpertdError as error:
            self._send(identity, messages.Error.of(error))

    def _line_ended(self, session: int) -> None:
        """The lifeline of ``session`` reached its end of file: its process is gone, or let go."""
        self._end(session)

    def _end(self, session: int, why: str | None = None) -> None:
        peer = self._peers.pop(session, None)
        if peer is not None:
            self._diary.session_ended(session, why)
            self._tracing.gone(session)
            self._remember(session, self._waits.ended(session, time.monotonic()))
            self._tokens.ended(session)
            self._lifelines.close_line(peer.token)
            self._bases.known.ended(session)
            self._feed(events.Ended(session))
            self._share_out()

    def _remember(self, session: int, waited: Waited) -> None:
        """A session that ends leaves what it has waited to its model."""
        for key, model in self._core.models.items():
            if session in model.sessions:
                self._waited[key] = self._waited.get(key, Waited()).plus(waited)

    # -- what goes out -------------------------------------------------------------------------------------------------

    def _feed(self, event: events.Event) -> None:
        """Give ``event`` to the core and do what it says, after whatever is being done already."""
        self._events.append(event)
        if len(self._events) > 1:
            return
        try:
            while self._events:
                self._core.handle(self._events[0], self._carry_out)
                self._events.popleft()
            for key in self._files.keys() - self._core.models.keys():
                self._files.pop(key).close()
                self._waited.pop(key, None)
            self._diary.models_kept(self._core.models.keys())
            self._drop_bases()
        except Exception as error:
            # What the core believes is no longer what is: end, so that nobody computes on it.
            log.critical("the daemon has an error in itself and ends", exc_info=True)
            self._fault = error
            self._end_because("an error in itself")
            raise

    def _drop_bases(self) -> None:
        """Give back the base weights whose model is gone; what they took is there for pools."""
        if self._bases.sweep(self._core.models.keys()):
            self._share_out()

    def _share_out(self, drop: bool = False) -> None:
        """Give the core what base weights leave of the memory that may be used, if that has changed."""
        if self._ending.is_set():
            return
        governor, known = self._memory.governor, self._bases.known
        limit, most = max(1, governor.limit - known.used), max(1, governor.budget - known.in_use)
        core, shared = self._core, (limit, most, known.in_use, known.going)
        if shared != (core.budget, core.most, core.beside, core.going):
            self._feed(events.BudgetChanged(limit, drop, most, known.in_use, known.going))

    def _carry_out(self, what: instructions.Instruction) -> None:
        match what:
            case instructions.Answer(session, sequence, version, slots, announce):
                self._waits.answered(session, time.monotonic())
                resident = messages.Resident(
                    session=session, sequence=sequence, version=version, slots=list(slots), announce=announce
                )
                self._to_data(session, resident)
            case instructions.Publish(segment, row, expert, slot):
                self._pools[segment].table[row, expert] = slot
            case instructions.StartRead():
                self._filling.read(what, self._frame_at if what.priority is Priority.DEMAND else None)
            case instructions.Promote(segment, slot):
                self._filling.promote(segment, slot)
            case instructions.Cancel(segment, slot):
                self._filling.cancel(segment, slot)
            case instructions.StartCopy():
                self._filling.copy(what)
            case instructions.AskAck(session, version):
                self._to_control(session, messages.AckRequest(session=session, version=version))
            case instructions.Announce(session, segment):
                self._to_control(session, messages.Complete(session=session, segment=segment))
            case instructions.Grant():
                self._grant(what)
            case instructions.Move(session, info):
                if (info_named := self._hand_over(session, info)) is not None:
                    self._to_control(session, messages.Moved(session=session, pool=info_named))
            case instructions.Refuse(session, error, None):
                self._to_control(session, messages.Error.of(error))
                log.warning("session refused: %s", error.message, code=error.code)
                self._end(session)
            case instructions.Refuse(session, error, sequence):
                self._waits.answered(session, time.monotonic())
                self._to_data(session, messages.Error.of(error, sequence))
            case instructions.CreatePool():
                self._spawn(self._create_pool(what))
            case instructions.UnlinkPool(segment):
                self._large_pages.forget(segment)
                self._pools.pop(segment).close()

    def _grant(self, grant: instructions.Grant) -> None:
        pools = [self._hand_over(grant.session, info) for info in grant.pools]
        peer = self._peers.get(grant.session)
        if peer is None:
            return
        base = self._hand_over_base(grant.session)
        self._diary.session_opened(grant.session, peer.pid, peer.mode, self._core.models[grant.model])
        attached = messages.Attached(
            session=grant.session,
            model=grant.model,
            version=grant.version,
            announce=grant.announce,
            pools=[pool for pool in pools if pool is not None],
            base=base,
        )
        self._to_control(grant.session, attached)
        if self._memory.pressure.level != "normal":
            self._to_control(grant.session, self._memory.pressure)
        self._steering.opened(grant.session)

    def _hand_over(self, session: int, info: messages.PoolInfo) -> messages.PoolInfo | None:
        """Send a segment's descriptor over the lifeline; returns ``info`` with its nonce, None if the session is over.

        One that does not take it is gone, or has been sent dozens: its session ends.
        """
        peer = self._peers.get(session)
        if peer is None:
            return None
        pool = self._pools[info.segment]
        try:
            self._lifelines.send_segment(peer.token, info.segment, pool.layout.size, pool.segment.readonly)
        except OSError as error:
            self._end(session, f"it took no segment ({error})")
            return None
        return msgspec.structs.replace(info, nonce=pool.nonce)

    def _hand_over_base(self, session: int) -> messages.BaseInfo | None:
        """Send the descriptor of the session's base weights, if it has any."""
        base = self._bases.known.of_session(session)
        if base is None or self._peers[session].has_base:
            return None
        token, descriptor = self._peers[session].token, self._bases.descriptor(base)
        try:
            self._lifelines.send_segment(token, base.segment, base.size, descriptor)
        except OSError as error:
            self._end(session, f"it took no segment ({error})")
            return None
        return self._bases.info(base)

    async def _create_pool(self, what: instructions.CreatePool) -> None:
        event: events.Event
        name = segment_name(self._home.root)
        async with self._creating:  # segments share that name while they are created
            try:
                pool = await asyncio.to_thread(
                    create_pool, name, what.layout, what.generation, what.model, what.layers, what.least
                )
            except ExpertdError as error:
                log.warning("a pool could not be created: %s", error)
                event = events.PoolFailed(what.segment, error)
            else:
                self._pools[what.segment] = pool
                self._large_pages.gather(what.segment, pool.segment.readonly, pool.layout.size)
                self._diary.pool_created(what.segment, what.layout, what.generation, self._core.models.values())
                event = events.PoolCreated(what.segment)
        self._feed(event)

    def _to_data(self, session: int, message: messages.Message) -> None:
        if session in self._peers:
            self._send(self._peers[session].data, message)

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
            self._fault = error
            self._end_because("an error in itself")

    # -- state ---------------------------------------------------------------------------------------------------------

    def _status(self) -> messages.Status:
        now, folder = time.monotonic(), str(self._tracing.folder or "")
        waited, uptime_s = self._waits.all(now), now - self._began
        dropped, ssd = self._diary.drops.total, self._simulated_ssd
        packed = {key: files.packed for key, files in self._files.items()}
        reads = self._reader.devices()
        return daemon_status(
            self._home, self._core, self._memory, self._bases.known, waited, self._tokens.all(), uptime_s, folder,
            dropped, ssd, reads, packed, self._waited,
        )  # fmt: skip

    async def _watch_sessions(self) -> None:
        """Ping those of whom something is expected; tell the core of those who have gone silent."""
        while True:
            await asyncio.sleep(TICK_S)
            ping, silent = self._liveness.tick(self._core.owing, self._core.holding)
            for session in ping:
                self._to_control(session, messages.Ping(session=session))
            for session in silent:
                self._diary.session_left_behind(session)
                self._feed(events.Silent(session))

    async def _watch_memory(self) -> None:
        """Let the limit follow the machine's pressure, and tell sessions of it."""
        while True:
            await asyncio.sleep(memory_watch.TICK_S if self._core.used else memory_watch.IDLE_TICK_S)
            bases = self._bases.known
            used, floor = self._core.used + bases.used, self._core.floor + bases.in_use
            change, news = self._memory.tick(used, floor, bases.used)
            if change is not None:
                self._share_out(change.drop)
            elif self._memory.asks_again(self._core.wanting):
                self._feed(events.MemoryWanted())
            if news is not None:
                for session in self._peers:
                    self._to_control(session, news)

    async def _watch_warmth(self) -> None:
        """Note what outlives this daemon: who holds its memory, and what is worth keeping; tell when that is back."""
        while True:
            await asyncio.sleep(1.0)
            if self._holders.changed(held_now(self._core, self._bases.known)):
                await asyncio.to_thread(self._holders.write)
            models = self._core.models.values()
            self._diary.recalled(models)
            due = self._remembering.due(models, time.monotonic()) if self._remembering is not None else ()
            if not due:
                continue
            await self._record(due)

    async def _record(self, models: Iterable[Model]) -> None:
        records = [record_of(model, time.time()) for model in models]
        await self._records.write([record for record in records if record is not None])

    async def _watch_idle(self) -> None:
        """Give back models that nobody has used for the time that they are kept; end when nobody was here for long."""
        while True:
            await asyncio.sleep(1.0)
            models = {model.key: model.in_use for model in self._core.models.values()}
            for key in self._idleness.unused(time.monotonic(), models):
                self._feed(events.Unwanted(key))
            if self._idleness.over(time.monotonic(), busy=bool(self._peers or self._attaching.under_way)):
                self._end_because(f"nobody was attached for {self._idleness.exit_s:.0f} s")
