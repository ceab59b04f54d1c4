"""Where the bytes of blocks and base weights are: a manifest checked against the files' own headers.

And the model's packed store, if it has one.

Reads headers, never weights (that is ``expertd.daemon.blocks``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expertd.daemon.packed import StoreIndex, find_store
from expertd.protocol.checkpoint import ITEM_BYTES, FileMark, Header, Tensor, read_header
from expertd.protocol.errors import CheckpointError, DerivedExperts, FileChanged, HeaderInvalid
from expertd.protocol.manifest import BaseTensor, Layer, Manifest, Part


@dataclass(frozen=True)
class Range:
    """``size`` bytes at ``offset`` of file number ``file``; they fill row ``slot`` of slab number ``slab``."""

    file: int
    offset: int
    size: int
    slab: int


@dataclass(frozen=True)
class BlockIndex:
    """The files of one model and the byte ranges of its blocks; ``store`` is the packed store that has them too.

    ``base``: for each of the manifest's base tensors, where its bytes begin in its file.
    """

    paths: tuple[Path, ...]
    marks: tuple[FileMark, ...]
    _starts: tuple[tuple[tuple[int, ...], ...], ...]  # [layer][part]: start of each of the part's tensors
    _layers: tuple[Layer, ...]
    store: StoreIndex | None = None
    derived: bool = False  # some blocks are in the store only
    base: tuple[int, ...] = ()

    def files_of(self, layer: int, expert: int) -> set[int]:
        """Numbers of the files that one block comes from: all of them if it was computed."""
        if self.derived:
            return set(range(len(self.marks)))
        return {part.files[expert if len(part.files) > 1 else 0] for part in self._layers[layer].parts}

    def ranges(self, layer: int, expert: int) -> list[Range]:
        """The ranges of one block, one for each part, in the order of the pool's slabs."""
        out = []
        for number, (part, starts) in enumerate(zip(self._layers[layer].parts, self._starts[layer], strict=True)):
            which = expert if len(starts) > 1 else 0
            offset = starts[which] + (0 if len(starts) > 1 else expert * part.block_bytes)
            out.append(Range(part.files[which], offset, part.block_bytes, number))
        return out


def build_index(manifest: Manifest, packed: Path | None = None) -> BlockIndex:
    """Read the headers of the manifest's files and find every part's bytes.

    Args:
        packed: the folder in which packed stores are looked for; None: nowhere.
    Raises:
        DerivedExperts: blocks are computed at load, and there is no packed store that has them.
        FileChanged: a file is not the one that the worker opened.
        HeaderInvalid: a tensor is missing, or its type or shape is not what the manifest says.
        CheckpointError: a file cannot be read.
    """
    folder = Path(manifest.folder)
    headers = [_header(folder / mark.name, mark) for mark in manifest.files]
    starts = []
    for layer in manifest.layers:
        if not layer.parts or not 0 < layer.top_k <= layer.experts:
            raise HeaderInvalid(f"the manifest of {folder} describes {layer.path} without parts or experts")
        starts.append(tuple(_starts(layer, part, headers, manifest.derived_by) for part in layer.parts))
    if not manifest.layers:
        raise HeaderInvalid(f"the manifest of {folder} names no MoE layer")
    paths = tuple(header.path for header in headers)
    store = find_store(packed, manifest) if packed is not None else None
    if store is None and manifest.derived_by:
        raise DerivedExperts(
            f"{folder}: mlx-lm computes its experts while it loads, so their bytes are not in the files; "
            f"compute and write them once with: expertd pack {folder}"
        )
    base = tuple(_base_start(tensor, headers) for tensor in manifest.base)
    return BlockIndex(paths, manifest.files, tuple(starts), manifest.layers, store, bool(manifest.derived_by), base)


def _base_start(wanted: BaseTensor, headers: list[Header]) -> int:
    tensor = _tensor(wanted.name, wanted.file, headers)
    if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
        raise HeaderInvalid(
            f"tensor {wanted.name} is {tensor.dtype} {list(tensor.shape)} "
            f"where {wanted.dtype} {list(wanted.shape)} was expected"
        )
    return tensor.start


def _tensor(name: str, file: int, headers: list[Header]) -> Tensor:
    if not 0 <= file < len(headers):
        raise HeaderInvalid(f"the manifest names file number {file} of {len(headers)}")
    tensor = headers[file].tensors.get(name)
    if tensor is None:
        raise HeaderInvalid(f"{headers[file].path} holds no tensor {name}")
    return tensor


def _header(path: Path, mark: FileMark) -> Header:
    if Path(mark.name).name != mark.name or mark.name in ("", ".."):
        raise HeaderInvalid(f"the manifest names a file outside its folder: {mark.name}")
    if "\0" in str(path):
        raise HeaderInvalid(f"the manifest names a file that cannot exist: {str(path)!r}")
    try:
        header = read_header(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read by the daemon ({error.strerror})") from error
    if header.mark != mark:
        raise FileChanged(f"{path} has changed since the model was loaded; load the model again")
    return header


def _starts(layer: Layer, part: Part, headers: list[Header], derived_by: str) -> tuple[int, ...]:
    count = len(part.tensors)
    if derived_by and count == len(part.files) == 0 and part.dtype in ITEM_BYTES and part.block_bytes:
        return ()
    if count not in (1, layer.experts) or len(part.files) != count:
        raise HeaderInvalid(f"the manifest gives {layer.path}.{part.name} {count} tensors for {layer.experts} experts")
    expected = part.shape if count > 1 else (layer.experts, *part.shape)
    starts = []
    for name, file in zip(part.tensors, part.files, strict=True):
        tensor = _tensor(name, file, headers)
        # One expert alone may be stored stacked or not: [1, ...] and [...] are the same bytes.
        same = tensor.shape == expected or (layer.experts == 1 and tensor.shape == part.shape)
        if tensor.dtype != part.dtype or not same:
            raise HeaderInvalid(
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)} where {part.dtype} {list(expected)} was expected"
            )
        starts.append(tensor.start)
    if part.block_bytes == 0:
        raise HeaderInvalid(f"the manifest of {layer.path} names {part.name}, which has no bytes")
    return tuple(starts)
