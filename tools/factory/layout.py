"""Which parameters a checkpoint has, read off the mlx-lm model class without allocating any.

MLX builds initial values lazily, so instantiating a model of any size and flattening its parameters yields names,
shapes and dtypes for free. Only the expert projections are quantized; everything else stays float. Names in files,
which may differ, are the business of ``forms``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from tools.factory.values import ExpertLinear

__all__ = ["DenseParameter", "ExpertGroup", "Parameters", "read_parameters"]

DTYPE_WORDS = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class DenseParameter:
    """A parameter outside the experts; ``dtype`` is a safetensors word."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ExpertGroup:
    """All experts of one MoE layer: the module path of its SwitchGLU or SwitchMLP, and its projections by name."""

    path: str
    linears: dict[str, ExpertLinear]

    @property
    def n_experts(self) -> int:
        return next(iter(self.linears.values())).n_experts


Parameters = list[DenseParameter | ExpertGroup]


def read_parameters(config: dict[str, Any], experts: str, dense: str, group_size: int) -> Parameters:
    """All parameters of the model that ``config`` describes, in the model's own order.

    ``experts`` is mxfp4, affine, float32 or bfloat16, ``dense`` float32 or bfloat16; ``group_size`` matters only to the
    quantized encodings and has to divide the inputs of every expert projection.
    """
    model = _instantiate(config)
    groups = _expert_linears(model, experts)
    keeps_float32 = getattr(model, "cast_predicate", None)
    if experts in ("mxfp4", "affine"):
        paths = {linear.path for linears in groups.values() for linear in linears.values()}
        nn.quantize(model, group_size, 4, mode=experts, class_predicate=lambda path, _: path in paths)

    parameters: Parameters = []
    seen: set[str] = set()
    for name, value in tree_flatten(model.parameters()):
        module, leaf = name.rsplit(".", 1)
        owner, _, linear = module.rpartition(".")
        if linear in groups.get(owner, {}):
            groups[owner][linear].parts[leaf] = (_part_dtype(value, leaf, experts, dense), tuple(value.shape[1:]))
            if owner not in seen:
                seen.add(owner)
                parameters.append(ExpertGroup(owner, groups[owner]))
        else:
            castable = keeps_float32 is None or keeps_float32(name)
            parameters.append(DenseParameter(name, DTYPE_WORDS[dense if castable else "float32"], tuple(value.shape)))
    return parameters


def _instantiate(config: dict[str, Any]) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    return model


def _expert_linears(model: nn.Module, experts: str) -> dict[str, dict[str, ExpertLinear]]:
    """By module path of each SwitchGLU or SwitchMLP: its projections, their ``parts`` still empty."""
    groups: dict[str, dict[str, ExpertLinear]] = {}
    for path, module in model.named_modules():
        if isinstance(module, (SwitchGLU, SwitchMLP)):
            groups[path] = {
                name: ExpertLinear(
                    f"{path}.{name}", child.num_experts, child.output_dims, child.input_dims, experts, parts={}
                )
                for name, child in module.children().items()
                if isinstance(child, SwitchLinear)
            }
    return groups


def _part_dtype(value: mx.array, leaf: str, experts: str, dense: str) -> str:
    if value.dtype == mx.uint32:
        return "U32"
    if value.dtype == mx.uint8:
        return "U8"
    # Scales, zero points and expert biases follow the dense parts; unquantized weights are an encoding of their own.
    return DTYPE_WORDS[experts if leaf == "weight" else dense]
