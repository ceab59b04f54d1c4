"""Packed stores: what is in the file, how blocks are read from it, and what happens when it is not what it was."""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash

from expertd.daemon.blocks import OpenFiles, read_block
from expertd.daemon.index import build_index
from expertd.daemon.packed import find_store
from expertd.protocol import packed
from expertd.protocol.checkpoint import read_header
from expertd.protocol.errors import DerivedExperts, FileChanged, HeaderInvalid, StoreInvalid
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.packed import ALIGN, check_fits, header_of, layout_of, store_name
from expertd.worker.store import write_store

EXPERTS = 5
SIZES = {"whole": (512, 8192), "odd": (3, 1000, 4096)}
"""Bytes of the parts of each layer's blocks."""


def write_model(folder: Path, layers: dict[str, tuple[int, ...]] = SIZES) -> Manifest:
    """A checkpoint of bytes in which no two blocks are alike."""
    entries, data = {}, bytearray()
    for name, sizes in layers.items():
        for number, size in enumerate(sizes):
            begin = len(data)
            n = np.arange(EXPERTS * size)
            data += ((7 * begin + 31 * n + n // 251) % 256).astype(np.uint8).tobytes()
            shape = [EXPERTS, size]
            entries[f"{name}.{number}"] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, len(data)]}
    header = json.dumps(entries).encode()
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    found = tuple(
        Layer(name, EXPERTS, 2, tuple(
            Part(str(number), "U8", (size,), (f"{name}.{number}",), (0,)) for number, size in enumerate(sizes)
        )) for name, sizes in layers.items()
    )  # fmt: skip
    return Manifest(str(folder), "any", (read_header(path).mark,), found)


def write(manifest: Manifest, folder: Path) -> Path:
    """The store of ``manifest`` in ``folder``."""
    files = OpenFiles(build_index(manifest))
    path = folder / store_name(manifest.key)
    folder.mkdir(exist_ok=True)

    def fill(layer: int, expert: int, rows: Sequence[memoryview]) -> None:
        read_block(files, layer, expert, rows)

    write_store(layout_of(header_of(manifest)), path, fill, lambda size, fresh: None)
    files.close()
    return path


def rows_of(layer: Layer) -> list[memoryview]:
    """Rows as those of a pool: each begins on a page, and is full of something else."""
    rows = []
    for part in layer.parts:
        memory = mmap.mmap(-1, part.block_bytes)
        memory[:] = b"\xee" * part.block_bytes
        rows.append(memoryview(memory))
    return rows


def plain_block(manifest: Manifest, layer: int, expert: int) -> list[bytes]:
    """A block's bytes as the model's file has them."""
    files = OpenFiles(build_index(manifest))
    rows = rows_of(manifest.layers[layer])
    read_block(files, layer, expert, rows)
    files.close()
    return [bytes(row) for row in rows]


class Spy:
    """As ``os.preadv``; notes how many buffers each read fills and how many bytes it asks for."""

    def __init__(self, refuse: Callable[[int], int] = lambda buffers: 0) -> None:
        """``refuse(number of buffers)`` is the error number of such a read, 0 for none."""
        self.reads: list[tuple[int, int]] = []
        self.refuse = refuse

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.reads.append((len(buffers), sum(map(len, buffers))))
        if number := self.refuse(len(buffers)):
            raise OSError(number, os.strerror(number))
        return os.preadv(descriptor, buffers, offset)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_model(tmp_path / "model")


@pytest.fixture
def store(manifest: Manifest, tmp_path: Path) -> Path:
    return write(manifest, tmp_path / "packed")


def opened(manifest: Manifest, folder: Path) -> OpenFiles:
    """The model's files as the daemon has them open."""
    index = build_index(manifest, folder)
    files = OpenFiles(index)
    files.use(index.store)
    return files


# -- the file ----------------------------------------------------------------------------------------------------------


def test_records_and_parts_begin_on_4_kib_and_hold_the_models_bytes(manifest: Manifest, store: Path) -> None:
    layout, raw = check_fits(store, manifest), store.read_bytes()
    assert len(raw) == layout.size
    table = layout.checksums(raw[layout.start : layout.start + layout.table_bytes])
    for number, layer in enumerate(layout.header.layers):
        for expert in range(EXPERTS):
            record = layout.record(number, expert)
            expected = plain_block(manifest, number, expert)
            assert record % ALIGN == 0
            assert all(part.offset % ALIGN == 0 for part in layer.parts)
            found = [raw[record + part.offset : record + part.offset + part.bytes] for part in layer.parts]
            assert found == expected
            assert table[number][expert] == xxhash.xxh3_64_intdigest(b"".join(expected))


def test_the_header_names_the_model_its_files_and_the_layout(manifest: Manifest, store: Path) -> None:
    header = packed.read_header(store)
    assert (header.key, header.folder, header.files) == (manifest.key, manifest.folder, manifest.files)
    assert [layer.record_bytes for layer in header.layers] == [3 * ALIGN, 3 * ALIGN]
    assert [part.bytes for part in header.layers[1].parts] == [3, 1000, 4096]
    assert [part.shape for part in header.layers[1].parts] == [(3,), (1000,), (4096,)]


def _flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def _in_its_place(other: Callable[[Manifest, Path], Manifest]) -> Callable[[Path, Manifest], None]:
    def put(store: Path, manifest: Manifest) -> None:
        write(other(manifest, store.parent.parent / "other"), store.parent / "x").replace(store)

    return put


UNFIT: dict[str, tuple[Callable[[Path, Manifest], None], str]] = {
    "header": (lambda path, manifest: _flip(path, 60), "header of the packed store .* is damaged"),
    "magic": (lambda path, manifest: _flip(path, 0), "is no packed store"),
    "format": (lambda path, manifest: _flip(path, 8), "is a packed store of format 0"),
    "header-length": (lambda path, manifest: _flip(path, 15), "header of the packed store .* is damaged"),
    "truncated": (lambda path, manifest: os.truncate(path, path.stat().st_size - 1), "bytes where"),
    "longer": (lambda path, manifest: os.truncate(path, path.stat().st_size + 1), "bytes where"),
    "empty": (lambda path, manifest: os.truncate(path, 0), "truncated before its header"),
    "short": (lambda path, manifest: os.truncate(path, 100), "header of the packed store .* is damaged"),
    "fifo": (lambda path, manifest: (path.unlink(), os.mkfifo(path))[1], "not a regular file"),
    "folder": (lambda path, manifest: (path.unlink(), path.mkdir())[1], "not a regular file"),
    "model": (_in_its_place(lambda manifest, folder: write_model(folder)), "of another model"),
    "version": (
        _in_its_place(lambda manifest, folder: msgspec.structs.replace(manifest, family="other")),
        "of another version of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", UNFIT)
def test_a_store_that_does_not_fit_is_refused_with_a_sentence_and_the_files_are_read(
    what: str, manifest: Manifest, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoil, sentence = UNFIT[what]
    spoil(store, manifest)
    with pytest.raises(StoreInvalid, match=sentence):
        check_fits(store, manifest)
    files = opened(manifest, store.parent)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"expertd pack {manifest.folder}" in record.getMessage()
    assert files.packed == ""
    rows = rows_of(manifest.layers[1])
    assert read_block(files, 1, 4, rows) == 3 + 1000 + 4096
    assert [bytes(row) for row in rows] == plain_block(manifest, 1, 4)
    files.close()


def test_without_a_store_nothing_is_said(manifest: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_store(tmp_path / "nowhere", manifest) is None
    assert caplog.records == []


def test_a_store_of_an_earlier_version_is_told_of(
    manifest: Manifest, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_store(store.parent, msgspec.structs.replace(manifest, family="newer")) is None
    assert f"{store} is of another version of {manifest.folder}" in caplog.text


def test_a_link_that_leads_nowhere_is_told_of(
    manifest: Manifest, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.unlink()
    store.symlink_to("/nowhere")
    assert find_store(store.parent, manifest) is None
    assert "leads to /nowhere, which is not there" in caplog.text


def test_a_link_that_leads_to_itself_is_told_of(
    manifest: Manifest, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.unlink()
    store.symlink_to(store)
    assert find_store(store.parent, manifest) is None
    assert "Too many levels of symbolic links" in caplog.text


def computed(manifest: Manifest, **changes: object) -> Manifest:
    """``manifest`` with parts that are in no file."""
    layers = tuple(
        msgspec.structs.replace(
            layer, parts=tuple(msgspec.structs.replace(part, tensors=(), files=(), **changes) for part in layer.parts)
        )
        for layer in manifest.layers
    )
    return msgspec.structs.replace(manifest, layers=layers, derived_by="mlx-lm 0")


def test_computed_experts_need_a_store(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DerivedExperts, match=f"expertd pack {manifest.folder}"):
        build_index(computed(manifest), tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda manifest: computed(manifest, dtype="nonsense"),
        lambda manifest: computed(manifest, shape=(0,)),
        lambda manifest: msgspec.structs.replace(computed(manifest), derived_by=""),
    ],
    ids=["dtype", "empty", "nobody"],
)
def test_a_manifest_of_computed_experts_that_makes_no_sense_is_refused(
    wrong: Callable[[Manifest], Manifest], manifest: Manifest, tmp_path: Path
) -> None:
    with pytest.raises(HeaderInvalid):
        build_index(wrong(manifest), tmp_path)


# -- reading -----------------------------------------------------------------------------------------------------------

EINVAL, EIO = errno.EINVAL, errno.EIO

REFUSALS: dict[str, Callable[[int], int]] = {
    "nothing": lambda buffers: 0,
    "scattering": lambda buffers: EINVAL if buffers > 1 else 0,
}


@pytest.mark.parametrize("refused", REFUSALS)
def test_blocks_are_the_models_however_they_are_read(refused: str, manifest: Manifest, store: Path) -> None:
    files, spy = opened(manifest, store.parent), Spy(REFUSALS[refused])
    layout = layout_of(header_of(manifest))
    for layer, described in enumerate(manifest.layers):
        for expert in range(EXPERTS):
            rows = rows_of(described)
            assert read_block(files, layer, expert, rows, spy) == layout.header.layers[layer].record_bytes
            assert [bytes(row) for row in rows] == plain_block(manifest, layer, expert)
    assert files.packed == str(store)
    refusals = sum(1 for buffers, _ in spy.reads if REFUSALS[refused](buffers))
    assert refusals <= 1  # what is refused once is not tried again
    assert len(spy.reads) - refusals == 2 * EXPERTS
    assert all(size == 3 * ALIGN for _, size in spy.reads)
    files.close()


def test_whole_sectors_are_scattered_into_the_slabs_by_one_read(manifest: Manifest, store: Path) -> None:
    files, spy = opened(manifest, store.parent), Spy()
    read_block(files, 0, 0, rows_of(manifest.layers[0]), spy)
    if len(spy.reads) > 1:
        pytest.skip("this file system does not take direct reads into several buffers")
    assert spy.reads == [(3, 3 * ALIGN)]  # two parts, and the zeros between them
    files.close()


def test_where_direct_reads_are_refused_the_page_cache_is_used(manifest: Manifest, store: Path) -> None:
    files = opened(manifest, store.parent)
    refusing = iter([EINVAL] * 3)  # into the slabs, of sectors of 512 bytes, and of 4096
    spy = Spy(lambda buffers: next(refusing, 0))
    rows = rows_of(manifest.layers[0])
    read_block(files, 0, 2, rows, spy)
    assert [bytes(row) for row in rows] == plain_block(manifest, 0, 2)
    for layer, buffers in ((0, 3), (1, 5)):  # parts and zeros, without a buffer between
        rows = rows_of(manifest.layers[layer])
        read_block(files, layer, 3, rows, spy)
        assert [bytes(row) for row in rows] == plain_block(manifest, layer, 3)
        assert spy.reads[-1][0] == buffers
    assert files.packed == str(store)
    files.close()


def test_a_short_read_is_gone_on_with(manifest: Manifest, store: Path) -> None:
    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:512]], offset)

    files = opened(manifest, store.parent)
    for layer in (0, 1):
        rows = rows_of(manifest.layers[layer])
        assert read_block(files, layer, 1, rows, short) == 3 * ALIGN
        assert [bytes(row) for row in rows] == plain_block(manifest, layer, 1)
    assert files.packed == str(store)
    files.close()


# -- a store that fails ------------------------------------------------------------------------------------------------


def _bad_record(store: Path, manifest: Manifest) -> None:
    before = store.stat()
    with store.open("r+b") as file:
        file.seek(layout_of(header_of(manifest)).record(1, 4) + ALIGN + 999)
        file.write(b"?")
    os.utime(store, ns=(before.st_atime_ns, before.st_mtime_ns))  # only the checksum can tell


def _replaced(store: Path, manifest: Manifest) -> None:
    other = store.with_name("other")
    other.write_bytes(store.read_bytes())
    other.replace(store)


FAILURES: dict[str, tuple[Callable[[Path, Manifest], None], str]] = {
    "bit": (_bad_record, "is damaged: layer 1, expert 4"),
    "truncated": (lambda store, manifest: os.truncate(store, 3 * ALIGN), "has changed"),
    "gone": (lambda store, manifest: store.unlink(), "No such file"),
    "replaced": (_replaced, "has changed"),
}


@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("what", FAILURES)
def test_a_store_that_fails_is_left_with_one_warning_and_every_block_is_right(
    what: str, read_before: bool, manifest: Manifest, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = opened(manifest, store.parent)
    if read_before:
        read_block(files, 0, 0, rows_of(manifest.layers[0]))
        assert files.packed == str(store)
    spoil, sentence = FAILURES[what]
    spoil(store, manifest)
    for _ in range(2):
        rows = rows_of(manifest.layers[1])
        assert read_block(files, 1, 4, rows) == 3 + 1000 + 4096
        assert [bytes(row) for row in rows] == plain_block(manifest, 1, 4)
    assert files.packed == ""
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sentence in warning
    assert f"the safetensors of {manifest.folder} are read" in warning
    files.close()


@pytest.mark.parametrize("number", [EIO, 0], ids=["error", "end"])
def test_a_store_that_cannot_be_read_is_left(
    number: int, manifest: Manifest, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, failed = opened(manifest, store.parent), []

    def fail_once(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if failed:
            return os.preadv(descriptor, buffers, offset)
        failed.append(offset)
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    rows = rows_of(manifest.layers[0])
    read_block(files, 0, 0, rows, fail_once)
    assert [bytes(row) for row in rows] == plain_block(manifest, 0, 0)
    assert files.packed == ""
    files.close()


def test_a_store_that_has_failed_is_not_taken_again_but_a_new_one_is(manifest: Manifest, store: Path) -> None:
    files = opened(manifest, store.parent)
    _bad_record(store, manifest)
    read_block(files, 1, 4, rows_of(manifest.layers[1]))
    files.use(find_store(store.parent, manifest))
    assert files.packed == ""
    store.unlink()
    write(manifest, store.parent)
    files.use(find_store(store.parent, manifest))
    rows = rows_of(manifest.layers[1])
    assert read_block(files, 1, 4, rows) == 3 * ALIGN
    assert files.packed == str(store)
    files.close()


def test_a_store_that_is_left_is_closed(manifest: Manifest, store: Path) -> None:
    files, held = opened(manifest, store.parent), set[int]()

    def note(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        held.add(descriptor)
        return os.preadv(descriptor, buffers, offset)

    read_block(files, 0, 0, rows_of(manifest.layers[0]), note)
    (descriptor,) = held
    inode = os.fstat(descriptor).st_ino
    store.unlink()
    read_block(files, 0, 1, rows_of(manifest.layers[0]))
    try:
        assert os.fstat(descriptor).st_ino != inode
    except OSError as error:
        assert error.errno == errno.EBADF
    files.close()


@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize("how", ["touched", "replaced", "gone"])
def test_a_changed_model_fails_though_the_store_has_its_blocks(
    how: str, read_before: bool, manifest: Manifest, store: Path
) -> None:
    files = opened(manifest, store.parent)
    if read_before:
        read_block(files, 0, 0, rows_of(manifest.layers[0]))
    path = Path(manifest.folder) / "model.safetensors"
    match how:
        case "touched":
            os.utime(path, ns=(1, 1))
        case "replaced":
            other = path.with_name("other")
            other.write_bytes(path.read_bytes())
            other.replace(path)
        case "gone":
            path.unlink()
    with pytest.raises(FileChanged):
        read_block(files, 0, 1, rows_of(manifest.layers[0]))
    assert files.packed == str(store)
    files.close()
