"""What signals mean in a block of a command; afterwards they mean what they did before."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, ``kill``, and a terminal that is closed."""


@contextmanager
def on_signals(handler: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    """In the block these signals call ``handler``; one that this process ignores (``nohup``) stays ignored."""
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


class Stop:
    """Whether the user wants something to stop that must end in order.  Called, it tells."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self) -> bool:
        return self.wanted

    @contextmanager
    def on(self, *numbers: signal.Signals) -> Iterator[None]:
        """In the block one of these signals asks for a stop; once more, it interrupts (KeyboardInterrupt)."""
        with on_signals(self._asked, *numbers):
            yield

    def _asked(self, *_: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
