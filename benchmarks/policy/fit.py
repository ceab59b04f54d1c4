"""Fit the weights of ``expertd.daemon.policy.forecast`` to a trace: least squares on the logarithm of the next use.

Samples near the line between what is kept and what is evicted count most: only their order matters.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.policy.traffic import passes_of
from expertd.daemon.policy import Forecast
from expertd.daemon.policy.forecast import CONSTANT, FOLLOWS_WEIGHT, WEIGHTS
from expertd.protocol.traces import Trace

SAMPLED = 29
"""One event of so many is a sample."""
FARTHEST = 1000
"""Tokens; a next use beyond counts as this."""
KEPT, SPREAD, ROUNDS = 0.3, 0.8, 3
"""Where that line is (share of blocks), how near is near (in logarithms), and how often it is drawn again."""


def fit_weights(trace: Trace) -> dict[str, Any]:
    """The fitted ``weights`` and ``constant``, and those that are in use."""
    samples, targets = _samples(trace)
    weights, *_ = np.linalg.lstsq(samples, targets, rcond=None)
    for _ in range(ROUNDS):
        forecast = samples @ weights
        line = np.quantile(forecast, KEPT)
        near = np.sqrt(np.exp(-((forecast - line) ** 2) / 2 / SPREAD**2) + 0.02)
        weights, *_ = np.linalg.lstsq(samples * near[:, None], targets * near, rcond=None)
    *fitted, constant = (round(float(weight), 2) for weight in weights)
    return {
        "samples": len(targets),
        "weights": fitted,
        "constant": constant,
        "weights_in_use": [*WEIGHTS, -FOLLOWS_WEIGHT],
        "constant_in_use": CONSTANT,
    }


def _samples(trace: Trace) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What forecasts were made of at sampled events, ``[S * experts, weights + 1]``, and the log of what came true."""
    info = trace.info
    policy = Forecast(info.layers, info.experts, info.top_k)
    chance = random.Random(0)
    samples, sampled = [], []
    passes = passes_of(trace)
    for number, each in enumerate(passes):
        for event in each:
            policy.observe(*event)
            if chance.random() < 1 / SAMPLED:
                samples.append(policy.evidence(event.layer).T)
                sampled.append((number, event.layer))
    until = np.full((info.layers, info.experts), FARTHEST, np.float32)
    wanted = set(sampled)
    targets = {}
    for number in range(len(passes) - 1, -1, -1):
        for _, layer, experts in passes[number]:
            if (number, layer) in wanted:
                targets[number, layer] = np.log(until[layer])
            until[layer] = np.minimum(until[layer] + 1, FARTHEST)
            until[layer, experts] = 1
    return np.concatenate(samples), np.concatenate([targets[each] for each in sampled])
