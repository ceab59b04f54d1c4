"""A profile of routing traces: how often each expert was chosen, and in how many sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertd.clients.traces.statistics import uses
from expertd.protocol.errors import ProfileInvalid
from expertd.protocol.profiles import Profile
from expertd.protocol.traces import Trace


def profile_of(traces: Sequence[Trace], model: str, source: str, made_at: float, experts: Sequence[int]) -> Profile:
    """Count the choices of ``traces``, all of one model whose MoE layers have so many ``experts``.

    Raises:
        ProfileInvalid: there is no token, or a trace is of a model of another shape.
    """
    layers, most = len(experts), max(experts)
    chosen, seen = np.zeros((layers, most), np.int64), np.zeros((layers, most), np.int64)
    tokens = prompts = 0
    for trace in traces:
        if (trace.info.layers, trace.info.experts) != (layers, most):
            raise ProfileInvalid(
                f"a trace has {trace.info.layers} layers of {trace.info.experts} experts and {model} has {layers} of "
                f"{most}; take traces of that model"
            )
        chosen += uses(trace)
        tokens += trace.info.tokens
        for sequence in np.unique(trace.seq_id):
            prompts += 1
            for layer, ids in enumerate(np.moveaxis(trace.experts[trace.seq_id == sequence], 1, 0)):
                seen[layer, np.unique(ids)] += 1
    if not tokens:
        raise ProfileInvalid("nothing was recorded, so there is nothing to make a profile of; use the model meanwhile")
    return Profile(
        model=model, made_at=made_at, source=source, tokens=tokens, prompts=prompts, experts=list(experts),
        uses=[row[:count].tolist() for row, count in zip(chosen, experts, strict=True)],
        seen=[row[:count].tolist() for row, count in zip(seen, experts, strict=True)],
    )  # fmt: skip
