"""Base weights in shared memory: created, filled from the model's own files, and handed over read-only.

Once filled, a segment is *sealed*: the daemon keeps no writable mapping of it, so nobody can change it any more.  What
they take and when they go is decided in ``expertd.daemon.core.bases``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from expertd.daemon.core.bases import Base, Bases
from expertd.daemon.direct import Piece, runs
from expertd.daemon.files import Read
from expertd.daemon.index import BlockIndex
from expertd.daemon.large_pages import LargePages
from expertd.daemon.plain import PlainFile
from expertd.daemon.reader import Reader
from expertd.protocol.errors import ExpertdError, SegmentFailed, from_code
from expertd.protocol.layout import (
    BASE_GENERATION,
    base_layout,
    has_contents,
    read_header,
    write_contents,
    write_header,
)
from expertd.protocol.logs import Log
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import BaseInfo
from expertd.protocol.model_names import shown_name
from expertd.protocol.segments import Segment, create, map_readonly
from expertd.protocol.sizes import show_size

log = Log("expertd.daemon")

CHUNK = 4 << 20
"""So much is read at once."""
AT_ONCE = 3
"""So many of these wait or are read: enough for a device, and a block that somebody waits for comes soon."""

Chunk = Sequence[tuple[int, Piece]]
"""Pieces, each with the number of its file."""


@dataclass(frozen=True)
class _Sealed:
    descriptor: int
    nonce: bytes


class SharedBases:
    """Owned by the daemon's loop.

    Attributes:
        known: what there is, and who has it.
    """

    def __init__(
        self, name: str, reader: Reader, creating: asyncio.Lock, large_pages: LargePages, changed: Callable[[], None]
    ) -> None:
        """None yet.

        Args:
            name: of segments, for the instant in which they have one; under ``creating``.
            changed: called when they take more or less memory than before.
        """
        self._large_pages = large_pages
        self.known = Bases(secrets.randbits(48) | 1 << 56)  # far from the numbers of pools
        self._name, self._reader, self._creating, self._changed = name, reader, creating, changed
        self._sealed: dict[int, _Sealed] = {}
        self._filling: dict[int, asyncio.Task[None]] = {}  # by segment
        self._told: set[tuple[str, str]] = set()

    async def share(self, manifest: Manifest, index: BlockIndex, most: int, needed: int, opened: bool) -> Base | None:
        """The base weights of ``manifest``, read; the caller is counted in their ``opening`` until it says otherwise.

        None if nobody wants them shared, or they cannot be; then the log and ``known.problems`` tell why.  If this is
        called off, and nobody else waits for them, they are not read to their end.

        Args:
            most, needed, opened: see ``Bases.refusal``.
        """
        if not manifest.base:
            return None
        base = self.known.find(manifest.base_key)
        if base is None:
            if (refusal := self.known.refusal(manifest, most, needed, opened)) is not None:
                self.known.problems[manifest.key] = refusal
                self._tell(manifest, refusal)
                return None
            base = self.known.add(manifest)
            task = asyncio.get_running_loop().create_task(self._make(base, manifest, index))
            self._filling[base.segment] = task
            task.add_done_callback(partial(self._filled, base.segment))
        base.opening += 1
        self._changed()
        try:
            if (filling := self._filling.get(base.segment)) is not None:
                await asyncio.shield(filling)
        except asyncio.CancelledError:  # its session has ended; if nobody else waits, its lanes stop at the next chunk
            base.opening -= 1
            if not base.in_use and base.segment not in self._sealed and self.known.find(base.key) is base:
                self.known.given_up(base)
            self._changed()
            raise
        if base.segment in self._sealed:
            return base
        base.opening -= 1
        return None

    def adopt(
        self, manifest: Manifest, info: BaseInfo, size: int, descriptor: int, most: int, needed: int, opened: bool
    ) -> Base | None:
        """Base weights of an earlier daemon that a session goes on with, as ``share``; None: they are not used here.

        They were handed over when they were complete, and nobody can write to them.  Whoever waits for them being read
        gets these; where they have been read, these only count.  Owns ``descriptor``.
        """
        base = self.known.find(manifest.base_key)
        sealed = None if base is None else self._sealed.get(base.segment)
        problem = _misfit(manifest, info, size, descriptor)
        if base is None:
            problem = problem or self.known.refusal(manifest, most, needed, opened)
        if problem is not None:
            os.close(descriptor)
            self._tell(manifest, f"those that a session handed back are not used: {problem}")
            return None
        if base is None or sealed is None:
            base = base or self.known.add(manifest)
            self._sealed[base.segment] = _Sealed(descriptor, info.nonce)  # if they are being read, that stops
        else:
            os.close(descriptor)
            if sealed.nonce != info.nonce:  # others are shared already
                base = self.known.copy(manifest, info.nonce)
        base.opening += 1
        self._changed()
        return base

    def info(self, base: Base) -> BaseInfo:
        """What a session is told of it."""
        return BaseInfo(segment=base.segment, size=base.size, nonce=self._sealed[base.segment].nonce)

    def descriptor(self, base: Base) -> int:
        """The read-only descriptor to hand over."""
        return self._sealed[base.segment].descriptor

    def sweep(self, models: Collection[str]) -> bool:
        """Give back what nobody uses and whose model is none of ``models``; whether there was any."""
        gone = self.known.leave(models)
        for base in gone:
            self._large_pages.forget(base.segment)
            if (sealed := self._sealed.pop(base.segment, None)) is not None:
                os.close(sealed.descriptor)
        return bool(gone)

    async def close(self) -> None:
        """Give up what is being read, and all segments; sessions that have them mapped keep them."""
        for task in list(self._filling.values()):
            task.cancel()
        await asyncio.gather(*self._filling.values(), return_exceptions=True)
        for sealed in self._sealed.values():
            os.close(sealed.descriptor)
        self._sealed.clear()

    def _filled(self, segment: int, _: asyncio.Task[None]) -> None:
        self._filling.pop(segment, None)

    def _tell(self, manifest: Manifest, why: str) -> None:
        if (manifest.key, why) not in self._told:
            self._told.add((manifest.key, why))
            log.warning("base weights are not shared: %s", why, model=shown_name(Path(manifest.folder)))

    async def _make(self, base: Base, manifest: Manifest, index: BlockIndex) -> None:
        began = time.monotonic()
        segment: Segment | None = None
        try:
            async with self._creating:
                segment = await asyncio.to_thread(create, self._name, base.size)
            nonce = secrets.token_bytes(16)
            write_header(memoryview(segment.mapping), nonce, BASE_GENERATION)
            write_contents(memoryview(segment.mapping), base.key, (), 0)
            read = await self._fill(base, segment, manifest, index)
            if not self._wanted(base):
                return
            base.read = read
            self._large_pages.gather(base.segment, segment.readonly, base.size)
            self._sealed[base.segment] = _Sealed(os.dup(segment.readonly), nonce)
        except (ExpertdError, OSError) as error:
            if not self._wanted(base):
                return
            why = f"{error}; each process reads and holds its own"
            self.known.failed(base, why)
            self._tell(manifest, why)
            self._changed()
        else:
            seconds = round(time.monotonic() - began, 2)
            name = shown_name(Path(manifest.folder))
            self.known.problems.pop(base.model, None)
            log.info("base weights are shared", model=name, size=show_size(base.size), seconds=seconds)
        finally:
            if segment is not None:
                segment.close()

    def _wanted(self, base: Base) -> bool:
        """Whether a segment for ``base`` is to be read on: it was not given up, and nobody has handed another back."""
        return self.known.find(base.key) is base and base.segment not in self._sealed

    async def _fill(self, base: Base, segment: Segment, manifest: Manifest, index: BlockIndex) -> int:
        """Read all tensors into ``segment``; returns how many bytes these were.

        Raises:
            ReadFailed, FileChanged: a file could not be read, or is another one.
        """
        files = [PlainFile(path, mark) for path, mark in zip(index.paths, index.marks, strict=True)]
        waiting = deque(chunks(manifest, index.base, memoryview(segment.mapping)))
        try:
            results = await asyncio.gather(*(self._lane(base, waiting, files) for _ in range(AT_ONCE)))
        finally:
            waiting.clear()
            for file in files:
                file.close()
        for problem in results:
            if problem is not None:
                # A new one, and no name for it: its story would hold the pieces, and they the segment.
                raise from_code(problem.code, problem.message)
        return sum(tensor.bytes for tensor in manifest.base)

    async def _lane(self, base: Base, waiting: deque[Chunk], files: Sequence[PlainFile]) -> ExpertdError | None:
        """Read what waits, as long as somebody wants it, or until one cannot be read: then it is told why."""
        while waiting and base.in_use and self._wanted(base):
            if (problem := await self._read(waiting.popleft(), files)) is not None:
                waiting.clear()
                return problem
        return None

    async def _read(self, chunk: Chunk, files: Sequence[PlainFile]) -> ExpertdError | None:
        loop = asyncio.get_running_loop()
        result: asyncio.Future[ExpertdError | None] = loop.create_future()

        def settle(problem: ExpertdError | None) -> None:
            if not result.done():  # it is, if the reading was called off
                result.set_result(problem)

        def done(_: int, error: ExpertdError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the daemon ends, and nobody waits for this any more
                loop.call_soon_threadsafe(settle, error)

        self._reader.work(lambda read: read_chunk(chunk, files, read), done)
        return await result


def _misfit(manifest: Manifest, info: BaseInfo, size: int, descriptor: int) -> str | None:
    """Why a segment does not hold the base weights of ``manifest``; None: it does."""
    if size != info.size or size != base_layout(manifest.base)[1]:
        return f"they have {size} bytes"
    try:
        mapping = map_readonly(os.dup(descriptor), size)
    except (OSError, SegmentFailed) as error:
        return str(error)
    with mapping, memoryview(mapping) as view:
        if read_header(view) == (info.nonce, BASE_GENERATION) and has_contents(view, manifest.base_key, (), 0):
            return None
    return "their header is another one's"


def chunks(manifest: Manifest, starts: Sequence[int], segment: memoryview) -> list[Chunk]:
    """What has to be read, and where to, in pieces of about CHUNK, in the order of the bytes in the files.

    Args:
        starts: for each base tensor, where its bytes begin in its file.
    """
    offsets, _ = base_layout(manifest.base)
    found: list[list[tuple[int, Piece]]] = []
    room = 0
    for tensor, start, offset in zip(manifest.base, starts, offsets, strict=True):
        done = 0
        while done < tensor.bytes:
            if room <= 0:
                found.append([])
                room = CHUNK
            size = min(room, tensor.bytes - done)
            found[-1].append((tensor.file, Piece(start + done, segment[offset + done : offset + done + size])))
            done, room = done + size, room - size
    return [tuple(chunk) for chunk in found]


def read_chunk(chunk: Chunk, files: Sequence[PlainFile], read: Read) -> int:
    """Read the pieces of one chunk; returns their bytes.

    Raises:
        ReadFailed, FileChanged: as ``PlainFile.read``.
    """
    pieces: defaultdict[int, list[Piece]] = defaultdict(list)
    for file, piece in chunk:
        pieces[file].append(piece)
    for file, of_file in pieces.items():
        for run in runs(of_file):
            files[file].read(run, read)
    return sum(len(piece.row) for _, piece in chunk)
