"""What happens when: a random schedule from a seed, several attacks at a time, none of one kind twice at once."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.torture.attacks import Attack, Attacks, Cast, Under

QUIET_EVERY_S = 75.0
RECOVERY_S = 45.0
"""When attacks pause, everybody says something right within this time: a gateway waits up to 30 s before it starts a
worker that has died many times, and then that has to load."""
POLL_S = 0.05


@dataclass(frozen=True)
class Kind:
    """An attack, how often it comes compared to others, and what it needs for itself while it lasts."""

    attack: Attack
    weight: float
    key: str


class Schedule:
    """Runs in the harness's main thread."""

    def __init__(self, cast: Cast, attacks: Attacks) -> None:
        self._cast = cast
        self._attacks = attacks
        self._chance = cast.chance
        self._kinds = {
            name: Kind(getattr(attacks, name), weight, key)
            for name, weight, key in (
                ("kill_program", 12.0, "kill"),
                ("kill_gateway_worker", 2.0, "kill"),
                ("kill_daemon", 3.5, "daemon"),
                ("kill_daemon_left_to_workers", 1.5, "daemon"),
                ("restart_program", 1.0, "restart"),
                ("stop_program", 3.5, "stop"),
                ("stop_gateway_worker", 2.0, "stop_gateway"),
                ("stop_daemon", 1.0, "daemon"),
                ("checkpoint", 3.0, "checkpoint"),
                ("failing_reads", 1.5, "reads"),
                ("shm_full", 1.5, "shm"),
                ("descriptors_exhausted", 1.5, "descriptors"),
                ("budget", 3.0, "budget"),
                ("frames", 2.0, "frames"),
            )
        }
        self._numbers = itertools.count()
        self._under: list[tuple[float, int, str, Callable[[], None]]] = []
        self._busy: set[str] = set()
        self.unrecovered = 0

    def run(self, seconds: float, pause_s: float) -> None:
        """Attack for ``seconds``, one attack each ``pause_s`` on average; every kind at least once if there is time."""
        ends = time.monotonic() + seconds
        quiet_at = time.monotonic() + min(QUIET_EVERY_S, seconds / 2)
        todo = list(self._kinds)
        self._chance.shuffle(todo)
        while time.monotonic() < ends:
            if time.monotonic() >= quiet_at:
                self.sleep_and_wake()
                quiet_at = time.monotonic() + QUIET_EVERY_S
            if self._one(todo[0] if todo else None) and todo:
                todo.pop(0)
            elif todo:
                todo.append(todo.pop(0))
            self.wait(self._chance.uniform(0.2, 1.8) * pause_s)
        self.calm()

    @property
    def names(self) -> list[str]:
        """All kinds of attacks."""
        return [*self._kinds, "stop_everybody"]

    def barrage(self, seconds: float) -> None:
        """Attack all but the daemon's life: what it has afterwards more than before, it has leaked.

        Without descriptors libzmq gives up the process, so that is left out too.
        """
        ends = time.monotonic() + seconds
        sparing = [name for name, kind in self._kinds.items() if kind.key not in ("daemon", "descriptors")]
        while time.monotonic() < ends:
            self._one(self._chance.choice(sparing))
            self.wait(0.3)
        self.calm()

    def wait(self, seconds: float) -> None:
        """Go on with what is under way: undo what is due, look for requests that hang."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            time.sleep(min(POLL_S, left))
            self._undo_due(time.monotonic())
            for asker in self._cast.askers:
                asker.check()

    def calm(self) -> None:
        """Undo all that is under way."""
        self._undo_due(float("inf"))

    def everybody_answers(self, within_s: float = RECOVERY_S) -> bool:
        """Whether, with no attack under way, each worker says something right; who does not is a story."""
        self.calm()
        began = time.monotonic()
        while time.monotonic() < began + within_s:
            late = [asker for asker in self._cast.askers if asker.last_answer < began]
            if not late:
                return True
            self.wait(POLL_S)
        self.unrecovered += len(late)
        names = ", ".join(asker.name for asker in late)
        self._cast.journal.tell(f"not one right answer in {within_s:.0f} calm seconds: {names}")
        return False

    def sleep_and_wake(self) -> None:
        """Everybody is stopped at once while nothing else is wrong, and not one request may fail."""
        if not self.everybody_answers():
            return
        self._cast.journal.quiet = True
        under = self._attacks.stop_everybody()
        if under is not None:
            self.wait(under.lasts_s)
            under.undo()
        self.wait(2.0)
        self._cast.journal.quiet = False

    def _one(self, name: str | None) -> bool:
        """Carry out one attack; False if it cannot be now."""
        if name is None:
            name = self._chance.choices(list(self._kinds), [kind.weight for kind in self._kinds.values()])[0]
        kind = self._kinds[name]
        if kind.key in self._busy:
            return False
        done = kind.attack()
        if isinstance(done, Under):
            self._busy.add(kind.key)
            due = time.monotonic() + done.lasts_s
            heapq.heappush(self._under, (due, next(self._numbers), kind.key, done.undo))
        return bool(done)

    def _undo_due(self, now: float) -> None:
        while self._under and self._under[0][0] <= now:
            _, _, key, undo = heapq.heappop(self._under)
            undo()
            self._busy.discard(key)
