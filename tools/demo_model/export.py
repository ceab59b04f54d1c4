"""Trained weights -> an mlx-lm checkpoint with its figures: ``python -m tools.demo_model.export DATA RUN OUT``.

Dense parts stay float32 (fast on MLX's CPU back end), experts become mxfp4.  Held-out perplexity is measured with plain
mlx-lm on a sample of each domain: of the finished checkpoint, of its float32 original, and of an earlier version.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

from expertd.clients.traces.statistics import jaccard
from expertd.worker.manifest import find_switches, replace_module
from tools.demo_model.corpus import DOMAINS

GROUP = 32
WINDOW = 512
WINDOWS = 16
"""Held-out windows of each domain that are measured through MLX."""
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "intermediate_size": 512,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": [2, 0],
    "torch_dtype": "float32",
}


def renamed(trained: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm's names for the trained tensors, experts still float32."""
    out = {}
    for name, array in trained.items():
        if name.endswith("mlp.gate_up"):
            switch = f"model.{name.removesuffix('gate_up')}switch_mlp"
            gate, up = mx.split(array, 2, axis=1)
            out[f"{switch}.gate_proj.weight"], out[f"{switch}.up_proj.weight"] = mx.contiguous(gate), mx.contiguous(up)
        elif name.endswith("mlp.down"):
            out[f"model.{name.removesuffix('down')}switch_mlp.down_proj.weight"] = array
        else:
            out[f"model.{name}"] = array
    return out


def quantized(weights: dict[str, Any]) -> dict[str, Any]:
    """The same with experts in mxfp4."""
    out = {}
    for name, array in weights.items():
        if ".switch_mlp." in name:
            packed, scales = mx.quantize(array, GROUP, 4, mode="mxfp4")
            out[name], out[name.replace(".weight", ".scales")] = packed, scales
        else:
            out[name] = array
    return out


def write(folder: Path, weights: dict[str, Any], config: dict[str, Any]) -> None:
    """One checkpoint's weights and config."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def measure(folder: Path, ids: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
    """Plain mlx-lm over the first ``WINDOWS`` windows of ``ids``.

    Returns:
        The mean loss (nats a token), and how often each expert was chosen ``[layers, experts]``.
    """
    model, config = load_model(folder)
    used = []
    for switch in find_switches(model):
        used.append(np.zeros(config["num_experts"], np.int64))
        replace_module(model, switch.path, _Counting(switch.module, used[-1]))
    total, windows = 0.0, min(WINDOWS, (len(ids) - 1) // WINDOW)
    for start in range(0, windows * WINDOW, WINDOW):
        window = mx.array(ids[start : start + WINDOW + 1].astype(np.int32))
        logits = model(window[None, :-1])[0]
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, window[1:, None], axis=-1)[:, 0]
        total += mx.sum(losses).item()
    return total / (windows * WINDOW), np.stack(used)


class _Counting(nn.Module):  # type: ignore[misc]
    """A switch that counts how often each expert is chosen."""

    def __init__(self, switch: Any, seen: np.ndarray[Any, Any]) -> None:
        super().__init__()
        self.switch = switch
        self._seen = seen

    def __call__(self, x: Any, indices: Any) -> Any:
        np.add.at(self._seen, np.array(indices).ravel(), 1)
        return self.switch(x, indices)


def perplexities(losses: dict[str, float]) -> dict[str, float]:
    """By domain, and over all of them with equal weight."""
    out = {domain: round(math.exp(loss), 3) for domain, loss in losses.items()}
    return out | {"all": round(math.exp(sum(losses.values()) / len(losses)), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=Path, help="an earlier version with the same tokenizer, to compare with")
    arguments = parser.parse_args()
    trained = mx.load(str(arguments.run / "model.safetensors"))
    assert isinstance(trained, dict)
    weights = renamed(trained)
    original = arguments.run / "float32"
    write(original, weights, CONFIG)
    quantization = {"group_size": GROUP, "bits": 4, "mode": "mxfp4"}
    write(arguments.out, quantized(weights), {**CONFIG, "quantization": quantization})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(arguments.data / name, arguments.out / name)
    shutil.copy(arguments.run / "loss.csv", arguments.out / "loss.csv")
    (arguments.out / "held_out").mkdir(exist_ok=True)
    for text in arguments.data.glob("*.txt"):
        shutil.copy(text, arguments.out / "held_out" / text.name)

    versions = {"shipped": arguments.out, "float32": original}
    if arguments.first is not None:
        versions["first_version"] = arguments.first
    losses: dict[str, dict[str, float]] = {version: {} for version in versions}
    uses: dict[str, np.ndarray[Any, Any]] = {}
    measured = 0
    for domain in DOMAINS:
        ids = np.load(arguments.data / f"held_out_{domain}.npy")
        measured += min(WINDOWS, (len(ids) - 1) // WINDOW) * WINDOW
        for version, folder in versions.items():
            losses[version][domain], counts = measure(folder, ids)
            if version == "shipped":
                uses[domain] = counts
    steps = list(csv.DictReader((arguments.run / "loss.csv").open()))
    final = {domain: float(steps[-1][f"held_out_{domain}"]) for domain in DOMAINS}
    figures = {
        "train_tokens": int(np.load(arguments.data / "train.npy", mmap_mode="r").size),
        "steps": int(steps[-1]["step"]),
        "tokens_seen": int(steps[-1]["tokens"]),
        "bytes": (arguments.out / "model.safetensors").stat().st_size,
        "measured_tokens": measured,
        "held_out_perplexity": {version: perplexities(found) for version, found in losses.items()},
        "held_out_perplexity_float32_all_tokens": perplexities(final),
        "dead_experts_by_layer": [int(n) for n in (sum(uses.values()) == 0).sum(1)],
        "hottest_quarter_jaccard_by_layer": {
            f"{one}-{other}": [round(share, 3) for share in jaccard(uses[one], uses[other])]
            for one, other in (("code", "prose"), ("code", "manual"), ("manual", "prose"))
        },
    }
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
