"""The manifest: which bytes of which files make up each block.  The worker derives it, the daemon checks it."""

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


class Manifest(msgspec.Struct, frozen=True):
    """All blocks of one version of one checkpoint.  ``layers`` are in the order in which a forward pass runs them.

    ``derived_by`` names what computes the parts that have no tensors; empty if all have.
    """

    folder: str
    family: str
    files: tuple[FileMark, ...]
    layers: tuple[Layer, ...]
    derived_by: str = ""

    @property
    def key(self) -> str:
        """Names the model: the same files, read the same way, give the same key; anything else another one."""
        import hashlib  # late: it brings OpenSSL along, and who only talks to a daemon needs none of it

        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]
