"""Recorded routing as traffic: the passes of some sequences, several sessions that take turns, a larger model."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expertd.clients.traces.replay import events_of
from expertd.protocol.traces import DECODE, Trace


class Event(NamedTuple):
    """``experts`` of ``layer``, each once, in the router's order if one token chose them."""

    session: int
    layer: int
    experts: list[int]


Pass = list[Event]
"""The events of one forward pass, in the order of the layers."""

ARRAYS = ("experts", "candidates", "scores", "seq_id", "pos", "forward", "phase")


def select(trace: Trace, sequences: str, tokens: int | None = None) -> Trace:
    """The first ``tokens`` tokens of the sequences with ``even`` or ``odd`` numbers, or of ``all``."""
    parity = {"even": 0, "odd": 1}.get(sequences)
    kept = np.flatnonzero((trace.seq_id % 2 == parity) | (parity is None))[:tokens]
    if not kept.size:
        raise SystemExit(f"the trace has no {sequences} sequences; give --sequences all")
    return _part(trace, kept)


def without(trace: Trace, sequences: NDArray[Any], tokens: int | None = None) -> Trace:
    """The first ``tokens`` tokens of all other sequences; there must be some."""
    return _part(trace, np.flatnonzero(~np.isin(trace.seq_id, sequences))[:tokens])


def _part(trace: Trace, kept: NDArray[Any]) -> Trace:
    arrays = {name: getattr(trace, name) for name in ARRAYS}
    return dataclasses.replace(
        trace, **{name: None if array is None else array[kept] for name, array in arrays.items()}
    )


def passes_of(trace: Trace, session: int = 0) -> list[Pass]:
    """The forward passes of ``trace`` in the order in which they ran."""
    layers, experts = trace.info.layers, trace.info.experts
    events = events_of(trace)
    return [
        [Event(session, layer, [block % experts for block in events[start + layer]]) for layer in range(layers)]
        for start in range(0, len(events), layers)
    ]


def dealt(trace: Trace, sessions: int) -> list[list[Pass]]:
    """The sequences of ``trace`` dealt out to ``sessions``, each as many passes."""
    numbers = list(dict.fromkeys(trace.seq_id.tolist()))
    out = []
    for session in range(sessions):
        kept = np.isin(trace.seq_id, numbers[session::sessions])
        out.append(passes_of(_part(trace, kept), session))
    return [passes[: min(map(len, out))] for passes in out]


def in_turns(sessions: list[list[Pass]]) -> list[Pass]:
    """A pass of each session, again and again."""
    return [each for together in zip(*sessions, strict=True) for each in together]


def together(sessions: list[list[Pass]]) -> list[Pass]:
    """Passes in which a token of each of ``sessions`` is computed: an event has all their experts."""
    return [
        [
            Event(0, events[0].layer, list(dict.fromkeys(expert for event in events for expert in event.experts)))
            for events in zip(*passes, strict=True)
        ]
        for passes in zip(*sessions, strict=True)
    ]


def enlarged(trace: Trace, layers: int, experts: int, top_k: int, tokens: int) -> list[Pass]:
    """Decoding of a model with more layers and experts, made of the decode tokens of a smaller one.

    Its experts are those of several tokens that are far from each other in the trace, side by side; its layers are the
    trace's again and again.
    """
    decoded = trace.experts[trace.phase == DECODE].astype(np.int64)
    side_by_side = max(1, experts // trace.info.experts)
    of_each = -(-top_k // side_by_side)
    apart = len(decoded) // side_by_side
    parts = []
    for number in range(side_by_side):
        part = decoded[number * apart : number * apart + min(tokens, apart), :, :of_each]
        parts.append(part % experts + number * trace.info.experts)
    chosen = np.concatenate(parts, axis=2)[:, :, :top_k]
    chosen = chosen[:, np.arange(layers) % trace.info.layers]
    return [[Event(0, layer, ids) for layer, ids in enumerate(token)] for token in chosen.tolist()]
