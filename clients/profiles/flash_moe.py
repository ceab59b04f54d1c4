"""Profiles that flash-moe (later mlx-moe) has written, read as ours.

Its file counts, layer by layer, in how many prompts an expert was chosen:

    {"model": ..., "num_prompts": 24, "threshold": 0.5,
     "layers": {"0": {"universal": [3, 17], "activation_counts": {"3": 24, "17": 13, ...}}, ...}}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from expertd.protocol.errors import ProfileInvalid
from expertd.protocol.profiles import LARGEST, MOST, Profile


class _Layer(msgspec.Struct):
    universal: list[int] = []
    activation_counts: dict[str, int] = {}


class _File(msgspec.Struct):
    layers: dict[str, _Layer]
    model: str = ""
    num_prompts: int = 0


def read_flash_moe(path: Path, model: str, made_at: float, paths: Sequence[str], experts: Sequence[int]) -> Profile:
    """The profile in ``path``, for a model whose MoE layers are at ``paths`` and have so many ``experts``.

    Its layers are numbered as the model's, where that has layers without experts, or as the MoE layers alone.

    Raises:
        ProfileInvalid: it is no such file, or of a model of another shape; says what does not fit.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ProfileInvalid(f"{path} is far too large for a profile")
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except OSError as error:
        raise ProfileInvalid(f"{path} cannot be read ({error.strerror})") from error
    except msgspec.DecodeError as error:
        raise ProfileInvalid(f"{path} is no profile of flash-moe ({error})") from error
    places = _places(path, list(found.layers), paths)
    counts = [[0] * count for count in experts]
    for name, layer in found.layers.items():
        row = counts[places[name]]
        seen = {_expert(path, name, expert): count for expert, count in layer.activation_counts.items()}
        for expert in layer.universal:
            seen.setdefault(expert, max(1, found.num_prompts))
        for expert, count in seen.items():
            if not 0 <= expert < len(row) or not 0 <= count < MOST:
                raise ProfileInvalid(
                    f"{path} is of another model: it counts expert {expert} of layer {name}, where {model} has "
                    f"{len(row)} experts"
                )
            row[expert] = count
    most = max((count for row in counts for count in row), default=0)
    if not most:
        raise ProfileInvalid(f"{path} counts nothing")
    return Profile(
        model=model, made_at=made_at, source=f"flash-moe's {path.name}", tokens=0,
        prompts=max(found.num_prompts, most), experts=list(experts), uses=counts, seen=counts,
    )  # fmt: skip


def _places(path: Path, names: Sequence[str], paths: Sequence[str]) -> dict[str, int]:
    """Which MoE layer each of the file's layers is."""
    numbers = [re.search(r"\.layers\.(\d+)\.", f".{layer}") for layer in paths]
    by_model = {found.group(1): place for place, found in enumerate(numbers) if found is not None}
    for known in (by_model, {str(place): place for place in range(len(paths))}):
        if names and set(names) <= known.keys():
            return {name: known[name] for name in names}
    raise ProfileInvalid(f"{path} has {len(names)} layers that do not fit the model's {len(paths)} MoE layers")


def _expert(path: Path, layer: str, name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 9):
        raise ProfileInvalid(f"{path} names {name[:40]!r} in layer {layer}, which is no expert's number")
    return int(name)
