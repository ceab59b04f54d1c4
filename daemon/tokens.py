"""How many tokens the sessions have computed, added up from what they report.  Pure."""

from __future__ import annotations

from typing import NamedTuple


class Tokens(NamedTuple):
    """Tokens that went through a session's model: one at a time for each answer, or in pieces of prompts."""

    decode: int = 0
    prompt: int = 0


class TokenCounts:
    """Owned by the daemon's loop.  What it remembers is two numbers for each session."""

    def __init__(self) -> None:
        self._counts: dict[int, Tokens] = {}

    def reported(self, session: int, decode: int, prompt: int) -> None:
        """So many more."""
        before = self._counts.get(session, Tokens())
        self._counts[session] = Tokens(before.decode + decode, before.prompt + prompt)

    def ended(self, session: int) -> None:
        """Nothing is remembered of it."""
        self._counts.pop(session, None)

    def all(self) -> dict[int, Tokens]:
        """By session, of those that have reported any."""
        return dict(self._counts)
