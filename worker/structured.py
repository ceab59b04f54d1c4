"""An answer that is kept to a grammar, taken apart by its structure: calls of tools as JSON, or JSON that fits.

Marks mean nothing within it: a string may contain any, so what begins as a call goes on to the end of its object, and
what does not begin as one is text to its end.  Which mark begins a call, and what of an answer comes before the grammar
begins, is known to ``expertd.worker.channels``.
"""

from __future__ import annotations

from expertd.worker.json_object import JsonObject

__all__ = ["Structured"]

Segment = tuple[str, str]
"""A state, "tool" or "normal", and the text in it; a call is over when another state follows, be it without text."""


class Structured:
    """One such answer, as it comes."""

    def __init__(self, begin: str, end: str) -> None:
        """Calls stand between these marks."""
        self._begin, self._end = begin, end
        self._rest = ""  # what may be a mark, or the space before one
        self._call: JsonObject | None = None
        self._is_text = False

    def feed(self, text: str) -> list[Segment]:
        """Take more; returns what is known of it."""
        self._rest += text
        found: list[Segment] = []
        while not self._is_text:
            if self._call is not None and not self._call.complete:
                taken = self._call.feed(self._rest)
                found.append(("tool", self._rest[:taken]))
                self._rest = self._rest[taken:]
                self._is_text = self._call.broken
                if not self._call.complete:
                    break
            mark = self._begin if self._call is None else self._end
            waiting = self._rest.lstrip()
            if not waiting.startswith(mark):
                if mark.startswith(waiting):
                    break
                self._is_text = True
            else:
                self._rest = waiting[len(mark) :]
                found.append(("tool" if self._call is None else "normal", ""))
                self._call = JsonObject() if self._call is None else None
        if self._is_text:
            found.append(("normal", self._rest))
            self._rest = ""
        return found

    def flush(self) -> list[Segment]:
        """The answer is over: what was held back."""
        rest, self._rest = self._rest, ""
        return [("normal", rest)] if rest.strip() else []
