"""Whose answer a worker begins next: fair between clients, bounded, first come first served for each.

Pure: no clock, no worker.  ``expertd.clients.gateway.served`` hands over what comes and does what it says.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from expertd.protocol.errors import QueueFull

__all__ = ["FairQueue"]

QUEUE_LIMIT = 64
"""Answers that may wait for one model."""
RESERVE = 4
"""One in so many of those places is kept from a client that has all the others."""
BEGINNING = 8
"""Answers that a worker has and has not told a token of: what it computes of prompts side by side, and as many that it
can go on with.  More would wait there in the order in which they came, whoever sent them."""

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items wait, run, and are done.  The next one to run is of the client who has the fewest that run.

    Among clients with as many it goes round.  So somebody with one question waits for one turn, and not for the fifty
    questions of another; and who is alone has everything.

    Attributes:
        room: how many may run at a time; the owner sets it when it knows.
    """

    def __init__(self, limit: int = QUEUE_LIMIT, beginning: int = BEGINNING) -> None:
        self.room = 1
        self._limit = limit
        self._beginning_limit = beginning
        self._waiting: dict[str, deque[T]] = {}  # clients who wait; who was served last stands last
        self._running: dict[T, str] = {}
        self._beginning: set[T] = set()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """How many run."""
        return len(self._running)

    def add(self, client: str, item: T) -> None:
        """Let ``item`` wait.

        Raises:
            QueueFull: too many wait already, or too many of this client's.
        """
        waiting, own = self.waiting, len(self._waiting.get(client, ()))
        if waiting >= self._limit:
            raise QueueFull(f"{waiting} requests wait already, which is the limit; try again later")
        if own >= self._limit - self._limit // RESERVE:
            raise QueueFull(f"{own} requests of this client wait already, which is the limit for one; try again later")
        self._waiting.setdefault(client, deque()).append(item)

    def take(self) -> T | None:
        """The next one, which runs from now on; None if there is none, or no room."""
        if not self._waiting or len(self._running) >= self.room or len(self._beginning) >= self._beginning_limit:
            return None
        running = list(self._running.values())
        client = min(self._waiting, key=running.count)
        items = self._waiting.pop(client)
        item = items.popleft()
        if items:
            self._waiting[client] = items
        self._running[item] = client
        self._beginning.add(item)
        return item

    def begun(self, item: T) -> None:
        """The prompt of ``item``, which runs, has been computed."""
        self._beginning.discard(item)

    def done(self, item: T) -> None:
        """Forget ``item``, whether it waits or runs.  An unknown one was forgotten before."""
        self._beginning.discard(item)
        if self._running.pop(item, None) is not None:
            return
        for client, items in list(self._waiting.items()):
            if item in items:
                items.remove(item)
            if not items:
                del self._waiting[client]

    def drop(self, *, running: bool) -> list[T]:
        """Forget all that waits, or all that runs; return it."""
        if running:
            dropped = list(self._running)
            self._running.clear()
            self._beginning.clear()
        else:
            dropped = [item for items in self._waiting.values() for item in items]
            self._waiting.clear()
        return dropped
