"""Which daemon a session looks up in, and what goes over to the next one.

A session outlives its daemon.  When that dies, pages that are mapped stay as they are, and the control thread attaches
to the next one (``active``) as soon as it is there.  What comes from it is *offered*: until the computing thread has
adopted it, under the forward lock, lookups go where they went before (``link``).  A new generation of a pool, from the
daemon that is there, goes the same way.

Who may read what meanwhile, acks and fetches are ``expertd.worker.attach``'s; the thread, and what it hears, is
``expertd.worker.control``.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import msgspec

from expertd.protocol import messages
from expertd.protocol.errors import DaemonLost, DaemonNotRunning, ExpertdError, from_code
from expertd.protocol.logs import Log, Sparsely
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.worker.doorbell import Doorbell
from expertd.worker.link import Link, MappedPool, Mode

log = Log("expertd.worker")

RECOVERY_S = 30.0
"""How long a forward that misses waits for a daemon's return."""
MOVE_S = 5.0
"""A session that was told that its pool moved and hears nothing of the new one for so long attaches anew."""
RETRY_S = (0.05, 0.5)
"""Pauses between two attempts to attach again: while a forward waits for it, and while nobody does."""
_POLL_S = 0.25


class Succession:
    """Between a session's two threads; attached from construction on.

    Attributes:
        link: over which the daemon is asked whose pools are looked up in.
        active: over which the session is attached: ``link``, or one whose pools nobody has adopted yet.
        start: sees to it that a daemon runs, should it be gone when it is needed again.
        pools: those that have been adopted.
        base: the pages of the manifest's base weights, for whoever makes arrays of them; None if they are not shared.
        news: grows when pools are offered or have become complete, or ``to_record`` changes.
        to_record: the number of the daemon's last wish to have this session's routing recorded, and the file; None for
            none.
    """

    def __init__(
        self, home: Home, manifest: Manifest, mode: Mode, start: Callable[[], None] | None, bell: Doorbell
    ) -> None:
        """Attach.  ``bell`` wakes the control thread.

        Raises:
            DaemonNotRunning, ProtocolMismatch, BudgetTooSmall, CheckpointError, SegmentFailed: as the daemon says.
        """
        self._home = home
        self._mode = mode
        self._bell = bell
        self.start = start
        self.news = 0
        self.to_record: tuple[int, str | None] = (0, None)
        self._exchange = threading.Condition()
        self._offers: dict[tuple[int, ...], MappedPool] = {}
        self._outbox: deque[messages.Released | messages.Recorded] = deque()
        self._left: deque[Link] = deque()  # nothing is looked up there any more; the control thread hangs up
        self._recorded = False
        self._needed = False  # somebody waits for a daemon
        self._attempts = 0
        self._refusals = Sparsely(10.0)
        self._trouble: ExpertdError = DaemonNotRunning("no daemon runs")
        self._frames_before = 0
        # Segments that are mapped, and over which link: one may come a second time, from a daemon that was cut off.
        self._mapped: set[tuple[int | None, int]] = set()
        alone = msgspec.structs.replace(manifest, base=())
        self.link = self.active = Link(home, manifest if mode == "shm" else alone, mode)
        # Of another daemon no base weights are wanted: what is mapped stays, and nobody ever writes to it.
        self._held_base = self.link.held_base
        self._manifest_again = alone if self._held_base is None else manifest
        self.base, self.link.base = self.link.base, None
        if self.base is not None and self._held_base is not None:
            self._follow_unmapping(None, self._held_base.info.segment, self.base)
        self.pools, self.link.pools = self.link.pools, []
        for pool in self.pools:
            self._follow_unmapping(self.link.number, pool.segment, pool.mapping)

    # -- the computing thread ------------------------------------------------------------------------------------------

    def follow(self, seen: int, check: Callable[[], None]) -> None:
        """Wait until there are other news than ``seen``: new generations, or a new daemon's pools.

        Args:
            check: raises if there is nothing to wait for any more.
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
                    check()
                    late = waited_s >= RECOVERY_S
                    if late or (self._attempts > before and not self._trouble.retryable):
                        self._raise_trouble(waited_s)
                    if waited_s >= MOVE_S and not self.active.lost:
                        self.active.lost = True
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
            if self.link is not link:
                self._frames_before += self.link.frames
                self.link.data.close()
                self._left.append(self.link)
                self.link = link

    def take_base(self) -> tuple[mmap.mmap, int] | None:
        """See ``Session.take_base``."""
        base, self.base = self.base, None
        return None if base is None or self._held_base is None else (base, self._held_base.descriptor)

    # -- any thread ----------------------------------------------------------------------------------------------------

    def tell(self, message: messages.Released | messages.Recorded) -> None:
        """Have the control thread send ``message``, unless the daemon that it is for is gone."""
        self._recorded = self._recorded or isinstance(message, messages.Recorded)
        self._outbox.append(message)
        self._bell.ring()

    @property
    def frames(self) -> int:
        """Frames that passed between this session and its daemons, both ways, since it was opened."""
        return self._frames_before + self.link.frames

    # -- the control thread --------------------------------------------------------------------------------------------

    def wait(self, pause_s: float) -> None:
        """Let ``pause_s`` pass before the next attempt to attach, or less if a forward waits or a daemon has come."""
        until_s = pause_s if not self._needed else min(pause_s, RETRY_S[0])
        self._bell.wait(until_s, self._home.daemon_socket)  # a new daemon reads nothing that is here

    def attach_again(self, pause_s: float) -> float:
        """Try to attach to whatever daemon there is; returns how long to pause before the next attempt."""
        try:
            if self._needed and self.start is not None:
                self.start()
            with self._exchange:
                held = [*self._offers.values(), *self.pools]
            link = Link(self._home, self._manifest_again, self._mode, held, self._held_base)
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
            return min(max(2 * pause_s, RETRY_S[0]), RETRY_S[1])
        log.info("attached again", session=link.number, before=self.link.number, attempts=self._attempts + 1)
        with self._exchange:
            self.to_record = self.to_record[0] + 1, None  # it was the last daemon's wish
            if self.active is not self.link:
                self.active.data.close()  # nobody has used it
            self.active = link
            self._offers = {pool.layers: pool for pool in link.pools}
            for pool in link.pools:
                self._follow_unmapping(link.number, pool.segment, pool.mapping)
            link.pools = []
            self._told()
        return 0.0

    def offer(self, link: Link, info: messages.PoolInfo) -> None:
        """A pool has a new generation, which has come over ``link``.

        Raises:
            DaemonLost, AliasFailed: it cannot be had.
        """
        pool = link.receive_pool(info)
        with self._exchange:
            self._follow_unmapping(link.number, pool.segment, pool.mapping)
            self._offers[pool.layers] = pool
            self._told()

    def complete(self, segment: int) -> None:
        """A pool holds all blocks of its layers, and keeps them."""
        with self._exchange:
            for pool in (*self.pools, *self._offers.values()):
                if pool.segment == segment:
                    pool.complete = True
            self._told()

    def record(self, path: str) -> None:
        """The daemon wants the routing recorded in ``path``, or no more if that is empty."""
        with self._exchange:
            self.to_record = self.to_record[0] + 1, path or None
            self._told()

    def _told(self) -> None:
        """There are news; the caller holds ``_exchange``."""
        self.news += 1
        self._exchange.notify_all()

    @contextlib.contextmanager
    def nothing_adopted(self) -> Iterator[None]:
        """Nothing is adopted in the block."""
        with self._exchange:
            yield

    def tidy(self, link: Link) -> None:
        """Hang up on daemons that were left, and send over ``link`` what is to be told to its daemon."""
        while self._left:
            self._left.popleft().hang_up()
        self._send_outbox(link)

    def _send_outbox(self, link: Link) -> None:
        while self._outbox:
            said = self._outbox.popleft()
            if isinstance(said, messages.Released) and said.segment in link.handed:
                said = messages.Released(session=link.number, segment=said.segment)
            if said.session == link.number and not link.lost:
                link.control.send(said)

    def hang_up(self) -> None:
        """The session is over: say what is left to be said, and hang up everywhere."""
        self._send_outbox(self.active)
        if self._recorded:
            self.active.say_goodbye()
        for link in self.links():
            link.hang_up()

    def links(self) -> tuple[Link, ...]:
        """All that are open."""
        return (*self._left, self.link, self.active)

    def wake(self) -> None:
        """Have whoever waits in ``follow`` check again."""
        with self._exchange:
            self._exchange.notify_all()

    @property
    def mapped(self) -> bool:
        """Whether pages of a daemon are mapped in this process on behalf of the session."""
        return bool(self._mapped)

    def adopt_unused(self) -> None:
        """The session is over: have what is offered take the place of what was there, which nobody looks up in."""
        offered = self.offered()
        if offered:
            self.adopted(offered)

    def let_go(self) -> None:
        """The session is over: let all pages go but those that arrays hold (``expertd.worker.alias``)."""
        with self._exchange:
            self.base = None
            self.pools.clear()
            self._offers.clear()

    def close(self) -> None:
        """Close what is the computing thread's."""
        for link in (self.link, self.active):
            link.data.close()

    def _follow_unmapping(self, number: int | None, segment: int, mapping: mmap.mmap) -> None:
        """Note when the pages of a segment are really gone from this process, and tell session ``number``'s daemon."""
        self._mapped.add((number, segment))
        weakref.finalize(mapping, _unmapped, weakref.ref(self), number, segment).atexit = False


def _unmapped(succession: weakref.ref[Succession], number: int | None, segment: int) -> None:
    """The pages of a segment are gone; on whatever thread, so this only notes it down."""
    alive = succession()
    if alive is not None:
        alive._mapped.discard((number, segment))
        if number is not None:
            alive.tell(messages.Released(session=number, segment=segment))
