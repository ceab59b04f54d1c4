"""Stop strings on streamed text: what may be shown, and when the answer is over.

Works on text alone.  The tokens that end an answer (eos) are the business of ``expertd.worker.engine``.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopText"]


class StopText:
    """Holds back text that may be the beginning of a stop string.

    The stop string that is *complete first* ends the answer, so that the result does not depend on how the text was cut
    into segments; of two that complete together the one that began first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the answer."""

    def feed(self, segment: str) -> tuple[str, bool]:
        """Take the next text; return what may be shown now, and whether a stop string ended the answer."""
        if not self._stops:
            return segment, False
        text = self._held + segment
        ends = [(place + len(stop), place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            _, place, self.found = min(ends)
            return text[:place], True
        keep = max(self._beginning(text, stop) for stop in self._stops)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was held back; the answer ended and no stop string completed it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
        for length in range(min(len(text), len(stop) - 1), 0, -1):
            if text.endswith(stop[:length]):
                return length
        return 0
