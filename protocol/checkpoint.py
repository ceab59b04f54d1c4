"""A checkpoint's files as bytes: safetensors headers, tensor ranges, fingerprints.

Both sides use it: the worker to name the files that it opened, the daemon to find a block's bytes and to refuse files
that are not those.  It reads headers only; weights are read by the daemon's reader.  What the tensors *mean* (which
model family, which expert) is no business of this module: see ``expertd.worker.manifest``.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from expertd.protocol.errors import CheckpointTruncated, FileChanged, HeaderInvalid, NotACheckpoint

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes an element takes, by safetensors' name of its type."""

_HEADER_LIMIT = 100 << 20
_SHARD = re.compile(r"(?P<prefix>.+)-\d+-of-(?P<count>\d{1,5})\.safetensors")


class FileMark(msgspec.Struct, frozen=True):
    """What tells one version of a file from another.

    ``header`` is the SHA-256 of the safetensors header in hex; ``modified`` is in nanoseconds.
    """

    name: str
    size: int
    modified: int
    inode: int
    header: str


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: ``shape``, safetensors ``dtype``, and the absolute byte range ``[start, end)``."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The parsed header of one safetensors file and the mark of the file that it was read from."""

    path: Path
    mark: FileMark
    tensors: dict[str, Tensor]


def weight_files(folder: Path) -> list[Path]:
    """The files that mlx-lm loads from ``folder``, sorted by name.

    Raises:
        NotACheckpoint: no such folder, or no ``model*.safetensors`` in it.
    """
    if not folder.exists():
        raise NotACheckpoint(f"{folder} does not exist; give the folder of an mlx-lm checkpoint")
    if not folder.is_dir():
        raise NotACheckpoint(f"{folder} is not a folder; give the folder of an mlx-lm checkpoint")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise NotACheckpoint(f"{folder} holds no model*.safetensors, so it is no mlx-lm checkpoint")
    return files


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a checkpoint in ``folder`` should have and has not; a link that leads nowhere counts.

    What it should have is what its index says, else what the numbers in its files' names say.  An index that is out of
    date (tensors are in other files than it says) is no proof that anything is missing.
    """
    there = {path.name for path in folder.glob("*.safetensors") if path.exists()}
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if not there:
        return [*missing, "model.safetensors"]
    index = _index(folder / "model.safetensors.index.json")
    lost = sorted(set(index.values()) - there)
    if lost:
        found = {name for file in there for name in _tensor_names(folder / file)}
        lost = sorted({file for name, file in index.items() if file not in there and name not in found})
    elif not index:
        shards = [match for match in map(_SHARD.fullmatch, sorted(there)) if match]
        for count in {match["count"] for match in shards}:
            prefix = next(match["prefix"] for match in shards if match["count"] == count)
            names = (f"{prefix}-{n:0{len(count)}}-of-{count}.safetensors" for n in range(1, int(count) + 1))
            lost += [name for name in names if name not in there]
    return missing + lost


def _index(path: Path) -> dict[str, str]:
    """File by tensor, as an index says; empty where there is none that can be read."""
    try:
        entries = json.loads(path.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _tensor_names(path: Path) -> set[str]:
    try:
        return set(read_header(path).tensors)
    except (OSError, CheckpointTruncated, HeaderInvalid):
        return set()


def read_header(path: Path) -> Header:
    """Parse and check the header of ``path``.

    Raises:
        CheckpointTruncated: the file ends before its header or its tensors do.
        HeaderInvalid: the header is not safetensors, or its offsets overlap, leave the file or contradict the shapes.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
        raise HeaderInvalid(f"{path} is not a regular file")
    with path.open("rb") as file:
        return _parse(path, file)


def _parse(path: Path, file: BinaryIO) -> Header:
    status = os.fstat(file.fileno())
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CheckpointTruncated(f"{path} is truncated ({status.st_size} bytes, no header); download it again")
    length = int.from_bytes(prefix, "little")
    if length > _HEADER_LIMIT:
        raise HeaderInvalid(f"{path} is not a safetensors file (its header claims {length} bytes)")
    raw = file.read(length)
    if len(raw) < length:
        raise CheckpointTruncated(f"{path} is truncated inside its header; download it again")
    try:
        entries = json.loads(raw)
        if not isinstance(entries, dict):
            raise ValueError("not a map")
        entries.pop("__metadata__", None)
        data = 8 + length
        tensors = {
            name: Tensor(
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                data + int(entry["data_offsets"][0]),
                data + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise HeaderInvalid(f"{path} has a header that is not safetensors ({error})") from error
    _check(path, tensors, data, status.st_size)
    import hashlib  # late: see ``Manifest.key``

    digest = hashlib.sha256(raw).hexdigest()
    mark = FileMark(path.name, status.st_size, status.st_mtime_ns, status.st_ino, digest)
    return Header(path, mark, tensors)


def _check(path: Path, tensors: dict[str, Tensor], data: int, size: int) -> None:
    """Refuse a header that lies: every tensor has its own bytes, as many as its shape needs, inside the file."""
    end_of_previous, previous = data, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.dtype not in ITEM_BYTES:
            raise HeaderInvalid(f"{path}: tensor {name} has the unknown type {tensor.dtype}")
        if any(n < 0 for n in tensor.shape):
            raise HeaderInvalid(f"{path}: tensor {name} has the impossible shape {list(tensor.shape)}")
        needed = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if tensor.end - tensor.start != needed:
            raise HeaderInvalid(
                f"{path}: tensor {name} has {tensor.end - tensor.start} bytes where its shape needs {needed}"
            )
        if tensor.start < end_of_previous:
            raise HeaderInvalid(f"{path}: the bytes of tensor {name} overlap {previous}")
        if tensor.end > size:
            raise CheckpointTruncated(
                f"{path} is truncated: tensor {name} ends at byte {tensor.end}, the file at {size}; download it again"
            )
        end_of_previous, previous = tensor.end, f"tensor {name}"


def check_unchanged(path: Path, mark: FileMark, descriptor: int | None = None) -> None:
    """Compare a file (or an open descriptor of it) with the mark taken when it was indexed.

    Raises:
        FileChanged: size, modification time or inode differ, or the file is gone.
    """
    try:
        status = os.stat(path) if descriptor is None else os.fstat(descriptor)  # noqa: PTH116 - one call for both
    except OSError as error:
        raise FileChanged(f"{path} cannot be opened any more ({error.strerror}); load the model again") from error
    if (status.st_size, status.st_mtime_ns, status.st_ino) != (mark.size, mark.modified, mark.inode):
        raise FileChanged(f"{path} has changed since the model was loaded; load the model again")
