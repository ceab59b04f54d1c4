"""A process that a service manager keeps alive and that dies at once again and again is not started for ever.

launchd and systemd start again what fails, every few seconds, without an end that both know.  So what they start counts
its starts in the home: after ``MOST`` starts that each ended badly within ``QUICK_S``, the next one ends at once with
status 0, which both take for the wish to rest.  ``expertd service start`` forgets the count; so does an end in order,
and ``REST_S``.

Times are seconds since 1970, because the count has to outlive the process and the machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from expertd.protocol.paths import Home

log = logging.getLogger(__name__)

MOST = 5
QUICK_S = 60.0
REST_S = 3600.0


class Starts(msgspec.Struct, frozen=True):
    """Starts whose processes have not ended in order.

    Attributes:
        times: when they were, each less than ``QUICK_S`` after the one before.
        refused_at: when the first one was refused, if any was.
    """

    times: tuple[float, ...] = ()
    refused_at: float | None = None

    def next(self, now: float) -> Starts:
        """The same after one more wish to start, which is refused if the result has a ``refused_at``."""
        if self.refused(now):
            return self
        last = self.times[-1] if self.times else now
        row = self.times if 0 <= now - last < QUICK_S and self.refused_at is None else ()
        if len(row) >= MOST:
            return Starts(row, now)
        return Starts((*row, now))

    def refused(self, now: float) -> bool:
        """Whether starts are refused at the time ``now``."""
        return self.refused_at is not None and 0 <= now - self.refused_at < REST_S


def read_starts(home: Home, name: str) -> Starts:
    """The count of the ``daemon`` or the ``gateway``; an empty one if there is none that can be read."""
    try:
        return msgspec.json.decode(home.service_starts(name).read_bytes(), type=Starts)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return Starts()


def why_refused(home: Home, name: str) -> str:
    """The sentence for a user whose daemon or gateway is not started any more; empty while it is."""
    starts = read_starts(home, name)
    if not starts.refused(time.time()):
        return ""
    logs = "expertd service logs" + (" --gateway" if name == "gateway" else "")
    return (
        f"the service's {name} has died {len(starts.times)} times in a row, each time within {QUICK_S:.0f} s, and is "
        f"not started any more; '{logs}' says why; start it again with: expertd service start"
    )


def forget(home: Home, name: str) -> None:
    """Begin to count anew."""
    home.service_starts(name).unlink(missing_ok=True)


@contextlib.contextmanager
def counted(home: Home, name: str) -> Iterator[bool]:
    """Count a start; what is yielded says whether it may go on.  Leaving the body in order forgets the count."""
    starts = read_starts(home, name).next(time.time())
    _write(home.service_starts(name), starts)
    if starts.refused_at is not None:
        yield False
        return
    try:
        yield True
    except SystemExit as end:
        if not end.code:
            forget(home, name)
        raise
    forget(home, name)


def _write(path: Path, starts: Starts) -> None:
    """A count that cannot be written stays as it was: a full disk is no reason not to run."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_bytes(msgspec.json.encode(starts))
        new.replace(path)
    except OSError as error:
        log.warning("%s cannot be written (%s)", path, error.strerror)
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
