"""A session: one process's hold on one model's pools, and the conversation with the daemon about it.

It outlives its daemon: when that dies, pages that are mapped stay as they are, and a control thread attaches to the
next one as soon as it is there.  Nothing that was looked up becomes wrong by that; a miss waits.

The rules it keeps (PROTOCOL.md, "Acks", "Generations"): an ack names a version that the daemon *told* in a message, and
is sent only when nothing that was looked up before is still to be read.  A new generation of a pool, or a new daemon's
pools, are *offered* by the control thread, and adopted under the forward lock by ``expertd.worker.experts``.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import msgspec
import numpy as np
import zmq
from numpy.typing import NDArray

from expertd.protocol import messages
from expertd.protocol.connection import Connection
from expertd.protocol.errors import (
    DaemonLost,
    DaemonNotRunning,
    ExpertdError,
    PoolMoved,
    SessionClosed,
    SessionUnknown,
    from_code,
)
from expertd.protocol.logs import Log, Sparsely
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.protocol.routing import pack
from expertd.worker.doorbell import Doorbell
from expertd.worker.link import Link, MappedPool, Mode
from expertd.worker.pressure import Gauge

log = Log("expertd.worker")

RESEND_S = 5.0
"""An unanswered Fetch is sent again after so long: it is idempotent, and a ROUTER may drop an answer."""
SILENCE_S = 60.0
"""A daemon that does not even answer pings for so long while a Fetch waits is given up for that forward."""
RECOVERY_S = 30.0
"""How long a forward that misses waits for a daemon's return."""
MOVE_S = 5.0
"""A session that was told that its pool moved and hears nothing of the new one for so long attaches anew."""
FLUSH_FORWARDS = 100
"""The routing log is sent after so many forwards, or with the next Fetch or ack, or when idle."""
LAST_REPORT_S = 0.3
"""How long a session that is closed waits until its last report is taken."""
IDLE_S = 1.0
"""Without a forward for so long it is idle."""
_POLL_S = 0.25
_RETRY_S = (0.05, 2.0)
"""Pauses between two attempts to attach again: while a forward waits for it, and while nobody does."""

_FORKED = (
    "a model that was loaded before a fork cannot be used in the child, and MLX neither; start a new process "
    "(multiprocessing's 'spawn') and load it there"
)

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """Open from construction to ``close``.

    One forward at a time: between ``begin`` and ``end`` the caller may look blocks up in the tables and read the slots
    that it found.  ``end``, ``ack`` and ``fetch`` promise that whatever was looked up before them is evaluated.

    Attributes:
        owner: identity of the thread that is between ``begin`` and ``end``, 0 if none is.
        asked, acked: how often the daemon has asked for an ack, and which of these requests has been answered.  If they
            differ, the owner calls ``ack`` when it may.
        leases_only: until the next ``fetch`` nothing may be looked up, and nothing read but what the last one gave.
        routing: what routers chose, ``(layer, experts)``, and no message has told yet.  The owner appends events that
            were all hits; the others ride in their Fetch.
        decode_tokens, prompt_tokens: what was computed and no message has told yet; the owner counts with ``computed``.
        news: grows when pools are offered or have become complete, or ``to_record`` changes.
        to_record: the number of the daemon's last wish to have this session's routing recorded, and the file; None for
            none.
        pools: those that have been adopted.
        base: the pages of the manifest's base weights, for whoever makes arrays of them; None if they are not shared.
        pressure: how short of memory the machine is, as the daemon says.
        fetches, waited_s: how many fetches were answered, and the seconds that they took in all.
        on_idle: called by the control thread under the forward lock, when no forward has run for a while.
        on_close: called under the forward lock when the session is closed, before anything is given up.
    """

    def __init__(self, home: Home, manifest: Manifest, mode: Mode, start: Callable[[], None] | None = None) -> None:
        """Attach.

        Args:
            start: sees to it that a daemon runs, should it be gone when it is needed again.
        Raises:
            DaemonNotRunning, ProtocolMismatch, BudgetTooSmall, CheckpointError, SegmentFailed: as the daemon says.
        """
        self._process = os.getpid()
        self._home = home
        self._manifest = manifest
        self.mode = mode
        self._start = start
        self._closed: ExpertdError | None = None
        self._abandoned = False
        self._forward = threading.Lock()
        self._unanswered: messages.Fetch | None = None
        self._settled = True
        self._quiet = (0, time.monotonic())  # how many forwards there had been when one was seen last, and when
        self.owner = 0
        self.leases_only = False
        self.asked = self.acked = 0
        self.routing: list[tuple[int, Sequence[int]]] = []
        self.decode_tokens = self.prompt_tokens = 0
        self._forwards = 0
        self._missed_in = 0  # the number of the last forward in which something was fetched
        self._frames_before = 0
        # Between the two threads: what is offered, what was unmapped, whether somebody waits for a daemon, and how
        # that goes.
        self._exchange = threading.Condition()
        self._offers: dict[tuple[int, ...], MappedPool] = {}
        self._outbox: deque[messages.Released | messages.Recorded] = deque()
        self._left: deque[Link] = deque()  # nothing is looked up there any more; the control thread hangs up
        self._needed = False
        self._attempts = 0
        self._refusals = Sparsely(10.0)
        self._trouble: ExpertdError = DaemonNotRunning("no daemon runs")
        self.news = 0
        self.to_record: tuple[int, str | None] = (0, None)
        self._recorded = False
        self.pressure = Gauge()
        self.fetches, self.waited_s = 0, 0.0
        self.on_idle: Callable[[], None] = lambda: None
        self.on_close: Callable[[], None] = lambda: None
        alone = msgspec.structs.replace(manifest, base=())
        self._link = self._active = Link(home, manifest if mode == "shm" else alone, mode)
        # Of another daemon none are wanted: what is mapped stays, and nobody ever writes to it.
        self._held_base = self._link.held_base
        self._manifest_again = alone if self._held_base is None else manifest
        self.base, self._link.base = self._link.base, None
        self.pools, self._link.pools = self._link.pools, []
        self._follow_unmapping(self._link, self.pools)
        self._bell = Doorbell()
        self._thread = threading.Thread(target=self._run, name=f"session-{self._link.number}", daemon=True)
        _sessions.add(self)
        self._thread.start()

    @property
    def number(self) -> int:
        """The session's number in its present daemon."""
        return self._link.number

    @property
    def home(self) -> Home:
        """Whose daemon it is attached to."""
        return self._home

    @property
    def manifest(self) -> Manifest:
        """Which blocks the session's model has."""
        return self._manifest

    # -- the computing thread ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a forward (waits for one of another thread).

        Raises:
            SessionClosed: the session was closed, or this process is a fork of its owner.
            DaemonLost: an answer that an interrupted forward did not wait for does not come.
        """
        self._forward.acquire()
        try:
            self._check_open()
            if self._unanswered is not None:
                try:
                    self._await_answer(self._link, self._unanswered)
                except PoolMoved:
                    self.leases_only = True  # a daemon that lives may believe for ever that nothing is looked up
            self._settled = False
            self.owner = threading.get_ident()
        except BaseException:
            self._forward.release()
            raise

    def end(self, settled: bool) -> None:
        """Finish a forward.

        Args:
            settled: nothing that was looked up in it is still to be read.  If that is not known (an interrupt came
                between), the session acks nothing until a later forward has settled.
        """
        self._settled = settled
        self.owner = 0
        if not settled:
            self._forward.release()
            return
        self._forwards += 1
        flush = self._forwards % FLUSH_FORWARDS == 0 and self._closed is None
        while True:
            try:
                if flush and self.routing:
                    self._report(self._link.data)
                if self.asked != self.acked:
                    self.ack()
            finally:
                self._forward.release()
            # The control thread may have noted a request after the ack and found the lock still taken.
            if self.asked == self.acked or not self._forward.acquire(blocking=False):
                return

    def computed(self, sequences: int, length: int) -> None:
        """The forward that ends has computed ``length`` tokens of each of so many sequences."""
        if length == 1:
            self.decode_tokens += sequences
        else:
            self.prompt_tokens += sequences * length

    def report(self) -> None:
        """Tell the daemon what was routed and computed until now (between two forwards)."""
        with self.between_forwards():
            self._report(self._link.data)

    @contextlib.contextmanager
    def between_forwards(self) -> Iterator[None]:
        """No forward runs in the block.

        Raises:
            SessionClosed: the session was closed, or this process is a fork of its owner.
        """
        with self._forward:
            self._check_open()
            yield

    def recorded(self, path: str, tokens: int, error: str = "") -> None:
        """Tell the daemon that the recording in ``path`` has ended, or why it could not begin."""
        self._recorded = True
        self._tell(messages.Recorded(session=self._link.number, path=path, tokens=tokens, error=error))

    def ack(self) -> None:
        """Answer the daemon's request for an ack; the caller has evaluated all that was looked up until now."""
        self._send_ack(self._link.data)

    @property
    def announces(self) -> int:
        """What should be announced (``messages.Announce``): as the daemon wants, and less while nothing misses."""
        wanted = self._link.announce
        return wanted if wanted <= 0 or self._forwards - self._missed_in <= 1 else 0

    def fetch(
        self,
        pool: MappedPool,
        layer: int,
        experts: NDArray[np.integer],
        then: Sequence[int] = (),
        leases_only: bool = False,
    ) -> NDArray[np.int32]:
        """Make the blocks (``layer``, ``experts``) resident in ``pool`` and lease them until the next fetch or ack.

        Args:
            experts: distinct ids, shape ``[n]``, at most as many as the layer's pool has slots.
            then: those that the next fetches of the same event will ask for, in this order.
            leases_only: the promise that until the next fetch nothing is looked up, and nothing else read than what
                this one gives.
        Returns:
            Their slots, shape ``[n]``.
        Raises:
            PoolMoved: the layer's pool has a new generation, or the daemon is gone: ``follow``, adopt, look up again.
            ReadFailed, FileChanged: the disk or the file failed; the next fetch may work.
            DaemonLost: the daemon does not answer.
        """
        self._check_open()
        link = pool.link
        if link.lost:
            raise PoolMoved("the daemon has gone")
        self.acked = self.asked  # a Fetch acks everything that was told
        link.sequence += 1
        self._missed_in = self._forwards
        decode_tokens, prompt_tokens = self._take_tokens()
        request = messages.Fetch(
            session=link.number,
            sequence=link.sequence,
            segment=pool.segment,
            layer=layer,
            experts=experts.tolist(),
            routing=self._take_routing(),
            then=list(then),
            leases_only=leases_only,
            decode_tokens=decode_tokens,
            prompt_tokens=prompt_tokens,
        )
        self._unanswered, self.leases_only = request, leases_only
        began = time.monotonic()
        link.data.send(request)
        answer = self._await_answer(link, request)
        self.waited_s += time.monotonic() - began
        self.fetches += 1
        if isinstance(answer, messages.Error):
            self.leases_only = False
            raise answer.exception()
        return np.array(answer.slots, np.int32)

    def announce(self, pool: MappedPool, layer: int, experts: Sequence[int], distance: int, prompt: bool) -> None:
        """Tell that the next event in ``layer``, ``distance`` layers from now, may need ``experts``, which are absent.

        Args:
            experts: distinct ids, the likeliest first.
            prompt: it will be an event of many tokens.
        """
        link = pool.link
        if not link.lost:
            link.data.send(
                messages.Ahead(
                    session=link.number,
                    segment=pool.segment,
                    layer=layer,
                    experts=list(experts),
                    distance=distance,
                    prompt=prompt,
                    routing=self._take_routing(),
                )
            )

    def _await_answer(self, link: Link, request: messages.Fetch) -> messages.Resident | messages.Error:
        """The answer to ``request``.

        A caller that is interrupted here (Ctrl-C) leaves ``_unanswered`` set: until the answer has come, the daemon
        takes this session for one that looks nothing up, so nothing may be looked up.  Time is counted in polls, so
        that a machine that slept has not waited.
        """
        silent_s, waited_s = 0.0, 0.0
        while not link.lost:
            answer = link.data.receive(_POLL_S)
            self._check_open()
            if answer is None:
                silent_s += _POLL_S
                waited_s += _POLL_S
                if waited_s >= RESEND_S:
                    waited_s = 0.0
                    link.data.send(request)
                    link.data.send(messages.Ping(session=link.number))
                if silent_s >= SILENCE_S:
                    raise DaemonLost(f"the daemon of {self._home.root} has not answered for {silent_s:.0f} s")
                continue
            silent_s = 0.0
            if isinstance(answer, messages.Resident) and answer.sequence == request.sequence:
                self._unanswered = None
                link.told_by_answer = answer.version
                link.announce = answer.announce
                return answer
            if isinstance(answer, messages.Error) and answer.sequence == request.sequence:
                if answer.code == SessionUnknown.code:
                    break
                self._unanswered = None
                return answer
            if isinstance(answer, messages.Error) and answer.sequence is None:
                # Not about this Fetch: the two sides no longer agree on what was said.
                log.warning("the daemon refused a message (%s); attaching anew", answer.message)
                break
        self._unanswered = None
        self._give_up(link)
        raise PoolMoved("the daemon has gone")

    def follow(self, seen: int) -> None:
        """Wait until there are other news than ``seen``: new generations, or a new daemon's pools.

        Raises:
            DaemonLost: no daemon has come back in time.
            ExpertdError: why there can be none, or why it does not take the model.
        """
        waited_s = 0.0
        with self._exchange:
            before = self._attempts
            self._needed = True
            try:
                while self.news == seen:
                    self._check_open()
                    late = waited_s >= RECOVERY_S
                    if late or (self._attempts > before and not self._trouble.retryable):
                        self._raise_trouble(waited_s)
                    if waited_s >= MOVE_S and not self._active.lost:
                        self._active.lost = True
                    self._bell.ring()
                    self._exchange.wait(_POLL_S)
                    waited_s += _POLL_S
            finally:
                self._needed = False

    def _raise_trouble(self, waited_s: float) -> NoReturn:
        trouble = self._trouble
        if isinstance(trouble, DaemonNotRunning):
            raise DaemonLost(f"no daemon has come back in {self._home.root} within {waited_s:.0f} s") from None
        raise from_code(trouble.code, trouble.message)

    def offered(self) -> list[MappedPool]:
        """The pools that are to be adopted; under the forward lock."""
        with self._exchange:
            return list(self._offers.values())

    def adopted(self, pools: Sequence[MappedPool]) -> None:
        """From now on lookups go to ``pools``; under the forward lock, and nothing reads others but lazy graphs."""
        with self._exchange:
            covered = {layer for pool in pools for layer in pool.layers}
            self.pools = [pool for pool in self.pools if not covered.issuperset(pool.layers)] + list(pools)
            for pool in pools:
                if self._offers.get(pool.layers) is pool:
                    del self._offers[pool.layers]
            link = pools[-1].link
            if self._link is not link:
                self._frames_before += self._link.frames
                self._link.data.close()
                self._left.append(self._link)
                self._link = link
                self._unanswered, self.leases_only = None, False
                self.acked = self.asked

    def _check_open(self) -> None:
        """Raise why this session is closed, if it is.

        A new exception each time: one that has been raised holds its frames, which hold the model, which must not be
        held by its own session.
        """
        if self._closed is not None:
            raise from_code(self._closed.code, self._closed.message)

    def _take_routing(self) -> bytes:
        taken, self.routing = self.routing, []
        return b"".join(pack(layer, experts) for layer, experts in taken)

    def _take_tokens(self) -> tuple[int, int]:
        taken, self.decode_tokens, self.prompt_tokens = (self.decode_tokens, self.prompt_tokens), 0, 0
        return taken

    def _report(self, over: Connection) -> None:
        """Send the routing log; without a daemon it is lost, which costs only statistics."""
        routing, (decode, prompt) = self._take_routing(), self._take_tokens()
        if not self._link.lost:
            number = self._link.number
            over.send(
                messages.RoutingLog(session=number, routing=routing, decode_tokens=decode, prompt_tokens=prompt)
            )

    def _report_at_last(self) -> None:
        """Send the routing log, and see it taken: what waits in a socket that is closed is lost."""
        if self._link.lost or not (self.routing or self.decode_tokens or self.prompt_tokens):
            return
        over, number = self._link.data, self._link.number
        with contextlib.suppress(ExpertdError, zmq.ZMQError):
            self._report(over)
            over.send(messages.Ping(session=number))
            until = time.monotonic() + LAST_REPORT_S
            while (said := over.receive(until - time.monotonic())) is not None and not isinstance(said, messages.Pong):
                continue

    def _send_ack(self, over: Connection) -> None:
        """Ack everything that was told over the present link; the caller holds the forward lock."""
        asked, link = self.asked, self._link
        version = max(link.told_by_request, link.told_by_answer)
        routing, (decode, prompt) = self._take_routing(), self._take_tokens()
        if not link.lost:
            over.send(
                messages.Ack(
                    session=link.number, version=version, sequence=link.sequence, routing=routing,
                    decode_tokens=decode, prompt_tokens=prompt,
                )
            )  # fmt: skip
        self.acked = asked

    def _give_up(self, link: Link) -> None:
        """Let the control thread attach anew."""
        link.lost = True
        self._bell.ring()

    def _tell(self, message: messages.Released | messages.Recorded) -> None:
        """Have the control thread send ``message``, unless the daemon that it is for is gone; on whatever thread."""
        self._outbox.append(message)
        self._bell.ring()

    # -- the control thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_s = 0.0
        while self._closed is None and not self._abandoned:
            try:
                if self._active.lost:
                    self._leave(self._active)
                    self.pressure.reset()
                    until_s = pause_s if not self._needed else min(pause_s, _RETRY_S[0])
                    self._bell.wait(until_s, self._home.daemon_socket)  # a new daemon reads nothing that is here
                    pause_s = self._attach_again(pause_s)
                else:
                    self._attend(self._active)
                    pause_s = 0.0
            except (ExpertdError, OSError, zmq.ZMQError) as error:
                if self._closed is None and not self._abandoned:
                    log.warning("%s", error)
                self._active.lost = True
        if self._abandoned:
            with self._forward:  # somebody may still compute with one of the model's layers
                self._closed = self._closed or SessionClosed("the model is gone; keep it while its layers are used")
        if self._settled:
            self._send_outbox(self._active)
            if self._recorded:
                self._active.say_goodbye()
            for link in (*self._left, self._link, self._active):
                link.hang_up()
        if self._abandoned:
            self._close_sockets()
        with self._exchange:
            self._exchange.notify_all()

    def _leave(self, link: Link) -> None:
        """Nothing more is said over ``link``: tell its daemon, when nothing is looked up in its pools any more.

        A daemon that lives must not take the session for over before: it would fill slots again that are read.  Of one
        that has gone the pages stay as they are.
        """
        if link is not self._link or link.ended():
            link.hang_up()
        elif self._forward.acquire(blocking=False):
            try:
                if self._settled:
                    self.leases_only = True  # so the next event fetches, and waits for other pools
                    link.hang_up()
            finally:
                self._forward.release()

    def _send_outbox(self, link: Link) -> None:
        while self._outbox:
            said = self._outbox.popleft()
            if isinstance(said, messages.Released) and said.segment in link.handed:
                said = messages.Released(session=link.number, segment=said.segment)
            if said.session == link.number and not link.lost:
                link.control.send(said)

    def _attach_again(self, pause_s: float) -> float:
        """Try to attach to whatever daemon there is; returns how long to pause before the next attempt."""
        try:
            if self._needed and self._start is not None:
                self._start()
            with self._exchange:
                held = [*self._offers.values(), *self.pools]
            link = Link(self._home, self._manifest_again, self.mode, held, self._held_base)
        except (ExpertdError, OSError) as error:
            with self._exchange:
                self._attempts += 1
                # A new one: this one's story holds the pools that were to be handed back.
                if isinstance(error, ExpertdError):
                    self._trouble = from_code(error.code, error.message)
                else:
                    self._trouble = DaemonLost(str(error))
                self._exchange.notify_all()
            if not isinstance(error, DaemonNotRunning) and self._refusals.add():
                log.warning("the model could not be attached again: %s", error, attempts=self._attempts)
            return min(max(2 * pause_s, _RETRY_S[0]), _RETRY_S[1])
        log.info("attached again", session=link.number, before=self._link.number, attempts=self._attempts + 1)
        with self._exchange:
            self.to_record = self.to_record[0] + 1, None  # it was the last daemon's wish
            if self._active is not self._link:
                self._active.data.close()  # nobody has used it
            self._active = link
            self._offers = {pool.layers: pool for pool in link.pools}
            self._follow_unmapping(link, link.pools)
            link.pools = []
            self._told()
        return 0.0

    def _told(self) -> None:
        """There are news; the caller holds ``_exchange``."""
        self.news += 1
        self._exchange.notify_all()

    def _attend(self, link: Link) -> None:
        """Wait for a second, or for something to happen, and see to it."""
        poller = zmq.Poller()
        poller.register(link.control.socket, zmq.POLLIN)
        poller.register(link.line.fileno(), zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        ready = dict(poller.poll(round(IDLE_S * 1000)))
        if self._bell.fileno() in ready:
            self._bell.answer()
        while self._left:
            self._left.popleft().hang_up()
        self._send_outbox(link)
        if link.control.socket in ready:
            self._listen(link)
        elif link.line.fileno() in ready and link.ended():
            raise DaemonLost(f"the daemon of {self._home.root} has ended; the model waits for its return")
        now = time.monotonic()
        if self._forwards != self._quiet[0]:
            self._quiet = self._forwards, now
        elif now - self._quiet[1] >= IDLE_S:  # whatever else is heard meanwhile: who keeps old pools is pinged
            self._when_idle()

    def _listen(self, link: Link) -> None:
        match link.control.receive(0):
            case messages.AckRequest(version=version):
                link.told_by_request = max(link.told_by_request, version)
                if link is not self._link:
                    self._ack_unused(link)
                    return
                self.asked += 1
                if self._forward.acquire(blocking=False):
                    try:
                        if self.asked != self.acked and self._settled and link is self._link:
                            self._send_ack(link.control)
                    finally:
                        self._forward.release()
            case messages.Complete(segment=segment):
                with self._exchange:
                    for pool in (*self.pools, *self._offers.values()):
                        if pool.segment == segment:
                            pool.complete = True
                    self._told()
            case messages.Moved(pool=info):
                pool = link.receive_pool(info)
                with self._exchange:
                    self._follow_unmapping(link, [pool])
                    self._offers[pool.layers] = pool
                    self._told()
            case messages.Record(path=path):
                with self._exchange:
                    self.to_record = self.to_record[0] + 1, path or None
                    self._told()
            case messages.Ping():
                link.control.send(messages.Pong(session=link.number))
            case messages.Pressure() as told:
                self.pressure.take(told)
            case messages.Error() as error:
                raise error.exception()

    def _ack_unused(self, link: Link) -> None:
        """Ack over a link whose pools nobody has adopted yet, so that nothing can have been looked up there."""
        with self._exchange:
            if link is not self._link:
                version = link.told_by_request
                link.control.send(messages.Ack(session=link.number, version=version, sequence=0))

    def _when_idle(self) -> None:
        """No forward ran for a while: report what was routed, and adopt news, so that old pools can be given back."""
        if self._forward.acquire(blocking=False):
            try:
                if self.routing or self.decode_tokens or self.prompt_tokens:
                    self._report(self._link.control)
                if self._settled and self._closed is None:
                    self.on_idle()
            finally:
                self._forward.release()

    def _follow_unmapping(self, link: Link, pools: Sequence[MappedPool]) -> None:
        """Tell the daemon when the pages of ``pools`` are really gone from this process."""
        for pool in pools:
            gone = weakref.finalize(pool.mapping, _unmapped, weakref.ref(self), link.number, pool.segment)
            gone.atexit = False

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened the session."""
        return self._process != os.getpid()

    @property
    def frames(self) -> int:
        """Frames that passed between this session and its daemons, both ways, since it was opened."""
        return self._frames_before + self._link.frames

    def close(self) -> None:
        """Detach.  Waits for a forward that is under way; later ones raise SessionClosed.

        Unmapping the pages is for whoever has arrays over them (``expertd.worker.alias``).
        """
        if self.forked:
            return
        with self._forward:
            if self._closed is None:
                self._report_at_last()
                try:
                    self.on_close()
                finally:
                    self._closed = SessionClosed("the model was closed; load it again")
        self._bell.ring()
        self._thread.join()
        self._close_sockets()

    def _close_sockets(self) -> None:
        """Close what is left; if a graph may still read a pool, the daemon keeps that until this process ends."""
        if self._settled:
            for link in (self._link, self._active):
                link.data.close()
            self.pools.clear()
            self._offers.clear()
        self._bell.close()

    def abandon(self) -> None:
        """Close a session whose model was garbage-collected.

        The collector runs on any thread and at any place, so this takes no lock and waits for nobody.
        """
        if not self.forked:
            self._abandoned = True
            self._bell.ring()


def _unmapped(session: weakref.ref[Session], number: int, segment: int) -> None:
    """The pages of a pool are gone; on whatever thread, so this only notes it down."""
    alive = session()
    if alive is not None and not alive.forked:
        alive._tell(messages.Released(session=number, segment=segment))


def _void_after_fork() -> None:
    """In a forked child sessions are the parent's: hang up nothing, send nothing, refuse to compute."""
    for session in _sessions:
        session._closed = SessionClosed(_FORKED)
        session._forward = threading.Lock()  # the parent's may be held by a thread that does not exist here
        # The parent's death must reach the daemon as an end of file, so the child may not hold the line open.
        for link in (session._active, session._link, *session._left):
            link.line.close()
        session._bell.close()


def close_all() -> None:
    """Close every session of this process (at exit)."""
    for session in list(_sessions):
        session.close()


os.register_at_fork(after_in_child=_void_after_fork)
