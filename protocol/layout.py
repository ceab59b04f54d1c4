"""The shared-memory layout of pool and base segments (PROTOCOL.md, section "Shared memory").

A pool:

    offset 0            header: magic, layout version, nonce, generation
    offset 40           contents: key of the model, checksum of the layers' numbers, slots
    offset 64           table: int32 slot[layer of the pool, expert], -1 absent
    then, each on 16 KiB, one slab a part: [slots, *shape]

Base weights, which are never written once their segment was handed over:

    offset 0            header: as above, generation 0
    then, each on 16 KiB, one tensor after the other

Table and slabs share one segment, so that a slot number can never be read against the slabs of another generation.
Both sides compute the offsets from the same few numbers; nothing but those numbers crosses the wire.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from expertd.protocol.checkpoint import ITEM_BYTES
from expertd.protocol.manifest import BaseTensor, Part

PAGE = 16384
"""Slabs start and end on this many bytes: Apple silicon's page, and a multiple of everybody else's."""

SLAB_ELEMENTS = 2**31 - 1
"""A slab stays below 2^31 elements: beyond it MLX's CPU gather is silently wrong."""

LAYOUT = 1
ABSENT = -1
BASE_GENERATION = 0
"""In the header of base weights, which have no generations; those of pools count from 1."""
_HEADER = struct.Struct("<8sI16sQ")
_CONTENTS = struct.Struct("<16sII")
_CONTENTS_OFFSET = 40
_MAGIC = b"expertd\0"
_TABLE_OFFSET = 64


@dataclass(frozen=True)
class Slab:
    """Where one part's slab lies in its segment: ``offset`` in bytes, full ``shape`` with the slot axis first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one slot."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PoolLayout:
    """All offsets of a pool's segment.

    Attributes:
        layers: number of MoE layers that share the pool.
        experts: experts of each of them.
        slots: blocks that the pool holds.
        slabs: one for each part.
        size: bytes of the segment.
    """

    layers: int
    experts: int
    slots: int
    slabs: tuple[Slab, ...]
    size: int

    @property
    def table_offset(self) -> int:
        return _TABLE_OFFSET


def _up(offset: int) -> int:
    return -(-offset // PAGE) * PAGE


def pool_layout(layers: int, experts: int, parts: Sequence[Part], slots: int) -> PoolLayout:
    """The layout of a pool of ``slots`` blocks for ``layers`` layers of ``experts`` experts made of ``parts``."""
    offset = _up(_TABLE_OFFSET + 4 * layers * experts)
    slabs = []
    for part in parts:
        slabs.append(Slab(part.name, part.dtype, (slots, *part.shape), offset))
        offset = _up(offset + slots * part.block_bytes)
    return PoolLayout(layers, experts, slots, tuple(slabs), offset)


def most_slots(layers: int, experts: int, parts: Sequence[Part], size: int) -> int:
    """The most slots whose segment takes at most ``size`` bytes (0 if not even one fits)."""
    low, high = 0, layers * experts
    while low < high:
        middle = (low + high + 1) // 2
        if pool_layout(layers, experts, parts, middle).size <= size:
            low = middle
        else:
            high = middle - 1
    return low


def slot_limit(parts: Sequence[Part]) -> int:
    """The most slots that keep every slab below 2^31 elements."""
    return min(SLAB_ELEMENTS // math.prod(part.shape) for part in parts)


def base_layout(tensors: Sequence[BaseTensor]) -> tuple[list[int], int]:
    """Where each of ``tensors`` lies in the segment of base weights, and the bytes of that segment."""
    offset = _up(_HEADER.size)
    offsets = []
    for tensor in tensors:
        offsets.append(offset)
        offset = _up(offset + tensor.bytes)
    return offsets, offset


def write_header(view: memoryview, nonce: bytes, generation: int) -> None:
    """Fill the header of a new segment (``nonce``: 16 bytes by which a worker knows the segment that was announced)."""
    _HEADER.pack_into(view, 0, _MAGIC, LAYOUT, nonce, generation)


def read_header(view: memoryview) -> tuple[bytes, int] | None:
    """``(nonce, generation)`` of a segment, or None if it is none of ours."""
    magic, version, nonce, generation = _HEADER.unpack_from(view, 0)
    return (nonce, generation) if magic == _MAGIC and version == LAYOUT else None


def write_contents(view: memoryview, model: str, layers: Sequence[int], slots: int) -> None:
    """Write down what a new segment is for: the model's key, which of its MoE layers, and how many slots."""
    _CONTENTS.pack_into(view, _CONTENTS_OFFSET, *_contents(model, layers, slots))


def has_contents(view: memoryview, model: str, layers: Sequence[int], slots: int) -> bool:
    """Whether a segment was made for just that."""
    return _CONTENTS.unpack_from(view, _CONTENTS_OFFSET) == _contents(model, layers, slots)


def _contents(model: str, layers: Sequence[int], slots: int) -> tuple[bytes, int, int]:
    return model.encode("ascii").ljust(16, b"\0"), zlib.crc32(struct.pack(f"<{len(layers)}I", *layers)), slots
