"""Memory pressure out of a text file, for tests and for ``expertd daemon run --simulate-pressure FILE``.

A line is ``SECONDS LEVEL [figure...]``, seconds since the start, in ascending order; ``#`` begins a comment:

    0   normal
    10  warning   a big program starts
    20  critical
    25  normal

Before the first line it is normal; the last line holds.  Who edits the file steers the running daemon: the newest
content counts, on the same clock.
"""

from __future__ import annotations

import math
import stat
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.daemon.pressure import Level, Reading
from expertd.protocol.errors import DaemonStartFailed

LONGEST_BYTES = 1 << 20
"""No script is longer; it is read in the daemon's loop."""

EXPECTED = "SECONDS normal|warning|critical [figure...]"

_LEVELS = {level.word: level for level in Level}


@dataclass(frozen=True)
class Step:
    """From ``at_s`` seconds after the start, this is the pressure."""

    at_s: float
    reading: Reading


def parse_script(text: str, name: str) -> list[Step]:
    """The steps of a script, at least one; ``name`` stands for it in errors.

    Raises:
        DaemonStartFailed: a line is wrong, or there is none.
    """
    steps: list[Step] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split(maxsplit=2)
        if not words:
            continue
        where = f"{name}, line {number}"
        if len(words) < 2 or words[1] not in _LEVELS:
            raise DaemonStartFailed(f"{where}: '{line.strip()}' is no step of pressure; write {EXPECTED}")
        at_s = _seconds(words[0])
        if at_s is None:
            raise DaemonStartFailed(f"{where}: '{words[0]}' is no number of seconds; write {EXPECTED}")
        if steps and at_s < steps[-1].at_s:
            raise DaemonStartFailed(
                f"{where}: {at_s:g} s is earlier than the {steps[-1].at_s:g} s before it; put the lines in order"
            )
        level = _LEVELS[words[1]]
        figure = words[2].strip() if len(words) == 3 else f"the script says {level.word} from {at_s:g} s on"
        steps.append(Step(at_s, Reading(level, figure)))
    if not steps:
        raise DaemonStartFailed(f"{name} has no step of pressure; write at least one line {EXPECTED}")
    return steps


def _seconds(word: str) -> float | None:
    try:
        found = float(word)
    except ValueError:
        return None
    return found if math.isfinite(found) and found >= 0 else None


class ScriptedSource:
    """Readings by the script in ``path``; its time starts when this is made.

    Raises:
        DaemonStartFailed: when it is made: the file cannot be read, or is no script.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        try:
            self._seen = self._look()
            text = self._text()
        except (OSError, ValueError) as error:
            raise DaemonStartFailed(
                f"{path} cannot be read ({_reason(error)}); it should have lines {EXPECTED}"
            ) from error
        self._steps = parse_script(text, str(path))
        self._start = clock()

    def read(self) -> Reading:
        """What the newest good content of the file says for this moment; a bad edit changes nothing."""
        self._follow()
        passed = bisect_right(self._steps, self._clock() - self._start, key=lambda step: step.at_s)
        if passed == 0:
            return Reading(Level.NORMAL, f"the script begins at {self._steps[0].at_s:g} s")
        return self._steps[passed - 1].reading

    def _follow(self) -> None:
        try:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                self._steps = parse_script(self._text(), str(self._path))
        except (OSError, ValueError, DaemonStartFailed):
            pass  # gone, or somebody is in the middle of writing it

    def _look(self) -> tuple[int, int, int]:
        found = self._path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LONGEST_BYTES:  # opening a pipe would wait for a writer
            raise ValueError("it is no file of at most 1 MiB")
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _text(self) -> str:
        return self._path.read_text("utf-8-sig")


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
