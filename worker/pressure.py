"""What a worker knows of the machine's memory pressure, and MLX's buffer cache, which it gives back because of it.

The daemon tells the level (PROTOCOL.md, "Pressure"); a session's control thread notes it in a ``Gauge``.  Whoever
computes looks there between two forwards: MLX's buffers are cleared by ``Buffers``, on that thread and on no other.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from expertd.protocol.messages import Pressure

__all__ = ["NORMAL", "Buffers", "Gauge"]

NORMAL = Pressure(level="normal", figure="")
"""What holds until a daemon says otherwise."""


class Gauge:
    """The newest pressure that a session was told of.  Its control thread writes; any thread reads.

    Attributes:
        newest: what the daemon said last; ``NORMAL`` if it has said nothing, or is gone.
        rises: how often the level has risen to warning or worse, or from warning to critical.
        on_change: called on the control thread after each change; it MUST be quick and MUST NOT raise.
    """

    def __init__(self) -> None:
        self.newest = NORMAL
        self.rises = 0
        self.on_change: Callable[[], None] = lambda: None

    @property
    def short(self) -> bool:
        """Whether memory is short: warning or worse."""
        return self.newest.level != "normal"

    def take(self, told: Pressure) -> None:
        """The daemon has said something."""
        before, self.newest = self.newest.level, told
        if told.level != "normal" and told.level != before and before != "critical":
            self.rises += 1
        self.on_change()

    def reset(self) -> None:
        """The daemon is gone, and what it said with it: the next one may see it differently, or there may be none."""
        if self.newest is not NORMAL:
            self.take(NORMAL)


class Buffers:
    """MLX's cache of freed buffers.  For the thread that computes, between two forwards."""

    def __init__(self, gauge: Gauge, clear: Callable[[], None] = mx.clear_cache) -> None:
        self._gauge = gauge
        self._seen = 0
        self.clear = clear

    def relieve(self) -> bool:
        """Give the buffers back if memory has become short since the last call; returns whether it has."""
        if self._seen == self._gauge.rises:
            return False
        self._seen = self._gauge.rises
        if self._gauge.short:
            self.clear()
        return self._gauge.short

    def after_request(self, idle: bool) -> None:
        """A request has ended: give its buffers back if nobody is there to use them again, or memory is short."""
        if idle or self._gauge.short:
            self.clear()
