"""The packed store: all blocks of one version of one model in one file, each as one record.

    0          prefix: magic, format, bytes of the header, checksum of the header
    24         header: one msgpack map (``StoreHeader``)
    up to      table: xxh3_64 of each block's parts, one after the other, 8 bytes little-endian; 0 is not written yet
    up to      records: layer by layer, expert by expert; each part begins on 4 KiB, with zeros up to the next

"Up to" is the next multiple of 4 KiB.  So a block is one read, which a system that reads past its page cache can
scatter straight into the slabs.  Integers are little-endian.  Offsets in the header count from the table's beginning.

A store belongs to one key (``Manifest.key``), so to one version of its model's files: it *fits* if its header is the
one that ``header_of`` computes.  Here is what a store looks like; ``expertd.worker.store`` writes and verifies it, and
the daemon reads it (``expertd.daemon.packed``).
"""

from __future__ import annotations

import itertools
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from expertd.protocol.checkpoint import FileMark
from expertd.protocol.errors import StoreInvalid
from expertd.protocol.manifest import Manifest

ALIGN = 4096
"""Table, records and parts begin on multiples of it: what every device and file system takes for direct reads."""

FORMAT = 1
SUFFIX = ".packed"
_MAGIC = b"xpacked\0"
_PREFIX = struct.Struct("<8sIIQ")
_HEADER_LIMIT = 64 << 20
_ENTRY_BYTES = 8


class PackedPart(msgspec.Struct, frozen=True):
    """One part of every record of a layer: as ``manifest.Part``, with its ``bytes`` and ``offset`` in the record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    offset: int


class PackedLayer(msgspec.Struct, frozen=True):
    """One MoE layer: ``experts`` records of ``record_bytes``, the first one at ``offset``."""

    path: str
    experts: int
    parts: tuple[PackedPart, ...]
    record_bytes: int
    offset: int


class StoreHeader(msgspec.Struct, frozen=True):
    """What a store holds, and of which model: its key, folder, family and the marks of its files.

    ``derived_by`` is the manifest's.  ``bytes``: from the table's beginning to the end of the file.
    """

    key: str
    folder: str
    family: str
    files: tuple[FileMark, ...]
    derived_by: str
    layers: tuple[PackedLayer, ...]
    bytes: int

    @property
    def blocks(self) -> int:
        """Number of records."""
        return sum(layer.experts for layer in self.layers)


@dataclass(frozen=True)
class StoreLayout:
    """Where everything is in a store's file: its header, encoded with the prefix, and ``start``, where the table is."""

    header: StoreHeader
    encoded: bytes
    start: int

    @property
    def size(self) -> int:
        """Bytes of the complete file."""
        return self.start + self.header.bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of all records."""
        return sum(layer.experts * layer.record_bytes for layer in self.header.layers)

    @property
    def table_bytes(self) -> int:
        return self.header.blocks * _ENTRY_BYTES

    def entry(self, layer: int, expert: int) -> int:
        """Offset of a block's checksum."""
        before = sum(one.experts for one in self.header.layers[:layer])
        return self.start + (before + expert) * _ENTRY_BYTES

    def record(self, layer: int, expert: int) -> int:
        """Offset of a block's record."""
        one = self.header.layers[layer]
        return self.start + one.offset + expert * one.record_bytes

    def checksums(self, table: bytes) -> tuple[tuple[int, ...], ...]:
        """``[layer][expert]`` of the table's bytes."""
        entries = iter(struct.unpack(f"<{self.header.blocks}Q", table))
        return tuple(tuple(itertools.islice(entries, layer.experts)) for layer in self.header.layers)


def up(offset: int) -> int:
    """The next multiple of ``ALIGN``."""
    return -(-offset // ALIGN) * ALIGN


def header_of(manifest: Manifest) -> StoreHeader:
    """The header of the one store that fits ``manifest``."""
    offset = up(sum(layer.experts for layer in manifest.layers) * _ENTRY_BYTES)
    layers = []
    for layer in manifest.layers:
        parts, end = [], 0
        for part in layer.parts:
            parts.append(PackedPart(part.name, part.dtype, part.shape, part.block_bytes, end))
            end = up(end + part.block_bytes)
        layers.append(PackedLayer(layer.path, layer.experts, tuple(parts), end, offset))
        offset += layer.experts * end
    return StoreHeader(
        manifest.key, manifest.folder, manifest.family, manifest.files, manifest.derived_by, tuple(layers), offset
    )


def layout_of(header: StoreHeader) -> StoreLayout:
    """The layout of a store with this header."""
    raw = msgspec.msgpack.encode(header)
    encoded = _PREFIX.pack(_MAGIC, FORMAT, len(raw), xxhash.xxh3_64_intdigest(raw)) + raw
    return StoreLayout(header, encoded, up(len(encoded)))


def store_name(key: str) -> str:
    """The file name of the store of the model with this key."""
    return key + SUFFIX


def read_header(path: Path) -> StoreHeader:
    """The header of the store at ``path``.

    Raises:
        StoreInvalid: it is no store, is of another format, or its header is damaged.
        FileNotFoundError: there is nothing.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a FIFO would wait for ever
            raise StoreInvalid(f"{path} is not a regular file, so it is no packed store")
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size:
                raise StoreInvalid(f"{path} is truncated before its header")
            magic, version, length, digest = _PREFIX.unpack(prefix)
            if magic != _MAGIC:
                raise StoreInvalid(f"{path} is no packed store")
            if version != FORMAT:
                raise StoreInvalid(f"{path} is a packed store of format {version}, where this version reads {FORMAT}")
            raw = file.read(min(length, _HEADER_LIMIT))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreInvalid(f"the packed store {path} cannot be read ({error.strerror})") from error
    if len(raw) < length or xxhash.xxh3_64_intdigest(raw) != digest:
        raise StoreInvalid(f"the header of the packed store {path} is damaged")
    try:
        return msgspec.msgpack.decode(raw, type=StoreHeader)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreInvalid(f"the header of the packed store {path} is damaged ({error})") from error


def check_fits(path: Path, manifest: Manifest) -> StoreLayout:
    """The layout of the store at ``path``, which is the one of ``manifest`` and has all its bytes.

    Raises:
        StoreInvalid: it is another model's, another version's, damaged or truncated.
        FileNotFoundError: there is nothing.
    """
    found, expected = read_header(path), header_of(manifest)
    if found.folder != expected.folder:
        raise StoreInvalid(f"the packed store {path} is of another model, {found.folder}")
    if found.key != expected.key:
        raise StoreInvalid(f"the packed store {path} is of another version of {expected.folder}")
    if found != expected:
        raise StoreInvalid(f"the packed store {path} lays the blocks of {expected.folder} out in another way")
    layout = layout_of(found)
    size = path.stat().st_size
    if size != layout.size:
        raise StoreInvalid(f"the packed store {path} has {size} bytes where {layout.size} were written")
    return layout


def checksum(parts: Iterable[memoryview]) -> int:
    """The checksum of a block: xxh3_64 of its parts, one after the other, without what lies between them."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.intdigest()
