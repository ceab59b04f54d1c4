"""Pools that are put together into large pages: which, when not, and that their contents stay what they are."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.daemon import large_pages
from expertd.daemon.large_pages import PIECE, SMALLEST, Collapse, LargePages, system_collapse
from expertd.protocol.segments import Segment, create, map_readonly
from tests.conftest import DEADLINE_S, wait_for


class Kernel:
    """As ``system_collapse()``: notes what it is asked for and refuses what it is told to.

    With ``held`` every piece waits until it is let through.
    """

    def __init__(self, held: bool = False) -> None:
        self.offsets: list[int] = []
        self.files: list[int] = []
        self.refuse: dict[int, list[int]] = {}  # error numbers by offset, one for each time
        self._tickets = threading.Semaphore(0)
        self._held = held

    def __call__(self, descriptor: int, offset: int) -> int:
        self.files.append(os.fstat(descriptor).st_ino)
        self.offsets.append(offset)
        if self._held:
            assert self._tickets.acquire(timeout=DEADLINE_S), "nobody let this piece through"
        numbers = self.refuse.get(offset)
        return numbers.pop(0) if numbers else 0

    def let(self, pieces: int) -> None:
        self._tickets.release(pieces)


@contextmanager
def working(collapse: Collapse | None, short: threading.Event | None = None) -> Iterator[LargePages]:
    pages = LargePages(collapse, short.is_set if short is not None else lambda: False)
    try:
        yield pages
    finally:
        pages.close()


@contextmanager
def pipe_end() -> Iterator[tuple[int, int]]:
    """``(reader, writer)``: as long as anybody has a copy of the writer, the reader does not come to its end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)


def is_held(reader: int) -> bool:
    try:
        return os.read(reader, 1) != b""
    except BlockingIOError:
        return True


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    found = os.open(tmp_path / "pool", os.O_RDWR | os.O_CREAT)
    yield found
    os.close(found)


PIECES = SMALLEST // PIECE
ALL = [number * PIECE for number in range(PIECES)]


def test_every_whole_piece_is_put_together(descriptor: int) -> None:
    kernel = Kernel()
    with working(kernel) as pages:
        pages.gather(1, descriptor, SMALLEST + PIECE - 4096)
        wait_for(lambda: not pages.busy)
    assert kernel.offsets == ALL


def test_small_pools_are_left_alone(descriptor: int) -> None:
    kernel = Kernel()
    with working(kernel) as pages:
        pages.gather(1, descriptor, SMALLEST - 1)
        assert not pages.busy
    assert kernel.offsets == []


def test_a_system_without_large_pages_does_nothing(descriptor: int) -> None:
    with working(None) as pages:
        pages.gather(1, descriptor, SMALLEST)
        assert not pages.busy
        pages.forget(1)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY])
def test_a_busy_piece_is_tried_once_more_at_the_end(number: int, descriptor: int) -> None:
    kernel = Kernel()
    kernel.refuse = {0: [number], PIECE: [number, number, number]}
    with working(kernel) as pages:
        pages.gather(1, descriptor, SMALLEST)
        wait_for(lambda: not pages.busy)
    assert kernel.offsets == [*ALL, 0, PIECE]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM, errno.ENOSYS])
def test_any_other_refusal_ends_that_pool_and_no_other(number: int, descriptor: int) -> None:
    kernel = Kernel()
    kernel.refuse = {PIECE: [number]}
    with working(kernel) as pages:
        pages.gather(1, descriptor, SMALLEST)
        pages.gather(2, descriptor, SMALLEST)
        wait_for(lambda: not pages.busy)
    assert kernel.offsets == [0, PIECE, *ALL]


def test_the_caller_may_close_its_descriptor(tmp_path: Path) -> None:
    kernel = Kernel(held=True)
    theirs = os.open(tmp_path / "pool", os.O_RDWR | os.O_CREAT)
    inode = os.fstat(theirs).st_ino
    with working(kernel) as pages:
        pages.gather(1, theirs, SMALLEST)
        os.close(theirs)
        kernel.let(PIECES)
        wait_for(lambda: not pages.busy)
    assert kernel.files == [inode] * PIECES


def test_a_pool_that_is_forgotten_is_held_for_one_piece_more() -> None:
    kernel = Kernel(held=True)
    with pipe_end() as (reader, writer), working(kernel) as pages:
        pages.gather(1, writer, SMALLEST)
        os.close(writer)
        wait_for(lambda: kernel.offsets == [0])
        pages.forget(1)
        assert is_held(reader)
        kernel.let(PIECES)
        wait_for(lambda: not is_held(reader))
    assert kernel.offsets == [0]


def test_a_waiting_pool_that_is_forgotten_is_not_held_at_all(descriptor: int) -> None:
    kernel = Kernel(held=True)
    with pipe_end() as (reader, writer), working(kernel) as pages:
        pages.gather(1, descriptor, SMALLEST)
        wait_for(lambda: kernel.offsets == [0])
        pages.gather(2, writer, SMALLEST)
        os.close(writer)
        pages.forget(2)
        assert not is_held(reader)
        kernel.let(PIECES)
        wait_for(lambda: not pages.busy)
    assert kernel.offsets == ALL


def test_nothing_is_done_while_memory_is_short(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "SHORT_S", 0.01)
    asked, short = threading.Semaphore(0), threading.Event()
    short.set()

    def tell() -> bool:
        asked.release()
        return short.is_set()

    kernel = Kernel()
    pages = LargePages(kernel, tell)
    pages.gather(1, descriptor, SMALLEST)
    assert all(asked.acquire(timeout=DEADLINE_S) for _ in range(3))
    assert kernel.offsets == []
    short.clear()
    wait_for(lambda: not pages.busy)
    pages.close()
    assert kernel.offsets == ALL


def test_a_pool_is_let_go_while_memory_is_short() -> None:
    short = threading.Event()
    short.set()
    kernel = Kernel()
    with pipe_end() as (reader, writer), working(kernel, short) as pages:
        pages.gather(1, writer, SMALLEST)
        os.close(writer)
        pages.forget(1)
        wait_for(lambda: not is_held(reader))
    assert kernel.offsets == []


def test_the_end_waits_for_one_piece_and_lets_every_pool_go() -> None:
    kernel = Kernel(held=True)
    with pipe_end() as (reader, writer):
        pages = LargePages(kernel, lambda: False)
        pages.gather(1, writer, SMALLEST)
        pages.gather(2, writer, SMALLEST)
        wait_for(lambda: kernel.offsets == [0])
        kernel.let(1)
        pages.close()
        pages.gather(3, writer, SMALLEST)
        os.close(writer)
        assert not is_held(reader)
    assert len(kernel.offsets) <= 2  # close may come when the second has begun


RECORD, RECORDS = 256 << 10, 32
SIZE = 32 << 20
HALF = SIZE // 2


@pytest.fixture
def segment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Segment]:
    """A real one, small enough for a container's /dev/shm."""
    monkeypatch.setattr(large_pages, "SMALLEST", SIZE)
    found = create(f"/expertd-test-{secrets.token_hex(4)}", SIZE)
    yield found
    found.close()


def open_directly(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(path, os.O_RDONLY)


def test_contents_stay_while_others_read_and_direct_reads_write(segment: Segment) -> None:
    """One half is only read; into the other half, records of a file are read, each time another into each place."""
    records = [bytes([number + 1]) * RECORD for number in range(RECORDS)]
    still = secrets.token_bytes(PIECE) * (HALF // PIECE)
    view = memoryview(segment.mapping)
    view[:HALF] = still
    other = map_readonly(os.dup(segment.readonly), SIZE)
    wrong: list[str] = []
    over, rounds = threading.Event(), threading.Semaphore(0)

    def read_into(descriptor: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            for place in range(HALF // RECORD):
                number, at = (place + turn) % RECORDS, HALF + place * RECORD
                if os.preadv(descriptor, [view[at : at + RECORD]], number * RECORD) != RECORD:
                    wrong.append("a short read")
                if other[at : at + RECORD] != records[number]:
                    wrong.append(f"place {place} has not what was read")
            rounds.release()

    def look() -> None:
        while not over.is_set():
            if other[:HALF] != still:
                wrong.append("what nobody wrote to has changed")
            rounds.release()

    with tempfile.NamedTemporaryFile(dir=os.environ.get("TMPDIR")) as file:
        file.write(b"".join(records))
        file.flush()
        os.fsync(file.fileno())
        descriptor = open_directly(Path(file.name))
        threads = [threading.Thread(target=read_into, args=(descriptor,)), threading.Thread(target=look)]
        for thread in threads:
            thread.start()
        assert all(rounds.acquire(timeout=DEADLINE_S) for _ in range(4))
        with working(system_collapse()) as pages:
            pages.gather(1, segment.readonly, SIZE)
            wait_for(lambda: not pages.busy)
        assert all(rounds.acquire(timeout=DEADLINE_S) for _ in range(4))
        over.set()
        for thread in threads:
            thread.join()
        os.close(descriptor)
    view.release()
    other.close()
    assert wrong == []


def shmem_large() -> int:
    """Bytes of shared memory of the whole system that lie in large pages; others may have some come and go."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("ShmemHugePages:"):
            return int(line.split()[1]) << 10
    pytest.skip("this kernel does not count large pages")


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are put together on Linux only")
def test_what_was_scattered_lies_in_large_pages(segment: Segment) -> None:
    collapse = system_collapse()
    if collapse is None or (number := collapse(segment.readonly, 0)):
        pytest.skip(f"this kernel puts nothing together ({collapse and os.strerror(number)})")
    before = shmem_large()
    with working(collapse) as pages:
        pages.gather(1, segment.readonly, SIZE)
        wait_for(lambda: not pages.busy)
    assert shmem_large() - before >= SIZE // 2
