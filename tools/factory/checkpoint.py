"""Writes a whole checkpoint folder: config, tokenizer and weights, of any size, in seconds and in bounded memory.

For tests, demos and benchmarks. The text such a model writes means nothing; what is real is its shape, its files and
that its router chooses different experts for different tokens. What is in the files is decided in ``families``
(config), ``layout`` (parameters), ``values`` (numbers) and ``forms`` (names); ``stream`` puts it on the disk.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.factory.cells import DENSE, EXPERTS, QUANTIZED, unwritable
from tools.factory.families import FAMILIES, Family, Sizes, resolve_sizes
from tools.factory.forms import NAMES, file_tensors
from tools.factory.layout import read_parameters
from tools.factory.stream import write_shards
from tools.factory.tokenizer import BOS_ID, EOS_ID, write_tokenizer

__all__ = ["write_checkpoint"]

# The group sizes of 4-bit weights, the default first.
GROUP_SIZES = {"mxfp4": (32,), "affine": (64, 32, 128)}


def write_checkpoint(
    path: str | Path,
    family: str,
    *,
    experts: str = "mxfp4",
    dense: str = "float32",
    names: str = "stacked",
    shards: int = 1,
    seed: int = 0,
    group_size: int | None = None,
    **sizes: int,
) -> Path:
    """Write a checkpoint that ``mlx_lm.load(path)`` loads with no network, and return its folder.

    Equal arguments give byte-identical files. Checkpoints that differ only in ``names`` or ``shards`` load as the same
    model. Greedy text never ends early, as the special tokens' rows of the output head are zero.

    Args:
        path: a folder that does not exist yet or is empty.
        family: a key of ``FAMILIES``.
        experts: ``mxfp4`` (groups of 32), ``affine`` (4 bits), ``float32`` or ``bfloat16``.
        dense: ``float32`` or ``bfloat16``, of everything else, affine scales and expert biases included.
        names: ``stacked`` as mlx-lm saves, ``per_expert`` as originals with one tensor per expert, ``derived`` as
            originals with fused experts (gpt_oss, llama4).
        shards: number of weight files.
        seed: chooses the values; any integer.
        group_size: of affine experts 32, 64 (the default) or 128; it has to divide hidden and expert_width.
        sizes: fields of ``Sizes``, over the family's defaults.

    Raises:
        ValueError: an argument is out of range or the combination has no such form; the message names the argument.
        FileExistsError: ``path`` holds something already.

    Instantiating the model class advances ``mx.random``'s global state.
    """
    _one_of("family", family, tuple(FAMILIES))
    _one_of("experts", experts, EXPERTS)
    _one_of("dense", dense, DENSE)
    _one_of("names", names, NAMES)
    if shards < 1:
        raise ValueError(f"shards={shards}: has to be at least 1.")
    chosen = FAMILIES[family]
    if reason := unwritable(chosen, experts, names):
        raise ValueError(reason)
    resolved = resolve_sizes(chosen, sizes)
    group = _group_size(experts, group_size, resolved)

    config = _config(chosen, resolved, experts, names, group)
    parameters = read_parameters(config, experts, dense, group)
    tensors = file_tensors(parameters, chosen, names, seed)

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a checkpoint needs a folder of its own.")
    write_shards(folder, tensors, shards)
    write_tokenizer(folder, resolved.vocab)
    # Last, so that a folder that was cut short does not pass for a checkpoint.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _config(family: Family, sizes: Sizes, experts: str, names: str, group_size: int) -> dict[str, Any]:
    config = {"model_type": family.name, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, **family.config(sizes)}
    if experts not in QUANTIZED:
        return config
    if names == "derived":
        # What the original release says; mlx-lm turns it into the form below.
        return config | {"quantization_config": {"quant_method": experts}}
    return config | {"quantization": {"group_size": group_size, "bits": 4, "mode": experts}}


def _group_size(experts: str, wanted: int | None, sizes: Sizes) -> int:
    if experts not in QUANTIZED:
        if wanted is not None:
            raise ValueError(f"group_size={wanted}: experts={experts!r} are not quantized, so leave it out.")
        return 0
    allowed = GROUP_SIZES[experts]
    group_size = allowed[0] if wanted is None else wanted
    _one_of("group_size", group_size, allowed)
    for name, value in (("hidden", sizes.hidden), ("expert_width", sizes.expert_width)):
        if value % group_size:
            raise ValueError(f"{name}={value}: has to be a multiple of group_size, which is {group_size}.")
    return group_size


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: has to be one of {', '.join(map(str, allowed))}.")
