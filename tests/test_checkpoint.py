"""Checkpoint headers that are true, broken or lying, and the index that the daemon builds of them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors import safe_open

from expertd.daemon.index import build_index
from expertd.protocol.checkpoint import ITEM_BYTES, check_unchanged, read_header, weight_files
from expertd.protocol.errors import (
    CheckpointError,
    CheckpointTruncated,
    FileChanged,
    HeaderInvalid,
    NotACheckpoint,
)
from expertd.protocol.manifest import Layer, Manifest, Part

TENSORS = {"a": ("F32", [2, 3], 24), "b": ("U8", [5], 5)}


def _raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def _entries(tensors: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    entries, offset = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return entries


def _write(path: Path, entries: dict[str, Any], size: int) -> Path:
    """A safetensors file whose header is ``entries`` and whose data are ``size`` bytes, each telling its place."""
    return _raw(path, json.dumps(entries).encode(), bytes(n % 251 for n in range(size)))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return _write(tmp_path / "model.safetensors", _entries(TENSORS), 29)


# -- headers -----------------------------------------------------------------------------------------------------------


def test_a_true_header_gives_types_shapes_and_absolute_ranges(good: Path) -> None:
    header = read_header(good)
    data = good.stat().st_size - 29
    found = {name: (t.dtype, t.shape, t.start, t.end) for name, t in header.tensors.items()}
    assert found == {"a": ("F32", (2, 3), data, data + 24), "b": ("U8", (5,), data + 24, data + 29)}


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    path = _write(tmp_path / "m", {"__metadata__": {"format": "mlx"}, **_entries(TENSORS)}, 29)
    assert set(read_header(path).tensors) == {"a", "b"}


def test_a_mark_names_size_time_inode_and_header(good: Path) -> None:
    mark, status = read_header(good).mark, good.stat()
    assert (mark.name, mark.size) == ("model.safetensors", status.st_size)
    assert (mark.modified, mark.inode) == (status.st_mtime_ns, status.st_ino)
    assert len(mark.header) == 64


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_type_of_safetensors_is_known(tmp_path: Path, dtype: str) -> None:
    size = 3 * ITEM_BYTES[dtype]
    path = _write(tmp_path / "m", _entries({"t": (dtype, [3], size)}), size)
    assert read_header(path).tensors["t"].dtype == dtype


@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_file_that_ends_inside_its_header_is_truncated(good: Path, size: int) -> None:
    os.truncate(good, size)
    with pytest.raises(CheckpointTruncated, match=r"model\.safetensors is truncated"):
        read_header(good)


def test_a_file_that_ends_inside_its_data_is_truncated(good: Path) -> None:
    os.truncate(good, good.stat().st_size - 1)
    with pytest.raises(CheckpointTruncated, match="tensor b ends at byte"):
        read_header(good)


def test_a_header_of_a_huge_length_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(HeaderInvalid, match="claims 9223372036854775807 bytes"):
        read_header(_raw(tmp_path / "m", b"{}", length=2**63 - 1))


NOT_SAFETENSORS = {
    "no JSON": b"hello, world",
    "no UTF-8": b'{"\xff\xfe": 1}',
    "a list": b"[]",
    "a tensor that is a number": b'{"t": 3}',
    "no type": b'{"t": {"shape": [], "data_offsets": [0, 0]}}',
    "no shape": b'{"t": {"dtype": "U8", "data_offsets": [0, 0]}}',
    "no offsets": b'{"t": {"dtype": "U8", "shape": [0]}}',
    "one offset": b'{"t": {"dtype": "U8", "shape": [0], "data_offsets": [0]}}',
    "words for numbers": b'{"t": {"dtype": "U8", "shape": ["many"], "data_offsets": [0, 0]}}',
    "an infinite shape": b'{"t": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 0]}}',
    "a shape that is no number": b'{"t": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}',
    "an offset of 5000 digits": b'{"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, ' + b"1" * 5000 + b"]}}",
    "nested without end": b"[" * 200_000,
}


@pytest.mark.parametrize("header", NOT_SAFETENSORS.values(), ids=NOT_SAFETENSORS.keys())
def test_a_header_that_is_not_safetensors_is_invalid(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(HeaderInvalid):
        read_header(_raw(tmp_path / "m", header))


LIES = {
    "overlap": ({"a": ("U8", [4], [0, 4]), "b": ("U8", [4], [3, 7])}, "overlap tensor a"),
    "the same bytes twice": ({"a": ("U8", [4], [0, 4]), "b": ("U8", [4], [0, 4])}, "overlap tensor a"),
    "before the data": ({"a": ("U8", [4], [-4, 0])}, "overlap the header"),
    "size not of the shape": ({"a": ("F32", [2], [0, 4])}, "4 bytes where its shape needs 8"),
    "end before start": ({"a": ("U8", [4], [4, 0])}, "-4 bytes where its shape needs 4"),
    "a huge shape": ({"a": ("F32", [2**40, 2**40], [0, 8])}, "8 bytes where its shape needs"),
    "a negative shape": ({"a": ("U8", [-2, -4], [0, 8])}, "impossible shape"),
    "an unknown type": ({"a": ("F4", [8], [0, 4])}, "unknown type F4"),
}


@pytest.mark.parametrize(("tensors", "words"), LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_invalid(
    tmp_path: Path, tensors: dict[str, tuple[str, list[int], list[int]]], words: str
) -> None:
    entries = {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}
    with pytest.raises(HeaderInvalid, match=words):
        read_header(_write(tmp_path / "m", entries, 8))


def test_offsets_beyond_the_file_are_a_truncated_file(tmp_path: Path) -> None:
    entries = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [1000, 1004]}}
    with pytest.raises(CheckpointTruncated, match="tensor a ends at byte"):
        read_header(_write(tmp_path / "m", entries, 8))


def test_a_pipe_for_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(HeaderInvalid, match="not a regular file"):
        read_header(tmp_path / "m")


# -- folders -----------------------------------------------------------------------------------------------------------


def test_the_files_of_a_checkpoint_come_sorted_and_without_others(tmp_path: Path) -> None:
    for name in ("model-00002.safetensors", "model-00001.safetensors", "adapter.safetensors", "model.json"):
        (tmp_path / name).touch()
    assert [path.name for path in weight_files(tmp_path)] == ["model-00001.safetensors", "model-00002.safetensors"]


def test_a_folder_without_safetensors_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="holds no model"):
        weight_files(tmp_path)


def test_a_path_that_does_not_exist_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="does not exist"):
        weight_files(tmp_path / "nothing")


def test_a_file_is_no_checkpoint(good: Path) -> None:
    with pytest.raises(NotACheckpoint, match="is not a folder"):
        weight_files(good)


# -- files that change -------------------------------------------------------------------------------------------------


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def _replace(path: Path) -> None:
    status = path.stat()
    shutil.copyfile(path, path.with_name("copy"))
    os.utime(path.with_name("copy"), ns=(status.st_atime_ns, status.st_mtime_ns))
    path.with_name("copy").replace(path)


CHANGES: list[Callable[[Path], None]] = [_append, _touch, _replace, Path.unlink]


def test_a_file_that_did_not_change_passes(good: Path) -> None:
    check_unchanged(good, read_header(good).mark)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_is_noticed(good: Path, change: Callable[[Path], None]) -> None:
    mark = read_header(good).mark
    change(good)
    with pytest.raises(FileChanged, match="load the model again"):
        check_unchanged(good, mark)


def test_an_open_file_is_checked_by_its_descriptor(good: Path) -> None:
    mark = read_header(good).mark
    with good.open("rb") as file:
        _replace(good)
        check_unchanged(good, mark, file.fileno())
        _append(good)
        check_unchanged(good, mark, file.fileno())
    with pytest.raises(FileChanged), good.open("rb") as file:
        check_unchanged(good, mark, file.fileno())


# -- the index ---------------------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> Manifest:
    """The manifest of a factory checkpoint of qwen3_moe, from its names alone (the worker derives it by tracing)."""
    headers = [read_header(path) for path in weight_files(folder)]
    where = {name: (number, t) for number, header in enumerate(headers) for name, t in header.tensors.items()}
    config = json.loads((folder / "config.json").read_text())
    experts = config["num_experts"]
    layers = []
    for number in range(config["num_hidden_layers"]):
        base = f"model.layers.{number}.mlp"
        parts = []
        for tail in ("weight", "scales", "biases"):
            for projection in ("down_proj", "gate_proj", "up_proj"):
                stacked = f"{base}.switch_mlp.{projection}.{tail}"
                alone = [f"{base}.experts.{expert}.{projection}.{tail}" for expert in range(experts)]
                names = [stacked] if stacked in where else alone
                if names[0] not in where:
                    continue
                tensor = where[names[0]][1]
                shape = tensor.shape if len(names) > 1 else tensor.shape[1:]
                files = tuple(where[name][0] for name in names)
                parts.append(Part(f"{projection}.{tail}", tensor.dtype, shape, tuple(names), files))
        layers.append(Layer(f"{base}.switch_mlp", experts, config["num_experts_per_tok"], tuple(parts)))
    return Manifest(str(folder), "qwen3_moe", tuple(header.mark for header in headers), tuple(layers))


def _bytes_of(folder: Path, file: str, name: str, expert: int | None) -> bytes:
    """What the safetensors library reads."""
    with safe_open(folder / file, framework="numpy") as opened:
        tensor = opened.get_tensor(name)
    return bytes((tensor if expert is None else tensor[expert]).tobytes())


@pytest.mark.parametrize("name", ["stacked", "per_expert", "sharded"])
def test_the_ranges_of_every_block_are_the_bytes_of_its_tensors(checkpoints: dict[str, Path], name: str) -> None:
    manifest = _manifest(checkpoints[name])
    index = build_index(manifest)
    assert all(layer.parts for layer in manifest.layers)
    for number, layer in enumerate(manifest.layers):
        for expert in (0, 1, layer.experts - 1):
            ranges = index.ranges(number, expert)
            assert [piece.slab for piece in ranges] == list(range(len(layer.parts)))
            for part, piece in zip(layer.parts, ranges, strict=True):
                with index.paths[piece.file].open("rb") as file:
                    file.seek(piece.offset)
                    found = file.read(piece.size)
                alone = len(part.tensors) > 1
                tensor = part.tensors[expert if alone else 0]
                path = index.paths[piece.file].name
                assert found == _bytes_of(checkpoints[name], path, tensor, None if alone else expert)


def test_the_tensors_of_one_part_may_lie_in_several_files(checkpoints: dict[str, Path]) -> None:
    manifest = _manifest(checkpoints["sharded"])
    assert len(manifest.files) == 3
    assert any(len(set(part.files)) > 1 for layer in manifest.layers for part in layer.parts)


def test_equal_manifests_have_equal_keys_and_others_do_not(checkpoints: dict[str, Path]) -> None:
    manifest = _manifest(checkpoints["stacked"])
    assert manifest.key == _manifest(checkpoints["stacked"]).key
    touched = msgspec.structs.replace(manifest.files[0], modified=manifest.files[0].modified + 1)
    assert manifest.key != msgspec.structs.replace(manifest, files=(touched,)).key


@pytest.fixture
def small(tmp_path: Path) -> Manifest:
    """A checkpoint of one layer of four experts: ``s`` stacked, ``e0`` .. ``e3`` alone, ``n`` of no bytes."""
    tensors = {"s": ("F32", [4, 2], 32), **{f"e{n}": ("U8", [3], 3) for n in range(4)}, "n": ("F32", [4, 0], 0)}
    mark = read_header(_write(tmp_path / "model.safetensors", _entries(tensors), 44)).mark
    parts = (
        Part("s", "F32", (2,), ("s",), (0,)),
        Part("e", "U8", (3,), ("e0", "e1", "e2", "e3"), (0, 0, 0, 0)),
    )
    return Manifest(str(tmp_path), "any", (mark,), (Layer("mlp", 4, 2, parts),))


def _with_part(manifest: Manifest, **changes: Any) -> Manifest:
    """``manifest`` with its first part changed."""
    layer = manifest.layers[0]
    part = msgspec.structs.replace(layer.parts[0], **changes)
    return _with_layer(manifest, parts=(part, *layer.parts[1:]))


def _with_layer(manifest: Manifest, **changes: Any) -> Manifest:
    return msgspec.structs.replace(manifest, layers=(msgspec.structs.replace(manifest.layers[0], **changes),))


def test_a_true_manifest_is_taken(small: Manifest) -> None:
    assert [piece.size for piece in build_index(small).ranges(0, 3)] == [8, 3]


WRONG: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "a missing tensor": (lambda m: _with_part(m, tensors=("t",)), "holds no tensor t"),
    "another shape": (lambda m: _with_part(m, shape=(3,)), r"\[4, 2\] where F32 \[4, 3\] was expected"),
    "another type": (lambda m: _with_part(m, dtype="I32"), "where I32"),
    "an unknown type": (lambda m: _with_part(m, dtype="X"), "where X"),
    "a negative shape": (lambda m: _with_part(m, shape=(-2,)), "was expected"),
    "no bytes": (lambda m: _with_part(m, tensors=("n",), shape=(0,)), "has no bytes"),
    "too few tensors": (lambda m: _with_part(m, tensors=("e0", "e1"), files=(0, 0)), "2 tensors for 4 experts"),
    "no tensors": (lambda m: _with_part(m, tensors=(), files=()), "0 tensors for 4 experts"),
    "fewer files than tensors": (lambda m: _with_part(m, files=()), "1 tensors for 4 experts"),
    "a file number too high": (lambda m: _with_part(m, files=(1,)), "file number 1 of 1"),
    "a negative file number": (lambda m: _with_part(m, files=(-1,)), "file number -1 of 1"),
    "more experts than there are": (lambda m: _with_layer(m, experts=5, parts=m.layers[0].parts[:1]), "was expected"),
    "no experts": (lambda m: _with_layer(m, experts=0), "without parts or experts"),
    "no parts": (lambda m: _with_layer(m, parts=()), "without parts or experts"),
    "more experts a token than experts": (lambda m: _with_layer(m, top_k=5), "without parts or experts"),
    "no experts a token": (lambda m: _with_layer(m, top_k=0), "without parts or experts"),
    "no layers": (lambda m: msgspec.structs.replace(m, layers=()), "names no MoE layer"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_manifest_that_contradicts_the_files_is_refused(
    small: Manifest, change: Callable[[Manifest], Manifest], words: str
) -> None:
    with pytest.raises(HeaderInvalid, match=words):
        build_index(change(small))


OUTSIDE = ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "model\0.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(small: Manifest, name: str) -> None:
    mark = msgspec.structs.replace(small.files[0], name=name)
    with pytest.raises(HeaderInvalid, match="names a file"):
        build_index(msgspec.structs.replace(small, files=(mark,)))


def test_a_folder_that_cannot_exist_is_refused(small: Manifest) -> None:
    with pytest.raises(HeaderInvalid, match="cannot exist"):
        build_index(msgspec.structs.replace(small, folder="/tmp/\0"))


def test_a_file_that_is_gone_is_refused(small: Manifest) -> None:
    Path(small.folder, "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read by the daemon"):
        build_index(small)


@pytest.mark.parametrize("change", CHANGES[:-1])
def test_a_file_that_changed_since_the_worker_opened_it_is_refused(
    small: Manifest, change: Callable[[Path], None]
) -> None:
    change(Path(small.folder, "model.safetensors"))
    with pytest.raises(FileChanged, match="has changed since"):
        build_index(small)


def test_another_header_in_the_same_bytes_is_refused(small: Manifest) -> None:
    mark = msgspec.structs.replace(small.files[0], header="0" * 64)
    with pytest.raises(FileChanged):
        build_index(msgspec.structs.replace(small, files=(mark,)))


def test_one_expert_alone_may_be_stored_stacked_or_not(tmp_path: Path) -> None:
    mark = read_header(_write(tmp_path / "model.safetensors", _entries({"t": ("U8", [3], 3)}), 3)).mark
    layer = Layer("mlp", 1, 1, (Part("t", "U8", (3,), ("t",), (0,)),))
    (piece,) = build_index(Manifest(str(tmp_path), "any", (mark,), (layer,))).ranges(0, 0)
    assert piece.size == 3
