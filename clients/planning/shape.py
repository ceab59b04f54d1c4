"""What a checkpoint's config and headers tell of it, without mlx: its blocks, the rest of it, what a token touches.

A worker derives the manifest from what mlx-lm makes of the files (``expertd.worker.manifest``).  Here the names of the
tensors are taken at their word, which is right for all forms that mlx-lm writes; a daemon is never given a manifest
from here.  Where mlx-lm computes the experts, their packed store tells.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertd.protocol.checkpoint import ITEM_BYTES, Header, Tensor, read_header, weight_files
from expertd.protocol.errors import CheckpointError, ConfigMissing, DenseModel, DerivedExperts, StoreInvalid
from expertd.protocol.layout import base_layout
from expertd.protocol.manifest import BaseTensor, Layer, Manifest, Part
from expertd.protocol.packed import SUFFIX, StoreHeader
from expertd.protocol.packed import read_header as read_store

_STACKED = re.compile(
    r"(?P<path>.+\.(?:switch_mlp|switch_glu|experts))\."
    r"(?P<part>(?:gate_proj|up_proj|down_proj|gate_up_proj|fc1|fc2)\.(?:weight|scales|biases|bias))"
)
_SEPARATE = re.compile(r"(?P<path>.+)\.experts\.(?P<expert>\d+)\.(?P<part>.+)")
_EXPERTS = re.compile(r".+\.(?:experts|switch_mlp|switch_glu)\..+|.+\.experts\b.*")
_UNUSED = re.compile(r"(?:^|.*\.)mtp\..*")
"""Heads that predict several tokens: mlx-lm drops them."""
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FC = {"up_proj": "fc1", "down_proj": "fc2"}
_UNGATED = re.compile("^(?:up_proj|down_proj)")
_TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts",
    "experts_per_token", "top_k",
)  # fmt: skip


@dataclass(frozen=True)
class KvCache:
    """Of one sequence, in bytes: ``per_token``, and ``windowed_per_token`` for the last ``window`` tokens only."""

    per_token: int
    windowed_per_token: int = 0
    window: int = 0

    def bytes(self, tokens: int) -> int:
        """What it takes after so many tokens."""
        return self.per_token * tokens + self.windowed_per_token * min(tokens, self.window)


@dataclass(frozen=True)
class Shape:
    """A model as far as its memory and reads are concerned.

    Attributes:
        manifest: its blocks; of a derived model as its packed store has them.
        base_bytes: all that is not experts, as it is stored.
        base_segment: what that takes of the budget, as every tensor begins on a page.
        dense_bytes: what of that every token touches.
        kv: of one sequence; None if the config does not tell.
        store: its packed store, if there is one.
    """

    manifest: Manifest
    base_bytes: int
    base_segment: int
    dense_bytes: int
    kv: KvCache | None
    store: Path | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return sum(layer.experts for layer in self.manifest.layers)

    @property
    def top_k(self) -> int:
        """Blocks that a token uses in a layer."""
        return max(layer.top_k for layer in self.manifest.layers)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(layer.experts * layer.block_bytes for layer in self.manifest.layers)

    @property
    def touched_bytes(self) -> int:
        """Bytes of weights that one token's computing reads."""
        return self.dense_bytes + sum(layer.top_k * layer.block_bytes for layer in self.manifest.layers)


def read_shape(folder: Path, stores: Path | None = None) -> Shape:
    """The shape of the checkpoint in ``folder``.

    Args:
        stores: the folder of packed stores.
    Raises:
        CheckpointError: one of its kinds, for each way in which a checkpoint can be unusable.
    """
    files = weight_files(folder)
    config = _config(folder)
    try:
        headers = [read_header(path) for path in files]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror})") from error
    store = _store_of(folder, headers, stores) if stores is not None else None
    found, path = store or (None, None)
    return replace(shape_of(folder, config, headers, found), store=path)


def shape_of(
    folder: Path, config: Mapping[str, Any], headers: Sequence[Header], store: StoreHeader | None = None
) -> Shape:
    """The shape of a checkpoint with this config and these headers; ``store`` is its packed store's header, if any.

    Raises:
        DenseModel: it has no experts.
        DerivedExperts: mlx-lm computes its experts, and there is no store.
        CheckpointError: the config does not tell how many experts a token uses, or the experts differ.
    """
    family = str(config["model_type"])
    inner: Mapping[str, Any] = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    marks = tuple(header.mark for header in headers)
    base = [
        (name, tensor)
        for header in headers
        for name, tensor in header.tensors.items()
        if not _EXPERTS.fullmatch(name) and not _UNUSED.fullmatch(name)
    ]
    found = _layers(headers)
    if not found and not any(_EXPERTS.fullmatch(name) for header in headers for name in header.tensors):
        raise DenseModel(f"{folder} is a dense model ({family}): it has no experts to cache")
    if not found and store is None:
        raise DerivedExperts(
            f"{folder}: mlx-lm computes its experts while it loads, so the files do not tell how large they are; "
            f"compute and write them once with: expertd pack {folder}"
        )
    top_k = next((int(inner[key]) for key in _TOP_K if isinstance(inner.get(key), int)), 0)
    if top_k <= 0:
        raise CheckpointError(f"{folder}/config.json does not tell how many experts a token uses ({_TOP_K[0]})")
    if found:
        layers = tuple(_with_top_k(layer, top_k) for layer in found)
        manifest = Manifest(str(folder), family, marks, layers)
    else:
        assert store is not None
        layers = tuple(
            Layer(
                one.path, one.experts, min(top_k, one.experts),
                tuple(Part(part.name, part.dtype, part.shape, (), ()) for part in one.parts),
            )
            for one in store.layers
        )  # fmt: skip
        manifest = Manifest(str(folder), family, marks, layers, store.derived_by)
    base_bytes = sum(_size(tensor) for _, tensor in base)
    shared = [BaseTensor(name, 0, tensor.dtype, tensor.shape) for name, tensor in base]
    return Shape(manifest, base_bytes, base_layout(shared)[1], _dense(base), kv_cache(inner, _item_bytes(base)))


def _with_top_k(layer: Layer, top_k: int) -> Layer:
    """``layer`` with that many experts a token, or all if it has fewer."""
    return Layer(layer.path, layer.experts, min(top_k, layer.experts), layer.parts)


def kv_cache(config: Mapping[str, Any], item_bytes: int) -> KvCache | None:
    """What the KV cache of a model with this config takes, with elements of ``item_bytes``; None if that is not told.

    Layers of linear attention, or of state spaces, keep a state of fixed size, which is small and left out.
    """
    layers = config.get("num_hidden_layers")
    heads = config.get("num_attention_heads")
    if not (isinstance(layers, int) and isinstance(heads, int) and heads > 0):
        return None
    if isinstance(latent := config.get("kv_lora_rank"), int):  # MLA
        rope = config.get("qk_rope_head_dim")
        return KvCache(layers * (latent + (rope if isinstance(rope, int) else 0)) * item_bytes)
    hidden, head = config.get("hidden_size"), config.get("head_dim")
    if not isinstance(head, int):
        if not isinstance(hidden, int):
            return None
        head = hidden // heads
    kv_heads = config.get("num_key_value_heads")
    of_layer = 2 * (kv_heads if isinstance(kv_heads, int) else heads) * head * item_bytes
    kinds = config.get("layer_types")
    window = config.get("sliding_window")
    if isinstance(kinds, list) and len(kinds) == layers:
        full = sum(kind == "full_attention" for kind in kinds)
        windowed = sum(kind == "sliding_attention" for kind in kinds) if isinstance(window, int) else 0
        return KvCache(full * of_layer, windowed * of_layer, window if isinstance(window, int) and windowed else 0)
    if isinstance(pattern := config.get("hybrid_override_pattern"), str | list):
        return KvCache(pattern.count("*") * of_layer)
    if isinstance(chunk := config.get("attention_chunk_size"), int):  # llama4: three of four layers see a chunk
        return KvCache(layers // 4 * of_layer, (layers - layers // 4) * of_layer, chunk)
    interval = config.get("full_attention_interval")
    if isinstance(interval, int) and interval > 0:
        return KvCache(layers // interval * of_layer)
    return KvCache(layers * of_layer)


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigMissing(f"{folder} has no config.json, so it is no mlx-lm checkpoint") from error
    except (OSError, ValueError) as error:
        raise ConfigMissing(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigMissing(f"{path} names no model_type, so it is no mlx-lm checkpoint")
    return config


def _store_of(folder: Path, headers: Sequence[Header], stores: Path) -> tuple[StoreHeader, Path] | None:
    """The packed store of exactly these files: its header, and where it is."""
    marks = tuple(header.mark for header in headers)
    for path in sorted(stores.glob(f"*{SUFFIX}")):
        try:
            found = read_store(path)
        except (StoreInvalid, FileNotFoundError):
            continue  # the daemon tells of it, when the model is loaded
        if found.folder == str(folder) and found.files == marks:
            return found, path
    return None


def _layers(headers: Sequence[Header]) -> list[Layer]:
    """The MoE layers in the order of the numbers in their paths, each with 1 expert a token until that is known."""
    stacked: dict[str, dict[str, tuple[str, int, Tensor]]] = {}
    separate: dict[str, dict[str, dict[int, tuple[str, int, Tensor]]]] = {}
    for number, header in enumerate(headers):
        for name, tensor in header.tensors.items():
            if _UNUSED.fullmatch(name):
                continue
            if (one := _SEPARATE.fullmatch(name)) is not None:
                projection, _, rest = one["part"].partition(".")
                part = f"{_PROJECTIONS.get(projection, projection)}.{rest}"
                of_part = separate.setdefault(f"{one['path']}.switch_mlp", {}).setdefault(part, {})
                of_part[int(one["expert"])] = (name, number, tensor)
            elif (one := _STACKED.fullmatch(name)) is not None and len(tensor.shape) > 1:
                stacked.setdefault(one["path"], {})[one["part"]] = (name, number, tensor)
    layers = [
        Layer(path, next(iter(parts.values()))[2].shape[0], 1, tuple(
            Part(part, tensor.dtype, tensor.shape[1:], (name,), (file,))
            for part, (name, file, tensor) in sorted(parts.items())
        ))
        for path, parts in stacked.items()
    ]  # fmt: skip
    for path, parts in separate.items():
        experts = max(map(len, parts.values()))
        if not any(part.startswith("gate_proj.") for part in parts):  # no gate: mlx-lm's SwitchMLP, whose names differ
            parts = {_UNGATED.sub(lambda found: _FC[found[0]], part): of_part for part, of_part in parts.items()}
        layers.append(Layer(path, experts, 1, tuple(
            Part(part, of_part[min(of_part)][2].dtype, of_part[min(of_part)][2].shape,
                 tuple(of_part[expert][0] for expert in sorted(of_part)),
                 tuple(of_part[expert][1] for expert in sorted(of_part)))
            for part, of_part in sorted(parts.items()) if len(of_part) == experts
        )))  # fmt: skip
    return sorted(layers, key=lambda layer: [int(number) for number in re.findall(r"\d+", layer.path)])


def _size(tensor: Tensor) -> int:
    return tensor.end - tensor.start


def _dense(base: Sequence[tuple[str, Tensor]]) -> int:
    """What a token touches: all but the embedding, of which it needs a row, unless that is the output layer too."""
    has_output = any("lm_head." in name for name, _ in base)
    return sum(_size(tensor) for name, tensor in base if not (has_output and ".embed_tokens." in f".{name}"))


def _item_bytes(base: Sequence[tuple[str, Tensor]]) -> int:
    """Bytes of an element of the KV cache: those of the weights that are not quantized."""
    for name, tensor in base:
        if "norm" in name and tensor.dtype in ("F16", "BF16", "F32"):
            return ITEM_BYTES[tensor.dtype]
    return 2


