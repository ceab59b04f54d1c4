"""Which combinations of family, expert encoding, dense dtype and naming form exist, and which of them run here.

Two rules, kept apart. ``unwritable`` is about files: a form has to be one that mlx-lm's ``sanitize`` understands,
because otherwise nobody could have such a checkpoint. ``unrunnable`` is about this machine's MLX back end.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import mlx.core as mx

from tools.factory.families import FAMILIES, Family
from tools.factory.forms import NAMES

__all__ = ["DENSE", "EXPERTS", "QUANTIZED", "Cell", "cells", "left_out", "unrunnable", "unwritable"]

EXPERTS = ("mxfp4", "affine", "float32", "bfloat16")
QUANTIZED = ("mxfp4", "affine")
DENSE = ("float32", "bfloat16")


class Cell(NamedTuple):
    """One kind of checkpoint; the fields are ``write_checkpoint``'s arguments of the same names."""

    family: str
    experts: str
    dense: str
    names: str

    def __str__(self) -> str:
        return "-".join(self)


def cells() -> list[Cell]:
    """Every cell that plain mlx-lm can load and run on this machine."""
    return [cell for cell in _all_cells() if not _reason(cell)]


def left_out() -> list[tuple[Cell, str]]:
    """Every other cell, each with the reason as a sentence."""
    return [(cell, reason) for cell in _all_cells() if (reason := _reason(cell))]


def unwritable(family: Family, experts: str, names: str) -> str:
    """Why no checkpoint can have this form, or an empty string if one can."""
    if names == "per_expert" and not family.per_expert:
        return f"mlx-lm's {family.name} stacks no per-expert tensors, so names='per_expert' is not a form of it."
    if names == "per_expert" and experts in QUANTIZED and not family.stacks_quantized:
        return (
            f"mlx-lm's {family.name} stacks per-expert weights but not their scales, so names='per_expert' needs "
            "experts='float32' or 'bfloat16'."
        )
    if names == "derived" and experts not in family.fused_from:
        if not family.fused_from:
            return f"{family.name} has no original form with fused experts, so names='derived' is not a form of it."
        allowed = " or ".join(repr(encoding) for encoding in family.fused_from)
        return f"{family.name}'s original fused form holds other experts: names='derived' needs experts={allowed}."
    return ""


def unrunnable(experts: str, dense: str) -> str:
    """Why this machine's back end cannot run such a checkpoint, or an empty string if it can."""
    # With either side in float32 MLX computes in float32, which the CPU back end can.
    if experts == dense == "bfloat16" and not mx.metal.is_available():
        return "MLX's CPU back end multiplies unquantized experts (gather_mm) in float32 only."
    return ""


def _all_cells() -> list[Cell]:
    return [Cell(*cell) for cell in product(FAMILIES, EXPERTS, DENSE, NAMES)]


def _reason(cell: Cell) -> str:
    return unwritable(FAMILIES[cell.family], cell.experts, cell.names) or unrunnable(cell.experts, cell.dense)
