"""How many tokens the sessions have computed, added up from what they report.  Pure."""

from __future__ import annotations

from typing import NamedTuple


class Tokens(NamedTuple):
    """Tokens that went through a session's model: one at a time for each answer, or in pieces of prompts."""

    decode: int = 0
    prompt: int = 0


class TokenCounts:
    """Owned by the daemon's loop.  What it remembers is three numbers for each session."""

    def __init__(self) -> None:
        self._counts: dict[int, Tokens] = {}
        self._fetches: dict[int, int] = {}

    def reported(self, session: int, decode: int, prompt: int, sequence: int | None = None) -> None:
        """So many more.  A Fetch, which has a ``sequence``, may come again, and counts once."""
        if sequence is not None:
            if sequence <= self._fetches.get(session, 0):
                return
            self._fetches[session] = sequence
        before = self._counts.get(session, Tokens())
        self._counts[session] = Tokens(before.decode + decode, before.prompt + prompt)

    def ended(self, session: int) -> None:
        """Nothing is remembered of it."""
        self._counts.pop(session, None)
        self._fetches.pop(session, None)

    def all(self) -> dict[int, Tokens]:
        """By session, of those that have reported any."""
        return dict(self._counts)
