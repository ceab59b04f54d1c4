"""Turns a model's parameters into the tensors of a file, in one of three naming forms.

``stacked`` is what mlx-lm saves. ``per_expert`` is what original releases hold where mlx-lm's ``sanitize`` stacks one
tensor per expert; it also restores what ``sanitize`` changes on the way (convolution axes, shifted norms, deepseek's
fused ``kv_b_proj``). ``derived`` is an original form with fused or transposed experts, whose bytes are *not* those of
the loaded model. All forms of one seed load as the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tools.factory.families import Family
from tools.factory.layout import DenseParameter, ExpertGroup, Parameters
from tools.factory.stream import FileTensor
from tools.factory.values import ExpertLinear, dense_chunks, dense_whole, encode, expert_part

__all__ = ["NAMES", "file_tensors"]

NAMES = ("stacked", "per_expert", "derived")


def file_tensors(parameters: Parameters, family: Family, names: str, seed: int) -> list[FileTensor]:
    """The tensors of a checkpoint in file order. ``names`` has to be a form that the family has (see ``cells``)."""
    tensors: list[FileTensor] = []
    held: dict[str, DenseParameter] = {}
    for parameter in parameters:
        if isinstance(parameter, ExpertGroup):
            tensors += _experts(parameter, family, names, seed)
        elif names != "per_expert":
            tensors.append(_dense(parameter, seed))
        elif family.splits_kv_b and parameter.name.endswith(".embed_q.weight"):
            held[parameter.name.removesuffix(".embed_q.weight")] = parameter
        elif family.splits_kv_b and parameter.name.endswith(".unembed_out.weight"):
            block = parameter.name.removesuffix(".unembed_out.weight")
            tensors.append(_kv_b(block, held.pop(block), parameter, seed))
        else:
            tensors.append(_original_dense(parameter, family, seed))
    return tensors


def _experts(group: ExpertGroup, family: Family, names: str, seed: int) -> Iterable[FileTensor]:
    if names == "stacked":
        return _stacked(group, seed)
    if names == "per_expert":
        return _per_expert(group, family, seed)
    return _fused_blocks(group, seed) if family.name == "gpt_oss" else _fused_transposed(group, seed)


def _stacked(group: ExpertGroup, seed: int) -> Iterator[FileTensor]:
    for linear in group.linears.values():
        for part, (dtype, shape) in linear.parts.items():
            chunks = partial(_each_expert, seed, linear, part)
            yield FileTensor(f"{linear.path}.{part}", dtype, (linear.n_experts, *shape), chunks)


def _per_expert(group: ExpertGroup, family: Family, seed: int) -> Iterator[FileTensor]:
    owner = group.path.rpartition(".")[0]
    for expert in range(group.n_experts):
        for name, linear in group.linears.items():
            for part, (dtype, shape) in linear.parts.items():
                chunks = partial(_one_expert, seed, linear, part, expert)
                yield FileTensor(f"{owner}.experts.{expert}.{family.per_expert[name]}.{part}", dtype, shape, chunks)


def _each_expert(seed: int, linear: ExpertLinear, part: str) -> Iterator[npt.NDArray[Any]]:
    return (expert_part(seed, linear, part, expert) for expert in range(linear.n_experts))


def _one_expert(seed: int, linear: ExpertLinear, part: str, expert: int) -> Iterator[npt.NDArray[Any]]:
    yield expert_part(seed, linear, part, expert)


def _fused_blocks(group: ExpertGroup, seed: int) -> Iterator[FileTensor]:
    """gpt_oss: gate and up rows alternate in ``gate_up_proj``; packed weights are bytes ``[E, rows, groups, 16]``."""
    gate, up, down = (group.linears[name] for name in ("gate_proj", "up_proj", "down_proj"))
    endings = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}
    for name, linears in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
        for part, ending in endings.items():
            dtype, shape = linears[0].parts[part]
            fused = (len(linears) * shape[0], *shape[1:])
            if part == "weight":
                dtype, fused = "U8", (fused[0], fused[1] // 4, 16)
            chunks = partial(_interleaved, seed, linears, part)
            yield FileTensor(f"{group.path}.{name}{ending}", dtype, (gate.n_experts, *fused), chunks)


def _interleaved(seed: int, linears: tuple[ExpertLinear, ...], part: str) -> Iterator[npt.NDArray[Any]]:
    for expert in range(linears[0].n_experts):
        yield np.stack([expert_part(seed, linear, part, expert) for linear in linears], axis=1)


def _fused_transposed(group: ExpertGroup, seed: int) -> Iterator[FileTensor]:
    """llama4: ``gate_up_proj`` is ``[E, inputs, gate then up outputs]``, ``down_proj`` ``[E, inputs, outputs]``."""
    gate, up, down = (group.linears[name] for name in ("gate_proj", "up_proj", "down_proj"))
    for name, linears in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
        outputs, inputs = sum(linear.outputs for linear in linears), linears[0].inputs
        dtype, shape = linears[0].parts["weight"][0], (gate.n_experts, inputs, outputs)
        yield FileTensor(f"{group.path}.{name}", dtype, shape, partial(_transposed, seed, linears))


def _transposed(seed: int, linears: tuple[ExpertLinear, ...]) -> Iterator[npt.NDArray[Any]]:
    for expert in range(linears[0].n_experts):
        yield np.concatenate([expert_part(seed, linear, "weight", expert).T for linear in linears], axis=1)


def _dense(parameter: DenseParameter, seed: int, shift: float = 0.0) -> FileTensor:
    def chunks() -> Iterator[npt.NDArray[Any]]:
        for chunk in dense_chunks(seed, parameter.name, parameter.shape):
            yield encode(chunk + np.float32(shift) if shift else chunk, parameter.dtype)

    return FileTensor(parameter.name, parameter.dtype, parameter.shape, chunks)


def _original_dense(parameter: DenseParameter, family: Family, seed: int) -> FileTensor:
    """A dense parameter as an original release has it: norms less one, convolutions ``[channels, 1, width]``."""
    tensor = _dense(parameter, seed, shift=-1.0 if parameter.name.endswith(family.offset_norms) else 0.0)
    if parameter.name.endswith("conv1d.weight"):
        channels, width, one = parameter.shape
        # Swapping an axis of length one moves no byte.
        return FileTensor(tensor.name, tensor.dtype, (channels, one, width), tensor.chunks)
    return tensor


def _kv_b(block: str, embed_q: DenseParameter, unembed_out: DenseParameter, seed: int) -> FileTensor:
    """deepseek_v3: per head the transposed key half ``[nope, rank]`` above the value half ``[v, rank]``."""
    heads, rank, nope = embed_q.shape
    rows = heads * (nope + unembed_out.shape[1])

    def chunks() -> Iterator[npt.NDArray[Any]]:
        key = dense_whole(seed, embed_q.name, embed_q.shape).swapaxes(1, 2)
        value = dense_whole(seed, unembed_out.name, unembed_out.shape)
        for head in range(heads):
            yield encode(np.concatenate([key[head], value[head]]), embed_q.dtype)

    return FileTensor(f"{block}.kv_b_proj.weight", embed_q.dtype, (rows, rank), chunks)
