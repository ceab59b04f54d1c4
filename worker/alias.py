"""Mapped pages as MLX arrays without a copy, and the copying slabs for where that does not work.

    Metal        mx.asarray(numpy array over the mapping, copy=False)
    CPU back end mx.as_strided(base, ..., offset = target - base): the back end takes pointer plus offset unchecked

Both are checked by ``self_test`` before a session is opened; where the check fails, sessions copy.  Which slots may be
read when is no business of this module (``expertd.worker.attach``).
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import AliasFailed, SegmentFailed
from expertd.protocol.layout import PAGE, PoolLayout
from expertd.protocol.segments import create, map_readonly
from expertd.worker.dtypes import MLX_TYPE, NUMPY_TYPE

_bases: dict[str, tuple[Any, int]] = {}


def _base(dtype: str) -> tuple[Any, int]:
    """A tiny array of ``dtype`` and its address.

    It lives for ever: an as_strided view is built on it, and while somebody else holds it MLX cannot take the buffer of
    a view for the output of an operation and write into mapped pages.
    """
    if dtype not in _bases:
        bits = mx.zeros((8,), mx.uint16) if dtype == "BF16" else mx.zeros((8,), MLX_TYPE[dtype])
        array = bits.view(MLX_TYPE[dtype])
        mx.eval(bits, array)
        address = np.array(bits, copy=False).__array_interface__["data"][0]
        _bases[dtype] = (array, address)
    return _bases[dtype]


def alias(mapping: mmap.mmap, offset: int, shape: Sequence[int], dtype: str) -> Any:
    """The array of ``shape`` and ``dtype`` whose bytes start at ``offset`` of ``mapping``; the pages are its buffer.

    The caller keeps ``mapping`` alive for as long as any graph may use the array, and ``offset`` on an element.
    """
    if mx.default_device() == mx.gpu:
        values: NDArray[Any] = np.ndarray(tuple(shape), NUMPY_TYPE[dtype], buffer=mapping, offset=offset)
        adopted = mx.asarray(values, copy=False)
        return adopted.view(MLX_TYPE[dtype]) if dtype == "BF16" else adopted
    base, base_address = _base(dtype)
    address = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0] + offset
    distance, rest = divmod(address - base_address, base.dtype.size)
    if rest:
        raise AliasFailed(f"shared pages at {address:#x} are not aligned to {dtype}")
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    array = mx.as_strided(base, tuple(shape), strides, distance % 2**64)
    mx.eval(array)
    return array


def self_test() -> str | None:
    """Why aliasing does not work here, or None if it does: the address is the mapping's, and a later write is seen."""
    try:
        segment = create(f"/expertd-test-{os.getpid()}", PAGE)
        try:
            writer = np.frombuffer(segment.mapping, np.uint32)
            writer[:] = 1
            seen = map_readonly(os.dup(segment.readonly), PAGE)
            array = alias(seen, 64, (8, 16), "U32")
            address = np.frombuffer(seen, np.uint8).__array_interface__["data"][0] + 64
            if np.array(array, copy=False).__array_interface__["data"][0] != address:
                return "MLX copied the pages"
            before = mx.sum(array + 0).item()
            writer[:] = 3
            after = mx.sum(array + 0).item()
            del writer
        finally:
            segment.close()
    except (ValueError, TypeError, RuntimeError, SegmentFailed) as error:
        return str(error)
    return None if (before, after) == (128, 384) else f"a write was not seen ({before} then {after})"


class SharedSlabs:
    """The slabs of one pool, aliased: arrays by part name, shape ``[slots, ...]``; always as current as the pages."""

    mode = "shm"

    def __init__(self, mapping: mmap.mmap, layout: PoolLayout) -> None:
        self.mapping = mapping
        self.arrays = {slab.name: alias(mapping, slab.offset, slab.shape, slab.dtype) for slab in layout.slabs}

    def bring(self, layer: int, experts: NDArray[np.integer], slots: NDArray[np.integer]) -> None:
        """Nothing to do: the shared pages are what is computed from."""


class CopiedSlabs:
    """The slabs of one pool in memory of this process: each newly resident block is copied once.

    Only one who may read a slot (a lookup or a Fetch that has not been acked) may ``bring`` it, and only while no graph
    that reads these slabs is unevaluated.
    """

    mode = "copy"

    def __init__(self, mapping: mmap.mmap, layout: PoolLayout) -> None:
        self.mapping = mapping
        self.arrays: dict[str, Any] = {}
        self._rows: list[tuple[NDArray[Any], NDArray[Any]]] = []
        for slab in layout.slabs:
            stored = mx.zeros(slab.shape, mx.uint16 if slab.dtype == "BF16" else MLX_TYPE[slab.dtype])
            view = stored.view(MLX_TYPE[slab.dtype]) if slab.dtype == "BF16" else stored
            mx.eval(stored, view)
            self.arrays[slab.name] = view
            shared: NDArray[Any] = np.ndarray(slab.shape, NUMPY_TYPE[slab.dtype], buffer=mapping, offset=slab.offset)
            self._rows.append((np.array(stored, copy=False), shared))
        self._content = np.full((layout.slots, 2), -1, np.int64)

    def bring(self, layer: int, experts: NDArray[np.integer], slots: NDArray[np.integer]) -> None:
        """Copy those of the blocks (``layer``, ``experts``) in ``slots`` that are not here yet."""
        for expert, slot in set(zip(experts.ravel().tolist(), slots.ravel().tolist(), strict=True)):
            if self._content[slot, 0] != layer or self._content[slot, 1] != expert:
                for own, shared in self._rows:
                    np.copyto(own[slot], shared[slot])
                self._content[slot] = layer, expert


Slabs = SharedSlabs | CopiedSlabs
