"""The manifest: which bytes of which files make up each block, and the base weights beside them.

The worker derives it, the daemon checks it.
"""

from __future__ import annotations

import math

import msgspec

from expertd.protocol.checkpoint import ITEM_BYTES, FileMark


class Part(msgspec.Struct, frozen=True):
    """One tensor of every block of a layer.

    Attributes:
        name: below the expert layer's module, for example ``gate_proj.weight``.
        dtype: safetensors' name of the element type.
        shape: of one expert, without the expert axis.
        tensors: one name: a tensor ``[experts, *shape]``; as many names as experts: a tensor ``[*shape]`` for each;
            none: the part is computed at load, so its bytes are in a packed store only.
        files: for each of ``tensors``, the index of its file in ``Manifest.files``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    files: tuple[int, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one expert's tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Layer(msgspec.Struct, frozen=True):
    """One MoE layer: the module's ``path`` in the model, its number of ``experts``, and how many a token uses."""

    path: str
    experts: int
    top_k: int
    parts: tuple[Part, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block (one expert, all parts)."""
        return sum(part.block_bytes for part in self.parts)

    @property
    def shape_key(self) -> tuple[int, tuple[tuple[str, str, tuple[int, ...]], ...]]:
        """Layers with equal keys may share a pool: same number of experts, same parts."""
        return self.experts, tuple((part.name, part.dtype, part.shape) for part in self.parts)


class BaseTensor(msgspec.Struct, frozen=True):
    """One tensor of a file that is a weight of the model as it is, and no expert's.

    Attributes:
        name: of the tensor in its file.
        file: the index of that file in ``Manifest.files``.
        dtype: safetensors' name of the element type.
        shape: of the tensor.
    """

    name: str
    file: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Manifest(msgspec.Struct, frozen=True):
    """All blocks of one version of one checkpoint.  ``layers`` are in the order in which a forward pass runs them.

    ``derived_by`` names what computes the parts that have no tensors; empty if all have.  ``base``: the tensors that
    the worker would share with others; empty if it keeps its own.
    """

    folder: str
    family: str
    files: tuple[FileMark, ...]
    layers: tuple[Layer, ...]
    derived_by: str = ""
    base: tuple[BaseTensor, ...] = ()

    @property
    def key(self) -> str:
        """Names the model: the same files, read the same way, give the same key; anything else another one.

        It is about blocks alone, because packed stores are named by it: who shares base weights or not has the same.
        """
        return _digest(
            {
                "folder": self.folder,
                "family": self.family,
                "files": self.files,
                "layers": self.layers,
                "derived_by": self.derived_by,
            }
        )

    @property
    def base_key(self) -> str:
        """Names the base weights: the same tensors of the same files in the same order have the same key."""
        return _digest({"folder": self.folder, "files": self.files, "base": self.base})


def _digest(what: object) -> str:
    import hashlib  # late: it brings OpenSSL along, and who only talks to a daemon needs none of it

    return hashlib.sha256(msgspec.msgpack.encode(what)).hexdigest()[:16]
