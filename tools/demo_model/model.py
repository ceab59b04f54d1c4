"""Qwen3-MoE in PyTorch, only as much of it as training needs (no cache, no generation).

Names and arithmetic follow mlx-lm's ``qwen3_moe`` so that conversion is a renaming.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The demo model's sizes (about 21 M parameters, 4.9 M of them used by one token)."""

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 32
    top_k: int = 4
    expert_width: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        s = self.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, s.heads, s.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, s.kv_heads, s.head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, s.kv_heads, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeat = s.heads // s.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves (not pairs) rotated, as ``nn.RoPE(traditional=False)`` does."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


class Experts(nn.Module):
    """The sparse block.  Returns its output and the load-balancing loss (Switch Transformers, eq. 4)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert_width, shape.hidden))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert_width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.shape
        tokens = x.reshape(-1, s.hidden)
        scores = F.softmax(self.gate(tokens), -1)
        weight, chosen = scores.topk(s.top_k, -1)
        weight = weight / weight.sum(-1, keepdim=True)
        flat = chosen.reshape(-1)
        order = flat.argsort()
        counts = torch.bincount(flat, minlength=s.experts)
        rows = tokens[order // s.top_k]
        parts = []
        # unbind, because its gradient is one stack; indexing makes a zeroed tensor of all experts for each of them.
        each = zip(rows.split(counts.tolist()), self.gate_up.unbind(), self.down.unbind(), strict=True)
        for chunk, gate_up, down in each:
            gate, up = F.linear(chunk, gate_up).chunk(2, -1)
            parts.append(F.linear(F.silu(gate) * up, down))
        done = torch.cat(parts) * weight.reshape(-1)[order, None]
        out = torch.zeros_like(tokens).index_add(0, order // s.top_k, done)
        share = counts / flat.numel()
        balance = s.experts * (share * scores.mean(0)).sum()
        return out.view_as(x), balance


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = Experts(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out, balance = self.mlp(self.post_attention_layernorm(x))
        return x + out, balance


class Qwen3MoE(nn.Module):
    """``forward(ids[batch, length])`` -> logits ``[batch, length, vocabulary]`` and the mean balancing loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "mlp.down")):
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        s = self.shape
        frequency = s.rope_theta ** (-torch.arange(0, s.head_dim, 2, device=ids.device) / s.head_dim)
        angle = torch.arange(ids.shape[1], device=ids.device)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        x = self.embed_tokens(ids)
        balance = torch.zeros((), device=ids.device)
        for layer in self.layers:
            x, one = layer(x, cos, sin)
            balance = balance + one / s.layers
        return F.linear(self.norm(x), self.embed_tokens.weight), balance
