"""The reading threads: who goes first, what waits, what is read together, and whose error is whose.  Real files."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from expertd.daemon import pacing
from expertd.daemon.blocks import OpenFiles, read_block
from expertd.daemon.core.instructions import Priority
from expertd.daemon.direct import CHUNK, PAGE, Piece, runs
from expertd.daemon.files import SECTOR, device_name
from expertd.daemon.index import build_index
from expertd.daemon.reader import MERGED_BYTES, Job, Reader, _outcome, copy_block
from expertd.protocol.errors import ExpertdError, ReadFailed
from expertd.protocol.manifest import Manifest
from expertd.protocol.packed import checksum
from tests.conftest import DEADLINE_S, wait_for
from tests.test_packed_store import EXPERTS, SIZES, opened, plain_block, rows_of, write, write_model

DEMAND, AHEAD, BACKGROUND = Priority


class Gate:
    """As ``os.preadv``; with ``held`` every read waits until it is let through.  Notes where reads begin."""

    def __init__(self, held: bool = False) -> None:
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.buffers: list[list[memoryview]] = []
        self.fail: Callable[[int, int], OSError | None] = lambda offset, size: None
        self._tickets = threading.Semaphore(0)
        self._held = held
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        size = sum(map(len, buffers))
        with self._lock:
            self.offsets.append(offset)
            self.sizes.append(size)
            self.buffers.append(buffers)
        if self._held:
            assert self._tickets.acquire(timeout=DEADLINE_S), "nobody let this read through"
        if error := self.fail(offset, size):
            raise error
        return os.preadv(descriptor, buffers, offset)

    def let(self, reads: int = 1) -> None:
        """Let so many through."""
        self._tickets.release(reads)

    def open(self) -> None:
        """Let all through from now on."""
        self._held = False
        self.let(1000)


class Desk:
    """Asks a reader for blocks of one layer of a model, and notes what became of each."""

    def __init__(self, files: OpenFiles, manifest: Manifest, reader: Reader) -> None:
        self.files, self.manifest, self.reader = files, manifest, reader
        self.done: list[int] = []
        self.sizes: dict[int, int] = {}
        self.errors: dict[int, ExpertdError] = {}
        self.rows: dict[int, list[memoryview]] = {}

    def ask(self, expert: int, priority: Priority = DEMAND, layer: int = 0, asked_at: float | None = None) -> Job:
        rows = self.rows[expert] = rows_of(self.manifest.layers[layer])

        def done(size: int, error: ExpertdError | None) -> None:
            self.sizes[expert] = size
            if error is not None:
                self.errors[expert] = error
            self.done.append(expert)

        return self.reader.read(self.files, layer, expert, rows, done, priority, asked_at)

    def wait(self, *experts: int) -> None:
        """Until these have been done."""
        wait_for(lambda: set(experts) <= set(self.done))

    def check(self, layer: int = 0) -> None:
        """All that was read without an error is as it is in the file."""
        for expert in set(self.done) - self.errors.keys():
            assert [bytes(row) for row in self.rows[expert]] == plain_block(self.manifest, layer, expert)


@contextmanager
def desk(
    manifest: Manifest, gate: Gate, threads: int = 3, folder: Path | None = None, **options: Any
) -> Iterator[Desk]:
    files = OpenFiles(build_index(manifest)) if folder is None else opened(manifest, folder)
    reader = Reader(threads, gate, **options)
    try:
        yield Desk(files, manifest, reader)
    finally:
        gate.open()
        reader.close()
        files.close()


APART = {"one": (MERGED_BYTES // 2 + 1,)}
"""Blocks of one part of which no two are read together."""


@pytest.fixture
def apart(tmp_path: Path) -> Manifest:
    return write_model(tmp_path / "apart", APART)


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    """Small blocks of one part, neighbours in the file."""
    return write_model(tmp_path / "small", {"one": (1000,)})


# -- who goes first ----------------------------------------------------------------------------------------------------


def test_demand_goes_before_ahead_and_that_before_background(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate, threads=1) as asks:
        asks.ask(0)
        wait_for(lambda: len(gate.offsets) == 1)
        asks.ask(1, BACKGROUND)
        asks.ask(2, AHEAD)
        asks.ask(3)
        gate.open()
        asks.wait(0, 1, 2, 3)
        assert asks.done == [0, 3, 2, 1]
        asks.check()


def test_of_what_nobody_waits_for_one_read_is_under_way(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate) as asks:
        for expert in range(3):
            asks.ask(expert, BACKGROUND)
        for expert in (3, 4):
            asks.ask(expert, AHEAD)
        for done in range(EXPERTS):
            wait_for(lambda done=done: len(gate.offsets) == done + 1)  # type: ignore[misc]
            assert len(asks.done) == done, "each begins when the one before has ended"
            gate.let()
            wait_for(lambda done=done: len(asks.done) == done + 1)  # type: ignore[misc]
        (device,) = asks.reader.devices().devices
        assert device.depth_max == 1


def test_a_demand_finds_a_free_thread_while_others_are_read(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate) as asks:
        asks.ask(0, BACKGROUND)
        wait_for(lambda: len(gate.offsets) == 1)
        asks.ask(1)
        wait_for(lambda: len(gate.offsets) == 2)


def test_nothing_else_begins_while_a_demand_is_read_and_all_comes_when_there_is_none(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate) as asks:
        asks.ask(0)
        wait_for(lambda: len(gate.offsets) == 1)
        asks.ask(1, AHEAD)
        asks.ask(2)
        wait_for(lambda: len(gate.offsets) == 2)
        assert asks.reader._queues[AHEAD], "two demands are read"
        gate.let(1)
        wait_for(lambda: len(asks.done) == 1)
        assert asks.reader._queues[AHEAD], "one is"
        gate.let(1)
        wait_for(lambda: len(gate.offsets) == 3)
        gate.let(1)
        asks.wait(0, 1, 2)
        assert asks.done[-1] == 1


def test_background_reads_go_on_between_demands_that_come_and_go(apart: Manifest) -> None:
    gate = Gate()
    with desk(apart, gate) as asks:
        for expert in (0, 1, 2):
            asks.ask(expert, BACKGROUND)
        for _ in range(20):
            asks.ask(3)
            asks.wait(3)
            asks.done.remove(3)
        asks.wait(0, 1, 2)
        asks.check()


def test_a_promoted_read_is_a_demand_behind_those_that_are_there(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate, threads=1) as asks:
        asks.ask(0)
        wait_for(lambda: len(gate.offsets) == 1)
        job = asks.ask(1, BACKGROUND)
        asks.ask(2, AHEAD)
        asks.ask(3)
        asks.reader.promote(job)
        asks.reader.promote(job)
        gate.open()
        asks.wait(0, 1, 2, 3)
        assert asks.done == [0, 3, 1, 2]
        asks.reader.promote(job)  # it has been done: nothing happens
        asks.check()


def test_a_cancelled_read_never_begins_and_nobody_hears_of_it(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate, threads=1) as asks:
        first = asks.ask(0)
        wait_for(lambda: len(gate.offsets) == 1)
        jobs = [asks.ask(1), asks.ask(2, AHEAD), asks.ask(3, BACKGROUND)]
        asks.reader.promote(jobs[2])
        assert [asks.reader.cancel(job) for job in jobs] == [True, True, True]
        assert [asks.reader.cancel(job) for job in jobs] == [False, False, False]
        assert not asks.reader.cancel(first), "it has begun"
        assert all(not job.rows for job in jobs), "a segment is held by nobody who only cancelled"
        asks.ask(4)
        gate.open()
        asks.wait(0, 4)
        assert asks.done == [0, 4]
        assert not asks.reader.cancel(first)
        assert len(gate.offsets) == 2


def test_a_demand_that_is_cancelled_makes_way_for_the_others(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate, threads=1) as asks:
        asks.ask(0, BACKGROUND)
        wait_for(lambda: len(gate.offsets) == 1)
        demand = asks.ask(1)
        asks.ask(2, BACKGROUND)
        assert asks.reader.cancel(demand)
        gate.open()
        asks.wait(0, 2)


# -- rate, trouble, heat -----------------------------------------------------------------------------------------------


def test_a_rate_holds_back_what_nobody_waits_for_and_nothing_else(
    apart: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "LEAST_BURST", 5 * APART["one"][0] // 2)
    with desk(apart, Gate(), background_rate=1) as asks:
        jobs = [asks.ask(expert, BACKGROUND) for expert in range(3)]
        asks.wait(0, 1)
        asks.ask(3)
        asks.wait(3)
        assert asks.reader._queues[BACKGROUND], "at a byte a second, half a block takes days"
        asks.reader.promote(jobs[2])
        asks.wait(2)
        asks.check()


def test_an_error_of_a_background_read_holds_back_the_next_and_no_demand(
    apart: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "TROUBLE_S", (1e6, 1e6))
    gate = Gate()
    gate.fail = lambda offset, size: OSError(errno.EIO, os.strerror(errno.EIO))
    with desk(apart, gate) as asks:
        asks.ask(0, BACKGROUND)
        asks.wait(0)
        gate.fail = lambda offset, size: None
        waiting = asks.ask(1, BACKGROUND)
        asks.ask(2)
        asks.wait(2)
        assert asks.reader.cancel(waiting)
        assert isinstance(asks.errors[0], ReadFailed)


def test_while_it_is_hot_only_demands_are_read(apart: Manifest) -> None:
    gate, asked = Gate(), threading.Event()

    def hot() -> bool:
        asked.set()
        return True

    with desk(apart, gate, hot=hot) as asks:
        waiting = asks.ask(0, AHEAD)
        assert asked.wait(DEADLINE_S)
        asks.ask(1)
        asks.wait(1)
        assert asks.done == [1]
        asks.reader.promote(waiting)
        asks.wait(0)


def test_no_demand_asks_how_hot_it_is(apart: Manifest) -> None:
    asked: list[int] = []
    with desk(apart, Gate(), hot=lambda: bool(asked.append(1))) as asks:
        asks.ask(0)
        asks.wait(0)
        assert not asked
        asks.ask(1, BACKGROUND)
        asks.wait(1)
        assert asked == [1]


# -- reading together --------------------------------------------------------------------------------------------------


def queued(asks: Desk, gate: Gate, *experts: int, priority: Priority = DEMAND, layer: int = 0) -> int:
    """Ask for these while the only thread is busy with another, then let it go on; returns the reads that they took."""
    asks.ask(EXPERTS - 1, layer=layer)
    wait_for(lambda: len(gate.offsets) == 1)
    for expert in experts:
        asks.ask(expert, priority, layer)
    gate.let()
    wait_for(lambda: len(asks.done) == 1)
    gate.open()
    asks.wait(*experts)
    asks.check(layer)
    return len(gate.offsets) - 1


@pytest.mark.parametrize("priority", Priority)
def test_neighbours_in_a_file_are_one_read(priority: Priority, small: Manifest) -> None:
    gate = Gate(held=True)
    with desk(small, gate, threads=1) as asks:
        assert queued(asks, gate, 2, 0, 3, 1, priority=priority) == 1
        assert asks.sizes == dict.fromkeys(range(EXPERTS), 1000)


def test_blocks_that_are_no_neighbours_are_read_each(small: Manifest) -> None:
    gate = Gate(held=True)
    with desk(small, gate, threads=1) as asks:
        assert queued(asks, gate, 0, 2) == 2


def test_neighbours_of_another_class_are_not_read_with_a_demand(small: Manifest) -> None:
    gate = Gate(held=True)
    with desk(small, gate, threads=1) as asks:
        asks.ask(0, BACKGROUND)
        wait_for(lambda: len(gate.offsets) == 1)
        asks.ask(2, BACKGROUND)
        asks.ask(1)
        gate.open()
        asks.wait(0, 1, 2)
        assert asks.done == [0, 1, 2]
        assert len(gate.offsets) == 3


def test_one_thread_takes_no_more_than_its_share(small: Manifest) -> None:
    gate = Gate(held=True)
    with desk(small, gate, threads=2) as asks:
        for expert in (4, 2):
            asks.ask(expert)
        wait_for(lambda: len(gate.offsets) == 2)
        for expert in (0, 1, 2, 3):
            asks.ask(expert)
        gate.open()
        asks.wait(0, 1, 2, 3, 4)
        assert len(gate.offsets) >= 2 + 2


def test_large_neighbours_are_read_each(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate, threads=1) as asks:
        assert queued(asks, gate, 0, 1, 2) == 3


def test_pieces_that_touch_are_read_as_one_whatever_their_order() -> None:
    rows = [memoryview(bytearray(size)) for size in (100, 200, 300)]
    pieces = [Piece(600, rows[2]), Piece(100, rows[0]), Piece(200, rows[1])]
    assert [[piece.offset for piece in run] for run in runs(pieces)] == [[100, 200], [600]]


@pytest.mark.parametrize("layer", [0, 1])
def test_packed_neighbours_are_one_read_and_each_has_its_checksum(layer: int, tmp_path: Path) -> None:
    manifest, gate = write_model(tmp_path / "model"), Gate(held=True)
    store = write(manifest, tmp_path / "packed")
    with desk(manifest, gate, threads=1, folder=store.parent) as asks:
        assert queued(asks, gate, 3, 2, 1, 0, layer=layer) == 1
        assert gate.sizes[-1] == 4 * 3 * 4096
        assert set(asks.sizes.values()) == {3 * 4096}
        assert asks.files.packed == str(store)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_in_a_merged_read_is_the_error_of_its_own_block(small: Manifest) -> None:
    gate = Gate(held=True)
    bad = build_index(small).ranges(0, 2)[0]

    def fail(offset: int, size: int) -> OSError | None:
        middle = bad.offset + bad.size // 2
        return OSError(errno.EIO, os.strerror(errno.EIO)) if offset <= middle < offset + size else None

    gate.fail = fail
    with desk(small, gate, threads=1) as asks:
        queued(asks, gate, 0, 3, 1, 2)
        # Rounded to sectors, reads of neighbours may touch the place too; those that do not are right.
        assert isinstance(asks.errors[2], ReadFailed)
        assert "failed at byte" in asks.errors[2].message
        assert 0 not in asks.errors
        assert asks.sizes[2] == 0


def test_a_damaged_packed_neighbour_costs_the_store_and_no_block(tmp_path: Path) -> None:
    manifest, gate = write_model(tmp_path / "model"), Gate(held=True)
    store = write(manifest, tmp_path / "packed")
    before = store.stat()
    with desk(manifest, gate, threads=1, folder=store.parent) as asks:
        raw = bytearray(store.read_bytes())
        at = raw.index(plain_block(manifest, 0, 2)[1])
        raw[at + 100] ^= 1
        with store.open("r+b") as file:
            file.write(raw)
        os.utime(store, ns=(before.st_atime_ns, before.st_mtime_ns))
        queued(asks, gate, 0, 1, 2, 3)
        assert not asks.errors
        assert asks.files.packed == ""


def test_what_was_not_foreseen_is_an_error_of_the_block_too(small: Manifest) -> None:
    def broken(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise KeyError("nobody thought of this")

    files, reader = OpenFiles(build_index(small)), Reader(2, broken)
    asks = Desk(files, small, reader)
    asks.ask(0)
    asks.wait(0)
    reader.close()
    files.close()
    assert "KeyError" in asks.errors[0].message


def test_a_copy_copies_and_reads_nothing(small: Manifest) -> None:
    gate = Gate()
    with desk(small, gate) as asks:
        source, row = memoryview(bytearray(b"abc")), memoryview(bytearray(3))
        done: list[tuple[int, ExpertdError | None]] = []
        asks.reader.copy([source], [row], lambda size, error: done.append((size, error)))
        wait_for(lambda: len(done) == 1)
        assert (done, bytes(row), gate.offsets) == ([(0, None)], b"abc", [])
        assert asks.reader.devices().devices == ()


def test_a_copy_that_fails_is_told(small: Manifest) -> None:
    with desk(small, Gate()) as asks:
        done: list[ExpertdError | None] = []
        asks.reader.copy([memoryview(b"abc")], [memoryview(bytearray(2))], lambda size, error: done.append(error))
        wait_for(lambda: len(done) == 1)
        assert isinstance(done[0], ReadFailed)


def test_closing_forgets_what_is_queued_and_finishes_what_is_read(apart: Manifest) -> None:
    gate = Gate(held=True)
    with desk(apart, gate, threads=1) as asks:
        asks.ask(0)
        wait_for(lambda: len(gate.offsets) == 1)
        asks.ask(1)
        asks.ask(2, BACKGROUND)
        gate.open()
        asks.reader.close()
        assert len(asks.done) <= 2
        asks.ask(3)
        assert 3 not in asks.done


# -- direct reads of ranges that lie anywhere --------------------------------------------------------------------------


def read_all(manifest: Manifest, read: Callable[[int, list[memoryview], int], int]) -> None:
    files = OpenFiles(build_index(manifest))
    for layer, described in enumerate(manifest.layers):
        for expert in range(EXPERTS):
            rows = rows_of(described)
            read_block(files, layer, expert, rows, read)
            expected = (Path(manifest.folder) / "model.safetensors").read_bytes()
            for found in files.index.ranges(layer, expert):
                assert bytes(rows[found.slab]) == expected[found.offset : found.offset + found.size]
    files.close()


def direct_here(folder: Path) -> bool:
    """Whether this file system takes direct reads."""
    path = folder / "probe"
    path.write_bytes(bytes(PAGE))
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True


def test_ranges_are_read_with_the_rest_of_their_first_and_last_sector(tmp_path: Path) -> None:
    if not direct_here(tmp_path):
        pytest.skip("this file system has no direct reads")
    size = 100_000
    manifest, gate = write_model(tmp_path / "model", {"one": (size, size)}), Gate()
    read_all(manifest, gate)
    assert all(number % SECTOR == 0 for number in gate.offsets + gate.sizes)
    assert sum(gate.sizes) <= 1.05 * 2 * EXPERTS * size


def test_the_last_sector_of_a_file_may_be_a_part_of_one(tmp_path: Path) -> None:
    for last in (1, 511, 512, 513, 4095, 5000):
        manifest = write_model(tmp_path / f"model-{last}", {"one": (last,)})
        assert (Path(manifest.folder) / "model.safetensors").stat().st_size
        read_all(manifest, os.preadv)


@pytest.mark.parametrize("refused", [(SECTOR,), (SECTOR, PAGE)], ids=["sectors", "pages too"])
def test_what_a_device_refuses_is_tried_with_pages_then_through_the_page_cache(
    refused: tuple[int, ...], tmp_path: Path
) -> None:
    """A device that refuses the first reads, as one of larger sectors does, or a file system without direct reads."""
    if not direct_here(tmp_path):
        pytest.skip("this file system has no direct reads")
    manifest, gate = write_model(tmp_path / "model"), Gate()
    left = list(refused)
    gate.fail = lambda offset, size: OSError(errno.EINVAL, "refused") if left and left.pop() else None
    read_all(manifest, gate)
    offsets, sizes = gate.offsets[len(refused) :], gate.sizes[len(refused) :]
    if len(refused) == 1:
        assert all(n % PAGE == 0 for n in offsets + sizes)
    else:
        assert sum(sizes) == EXPERTS * sum(map(sum, SIZES.values())), "exactly what is needed"


def test_short_direct_reads_are_gone_on_with(tmp_path: Path) -> None:
    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:SECTOR]], offset)

    read_all(write_model(tmp_path / "model"), short)


def test_a_range_longer_than_a_chunk_is_read_in_pieces_that_fit_a_buffer(tmp_path: Path) -> None:
    manifest, gate = write_model(tmp_path / "model", {"one": (CHUNK + 12_345,)}), Gate()
    files = OpenFiles(build_index(manifest))
    rows = rows_of(manifest.layers[0])
    read_block(files, 0, 1, rows, gate)
    files.close()
    found = build_index(manifest).ranges(0, 1)[0]
    with (Path(manifest.folder) / "model.safetensors").open("rb") as file:
        file.seek(found.offset)
        assert bytes(rows[0]) == file.read(found.size)
    assert max(gate.sizes) <= CHUNK or len(gate.sizes) == 1  # one read where reads are not direct


def test_a_file_that_ends_inside_a_block_is_told(tmp_path: Path) -> None:
    manifest = write_model(tmp_path / "model")
    files = OpenFiles(build_index(manifest))
    rows = rows_of(manifest.layers[0])
    with pytest.raises(ReadFailed, match=r"ended at byte \d+, inside a block"):
        read_block(files, 0, 0, rows, lambda descriptor, buffers, offset: 0)
    files.close()


@pytest.mark.parametrize("what", ["checksum", "copy"])
def test_large_blocks_are_compared_and_copied_without_holding_the_interpreter(what: str) -> None:
    """While one thread does it, another goes on: so both can keep the device busy."""
    source, row = memoryview(bytearray(64 << 20)), memoryview(bytearray(64 << 20))
    turns, ended = 0, threading.Event()
    moved: list[int] = []

    def work() -> None:
        for _ in range(20):  # a busy machine may give the other thread no turn, now and then
            before = turns
            if what == "checksum":
                checksum([source])
            else:
                copy_block([source], [row])
            moved.append(turns - before)
        ended.set()

    threading.Thread(target=work).start()
    while not ended.is_set():
        turns += 1
    assert any(count > 100 for count in moved)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_reads_are_counted_by_device(apart: Manifest) -> None:
    gate = Gate()
    with desk(apart, gate) as asks:
        for expert in range(EXPERTS):
            asks.ask(expert)
        asks.wait(*range(EXPERTS))
        (device,) = asks.reader.devices().devices
        assert device.number == Path(apart.folder).stat().st_dev
        assert device.reads == len(gate.offsets)
        assert device.bytes >= EXPERTS * APART["one"][0]
        assert 1 <= device.depth_mean <= device.depth_max <= 3
        assert 0 < device.p50_us <= device.p95_us <= device.p99_us


def test_only_the_first_read_of_a_fetch_counts_as_its_beginning(apart: Manifest) -> None:
    with desk(apart, Gate()) as asks:
        for asked_at, expert in ((1.0, 0), (1.0, 1), (2.0, 2), (None, 3)):
            asks.ask(expert, asked_at=asked_at)
            asks.wait(expert)
        assert asks.reader._devices._fetches.count == 2


def test_a_device_has_a_name() -> None:
    assert device_name(Path("/").stat().st_dev)
    assert device_name(os.makedev(4000, 77)) == "4000:77"


def test_what_is_told_of_a_failed_read_holds_no_rows() -> None:
    """The core remembers the error; with its story it would keep the rows, and they a segment that was given back."""

    def fail() -> int:
        raise ReadFailed("bad sector") from OSError(errno.EIO, "bad sector")

    size, error = _outcome(fail)
    assert (size, type(error), str(error)) == (0, ReadFailed, "bad sector")
    assert error is not None
    assert error.__traceback__ is error.__cause__ is error.__context__ is None
