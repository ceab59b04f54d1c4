"""The numbers in a made-up checkpoint: a pure function of seed, canonical tensor name and expert.

Values hang on the name that the *loaded* model uses, never on the file that carries them, so the same seed gives the
same model in every naming form and for every number of shards. Quantized experts are random bits under scales chosen
to give weights of about ``fan_in ** -0.5``; nothing is ever quantized from floats. This module knows no file format
and no mlx.

Equal arguments give equal bytes with one numpy version; numpy may change a distribution's stream between versions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SPECIAL_ROWS", "ExpertLinear", "dense_chunks", "dense_whole", "encode", "expert_part"]

Floats = npt.NDArray[np.float32]

CHUNK_ELEMENTS = 1 << 20

# Rows of the output head for the tokenizer's special tokens. They are zero, so that greedy text never ends early: the
# largest of many random logits is positive.
SPECIAL_ROWS = 3

# How much larger queries are than unit variance asks. Random attention that is not sharp averages its context, and
# greedy text then falls into a cycle of a few tokens (of 160 over a vocabulary of 512 some 75 differ; with this, 110).
SHARPNESS = 3

# Root mean square of a uniformly drawn code: signed e2m1 {0, .5, 1, 1.5, 2, 3, 4, 6}, and the integers 0..15 about 7.5.
MXFP4_RMS = math.sqrt(8.5625)
AFFINE4_RMS = math.sqrt(21.25)
AFFINE4_MIDDLE = 7.5


@dataclass(frozen=True)
class ExpertLinear:
    """One stacked expert projection of the loaded model, ``[n_experts, outputs, inputs]`` before quantization.

    ``path`` is its module path, ``encoding`` one of mxfp4, affine, float32, bfloat16; ``parts`` maps a parameter's name
    (weight, scales, biases, bias) to its safetensors dtype and its shape *per expert*.
    """

    path: str
    n_experts: int
    outputs: int
    inputs: int
    encoding: str
    parts: dict[str, tuple[str, tuple[int, ...]]]


def encode(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """Float32 values as F32, or as BF16 bits in uint16 (numpy has no bfloat16), rounded to nearest even."""
    if dtype == "F32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def expert_part(seed: int, linear: ExpertLinear, part: str, expert: int) -> npt.NDArray[Any]:
    """One expert's share of one parameter, in the file's dtype, shaped as ``linear.parts[part]`` says."""
    dtype, shape = linear.parts[part]
    rng = _generator(seed, f"{linear.path}.{part}", expert)
    if part == "bias":
        return encode(rng.standard_normal(shape, dtype=np.float32) * np.float32(0.1), dtype)
    if part == "weight" and dtype == "U32":
        return rng.integers(0, 1 << 32, shape, dtype=np.uint32)
    if part == "weight":
        return encode(rng.standard_normal(shape, dtype=np.float32) * np.float32(linear.inputs**-0.5), dtype)
    if linear.encoding == "mxfp4":
        return _mxfp4_scales(rng, shape, linear.inputs)
    if part == "scales":
        return encode(_affine_scales(rng, shape, linear.inputs), dtype)
    # An affine zero point belongs to the scale as stored, so that the dequantized weights are centred.
    scales = _affine_scales(_generator(seed, f"{linear.path}.scales", expert), shape, linear.inputs)
    return encode(_decoded(encode(scales, dtype)) * np.float32(-AFFINE4_MIDDLE), dtype)


def dense_chunks(seed: int, name: str, shape: tuple[int, ...]) -> Iterator[Floats]:
    """A non-expert parameter as flat float32 pieces of at most ``CHUNK_ELEMENTS`` elements, in row-major order."""
    rng = _generator(seed, name, 0)
    draw = _rule(name, shape)
    total = math.prod(shape)
    zeros = SPECIAL_ROWS * shape[-1] if name.endswith("lm_head.weight") else 0
    for start in range(0, total, CHUNK_ELEMENTS):
        chunk = draw(rng, min(CHUNK_ELEMENTS, total - start))
        if start < zeros:
            chunk[: zeros - start] = 0
        yield chunk


def dense_whole(seed: int, name: str, shape: tuple[int, ...]) -> Floats:
    """The same parameter in one piece, for the few small ones that an original checkpoint stores rearranged."""
    return np.concatenate(list(dense_chunks(seed, name, shape))).reshape(shape)


def _generator(seed: int, name: str, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))


def _mxfp4_scales(rng: np.random.Generator, shape: tuple[int, ...], inputs: int) -> npt.NDArray[np.uint8]:
    """E8M0 bytes: a mix of two neighbouring powers of two whose mean square is exactly the one wanted."""
    exponent = math.log2(inputs**-0.5 / MXFP4_RMS)
    low = math.floor(exponent)
    share_of_upper = (4 ** (exponent - low) - 1) / 3
    upper = rng.random(shape, dtype=np.float32) < share_of_upper
    return (127 + low + upper).astype(np.uint8)


def _affine_scales(rng: np.random.Generator, shape: tuple[int, ...], inputs: int) -> Floats:
    spread = rng.random(shape, dtype=np.float32) * np.float32(0.5) + np.float32(0.75)
    return spread * np.float32(inputs**-0.5 / AFFINE4_RMS)


def _decoded(stored: npt.NDArray[Any]) -> Floats:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored


Draw = Callable[[np.random.Generator, int], Floats]


def _rule(name: str, shape: tuple[int, ...]) -> Draw:
    """How a parameter is drawn, by what its name says it is."""
    module, leaf = name.split(".")[-2:]
    if leaf == "A_log":
        return lambda rng, n: np.log(rng.random(n, dtype=np.float32) * np.float32(15) + np.float32(1))
    if leaf == "dt_bias":
        return _draw_dt_bias
    if module == "q_norm":
        return _near(SHARPNESS)
    if leaf == "D" or "norm" in module:
        return _near(1)
    if leaf == "e_score_correction_bias":
        return _normal(0.05)
    if leaf == "sinks":
        return _normal(1.0)
    if leaf == "bias":
        return _normal(0.1)
    if module in ("gate", "router"):
        # Wide enough that different tokens choose different experts.
        return _normal(2 * shape[-1] ** -0.5)
    if module in ("embed_tokens", "embeddings"):
        # As large as what the layers add, so that the last of them still tell the token from its context.
        return _normal(1.0)
    if module in ("q_proj", "q_b_proj"):
        return _normal(SHARPNESS * shape[-1] ** -0.5)
    if module == "conv1d":
        return _normal(shape[1] ** -0.5)
    return _normal(shape[-1] ** -0.5)


def _normal(deviation: float) -> Draw:
    return lambda rng, n: rng.standard_normal(n, dtype=np.float32) * np.float32(deviation)


def _near(centre: int) -> Draw:
    """``centre`` plus a multiple of 1/64: two norms are told apart, and ``w - 1 + 1`` is exact in bfloat16 too."""

    def draw(rng: np.random.Generator, n: int) -> Floats:
        steps = np.clip(np.rint(rng.standard_normal(n, dtype=np.float32) * np.float32(6)), -24, 24)
        values: Floats = centre + steps / np.float32(64)
        return values

    return draw


def _draw_dt_bias(rng: np.random.Generator, n: int) -> Floats:
    """Inverse softplus of a time step log-uniform in [0.001, 0.1], as Mamba-2 initializes it."""
    step = np.exp(rng.random(n, dtype=np.float32) * np.float32(math.log(100)) + np.float32(math.log(0.001)))
    bias: Floats = step + np.log(-np.expm1(-step))
    return bias
