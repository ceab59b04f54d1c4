"""How far a long command is: one line that changes on a terminal, now and then a line of its own elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from expertd.protocol.sizes import show_size

TERMINAL_S = 0.1
ELSEWHERE_S = 10.0


class Progress:
    """Bytes of ``total``; a context manager.  The rate counts only what was dealt with in this run (``fresh``)."""

    def __init__(
        self, label: str, total: int, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._label, self._total = label, total
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._done = self._fresh = 0
        self._began = self._told_at = clock()
        self._terminal = self._stream.isatty()

    def moved(self, size: int, fresh: bool = True) -> None:
        """So many bytes more."""
        self._done += size
        self._fresh += size if fresh else 0
        if not self._fresh:
            self._began = self._clock()  # until now an earlier run's work was looked through
        if self._clock() - self._told_at >= (TERMINAL_S if self._terminal else ELSEWHERE_S):
            self._tell()

    def line(self) -> str:
        """What there is to tell."""
        share = 100 * self._done // max(1, self._total)
        told = f"{self._label} {show_size(self._done)} of {show_size(self._total)} ({share} %)"
        seconds = self._clock() - self._began
        if self._fresh and seconds > 0:
            rate = self._fresh / seconds
            told += f", {show_size(round(rate))}/s"
            if self._done < self._total:
                told += f", {_duration((self._total - self._done) / rate)} left"
        return told

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._tell()
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()

    def _tell(self) -> None:
        self._told_at = self._clock()
        self._stream.write(f"\r{self.line()}\x1b[K" if self._terminal else f"{self.line()}\n")
        self._stream.flush()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
