"""The control thread of a session: it listens to the daemon while the model computes, or while nobody does.

It answers pings and, when no forward runs, requests for acks; it attaches to the next daemon when one has gone; and of
a session that has become idle it reports what was routed, and has news adopted.  Everything that a forward could
collide with it does under the forward lock, and never waits for that (``expertd.worker.attach``).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import zmq

from expertd.protocol import messages
from expertd.protocol.errors import DaemonLost, ExpertdError
from expertd.protocol.logs import Log
from expertd.worker.doorbell import Doorbell
from expertd.worker.link import Link
from expertd.worker.succession import Succession

if TYPE_CHECKING:
    from expertd.worker.attach import Session

log = Log("expertd.worker")

IDLE_S = 1.0
"""Without a forward for so long it is idle."""


class Control:
    """Listens until the session is over."""

    def __init__(self, session: Session, succession: Succession, bell: Doorbell) -> None:
        self._session = session
        self._succession = succession
        self._bell = bell
        self._quiet = (0, time.monotonic())  # how many forwards there had been when one was seen last, and when

    def run(self) -> None:
        """What the thread does, from its beginning to its end."""
        try:
            self._follow()
            self._part()
            self._session.ended()
        finally:
            self._session.unattended()

    def _follow(self) -> None:
        """Listen to the daemon that there is, until the session is over."""
        session, succession = self._session, self._succession
        pause_s = 0.0
        while not session.over:
            try:
                if succession.active.lost:
                    self._leave(succession.active)
                    session.pressure.reset()
                    succession.wait(pause_s)
                    pause_s = succession.attach_again(pause_s)
                else:
                    self._attend(succession.active)
                    pause_s = 0.0
            except (ExpertdError, OSError, zmq.ZMQError) as error:
                if not session.over:
                    log.warning("%s", error)
                succession.active.lost = True

    def _part(self) -> None:
        """The session is over: let its pages go, and stay until they are, so that the daemon counts them.

        A forgotten model gets a moment to go to its end, because the garbage collector has told of that on the way.
        """
        session, succession = self._session, self._succession
        session.shut()
        succession.wake()
        patience = time.monotonic() + IDLE_S
        while not ((session.hurried or (session.abandoned and time.monotonic() >= patience)) and session.part()):
            if succession.active.lost:
                self._bell.wait(IDLE_S)
                continue
            try:
                self._attend(succession.active)
            except (ExpertdError, OSError, zmq.ZMQError) as error:
                log.debug("a session that is over was disturbed: %s", error)
                succession.active.lost = True

    def _leave(self, link: Link) -> None:
        """Nothing more is said over ``link``: tell its daemon, when nothing is looked up in its pools any more.

        A daemon that lives must not take the session for over before: it would fill slots again that are read.  Of one
        that has gone the pages stay as they are.
        """
        if link is not self._succession.link or link.ended():
            link.hang_up()
        else:
            self._session.leave(link)

    def _attend(self, link: Link) -> None:
        """Wait for a second, or for something to happen, and see to it."""
        poller = zmq.Poller()
        poller.register(link.control.socket, zmq.POLLIN)
        poller.register(link.line.fileno(), zmq.POLLIN)
        poller.register(self._bell.fileno(), zmq.POLLIN)
        ready = dict(poller.poll(round(IDLE_S * 1000)))
        if self._bell.fileno() in ready:
            self._bell.answer()
        self._succession.tidy(link)
        if link.control.socket in ready:
            self._listen(link)
        elif link.line.fileno() in ready and link.ended():
            raise DaemonLost(f"the daemon of {self._session.home.root} has ended; the model waits for its return")
        now = time.monotonic()
        if self._session.forwards != self._quiet[0]:
            self._quiet = self._session.forwards, now
        elif now - self._quiet[1] >= IDLE_S:  # whatever else is heard meanwhile: who keeps old pools is pinged
            self._session.while_idle()

    def _listen(self, link: Link) -> None:
        match link.control.receive(0):
            case messages.AckRequest(version=version):
                link.told_by_request = max(link.told_by_request, version)
                self._session.ack_wanted(link)
            case messages.Complete(segment=segment):
                self._succession.complete(segment)
            case messages.Moved(pool=info):
                self._succession.offer(link, info)
            case messages.Record(path=path):
                self._succession.record(path)
                if path and self._session.over:
                    self._session.recorded(path, 0, "the program has unloaded the model")
            case messages.Ping():
                link.control.send(messages.Pong(session=link.number))
            case messages.Pressure() as told:
                self._session.pressure.take(told)
            case messages.Error() as error:
                raise error.exception()
