"""Which processes hold how much of the daemon's memory, noted in the home for the daemon that comes after this one.

Pages that a session has mapped outlive the daemon that gave them.  To a daemon that starts then, they look like memory
that others have taken, though it gets them back as soon as these sessions have come over.  So whoever reckons a default
budget adds what is held here (``expertd.daemon.machine``).

A process counts if it has been running since before it was noted: then it is the one that was noted, whatever became of
numbers, and of the machine, in between.  It counts with no more than it has mapped, which Linux tells; elsewhere, as
long as it lives.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec
import psutil

from expertd.daemon.core import Core, memory
from expertd.daemon.core.bases import Bases
from expertd.protocol.logs import Log
from expertd.protocol.segments import mapped_by

log = Log("expertd.daemon")

ROUNDED_S = 2.0
"""Linux tells when a process began by a clock that is so far off at most."""


class Held(msgspec.Struct, frozen=True):
    """Bytes of one model's segments and copies, the processes that have them, and how much of that copies are."""

    size: int
    pids: tuple[int, ...]
    copied: int = 0


class _Noted(msgspec.Struct, frozen=True):
    """``held``, by processes that had it ``at`` that moment, in seconds since 1970."""

    at: float
    held: Held


class _Note(msgspec.Struct, frozen=True):
    """``models``: by their keys."""

    models: dict[str, _Noted]


class Holders:
    """Owned by the daemon's loop, or by somebody who only looks."""

    def __init__(self, path: Path) -> None:
        """``path``: of the note."""
        self._path = path
        self._before = _read(path)  # what is still held of earlier daemons, as far as its model has not come here
        self._noted: dict[str, _Noted] = {}

    @property
    def before(self) -> int:
        """Bytes that processes hold of earlier daemons, and have not brought here yet."""
        return self.beside(())

    def beside(self, models: Collection[str]) -> int:
        """The same without ``models`` (keys): somebody else counts these."""
        return sum(noted.held.size for key, noted in _living(self._before).items() if key not in models)

    def awaited(self, model: str, but: int) -> bool:
        """Whether processes hold something of ``model`` (a key) of an earlier daemon, and none of them has come yet.

        Process ``but`` is not asked about: it waits itself.
        """
        noted = self._before.get(model)
        return noted is not None and any(pid != but for pid in _still(noted).pids)

    def changed(self, now: Mapping[str, Held]) -> bool:
        """Take what is held of this daemon's models in use; whether that is worth a ``write``."""
        before = _living({key: noted for key, noted in self._before.items() if key not in now})
        noted = {key: self._noted.get(key) for key in now}
        at = time.time()
        fresh = {
            key: old if old is not None and old.held == now[key] else _Noted(at, now[key]) for key, old in noted.items()
        }
        changed = (before, fresh) != (self._before, self._noted)
        self._before, self._noted = before, fresh
        return changed

    def write(self) -> None:
        """Put the note in the place of the one before.  Never raises: a budget may be too small without it."""
        note = _Note({**_living(self._before), **self._noted})
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
            pids = tuple(sorted({session.pid for session in model.sessions.values()}))
            held[key] = Held(size, pids, model.size * model.copies)
    return held


def _read(path: Path) -> dict[str, _Noted]:
    """What the note tells; nothing, if there is none that can be read."""
    try:
        note = msgspec.json.decode(path.read_bytes(), type=_Note)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return _living(note.models)


def _living(models: Mapping[str, _Noted]) -> dict[str, _Noted]:
    """What of it is still held, and by whom."""
    living = {key: _Noted(noted.at, _still(noted)) for key, noted in models.items()}
    return {key: noted for key, noted in living.items() if noted.held.pids}


def _still(noted: _Noted) -> Held:
    """The same for one model, as far as the system tells."""
    held, since = noted.held, noted.at + ROUNDED_S
    mapped = {pid: mapped_by(pid) for pid in held.pids if _lives(pid, since)}
    pids = tuple(pid for pid, segments in mapped.items() if segments is None or segments)
    together: dict[bytes, int] = {}  # they share most
    for segments in mapped.values():
        if segments is None:
            return Held(held.size, pids, held.copied)
        together |= segments
    return Held(min(held.size, sum(together.values()) + held.copied), pids, held.copied)


def _lives(pid: int, since: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() <= since and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError, OverflowError):  # it has gone, or the note is none of ours
        return False
