"""Tells subscribed clients what the daemon's log tells: each event of level info or worse, as it happens.

Subscriptions end by themselves unless they are renewed, because ZeroMQ does not tell that a client is gone.  What is
worth telling, and in which words, is decided where it is logged (``expertd.daemon.diary``).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from expertd.protocol.messages import Happened

__all__ = ["MOST", "Subscribers"]

MOST = 64
"""Clients that may be subscribed; one more takes the place of the one that renewed longest ago."""
LASTS_S = 30.0


class Subscribers(logging.Handler):
    """A handler of the daemon's logger.  Any thread may log; the loop sends."""

    def __init__(self, send: Callable[[bytes, Happened], None], clock: Callable[[], float] = time.monotonic) -> None:
        """``send`` hands a message to the client of that identity; it is called on the loop."""
        super().__init__(logging.INFO)
        self._send, self._clock = send, clock
        self._loop = asyncio.get_running_loop()
        self._until: dict[bytes, float] = {}

    def subscribe(self, identity: bytes) -> None:
        """Tell this client too, from now on and for ``LASTS_S``."""
        self._until.pop(identity, None)
        self._until[identity] = self._clock() + LASTS_S
        while len(self._until) > MOST:
            del self._until[next(iter(self._until))]

    def emit(self, record: logging.LogRecord) -> None:
        """Called by ``logging``, on whatever thread."""
        if not self._until:
            return
        facts = {name: _plain(value) for name, value in getattr(record, "facts", {}).items()}
        words = getattr(record, "words", None) or record.getMessage()
        happened = Happened(at=record.created, level=record.levelname.lower(), event=words, facts=facts)
        try:
            self._loop.call_soon_threadsafe(self._tell, happened)
        except RuntimeError:
            return  # the loop has ended, and nobody listens any more

    def _tell(self, happened: Happened) -> None:
        now = self._clock()
        for identity, until in list(self._until.items()):
            if until < now:
                del self._until[identity]
            else:
                self._send(identity, happened)


def _plain(value: object) -> str | int | float | bool:
    return value if isinstance(value, str | int | float | bool) else str(value)
