"""Pools in shared memory: the daemon's writable view of a segment.  What is where: ``expertd.protocol.layout``."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd.protocol.layout import ABSENT, PoolLayout, write_header
from expertd.protocol.segments import Segment, create


@dataclass(frozen=True)
class SharedPool:
    """One pool's segment, its table ``[layers, experts]`` and the nonce that names it to its sessions."""

    segment: Segment
    layout: PoolLayout
    nonce: bytes
    table: NDArray[np.int32]

    def rows(self, slot: int) -> list[memoryview]:
        """Writable bytes of ``slot``, one view for each part."""
        view = memoryview(self.segment.mapping)
        return [
            view[slab.offset + slot * slab.row_bytes : slab.offset + (slot + 1) * slab.row_bytes]
            for slab in self.layout.slabs
        ]

    def close(self) -> None:
        """Give the memory back; sessions that still map it keep it until they let go."""
        self.segment.close()


def create_pool(name: str, layout: PoolLayout, generation: int) -> SharedPool:
    """A new pool with an empty table.

    Raises:
        SegmentFailed: the system has no memory for it.
    """
    segment = create(name, layout.size)
    nonce = secrets.token_bytes(16)
    write_header(memoryview(segment.mapping), nonce, generation)
    shape = (layout.layers, layout.experts)
    count = layout.layers * layout.experts
    table = np.frombuffer(segment.mapping, np.int32, count, layout.table_offset).reshape(shape)
    table[:] = ABSENT
    return SharedPool(segment, layout, nonce, table)
