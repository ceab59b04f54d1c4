"""An exported checkpoint as PyTorch weights, so that training goes on from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of E2M1 by its four bits (OCP Microscaling Formats 1.0, 5.3.3)."""
GROUP = 32


def dequantized(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """mxfp4 ``[..., width / 8]`` uint32 and its E8M0 scales ``[..., width / 32]`` uint8 as float32 ``[..., width]``."""
    nibbles = (packed[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 0xF
    values = FP4[nibbles].reshape(*packed.shape[:-1], -1, GROUP)
    return (values * np.exp2(scales.astype(np.float32) - 127)[..., None]).reshape(*packed.shape[:-1], -1)


def start_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the checkpoint in ``folder`` under the names of ``tools.demo_model.model.Qwen3MoE``."""
    stored = load_file(folder / "model.safetensors")
    out: dict[str, Tensor] = {}
    for name in stored:
        short = name.removeprefix("model.")
        if ".switch_mlp." not in name:
            out[short] = torch.from_numpy(stored[name])
        elif name.endswith("gate_proj.weight"):
            up = name.replace("gate_proj", "up_proj")
            both = [dequantized(stored[n], stored[n.replace(".weight", ".scales")]) for n in (name, up)]
            out[short.replace("switch_mlp.gate_proj.weight", "gate_up")] = torch.from_numpy(np.concatenate(both, 1))
        elif name.endswith("down_proj.weight"):
            down = dequantized(stored[name], stored[name.replace(".weight", ".scales")])
            out[short.replace("switch_mlp.down_proj.weight", "down")] = torch.from_numpy(down)
    return out
