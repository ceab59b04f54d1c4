"""A session: one process's hold on one model's pools, and the conversation with the daemon about it.

Here is the computing side: the forward lock, acks and fetches.  The control thread that every session has is
``expertd.worker.control``; which daemon it is, and what goes over to the next one, ``expertd.worker.succession``.

The rules it keeps (PROTOCOL.md, "Acks", "Generations"): an ack names a version that the daemon *told* in a message, and
is sent only when nothing that was looked up before is still to be read.  What is offered is adopted under the forward
lock, by ``expertd.worker.experts``.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from expertd.protocol import messages
from expertd.protocol.connection import Connection
from expertd.protocol.errors import (
    ExpertdError,
    PoolMoved,
    SessionClosed,
    from_code,
)
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.worker import sessions
from expertd.worker.control import Control
from expertd.worker.doorbell import Doorbell
from expertd.worker.link import Link, MappedPool, Mode
from expertd.worker.pressure import Gauge
from expertd.worker.succession import Succession
from expertd.worker.talk import Talk

FLUSH_FORWARDS = 100
"""The routing log is sent after so many forwards, or with the next Fetch or ack, or when idle."""

_FORKED = (
    "a model that was loaded before a fork cannot be used in the child, and MLX neither; start a new process "
    "(multiprocessing's 'spawn') and load it there"
)

class Session:
    """Open from construction to ``close``.

    One forward at a time: between ``begin`` and ``end`` the caller may look blocks up in the tables and read the slots
    that it found.  ``end``, ``ack`` and ``fetch`` promise that whatever was looked up before them is evaluated.

    Attributes:
        home, manifest, mode: whose daemon it is attached to, which blocks the model has, and how it uses their pages.
        forwards: how many have ended.
        owner: identity of the thread that is between ``begin`` and ``end``, 0 if none is.
        asked, acked: how often the daemon has asked for an ack, and which of these requests has been answered.  If they
            differ, the owner calls ``ack`` when it may.
        leases_only: until the next ``fetch`` nothing may be looked up, and nothing read but what the last one gave.
        routing: what routers chose, ``(layer, experts)``, and no message has told yet.  The owner appends events that
            were all hits; the others ride in their Fetch.
        pressure: how short of memory the machine is, as the daemon says.
        on_idle: called by the control thread under the forward lock, when no forward has run for a while.
        on_close: called under the forward lock when the session is closed, before anything is given up.
        let_go: called by the control thread when nobody computes any more: drops the arrays over the session's pages,
            and tells whether nothing can read those now; if something can, it is called again and again.
        abandoned: the model is gone.
        hurried: somebody waits for the end.
    """

    def __init__(self, home: Home, manifest: Manifest, mode: Mode, start: Callable[[], None] | None = None) -> None:
        """Attach.

        Args:
            start: sees to it that a daemon runs, should it be gone when it is needed again.
        Raises:
            DaemonNotRunning, ProtocolMismatch, BudgetTooSmall, CheckpointError, SegmentFailed: as the daemon says.
        """
        self._process = os.getpid()
        self.home = home
        self.manifest = manifest
        self.mode = mode
        self._closed: ExpertdError | None = None
        self.abandoned = False
        self.hurried = False
        self._at_once = False
        self._tried = threading.Event()  # to let the pages go
        self._forward = threading.Lock()
        self._settled = True
        self.owner = 0
        self.leases_only = False
        self.asked = self.acked = 0
        self._talk = Talk(home)
        self.routing = self._talk.routing
        self.forwards = 0
        self._missed_in = 0  # the number of the last forward in which something was fetched
        self.pressure = Gauge()
        self.on_idle: Callable[[], None] = lambda: None
        self.on_close: Callable[[], None] = lambda: None
        self.let_go: Callable[[], bool] = lambda: True
        self._bell = Doorbell()
        try:
            self._succession = Succession(home, manifest, mode, start, self._bell)
        except BaseException:
            self._bell.close()
            raise
        control = Control(self, self._succession, self._bell)
        self._thread = threading.Thread(target=control.run, name=f"session-{self.number}", daemon=True)
        sessions.register(self)
        self._thread.start()

    @property
    def _link(self) -> Link:
        return self._succession.link

    @property
    def pools(self) -> list[MappedPool]:
        """Those that have been adopted."""
        return self._succession.pools

    @property
    def news(self) -> int:
        """Grows when pools are offered or have become complete, or ``to_record`` changes."""
        return self._succession.news

    @property
    def to_record(self) -> tuple[int, str | None]:
        """The number of the daemon's last wish to have this session's routing recorded, and the file; None for none."""
        return self._succession.to_record

    @property
    def fetches(self) -> int:
        """How many fetches were answered."""
        return self._talk.fetches

    @property
    def waited_s(self) -> float:
        """The seconds that they took in all."""
        return self._talk.waited_s

    def take_base(self) -> tuple[mmap.mmap, int] | None:
        """The pages of the manifest's base weights, for whoever makes arrays of them; None if they are not shared.

        Their descriptor too, which is there as long as they are mapped.
        """
        return self._succession.take_base()

    @property
    def number(self) -> int:
        """The session's number in its present daemon."""
        return self._link.number

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
            if self._talk.unanswered is not None:
                try:
                    self._talk.await_answer(self._link, self._talk.unanswered, self._check_open)
                except PoolMoved:
                    self._bell.ring()  # attach anew
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
        self.forwards += 1
        flush = self.forwards % FLUSH_FORWARDS == 0 and self._closed is None
        while True:
            try:
                if flush and self.routing:
                    self._talk.report(self._link, self._link.data)
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
            self._talk.decode_tokens += sequences
        else:
            self._talk.prompt_tokens += sequences * length

    def report(self) -> None:
        """Tell the daemon what was routed and computed until now (between two forwards)."""
        with self.between_forwards():
            self._talk.report(self._link, self._link.data)

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
        self._succession.tell(messages.Recorded(session=self._link.number, path=path, tokens=tokens, error=error))

    def ack(self) -> None:
        """Answer the daemon's request for an ack; the caller has evaluated all that was looked up until now."""
        self._send_ack(self._link.data)

    @property
    def announces(self) -> int:
        """What should be announced (``messages.Announce``): as the daemon wants, and less while nothing misses."""
        wanted = self._link.announce
        return wanted if wanted <= 0 or self.forwards - self._missed_in <= 1 else 0

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
        self._missed_in = self.forwards
        self.leases_only = leases_only
        try:
            answer = self._talk.fetch(pool, layer, experts.tolist(), then, leases_only, self._check_open)
        except PoolMoved:
            self._bell.ring()  # attach anew
            raise
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
        self._talk.announce(pool, layer, experts, distance, prompt)

    def follow(self, seen: int) -> None:
        """Wait until there are other news than ``seen``: new generations, or a new daemon's pools.

        Raises:
            DaemonLost: no daemon has come back in time.
            ExpertdError: why there can be none, or why it does not take the model.
        """
        self._succession.follow(seen, self._check_open)

    def offered(self) -> list[MappedPool]:
        """The pools that are to be adopted; under the forward lock."""
        return self._succession.offered()

    def adopted(self, pools: Sequence[MappedPool]) -> None:
        """From now on lookups go to ``pools``; under the forward lock, and nothing reads others but lazy graphs."""
        if pools[-1].link is not self._link:
            self._talk.unanswered, self.leases_only = None, False
            self.acked = self.asked  # before requests can come over the new one
        self._succession.adopted(pools)

    def _check_open(self) -> None:
        """Raise why this session is closed, if it is.

        A new exception each time: one that has been raised holds its frames, which hold the model, which must not be
        held by its own session.
        """
        if self._closed is not None:
            raise from_code(self._closed.code, self._closed.message)

    def _send_ack(self, over: Connection) -> None:
        """Ack everything that was told over the present link; the caller holds the forward lock."""
        asked = self.asked
        self._talk.ack(self._link, over)
        self.acked = asked

    @property
    def over(self) -> bool:
        """Whether nobody computes any more, or will."""
        return self._closed is not None or self.abandoned

    def leave(self, link: Link) -> None:
        """Hang up on the daemon whose pools are looked up in, unless something may still read there."""
        if self._forward.acquire(blocking=False):
            try:
                if self._settled:
                    self.leases_only = True  # so the next event fetches, and waits for other pools
                    link.hang_up()
            finally:
                self._forward.release()

    def ack_wanted(self, link: Link) -> None:
        """The daemon has asked for an ack over ``link``: give it now, or leave it to the forward that runs."""
        if link is not self._link:
            # Nobody has adopted its pools yet, so nothing can have been looked up there.
            with self._succession.nothing_adopted():
                if link is not self._link:
                    link.control.send(messages.Ack(session=link.number, version=link.told_by_request, sequence=0))
            return
        self.asked += 1
        if self._forward.acquire(blocking=False):
            try:
                if self.asked != self.acked and self._settled and link is self._link:
                    self._send_ack(link.control)
            finally:
                self._forward.release()

    def while_idle(self) -> None:
        """No forward ran for a while: report what was routed, and adopt news, so that old pools can be given back."""
        if self._forward.acquire(blocking=False):
            try:
                if self._talk.untold:
                    self._talk.report(self._link, self._link.control)
                if self._settled and self._closed is None:
                    self.on_idle()
            finally:
                self._forward.release()

    def shut(self) -> None:
        """Nobody computes any more; the model may be gone."""
        with self._forward:
            self._closed = self._closed or SessionClosed("the model is gone; keep it while its layers are used")

    def part(self) -> bool:
        """Nobody computes any more: let the pages go; whether the session can end.

        As long as a daemon counts the session, its pools stay until all can go, because it has all or nothing.  Of one
        that has gone only what something can still read stays.
        """
        if not self._at_once:
            self._succession.adopt_unused()
            if self.let_go() or self._succession.active.lost:
                self._succession.let_go()
            if self._succession.mapped:
                self._tried.set()
                return False
        return True

    def ended(self) -> None:
        """The session ends: hang up, unless something may still read a pool that the daemon may write to."""
        if self._settled or not self._succession.mapped:
            self._succession.hang_up()
            self._succession.close()
        self._bell.close()

    def unattended(self) -> None:
        """The control thread is at its end, or broken: nobody is to wait for it."""
        self._tried.set()
        self._succession.wake()

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened the session."""
        return self._process != os.getpid()

    @property
    def frames(self) -> int:
        """Frames that passed between this session and its daemons, both ways, since it was opened."""
        return self._succession.frames

    def stop(self) -> None:
        """Have nobody compute any more.  Waits for a forward that is under way; later ones raise SessionClosed."""
        with self._forward:
            if self._closed is None:
                self._talk.report_at_last(self._link)
                try:
                    self.on_close()
                finally:
                    self._closed = SessionClosed("the model was closed; load it again")

    def close(self, at_once: bool = False) -> None:
        """Detach, after ``stop``.

        If arrays over the pages are still used, the session ends for the daemon when those are gone (``let_go``), or
        with the process.

        Args:
            at_once: end now, and leave what is mapped to the end of the process.
        """
        if self.forked:
            return
        self.stop()
        self.hurried = True
        self._at_once = self._at_once or at_once
        self._bell.ring()
        self._tried.wait()
        if at_once or not self._succession.mapped:
            self._thread.join()

    def void(self) -> None:
        """In a forked child the session is the parent's: hang up nothing, send nothing, refuse to compute."""
        self._closed = SessionClosed(_FORKED)
        self._forward = threading.Lock()  # the parent's may be held by a thread that does not exist here
        # The parent's death must reach the daemon as an end of file, so the child may not hold the line open.
        for link in self._succession.links():
            link.line.close()
        self._bell.close()

    def abandon(self) -> None:
        """Close a session whose model was garbage-collected.

        The collector runs on any thread and at any place, so this takes no lock and waits for nobody.
        """
        if not self.forked:
            self.abandoned = True
            self._bell.ring()

