"""Pools in shared memory: the daemon's writable view of a segment.  What is where: ``expertd.protocol.layout``."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import SegmentFailed
from expertd.protocol.layout import (
    ABSENT,
    PoolLayout,
    has_contents,
    pool_layout,
    read_header,
    slot_limit,
    write_contents,
    write_header,
)
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import PoolInfo
from expertd.protocol.segments import Segment, create, map_readonly


@dataclass(frozen=True)
class SharedPool:
    """One pool's segment, its table ``[layers, experts]`` and the nonce that names it to its sessions.

    ``handed``: it is an earlier daemon's, which a session has handed back; it can be read only.
    """

    segment: Segment
    layout: PoolLayout
    nonce: bytes
    table: NDArray[np.int32]
    handed: bool = False

    def rows(self, slot: int) -> list[memoryview]:
        """Writable bytes of ``slot``, one view for each part."""
        view = memoryview(self.segment.mapping)
        return [
            view[slab.offset + slot * slab.row_bytes : slab.offset + (slot + 1) * slab.row_bytes]
            for slab in self.layout.slabs
        ]

    @property
    def resident(self) -> list[tuple[int, int]]:
        """The blocks of its table, by row and expert."""
        return [(row, expert) for row, expert in np.argwhere(self.table != ABSENT).tolist()]

    def close(self) -> None:
        """Give the memory back; sessions that still map it keep it until they let go."""
        self.segment.close()


def create_pool(
    name: str, layout: PoolLayout, generation: int, model: str = "", layers: Sequence[int] = (), least: bool = False
) -> SharedPool:
    """A new pool with an empty table, for these layers of the model with that key.

    Args:
        least: nobody could go on without it, so it is created even if the room for segments is full (``create``).
    Raises:
        SegmentFailed: the system has no memory for it.
    """
    segment = create(name, layout.size, beyond=least)
    nonce = secrets.token_bytes(16)
    write_header(memoryview(segment.mapping), nonce, generation)
    write_contents(memoryview(segment.mapping), model, layers, layout.slots)
    table = _table(segment, layout)
    table[:] = ABSENT
    return SharedPool(segment, layout, nonce, table)


def handed_pool(manifest: Manifest, info: PoolInfo, size: int, descriptor: int) -> SharedPool | str:
    """A pool of an earlier daemon that a session has handed back, to copy from; or why it is not to be trusted.

    Its pages can be read only.  A block is in its table only if all its bytes had arrived, so what was torn when the
    daemon died is not.  Owns ``descriptor``, whatever comes of it.
    """
    problem = _misfit(manifest, info)
    if problem is not None:
        os.close(descriptor)
        return problem
    first = manifest.layers[info.layers[0]]
    layout = pool_layout(len(info.layers), first.experts, first.parts, info.slots)
    if layout.size != size:
        os.close(descriptor)
        return f"its segment has {size} bytes, and should have {layout.size}"
    try:
        mapping = map_readonly(os.dup(descriptor), size)
    except (OSError, SegmentFailed) as error:
        os.close(descriptor)
        return str(error)
    segment = Segment(mapping, descriptor, size)
    header = memoryview(mapping)
    known = read_header(header) == (info.nonce, info.generation)
    if not known or not has_contents(header, manifest.key, info.layers, info.slots):
        header.release()
        segment.close()
        return "its header is not that of such a pool"
    table = _table(segment, layout).copy()
    there = table[table != ABSENT]
    if (there < ABSENT).any() or (there >= info.slots).any() or len(np.unique(there)) != len(there):
        header.release()
        segment.close()
        return "its table names slots that there are not, or one of them twice"
    return SharedPool(segment, layout, info.nonce, table, handed=True)


def _misfit(manifest: Manifest, info: PoolInfo) -> str | None:
    count = len(manifest.layers)
    if not info.layers or len(set(info.layers)) != len(info.layers) or max(info.layers) >= count:
        return f"it names layers that the model, which has {count}, does not have"
    if len({manifest.layers[layer].shape_key for layer in info.layers}) > 1:
        return "its layers have blocks of different shapes"
    first = manifest.layers[info.layers[0]]
    if not 0 < info.slots <= min(len(info.layers) * first.experts, slot_limit(first.parts)):
        return f"it says to have {info.slots} slots"
    return None


def _table(segment: Segment, layout: PoolLayout) -> NDArray[np.int32]:
    count = layout.layers * layout.experts
    shape = (layout.layers, layout.experts)
    return np.frombuffer(segment.mapping, np.int32, count, layout.table_offset).reshape(shape)


def close_all(handed: Iterable[tuple[PoolInfo, SharedPool]]) -> None:
    """Nobody copies from these."""
    for _, pool in handed:
        pool.close()
