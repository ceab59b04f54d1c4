"""What happened: attacks with their times, how requests ended, and the stories of those that ended badly."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

STORY_ATTACKS = 20
MOST_STORIES = 20
SURPRISING = ("fetch_invalid", "message_invalid", "pool_moved", "alias_failed", "session_closed", "protocol_mismatch")
"""Codes that nobody who does nothing wrong should meet, whatever happens to others."""


@dataclass
class Journal:
    """Shared by all threads of the harness; each method is one step under the lock."""

    began: float = field(default_factory=time.monotonic)
    right: int = 0
    wrong: int = 0
    stuck: int = 0
    interrupted: int = 0
    failures: int = 0
    asleep_failures: int = 0
    kills: int = 0
    stops: int = 0
    typed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    attacks: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: {"supervised": [], "by_workers": []})
    quiet: bool = False
    """Whether nothing that excuses an error is going on."""
    _last: deque[str] = field(default_factory=lambda: deque(maxlen=STORY_ATTACKS))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stories: int = 0

    @property
    def requests(self) -> int:
        """Requests that ended, those of killed programs aside."""
        return self.right + self.wrong + self.failures + self.stuck + self.typed.total()

    def attack(self, kind: str, whom: str = "") -> None:
        """Note an attack that was carried out."""
        with self._lock:
            self.attacks[kind] += 1
            self._last.append(f"{time.monotonic() - self.began:8.2f} s  {kind} {whom}".rstrip())

    def note(self, event: str) -> None:
        """Note something for the stories that is no attack."""
        with self._lock:
            self._last.append(f"{time.monotonic() - self.began:8.2f} s    ({event})")

    def answered(self) -> None:
        with self._lock:
            self.right += 1

    def cut_off(self) -> None:
        """A program was killed with its request."""
        with self._lock:
            self.interrupted += 1

    def typed_error(self, who: str, code: str, message: str) -> None:
        """A request ended with a code.  ``internal`` is no type: it says that nobody foresaw it."""
        if code == "internal":
            self.failed(who, f"the code 'internal': {message}")
            return
        with self._lock:
            self.typed[code] += 1
            self.examples.setdefault(code, message)
            quiet, seen = self.quiet, self.typed[code]
            self.asleep_failures += quiet
        if quiet or (code in SURPRISING and seen <= 3):
            self.tell(f"{who} met {code}{' while nothing was wrong' if quiet else ''}: {message}")

    def failed(self, who: str, how: str) -> None:
        """A request or a process ended in a way that has no code."""
        with self._lock:
            self.failures += 1
        self.tell(f"{who} failed without a type: {how}")

    def wrong_answer(self, who: str, prompt: str, expected: str, got: str) -> None:
        with self._lock:
            self.wrong += 1
        self.tell(f"WRONG TOKENS from {who}\n    prompt   {prompt}\n    expected {expected}\n    got      {got}")

    def hangs(self, who: str, for_s: float) -> None:
        with self._lock:
            self.stuck += 1
        self.tell(f"{who} has neither answered nor failed for {for_s:.0f} s")

    def tell(self, story: str) -> None:
        """Print a story with the last attacks, as long as there are few."""
        with self._lock:
            self._stories += 1
            if self._stories > MOST_STORIES:
                return
            before = "\n".join(f"    {line}" for line in self._last)
            now = time.monotonic() - self.began
            print(f"\n{now:.2f} s: {story}\n  what happened before:\n{before}\n", flush=True)
