"""Mapped pages as MLX arrays without a copy, and the copying slabs for where that does not work.

    Metal        mx.asarray(numpy array over the mapping, copy=False)
    CPU back end mx.as_strided(base, ..., offset = target - base): the back end takes pointer plus offset unchecked

Both are checked by ``self_test`` before a session is opened; where the check fails, sessions copy.  Which slots may be
read when is no business of this module (``expertd.worker.attach``).
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import AliasFailed, SegmentFailed
from expertd.protocol.layout import PAGE, PoolLayout, base_layout
from expertd.protocol.manifest import BaseTensor
from expertd.protocol.segments import create, make_private, map_readonly
from expertd.worker.dtypes import MLX_TYPE, NUMPY_TYPE

log = logging.getLogger("expertd.worker")


class Bases:
    """The tiny arrays that as_strided views are built on, one for each element type, with their addresses.

    Two things hang on them.  While a base is held, MLX cannot take the buffer of a view for the output of an operation
    and write into mapped pages.  And views share their base's buffer, so the base knows whether any array or graph
    still uses one of them.
    """

    def __init__(self) -> None:
        self._bases: dict[str, tuple[Any, int]] = {}

    def get(self, dtype: str) -> tuple[Any, int]:
        """The base of ``dtype`` and its address."""
        if dtype not in self._bases:
            array = mx.zeros((8,), MLX_TYPE[dtype])
            mx.eval(array)
            self._bases[dtype] = (array, _address(array))
        return self._bases[dtype]

    def let_go(self) -> bool:
        """Give the bases up; True if nobody else uses their buffers, so that no graph can read the pages any more.

        MLX reuses an operand's buffer for the output if nobody else holds it, which the output's address shows.
        """
        unused = True
        while self._bases:
            array, address = self._bases.popitem()[1]
            moved = array + mx.array(1, array.dtype)
            del array
            mx.eval(moved)
            unused = unused and _address(moved) == address
        return unused


def _address(array: Any) -> int:
    """Where the elements of an evaluated array are."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return int(np.array(plain, copy=False).__array_interface__["data"][0])


def alias(
    mapping: mmap.mmap, offset: int, shape: Sequence[int], dtype: str, bases: Bases, evaluate: bool = True
) -> Any:
    """The array of ``shape`` and ``dtype`` whose bytes start at ``offset`` of ``mapping``; the pages are its buffer.

    The caller keeps ``mapping`` alive for as long as any graph may use the array (``Bases.let_go``), and ``offset`` on
    an element.  Without ``evaluate`` the caller does that, for many at once.
    """
    if mx.default_device() == mx.gpu:
        values: NDArray[Any] = np.ndarray(tuple(shape), NUMPY_TYPE[dtype], buffer=mapping, offset=offset)
        adopted = mx.asarray(values, copy=False)
        return adopted.view(MLX_TYPE[dtype]) if dtype == "BF16" else adopted
    base, base_address = bases.get(dtype)
    address = _start(mapping) + offset
    distance, rest = divmod(address - base_address, base.dtype.size)
    if rest:
        raise AliasFailed(f"shared pages at {address:#x} are not aligned to {dtype}")
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    array = mx.as_strided(base, tuple(shape), strides, distance % 2**64)
    if evaluate:
        mx.eval(array)
    return array


def _start(mapping: mmap.mmap) -> int:
    """Where mapped pages begin."""
    return int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])


def self_test() -> str | None:
    """Why aliasing does not work here, or None if it does: the address is the mapping's, and a later write is seen."""
    try:
        segment = create(f"/expertd-test-{os.getpid()}", PAGE)
        try:
            writer = np.frombuffer(segment.mapping, np.uint32)
            writer[:] = 1
            seen = map_readonly(os.dup(segment.readonly), PAGE)
            array = alias(seen, 64, (8, 16), "U32", Bases())
            if _address(array) != _start(seen) + 64:
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


class _Hold:
    """Keeps pages mapped while an array over them, a view of one, or a graph that reads one may be used."""

    def __init__(self, mapping: mmap.mmap, descriptor: int | None = None) -> None:
        """``descriptor`` is that of the pages, for arrays that a program may get hold of."""
        self._mapping: mmap.mmap | None = mapping
        self._descriptor = descriptor
        self.bases = Bases()
        self._arrays: list[weakref.ref[Any]] = []
        self._stuck = False
        _held.add(self)

    def watch(self, arrays: Iterable[Any]) -> None:
        """These are the arrays over the pages."""
        self._arrays += map(weakref.ref, arrays)

    def let_go(self) -> bool:
        """Let the pages go if nothing can read them any more; False: something can, so try again.

        As long as somebody has one of the arrays themselves, nothing is given up, and as much protects them as before.
        Of views and graphs only giving the bases up can tell, and if there are some, that was the only try: the pages
        stay mapped until the process ends.  Nothing keeps MLX from writing to them then, so they become the process's
        own.
        """
        if self._mapping is None:
            return True
        if self._stuck or any(array() is not None for array in self._arrays):
            return False
        try:
            unused = self.bases.let_go()
        except RuntimeError as error:  # MLX may tell here of what failed before
            log.warning("it could not be found out whether pages are still used (%s); they stay mapped", error)
            unused = False
        if not unused:
            self._stuck = True
            if self._descriptor is not None:
                make_private(_start(self._mapping), len(self._mapping), self._descriptor)
            return False
        self._mapping = None  # on Metal MLX itself holds what it adopted
        _held.discard(self)
        return True


_held: set[_Hold] = set()
"""Whatever becomes of their session, these have not been let go, so they may not be unmapped."""


class SharedSlabs:
    """The slabs of one pool, aliased: arrays by part name, shape ``[slots, ...]``; always as current as the pages."""

    def __init__(self, mapping: mmap.mmap, layout: PoolLayout) -> None:
        self._hold = _Hold(mapping)
        self.arrays = {s.name: alias(mapping, s.offset, s.shape, s.dtype, self._hold.bases) for s in layout.slabs}
        self._hold.watch(self.arrays.values())

    def bring(self, layer: int, experts: NDArray[np.integer], slots: NDArray[np.integer]) -> None:
        """Nothing to do: the shared pages are what is computed from."""

    def let_go(self) -> bool:
        """Drop the arrays, and the pages with them if nothing can read them any more; False: try again."""
        self.arrays.clear()
        return self._hold.let_go()


class SharedBase:
    """Base weights, aliased: ``arrays`` in the order of the manifest's ``base``.  Nobody writes to their pages."""

    def __init__(self, mapping: mmap.mmap, descriptor: int, tensors: Sequence[BaseTensor]) -> None:
        self._hold = _Hold(mapping, descriptor)
        offsets, _ = base_layout(tensors)
        self.arrays = [
            alias(mapping, offset, tensor.shape, tensor.dtype, self._hold.bases, evaluate=False)
            for tensor, offset in zip(tensors, offsets, strict=True)
        ]
        mx.eval(self.arrays)
        self._hold.watch(self.arrays)

    def let_go(self) -> bool:
        """As that of ``SharedSlabs``; a program may have kept a weight, or a module with some."""
        self.arrays.clear()
        return self._hold.let_go()


class CopiedSlabs:
    """The slabs of one pool in memory of this process: each newly resident block is copied once.

    Only one who may read a slot (a lookup or a Fetch that has not been acked) may ``bring`` it, and only while no graph
    that reads these slabs is unevaluated.
    """

    def __init__(self, mapping: mmap.mmap, layout: PoolLayout) -> None:
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

    def let_go(self) -> bool:
        """Drop the arrays; MLX owns their memory, so nothing is in the way of it."""
        self.arrays.clear()
        self._rows.clear()
        return True

    def bring(self, layer: int, experts: NDArray[np.integer], slots: NDArray[np.integer]) -> None:
        """Copy those of the blocks (``layer``, ``experts``) in ``slots`` that are not here yet."""
        for expert, slot in set(zip(experts.ravel().tolist(), slots.ravel().tolist(), strict=True)):
            if self._content[slot, 0] != layer or self._content[slot, 1] != expert:
                self._content[slot] = -1  # an interrupt in between leaves no block here
                for own, shared in self._rows:
                    np.copyto(own[slot], shared[slot])
                self._content[slot] = layer, expert


Slabs = SharedSlabs | CopiedSlabs


class Holdings:
    """All arrays over one session's pages, so that the pages can be let go when nobody uses them any more."""

    def __init__(self) -> None:
        self.slabs: list[Slabs] = []
        self.base: SharedBase | None = None

    def let_go(self) -> bool:
        """Drop the arrays, and those pages that nothing can read any more; whether those are all."""
        self.slabs[:] = [slabs for slabs in self.slabs if not slabs.let_go()]
        if self.base is not None and self.base.let_go():
            self.base = None
        return not self.slabs and self.base is None
