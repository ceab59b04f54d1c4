"""What a trace tells about a model's routing, layer by layer."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from expertd.protocol.traces import DECODE, Trace


def uses(trace: Trace) -> NDArray[np.int64]:
    """How often each expert was chosen: ``[layers, experts]``."""
    info = trace.info
    out = np.zeros((info.layers, info.experts), np.int64)
    for layer in range(info.layers):
        out[layer] = np.bincount(trace.experts[:, layer].ravel(), minlength=info.experts)
    return out


def reuse(trace: Trace) -> NDArray[np.float64]:
    """Share of a decoded token's experts that the token before it, of the same sequence, used too: ``[layers]``."""
    order = np.lexsort((trace.pos, trace.seq_id))
    seq, pos, chosen = trace.seq_id[order], trace.pos[order].astype(np.int64), trace.experts[order]
    pairs = np.flatnonzero((seq[1:] == seq[:-1]) & (pos[1:] == pos[:-1] + 1) & (trace.phase[order][1:] == DECODE))
    if not pairs.size:
        return np.full(trace.info.layers, np.nan)
    again = (chosen[pairs + 1][..., None] == chosen[pairs][..., None, :]).any(-1)
    return np.asarray(again.mean((0, 2)))


def hottest(counts: NDArray[np.int64]) -> list[set[int]]:
    """The most used quarter of each layer's experts, of ``uses``."""
    quarter = max(1, counts.shape[1] // 4)
    return [set(np.argsort(-layer, kind="stable")[:quarter].tolist()) for layer in counts]


def hottest_share(counts: NDArray[np.int64]) -> list[float]:
    """Share of all uses that go to each layer's hottest quarter (an even router: .25)."""
    return [
        float(layer[list(chosen)].sum() / max(1, layer.sum()))
        for layer, chosen in zip(counts, hottest(counts), strict=True)
    ]


def jaccard(one: NDArray[np.int64], other: NDArray[np.int64]) -> list[float]:
    """Of each layer, how much the hottest quarters of two traces agree: 1 the same experts, 0 none in common."""
    return [len(a & b) / len(a | b) for a, b in zip(hottest(one), hottest(other), strict=True)]
