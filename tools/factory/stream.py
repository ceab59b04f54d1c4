"""Writes safetensors files of any size while holding one chunk in memory.

The header goes first, from shapes alone; then every tensor's bytes follow as an iterator yields them. Like
``mx.save_safetensors`` it does *not* pad the header, so the data starts at an arbitrary byte: a reader that only
works on aligned files should fail here. What the bytes are is decided in ``values`` and ``forms``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ITEM_BYTES", "FileTensor", "write_safetensors", "write_shards"]

ITEM_BYTES = {"F32": 4, "BF16": 2, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class FileTensor:
    """One tensor as a file holds it.

    ``dtype`` is a safetensors word (a key of ``ITEM_BYTES``); ``chunks()`` starts over at each call and yields
    C-contiguous arrays whose bytes, one after another, are the tensor in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[npt.NDArray[Any]]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def write_safetensors(path: Path, tensors: Sequence[FileTensor]) -> None:
    """Write ``tensors`` in the order given.

    Raises RuntimeError if a tensor yields more or fewer bytes than its shape says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    with path.open("wb", buffering=1 << 20) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            written = 0
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk)
                file.write(data.data)
                written += data.nbytes
            if written != tensor.size_bytes:
                raise RuntimeError(f"{tensor.name}: {written} bytes generated, {tensor.size_bytes} declared")


def write_shards(folder: Path, tensors: Sequence[FileTensor], shards: int) -> None:
    """Write ``model.safetensors``, or for ``shards > 1`` numbered files of about equal size and their index.

    Tensors keep their order, so one layer's experts may lie in two files, as in published checkpoints. Raises
    ValueError if there are fewer tensors than shards.
    """
    if shards > len(tensors):
        raise ValueError(f"shards={shards}: has to be at most {len(tensors)}, the number of tensors.")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    total = sum(t.size_bytes for t in tensors)
    ends = list(accumulate(t.size_bytes for t in tensors))
    weight_map: dict[str, str] = {}
    start = 0
    for shard in range(shards):
        # The first tensor that passes this shard's share of the bytes ends it; each later shard keeps at least one.
        stop = start + 1
        while stop < len(tensors) - (shards - shard - 1) and (
            shard == shards - 1 or ends[stop - 1] < total * (shard + 1) // shards
        ):
            stop += 1
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / name, tensors[start:stop])
        weight_map.update({t.name: name for t in tensors[start:stop]})
        start = stop
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
