"""How long a model computes for a token on this machine: what workers measure, kept in the home for those who plan.

One small file for each model, named by its folder; the last worker to write wins, since all measure the same.  What is
measured is decided in ``expertd.worker.pace``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path

import msgspec

from expertd.protocol.checkpoint import FileMark
from expertd.protocol.paths import Home

log = logging.getLogger(__name__)


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds of single tokens beside waiting for blocks; 0: not measured.

    Attributes:
        folder, files: the model's, as they were then.
        complete_us: a token with all blocks resident.
        partial_us, fetch_us: a token with some absent, and what each of its Fetches adds.
    """

    folder: str
    files: tuple[FileMark, ...]
    complete_us: float = 0.0
    partial_us: float = 0.0
    fetch_us: float = 0.0


def pace_path(home: Home, folder: str) -> Path:
    """Where the pace of the model in ``folder`` is kept."""
    return home.pace / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.json"


def read_pace(home: Home, folder: str, files: tuple[FileMark, ...]) -> Pace | None:
    """What was measured of exactly these files; None if nothing was, or it cannot be read."""
    try:
        found = msgspec.json.decode(pace_path(home, folder).read_bytes(), type=Pace)
    except (OSError, msgspec.DecodeError):
        return None
    return found if (found.folder, found.files) == (folder, files) else None


def write_pace(home: Home, pace: Pace) -> None:
    """Keep ``pace``; of what it did not measure an earlier figure stays.  Never raises: nobody depends on it."""
    path = pace_path(home, pace.folder)
    before = read_pace(home, pace.folder, pace.files)
    if before is not None:
        pace = msgspec.structs.replace(
            pace,
            complete_us=pace.complete_us or before.complete_us,
            partial_us=pace.partial_us or before.partial_us,
            fetch_us=pace.fetch_us if pace.partial_us else before.fetch_us,
        )
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        fresh.write_bytes(msgspec.json.encode(pace))
        fresh.replace(path)
    except OSError as error:
        log.debug("the pace of %s is not kept: %s", pace.folder, error)
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
