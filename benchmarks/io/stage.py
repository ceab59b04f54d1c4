"""What the benchmark reads, and the daemons that read it: one model, packed in one home and plain in another."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.io.counters import Counted, Counters, between
from benchmarks.io.pages import PageCount
from expertd.daemon.blocks import OpenFiles, read_block
from expertd.daemon.index import build_index
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import FetchToRead
from expertd.protocol.packed import StoreLayout, header_of, layout_of, store_name
from expertd.protocol.paths import Home
from expertd.worker.attach import Session
from expertd.worker.manifest import load_lazily
from expertd.worker.store import write_store
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

EXPERTS = 128
FETCH = 64
"""Blocks of one Fetch, and slots of the pool, so that each Fetch of another layer finds none of its own."""


@dataclass(frozen=True)
class Stored:
    """A model and its packed store."""

    manifest: Manifest
    store: Path
    layout: StoreLayout

    @property
    def block_bytes(self) -> int:
        return self.manifest.layers[0].block_bytes


@dataclass(frozen=True)
class Read:
    """One Fetch: seconds until its answer, and what it cost.  None: not counted on this system."""

    seconds: float
    process_bytes: int | None
    device_bytes: int | None
    cpu_s: float


def write_model(folder: Path, layers: int) -> Stored:
    """A checkpoint with the blocks of Qwen3-30B-A3B in 4 bits (2.65 MB), and its store; on disk, not in memory."""
    path = write_checkpoint(
        folder / "model", "qwen3_moe", experts="affine", dense="bfloat16", layers=layers, n_experts=EXPERTS, top_k=8,
        hidden=2048, expert_width=768, vocab=2048,
    )  # fmt: skip
    manifest = load_lazily(path).manifest
    layout, store = layout_of(header_of(manifest)), folder / store_name(manifest.key)
    files = OpenFiles(build_index(manifest))

    def fill(layer: int, expert: int, rows: Sequence[memoryview]) -> None:
        read_block(files, layer, expert, rows)

    write_store(layout, store, fill, lambda size, fresh: None)
    files.close()
    for file in [store, *path.iterdir()]:
        _forget(file)
    return Stored(manifest, store, layout)


def _forget(path: Path) -> None:
    """See that ``path`` is on the disk, and not in the page cache where the system takes such advice."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


class Reading:
    """A daemon with one session, which fetches; ``large_share`` of its pool lies in large pages (None: unknown)."""

    def __init__(self, home: Home, pid: int, stored: Stored, count: PageCount) -> None:
        self.home, self._stored = home, stored
        self._session = Session(home, stored.manifest, "shm")
        self._counters = Counters(pid, stored.store)
        self.large_share = count.share_when_still(budget_for(stored.manifest, FETCH))

    def fetch(self, layer: int, experts: Sequence[int]) -> Read:
        """Fetch blocks of which none is resident."""
        session = self._session
        session.begin()
        (pool,) = (pool for pool in session.pools if layer in pool.layers)
        before, began = self._counters.now(), time.perf_counter()
        session.fetch(pool, layer, np.array(experts))
        seconds = time.perf_counter() - began
        after = self._counters.now()
        session.end(True)
        return _difference(seconds, before, after)

    def choose(self, chance: random.Random, layer: int, count: int, absent: int) -> list[int]:
        """``count`` experts of a layer, ``absent`` of them not resident as far as there are others."""
        (pool,) = (pool for pool in self._session.pools if layer in pool.layers)
        row = pool.table[pool.layers.index(layer)]
        resident = [expert for expert in range(EXPERTS) if row[expert] >= 0]
        others = [expert for expert in range(EXPERTS) if row[expert] < 0]
        chosen = chance.sample(resident, min(count - absent, len(resident)))
        return chosen + chance.sample(others, count - len(chosen))

    def fetch_to_read(self) -> FetchToRead:
        """How soon the daemon has begun to read after a Fetch came, since its start."""
        return ask_status(self.home).fetch_to_read_us or FetchToRead(p50=0, p99=0)

    def close(self) -> None:
        self._session.close()


def _difference(seconds: float, before: Counted, after: Counted) -> Read:
    return Read(
        seconds,
        between(before.process_bytes, after.process_bytes),
        between(before.device_bytes, after.device_bytes),
        after.cpu_s - before.cpu_s,
    )


@contextmanager
def reading(stored: Stored, packed: bool, slots: int = FETCH) -> Iterator[Reading]:
    """A daemon that reads from the store, or from the model's own files; what its pool lies in is settled."""
    count = PageCount()
    with temporary_home() as home:
        if packed:
            home.packed.mkdir(mode=0o700)
            (home.packed / stored.store.name).symlink_to(stored.store)
        with running_daemon(home, budget_for(stored.manifest, slots)) as daemon:
            found = Reading(home, daemon.pid, stored, count)
            try:
                (model,) = ask_status(home).models
                assert bool(model.packed) is packed, f"the daemon reads from {model.packed or 'the files'}"
                yield found
            finally:
                found.close()
