"""What the computing side of a session says to its daemon: fetches, announcements, acks, and what it has routed.

What each of them promises, and when it may be said, is ``expertd.worker.attach``'s business.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import zmq

from expertd.protocol import messages
from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonLost, ExpertdError, PoolMoved, SessionUnknown
from expertd.protocol.logs import Log
from expertd.protocol.paths import Home
from expertd.protocol.routing import pack
from expertd.worker.link import Link, MappedPool

log = Log("expertd.worker")

RESEND_S = 5.0
"""An unanswered Fetch is sent again after so long: it is idempotent, and a ROUTER may drop an answer."""
SILENCE_S = 60.0
"""A daemon that does not even answer pings for so long while a Fetch waits is given up for that forward."""
LAST_REPORT_S = 0.3
"""How long a session that is closed waits until its last report is taken."""
_POLL_S = 0.25


class Talk:
    """Used under the session's forward lock only.

    Attributes:
        routing: what routers chose, ``(layer, experts)``, and no message has told yet; always the same list.
        decode_tokens, prompt_tokens: what was computed, and no message has told yet.
        unanswered: the Fetch whose answer nobody has waited for to its end.
        fetches, waited_s: how many fetches were answered, and the seconds that they took in all.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self.routing: list[tuple[int, Sequence[int]]] = []
        self.decode_tokens = self.prompt_tokens = 0
        self.unanswered: messages.Fetch | None = None
        self.fetches, self.waited_s = 0, 0.0

    @property
    def untold(self) -> bool:
        """Whether there is something to report."""
        return bool(self.routing or self.decode_tokens or self.prompt_tokens)

    def fetch(
        self,
        pool: MappedPool,
        layer: int,
        experts: Sequence[int],
        then: Sequence[int],
        leases_only: bool,
        check: Callable[[], None],
    ) -> messages.Resident | messages.Error:
        """Send a Fetch, and wait for its answer as ``await_answer`` does."""
        link = pool.link
        link.sequence += 1
        decode, prompt = self._take_tokens()
        request = messages.Fetch(
            session=link.number,
            sequence=link.sequence,
            segment=pool.segment,
            layer=layer,
            experts=list(experts),
            routing=self._take_routing(),
            then=list(then),
            leases_only=leases_only,
            decode_tokens=decode,
            prompt_tokens=prompt,
        )
        self.unanswered = request
        began = time.monotonic()
        link.data.send(request)
        answer = self.await_answer(link, request, check)
        self.waited_s += time.monotonic() - began
        self.fetches += 1
        return answer

    def await_answer(
        self, link: Link, request: messages.Fetch, check: Callable[[], None]
    ) -> messages.Resident | messages.Error:
        """The answer to ``request``.

        A caller that is interrupted here (Ctrl-C) leaves ``unanswered`` set: until the answer has come, the daemon
        takes this session for one that looks nothing up, so nothing may be looked up.  Time is counted in polls, so
        that a machine that slept has not waited.

        Args:
            check: raises if there is nothing to wait for any more.
        Raises:
            PoolMoved: there will be none; ``link`` is of no use any more.
            DaemonLost: the daemon does not answer.
        """
        silent_s, waited_s = 0.0, 0.0
        while not link.lost:
            answer = link.data.receive(_POLL_S)
            check()
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
                self.unanswered = None
                link.told_by_answer = answer.version
                link.announce = answer.announce
                return answer
            if isinstance(answer, messages.Error) and answer.sequence == request.sequence:
                if answer.code == SessionUnknown.code:
                    break
                self.unanswered = None
                return answer
            if isinstance(answer, messages.Error) and answer.sequence is None:
                # Not about this Fetch: the two sides no longer agree on what was said.
                log.warning("the daemon refused a message (%s); attaching anew", answer.message)
                break
        self.unanswered = None
        link.lost = True
        raise PoolMoved("the daemon has gone")

    def announce(self, pool: MappedPool, layer: int, experts: Sequence[int], distance: int, prompt: bool) -> None:
        """See ``Session.announce``."""
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

    def ack(self, link: Link, over: Connection) -> None:
        """Ack all that was told over ``link``; ``over`` is that of its two sockets which is the caller's."""
        version = max(link.told_by_request, link.told_by_answer)
        routing, (decode, prompt) = self._take_routing(), self._take_tokens()
        if not link.lost:
            over.send(
                messages.Ack(
                    session=link.number, version=version, sequence=link.sequence, routing=routing,
                    decode_tokens=decode, prompt_tokens=prompt,
                )
            )  # fmt: skip

    def report(self, link: Link, over: Connection) -> None:
        """Send the routing log; without a daemon it is lost, which costs only statistics."""
        routing, (decode, prompt) = self._take_routing(), self._take_tokens()
        if not link.lost:
            over.send(
                messages.RoutingLog(session=link.number, routing=routing, decode_tokens=decode, prompt_tokens=prompt)
            )

    def report_at_last(self, link: Link) -> None:
        """Send the routing log, and see it taken: what waits in a socket that is closed is lost."""
        if link.lost or not self.untold:
            return
        over = link.data
        with contextlib.suppress(ExpertdError, zmq.ZMQError):
            self.report(link, over)
            over.send(messages.Ping(session=link.number))
            until = time.monotonic() + LAST_REPORT_S
            while (said := over.receive(until - time.monotonic())) is not None and not isinstance(said, messages.Pong):
                continue

    def _take_routing(self) -> bytes:
        taken = b"".join(pack(layer, experts) for layer, experts in self.routing)
        self.routing.clear()
        return taken

    def _take_tokens(self) -> tuple[int, int]:
        taken, self.decode_tokens, self.prompt_tokens = (self.decode_tokens, self.prompt_tokens), 0, 0
        return taken
