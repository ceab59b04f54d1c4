"""Which processes hold how much of the daemon's memory, noted in the home for the daemon that comes after this one.

Pages that a session has mapped outlive the daemon that gave them.  To a daemon that starts then, they look like memory
that others have taken, though it gets them back as soon as these sessions have come over.  So whoever reckons a default
budget adds what is held here (``expertd.daemon.machine``).

A process counts if it has been running since before the note was written: then it is the one that was noted, whatever
became of numbers, and of the machine, in between.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import psutil

from expertd.daemon.core import Core, memory
from expertd.daemon.core.bases import Bases
from expertd.protocol.logs import Log

log = Log("expertd.daemon")

ROUNDED_S = 2.0
"""Linux tells when a process began by a clock that is so far off at most."""


class Held(msgspec.Struct, frozen=True):
    """Bytes of one model's segments and copies, and the processes that have them."""

    size: int
    pids: tuple[int, ...]


class _Note(msgspec.Struct, frozen=True):
    """``at``: when it was written, in seconds since 1970; ``models``: by their keys."""

    at: float
    models: dict[str, Held]


class Holders:
    """Owned by the daemon's loop, or by somebody who only looks."""

    def __init__(self, path: Path) -> None:
        """``path``: of the note."""
        self._path = path
        self._before = _living(path)  # what is still held of earlier daemons, as far as its model has not come here
        self._noted: dict[str, Held] = {}

    @property
    def before(self) -> int:
        """Bytes that processes hold of earlier daemons, and have not brought here yet."""
        return sum(held.size for held in self._before.values())

    def awaited(self, model: str) -> bool:
        """Whether processes hold something of ``model`` (a key) of an earlier daemon, and none of them has come yet."""
        return model in self._before

    def changed(self, now: Mapping[str, Held]) -> bool:
        """Take what is held of this daemon's models in use; whether that is worth a ``write``."""
        self._before = {key: held for key, held in self._before.items() if key not in now}
        changed = dict(now) != self._noted
        self._noted = dict(now)
        return changed

    def write(self) -> None:
        """Put the note in the place of the one before.  Never raises: a budget may be too small without it."""
        note = _Note(time.time(), {**self._before, **self._noted})
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            fresh.write_bytes(msgspec.json.encode(note))
            fresh.replace(self._path)
        except OSError as error:
            log.warning("what sessions hold could not be noted", path=self._path, why=error.strerror)
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)


def held_now(core: Core, bases: Bases) -> dict[str, Held]:
    """What sessions hold of this daemon's models, by the models' keys."""
    held = {}
    for key, model in core.models.items():
        if model.sessions:
            size = memory.used([model]) + sum(base.size for base in bases.of_model(key) if base.users)
            held[key] = Held(size, tuple(sorted({session.pid for session in model.sessions.values()})))
    return held


def _living(path: Path) -> dict[str, Held]:
    """What the note tells of processes that are still there; nothing, if there is none that can be read."""
    try:
        note = msgspec.json.decode(path.read_bytes(), type=_Note)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    since = note.at + ROUNDED_S
    living = {
        key: Held(held.size, tuple(pid for pid in held.pids if _lives(pid, since))) for key, held in note.models.items()
    }
    return {key: held for key, held in living.items() if held.pids}


def _lives(pid: int, since: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):  # it has gone, or the note is none of ours
        return False
