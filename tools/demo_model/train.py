"""Train the demo model: ``python -m tools.demo_model.train DATA OUT``; interrupt and run again to resume.

Deterministic by seed and thread count.  Writes ``OUT/state.pt`` (resumable), ``OUT/loss.csv`` (the curve) and, at the
end, ``OUT/model.safetensors`` (float32, PyTorch names).
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tools.demo_model.model import Qwen3MoE, Shape

BALANCE = 0.01


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 2 % of the steps, then cosine down to 5 % of ``peak``."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


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
def held_out_loss(model: Qwen3MoE, ids: np.ndarray, length: int) -> float:
    """Mean cross-entropy (nats a token) over the held-out tokens, in windows of ``length``."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - length - 1, length * 8):
        rows = [ids[s : s + length + 1] for s in range(start, min(start + length * 8, len(ids) - length - 1), length)]
        window = torch.from_numpy(np.stack(rows).astype(np.int64))
        logits, _ = model(window[:, :-1])
        total += float(F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"))
        count += window[:, 1:].numel()
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # Adam's moments of rare tokens decay into denormals, which are many times slower
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)

    train = np.load(arguments.data / "train.npy", mmap_mode="r")
    held = np.load(arguments.data / "held_out.npy")
    model = Qwen3MoE(Shape())
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.95), eps=1e-9, fused=True)
    first, state = 0, arguments.out / "state.pt"
    if state.exists():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        print(f"resuming at step {first}")

    with (arguments.out / "loss.csv").open("a", newline="") as file:
        curve = csv.writer(file)
        if not first:
            curve.writerow(["step", "tokens", "train_loss", "held_out_loss"])
        began, seen, window = time.monotonic(), 0, []
        for step in range(first, arguments.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, arguments.steps, arguments.rate)
            rows = batch_at(train, step, arguments.batch, arguments.length, arguments.seed)
            logits, balance = model(rows[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            (loss + BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += rows[:, 1:].numel()
            window.append(float(loss.detach()))
            last = step + 1 == arguments.steps
            if (step + 1) % 20 == 0 or last:
                measured = held_out_loss(model, held, arguments.length) if (step + 1) % 200 == 0 or last else None
                mean = sum(window) / len(window)
                tokens = (step + 1) * arguments.batch * arguments.length
                curve.writerow([step + 1, tokens, f"{mean:.4f}", "" if measured is None else f"{measured:.4f}"])
                file.flush()
                speed = seen / (time.monotonic() - began)
                said = f"step {step + 1}: loss {mean:.3f} balance {float(balance.detach()):.2f} {speed:.0f} tokens/s"
                if measured is not None:
                    said += f" held out {measured:.3f} (perplexity {math.exp(measured):.1f})"
                print(said, flush=True)
                window.clear()
            if (step + 1) % 200 == 0 or last:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state)
    save_file(model.state_dict(), arguments.out / "model.safetensors")


if __name__ == "__main__":
    main()
