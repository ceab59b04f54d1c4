"""How fast a device gives blocks: a short measurement with the daemon's own reading threads, past the page cache.

For whoever plans or looks for what is wrong; the daemon itself counts its real reads (``expertd.daemon.devices``).
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from expertd.daemon.blocks import OpenFiles
from expertd.daemon.core.instructions import Priority
from expertd.daemon.files import FillFailed, Read, fill, open_direct, own_buffer
from expertd.daemon.index import BlockIndex, build_index
from expertd.daemon.packed import any_store
from expertd.daemon.reader import Reader
from expertd.protocol.errors import ExpertdError, ReadFailed
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import Layer, Manifest

FEWEST, SECONDS = 5, 0.4
"""Each number of blocks is read so often at least, and for about so long."""
PIECE = 1 << 20
"""Bytes of a read of ``rate_of``."""


def probe(
    manifest: Manifest, store: Path | None, counts: Sequence[int], read: Read = os.preadv, seed: int = 0
) -> dict[int, float]:
    """Seconds (the median) until so many random blocks of a model, asked for at once, are all read; by ``counts``.

    Args:
        manifest: need not be one that a worker has derived, as long as it names the right bytes.
        store: the model's packed store, if it has one.
        read: as ``Reader`` takes it.
    Raises:
        CheckpointError: the files cannot be used.
        StoreInvalid, OSError: the store cannot be used.
        ReadFailed: the system failed.
    """
    index = build_index(manifest) if store is None else _index_of(manifest, store)
    files = OpenFiles(index)
    files.use(index.store)
    reader = Reader(read=read)
    chance = random.Random(seed)
    blocks = [(number, expert) for number, layer in enumerate(manifest.layers) for expert in range(layer.experts)]
    try:
        times: dict[int, list[float]] = {}
        for count in counts:
            count = min(count, len(blocks))
            rows = [_rows(_largest(manifest)) for _ in range(count)]
            until = time.monotonic() + SECONDS
            found = times.setdefault(count, [])
            while len(found) < FEWEST or time.monotonic() < until:
                found.append(_read_at_once(reader, files, manifest, chance.sample(blocks, count), rows))
        return {count: statistics.median(found) for count, found in times.items()}
    finally:
        reader.close()
        files.close()


def rate_of(path: Path, seconds: float = 0.5, read: Read = os.preadv) -> tuple[float, float]:
    """Bytes a second, and the median seconds of one read of ``PIECE`` bytes, at random places of a large file.

    Raises:
        OSError: it cannot be read.
    """
    descriptor, _ = open_direct(path)
    try:
        pieces = path.stat().st_size // PIECE
        if not pieces:
            raise OSError(f"{path} is too short to be measured")
        places = [place * PIECE for place in range(pieces)]
        random.Random(0).shuffle(places)
        began, times = time.monotonic(), []
        for place in itertools.cycle(places):
            start = time.monotonic()
            try:
                fill(read, descriptor, [own_buffer(PIECE)], place)
            except FillFailed as failed:
                raise failed.error or OSError(f"{path} ended early") from failed
            times.append(time.monotonic() - start)
            if time.monotonic() - began > seconds:
                break
        return len(times) * PIECE / sum(times), statistics.median(times)
    finally:
        os.close(descriptor)


def _index_of(manifest: Manifest, store: Path) -> BlockIndex:
    paths = tuple(Path(manifest.folder) / mark.name for mark in manifest.files)
    return BlockIndex(paths, manifest.files, (), manifest.layers, any_store(store), derived=True)


def _largest(manifest: Manifest) -> list[int]:
    """Bytes of each part, the largest of all layers."""
    sizes = [[part.block_bytes for part in layer.parts] for layer in manifest.layers]
    return [max(of_part) for of_part in itertools.zip_longest(*sizes, fillvalue=0)]


def _rows(sizes: Sequence[int]) -> list[memoryview]:
    return [memoryview(mmap.mmap(-1, -(-size // PAGE) * PAGE)) for size in sizes]


def _fitting(rows: Sequence[memoryview], layer: Layer) -> list[memoryview]:
    return [row[: part.block_bytes] for row, part in zip(rows, layer.parts, strict=False)]


def _read_at_once(
    reader: Reader,
    files: OpenFiles,
    manifest: Manifest,
    blocks: Sequence[tuple[int, int]],
    rows: Sequence[Sequence[memoryview]],
) -> float:
    left, all_done = len(blocks), threading.Event()
    lock = threading.Lock()
    failed: list[ExpertdError] = []

    def done(size: int, error: ExpertdError | None) -> None:
        nonlocal left
        with lock:
            left -= 1
            if error is not None:
                failed.append(error)
            if not left:
                all_done.set()

    began = time.monotonic()
    for (layer, expert), of_block in zip(blocks, rows, strict=True):
        reader.read(files, layer, expert, _fitting(of_block, manifest.layers[layer]), done, Priority.DEMAND)
    if not all_done.wait(60):
        raise ReadFailed("a block was not read within a minute")
    if failed:
        raise failed[0]
    return time.monotonic() - began
