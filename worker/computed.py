"""Blocks that are in no file, because mlx-lm computes them while it loads: for packing them once.

It splits, transposes or dequantizes what the checkpoint has, family by family; here its own result is taken, so nothing
of that is known here.  What daemon and workers do with such a model is in DerivedExperts and ``Manifest.derived_by``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import ReadFailed
from expertd.worker.manifest import LazyModel, expert_tensors


class ComputedBlocks:
    """The blocks of a model as mlx-lm makes them, one layer in memory at a time; ask for layers in their order."""

    def __init__(self, loaded: LazyModel) -> None:
        """``loaded`` is of no use for anything else from now on: its experts are taken out as they are computed."""
        self._folder = loaded.manifest.folder
        self._waiting = [[array for _, array in expert_tensors(switch.module)] for switch in loaded.switches]
        self._layer = -1
        self._parts: list[NDArray[np.uint8]] = []
        for switch in loaded.switches:
            _forget(switch.module)

    def fill(self, layer: int, expert: int, rows: Sequence[memoryview]) -> None:
        """Put the bytes of a block into ``rows``, one for each part.

        Raises:
            ReadFailed: the model's files could not be read.
        """
        if layer != self._layer:
            self._parts.clear()
            mx.clear_cache()
            arrays, self._waiting[layer] = self._waiting[layer], []
            self._layer, self._parts = layer, self._compute(arrays)
        for part, row in zip(self._parts, rows, strict=True):
            np.copyto(np.frombuffer(row, np.uint8), part[expert])

    def _compute(self, arrays: list[Any]) -> list[NDArray[np.uint8]]:
        """The bytes ``[experts, bytes]`` of each of ``arrays``."""
        flat = [mx.contiguous(array).reshape(array.shape[0], -1).view(mx.uint8) for array in arrays]
        try:
            mx.eval(flat)
        except RuntimeError as error:
            raise ReadFailed(f"the weights in {self._folder} could not be read ({error}); try again") from error
        return [np.array(array, copy=False) for array in flat]


def _forget(module: Any) -> None:
    """Take the tensors with an expert axis out of a switch, so that nobody but us keeps them."""
    for child in (module, *module.children().values()):
        for name in [name for name, value in child.items() if isinstance(value, mx.array)]:
            del child[name]
