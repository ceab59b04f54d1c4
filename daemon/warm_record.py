"""The record of what was worth keeping of a model, for the daemon that comes after this one: a small file in the home.

It names the blocks that were resident, those used most in the long run first, and holds the policy's statistics.  A
file is written beside the one before and takes its place in one step; what is damaged all the same is told by its
checksum, and is not used.  When a record is written, and what becomes of one, is ``expertd.daemon.remembering``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import struct
import time
import zlib
from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy import Block, Statistics
from expertd.protocol.logs import Log
from expertd.protocol.paths import Home

log = Log("expertd.daemon")

KEPT = 64
"""Records that a home keeps: those of models that were changed or removed go when so many others are newer."""
LATEST = 1e11
"""Seconds since 1970 that are no date any more."""
ABANDONED_S = 3600.0
"""After so long nobody is writing a file any more that is not finished."""
LARGEST = 256 << 20
"""Bytes of a file that may be a record."""

_HEAD = struct.Struct("<8sI")
_MAGIC = b"xprtwrm1"


class RecordDamaged(Exception):
    """A file is no record, or not a whole one."""


class _Array(msgspec.Struct, frozen=True):
    """An array of numbers: NumPy's name of their type, the shape, and the bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[np.generic]) -> _Array:
        return cls(array.dtype.str, array.shape, np.ascontiguousarray(array).tobytes())

    def array(self) -> NDArray[np.generic]:
        """Raises RecordDamaged."""
        try:
            dtype = np.dtype(self.dtype)
            if dtype.kind not in "iuf" or len(self.data) != dtype.itemsize * math.prod(self.shape):
                raise RecordDamaged(f"it has no whole array of {self.dtype[:20]!r}")
            return np.frombuffer(self.data, dtype).reshape(self.shape)
        except (TypeError, ValueError) as error:
            raise RecordDamaged(f"it has an array that is none ({error})") from error


class WarmRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was known of a model.

    Attributes:
        model: its key: other files, or another way to read them, are another model.
        folder: where it was, for a person.
        at: when that was so, in seconds since 1970.
        policy: name of the class that ``statistics`` are of.
        order: ``[n, 2]``, int32: the resident blocks (layer, expert), in the order in which they should come back.
    """

    model: str
    folder: str
    at: float
    policy: str
    order: _Array
    arrays: dict[str, _Array]

    @classmethod
    def of(
        cls, model: str, folder: str, at: float, policy: str, blocks: Sequence[Block], statistics: Statistics
    ) -> WarmRecord:
        """Make one of ``blocks``, in the order in which they should come back."""
        order = _Array.of(np.array(blocks, "<i4").reshape(-1, 2))
        arrays = {name: _Array.of(array) for name, array in statistics.items()}
        return cls(model=model, folder=folder, at=at, policy=policy, order=order, arrays=arrays)

    @property
    def blocks(self) -> list[Block]:
        """The blocks in their order.  Raises RecordDamaged."""
        order = self.order.array()
        if order.ndim != 2 or order.shape[1] != 2 or order.dtype.kind != "i":
            raise RecordDamaged("its blocks are none")
        return [(layer, expert) for layer, expert in order.tolist()]

    @property
    def statistics(self) -> Statistics:
        """What the policy knew.  Raises RecordDamaged."""
        return {name: array.array() for name, array in self.arrays.items()}


def encode(record: WarmRecord) -> bytes:
    """The file of a record."""
    payload = msgspec.msgpack.encode(record)
    return _HEAD.pack(_MAGIC, zlib.crc32(payload)) + payload


def decode(data: bytes) -> WarmRecord:
    """The record of a file.

    Raises:
        RecordDamaged: it is none, or not a whole one; says why.
    """
    if len(data) < _HEAD.size:
        raise RecordDamaged(f"it has {len(data)} bytes only")
    magic, checksum = _HEAD.unpack_from(data)
    payload = memoryview(data)[_HEAD.size :]
    if magic != _MAGIC:
        raise RecordDamaged("it is something else, or of another version")
    if zlib.crc32(payload) != checksum:
        raise RecordDamaged("its checksum does not fit")
    try:
        record = msgspec.msgpack.decode(payload, type=WarmRecord)
    except msgspec.DecodeError as error:
        raise RecordDamaged(str(error)) from error
    if not 0 <= record.at < LATEST:
        raise RecordDamaged("its date is none")
    record.blocks, record.statistics  # noqa: B018  (so that nobody else has to expect what they raise)
    return record


def write(home: Home, record: WarmRecord) -> None:
    """Put ``record`` in the place of the one before.  Never raises: nobody depends on it."""
    path = home.warm_record(record.model)
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(encode(record))
            file.flush()
            os.fsync(file.fileno())  # else a machine that loses its power may keep the name, and nothing in it
        fresh.replace(path)
        _remove_oldest(home)
    except OSError as error:
        log.warning("what is worth keeping could not be recorded", folder=record.folder, why=error.strerror)
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def read(home: Home, model: str) -> WarmRecord | None:
    """The record of the model with that key; None if there is none, or it cannot be used, which the log tells."""
    path = home.warm_record(model)
    try:
        if path.stat().st_size > LARGEST:
            raise RecordDamaged("it is far too large")
        record = decode(path.read_bytes())
        if record.model != model:
            raise RecordDamaged("it is of another model")
    except FileNotFoundError:
        return None
    except (OSError, RecordDamaged) as error:
        log.warning("the record of what was warm is not used: %s", error, path=path)
        return None
    return record


def forget(home: Home, model: str) -> None:
    """Remove the record of the model with that key, if there is one.  Never raises."""
    path = home.warm_record(model)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("the record of what was warm could not be removed", path=path, why=error.strerror)


class Records:
    """Writes and forgets the records of a home for a loop, which owns it and never waits for the disk."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._writing: asyncio.Future[None] | None = None
        self._forgotten: set[str] = set()  # while something was written

    async def write(self, records: Sequence[WarmRecord]) -> None:
        """Write them all, after what is being written.  If this is called off, the thread goes on all the same."""
        await self._written()
        self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, records))
        await self._written()

    def forget(self, model: str) -> None:
        """Remove the record of the model with that key, and the one that is being written of it."""
        if self._writing is not None:
            self._forgotten.add(model)
        forget(self._home, model)

    def _write(self, records: Sequence[WarmRecord]) -> None:
        for record in records:
            write(self._home, record)

    async def _written(self) -> None:
        if self._writing is not None:
            await asyncio.shield(self._writing)
            self._writing = None
            for model in self._forgotten:
                forget(self._home, model)
            self._forgotten.clear()


def _remove_oldest(home: Home) -> None:
    """Keep the newest records, and nothing of those that a process began to write that was killed."""
    for path in home.warmth.glob("*.new"):
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)
    paths = [(path.stat().st_mtime_ns, path) for path in home.warmth.glob("*.warm")]
    for _, path in sorted(paths, reverse=True)[KEPT:]:
        path.unlink(missing_ok=True)
