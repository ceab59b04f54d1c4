"""Train the demo model: ``python -m tools.demo_model.train DATA OUT``; interrupt and run again to resume.

Uses a GPU where PyTorch sees one.  Deterministic by seed, device and thread count.  Writes ``OUT/state.pt``
(resumable), ``OUT/loss.csv`` (the curve) and, at the end, ``OUT/model.safetensors`` (float32, PyTorch names).
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tools.demo_model.corpus import DOMAINS
from tools.demo_model.model import Qwen3MoE, Shape
from tools.demo_model.start import start_weights

MEASURE_EVERY = 200
"""Steps between two measurements on held-out text, and two saved states."""
MEASURED_WINDOWS = 16
"""Held-out windows of each domain that are measured on the way."""


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 2 % of the steps, then cosine down to 2 % of ``peak``."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def batch_at(ids: np.ndarray, step: int, batch: int, length: int, seed: int) -> torch.Tensor:
    """Step ``step``'s windows ``[batch, length + 1]``: a shuffled pass over the corpus, a new order each pass."""
    windows = (len(ids) - 1) // length
    rows = []
    for number in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(number, windows)
        start = int(np.random.default_rng([seed, epoch]).permutation(windows)[place]) * length
        shift = int(np.random.default_rng([seed, epoch, 1]).integers(length)) if epoch else 0
        start = min(start + shift, len(ids) - length - 1)
        rows.append(ids[start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def held_out_loss(model: Qwen3MoE, ids: np.ndarray, length: int, windows: int, device: str) -> float:
    """Mean cross-entropy (nats a token) over the first ``windows`` windows of ``length`` held-out tokens."""
    total, count = 0.0, 0
    end = min(len(ids) - length - 1, windows * length)
    for start in range(0, end, length * 8):
        rows = [ids[s : s + length + 1] for s in range(start, min(start + length * 8, end), length)]
        window = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        logits, _ = model(window[:, :-1])
        total += float(F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"))
        count += window[:, 1:].numel()
    return total / count


def choose_device(threads: int) -> str:
    """``cuda`` where there is one, else ``cpu`` with ``threads``; deterministic on both."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if torch.cuda.is_available():
        return "cuda"
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # Adam's moments of rare tokens decay into denormals, which are many times slower
    return "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from, as tools.demo_model.export wrote it")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.003, help="weight of the load-balancing loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    device = choose_device(arguments.threads)
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    train = np.load(arguments.data / "train.npy", mmap_mode="r")
    held = {domain: np.load(arguments.data / f"held_out_{domain}.npy") for domain in DOMAINS}
    model = Qwen3MoE(Shape())
    if arguments.start is not None:
        model.load_state_dict(start_weights(arguments.start))
    model.to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device}")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.95), eps=1e-9, fused=True)
    first, state = 0, arguments.out / "state.pt"
    if state.exists():
        saved = torch.load(state, map_location=device)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"resuming at step {first}")

    with (arguments.out / "loss.csv").open("a", newline="") as file:
        curve = csv.writer(file)
        if not first:
            curve.writerow(["step", "tokens", "train_loss", *(f"held_out_{domain}" for domain in DOMAINS)])
        began, seen, window = time.monotonic(), 0, []
        for step in range(first, arguments.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, arguments.steps, arguments.rate)
            rows = batch_at(train, step, arguments.batch, arguments.length, arguments.seed).to(device)
            logits, balance = model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            (loss + arguments.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += rows[:, 1:].numel()
            window.append(float(loss.detach()))
            last = step + 1 == arguments.steps
            if (step + 1) % 20 == 0 or last:
                measured: list[float] = []
                if (step + 1) % MEASURE_EVERY == 0 or last:
                    windows = len(train) if last else MEASURED_WINDOWS
                    measured = [held_out_loss(model, held[d], arguments.length, windows, device) for d in DOMAINS]
                mean = sum(window) / len(window)
                tokens = (step + 1) * arguments.batch * arguments.length
                losses = [f"{m:.4f}" for m in measured] or [""] * len(DOMAINS)
                curve.writerow([step + 1, tokens, f"{mean:.4f}", *losses])
                file.flush()
                speed = seen / (time.monotonic() - began)
                said = f"step {step + 1}: loss {mean:.3f} balance {float(balance.detach()):.2f} {speed:.0f} tokens/s"
                if measured:
                    said += " held out: " + ", ".join(
                        f"{domain} {math.exp(m):.2f}" for domain, m in zip(DOMAINS, measured, strict=True)
                    )
                print(said, flush=True)
                window.clear()
            if (step + 1) % MEASURE_EVERY == 0 or last:
                # Written beside and renamed, so that an interrupt never costs the state that is there.
                fresh = state.with_suffix(".new")
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, fresh)
                fresh.replace(state)
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, arguments.out / "model.safetensors")


if __name__ == "__main__":
    main()
