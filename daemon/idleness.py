"""What nobody has used for long enough: models, and the daemon itself.  Pure: whoever owns it gives the time."""

from __future__ import annotations

from collections.abc import Mapping


class Idleness:
    """Asked about once a second; times are in seconds, None means for ever.

    Attributes:
        exit_s: after so long without anybody it is over.
    """

    def __init__(self, now: float, *, exit_s: float | None, keep_alive_s: float | None) -> None:
        self.exit_s, self._keep_alive_s = exit_s, keep_alive_s
        self._busy_at = now
        self._used_at: dict[str, float] = {}  # when each model was seen in use last

    def unused(self, now: float, models: Mapping[str, bool]) -> list[str]:
        """Of ``models`` (by key, with whether each is in use) those that nobody used for as long as they are kept."""
        self._used_at = {key: now if used else self._used_at.get(key, now) for key, used in models.items()}
        if self._keep_alive_s is None:
            return []
        return [key for key, used_at in self._used_at.items() if now - used_at > self._keep_alive_s]

    def over(self, now: float, busy: bool) -> bool:
        """Whether nobody was there for so long that the daemon should end."""
        if busy:
            self._busy_at = now
        return self.exit_s is not None and now - self._busy_at > self.exit_s
