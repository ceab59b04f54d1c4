"""From what forwards left to the arrays of a trace; on the recorder's thread, without MLX."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import ExpertdError, TraceWriteFailed
from expertd.protocol.traces import DECODE, PREFILL, TraceFile
from expertd.worker.rows import Call, Rows, Sequences

FORMATS = {"f": np.float32, "e": np.float16, "bfloat16": np.uint16, "I": np.uint32, "i": np.int32, "q": np.int64}
"""NumPy's types for the formats of MLX's buffers; it has none for bfloat16."""


class Forward:
    """One forward pass: whose tokens it computed, and of each layer chosen ids and scores (or None).

    These are arrays of MLX until ``read``, then their bytes; ``rows`` and ``formats`` are there from then on.
    """

    __slots__ = ("call", "formats", "ids", "rows", "scores", "tokens")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.tokens = call.batch * call.length
        self.ids: list[Any] = []
        self.scores: list[Any] = []
        self.rows: Rows
        self.formats: tuple[str, str]

    def read(self, sequences: Sequences) -> None:
        """Copy what the arrays hold.

        Raises:
            RuntimeError: they are not evaluated, and this thread cannot do that.
        """
        ids = [memoryview(array) for array in self.ids]
        scores = [None if array is None else memoryview(array) for array in self.scores]
        self.rows = sequences.rows(self.call)
        self.formats = ids[0].format, next((view.format for view in scores if view is not None), "")
        self.ids = [view.tobytes() for view in ids]
        self.scores = [None if view is None else view.tobytes() for view in scores]


class Packer:
    """Appends forwards to a trace's file."""

    def __init__(self, file: TraceFile, biases: list[NDArray[np.float32] | None]) -> None:
        """``biases``: of each layer, what its router adds to the sigmoid of a score before it chooses."""
        self.file = file
        self.failed: ExpertdError | None = None
        self._biases = biases
        self._forwards = 0
        self._agreed = np.zeros(file.info.layers)
        self._judged = np.zeros(file.info.layers)

    def write(self, forwards: list[Forward]) -> None:
        """Append ``forwards``; what fails is noted in ``failed``, and nothing is written after it."""
        if self.failed is not None or not forwards:
            return
        alike = groupby(forwards, lambda forward: (forward.tokens, forward.formats))
        pieces = [self._pack(list(group)) for _, group in alike]
        arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        if not len(arrays["pos"]):
            return
        try:
            self.file.append(arrays)
        except TraceWriteFailed as error:
            self.fail(error)

    def fail(self, error: ExpertdError) -> None:
        """Write nothing more, because of ``error``."""
        self.failed = error
        self.file.leave()

    def finish(self) -> None:
        """Make the trace of what was written; a part that could not be written stays."""
        if self.failed is not None:
            return
        agreement = [round(float(share), 5) for share in self._agreed / np.maximum(self._judged, 1)]
        try:
            self.file.finish(agreement if self._judged.any() else [])
        except ExpertdError as error:
            self.failed = error

    def _pack(self, forwards: list[Forward]) -> dict[str, NDArray[Any]]:
        """The arrays of forwards of equally many tokens."""
        info = self.file.info
        count, tokens = len(forwards), forwards[0].tokens
        total = count * tokens
        raw = np.frombuffer(b"".join([each for forward in forwards for each in forward.ids]), _type(forwards, 0))
        by_layer = raw.reshape(count, info.layers, tokens, info.top_k)
        chosen = by_layer.transpose(0, 2, 1, 3).reshape(total, info.layers, info.top_k)
        places = [_places(forward.rows, tokens) for forward in forwards]
        seq_id, pos, real = (np.concatenate([place[n] for place in places]) for n in range(3))
        phases = np.array([DECODE if forward.rows.decode else PREFILL for forward in forwards], np.uint8)
        out: dict[str, NDArray[Any]] = {"experts": chosen.astype(np.uint8 if info.experts <= 256 else np.uint16)}
        if info.candidates:
            out["candidates"], out["scores"] = self._rank(forwards, chosen.astype(np.int64), real)
        out["seq_id"], out["pos"] = seq_id, pos
        out["forward"] = np.repeat(np.arange(self._forwards, self._forwards + count, dtype=np.uint32), tokens)
        out["phase"] = np.repeat(phases, tokens)
        self._forwards += count
        return out if real.all() else {name: array[real] for name, array in out.items()}

    def _rank(
        self, forwards: list[Forward], chosen: NDArray[np.int64], real: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Candidates and scores: the chosen first, then the next best, each falling by score."""
        info = self.file.info
        values = np.full((len(chosen), info.layers, info.experts), np.nan, np.float32)
        for layer in range(info.layers):
            if forwards[0].scores[layer] is not None:
                raw = np.frombuffer(b"".join([forward.scores[layer] for forward in forwards]), _type(forwards, 1))
                values[:, layer] = _floats(raw).reshape(len(chosen), info.experts)
        known = ~np.isnan(values[0, :, 0])
        merit = np.nan_to_num(values, nan=0.0, copy=False) if known.all() else np.nan_to_num(values, nan=0.0)
        if any(bias is not None for bias in self._biases):
            merit = merit.copy()
            for layer, bias in enumerate(self._biases):
                if bias is not None:
                    merit[:, layer] = 1 / (1 + np.exp(-merit[:, layer])) + bias
        own = np.take_along_axis(merit, chosen, -1)
        others = merit.copy()
        np.put_along_axis(others, chosen, -np.inf, -1)
        agreed = own.min(-1) >= others.max(-1)
        self._agreed += np.where(known, agreed[real].sum(0), 0)
        self._judged += np.where(known, real.sum(), 0)
        # The chosen ones are lifted above all others, whatever the router made of the scores.
        np.put_along_axis(others, chosen, own + (2 * np.abs(merit).max() + 1), -1)
        best = np.argpartition(-others, info.candidates - 1, axis=-1)[..., : info.candidates]
        order = np.argsort(-np.take_along_axis(others, best, -1), axis=-1, kind="stable")
        best = np.take_along_axis(best, order, -1)
        scores = _rounded(np.take_along_axis(values, best, -1))
        scores[:, ~known] = np.nan
        return best.astype(np.uint8 if info.experts <= 256 else np.uint16), scores


def _type(forwards: list[Forward], which: int) -> Any:
    return FORMATS[forwards[0].formats[which]]


def _floats(raw: NDArray[Any]) -> NDArray[np.float32]:
    """Scores as float32; uint16 are the bits of bfloat16."""
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """As float16 with 6 significant bits, which packs into half the bytes."""
    bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return ((bits + 0x10) & 0xFFE0).astype(np.uint16).view(np.float16)


def _places(rows: Rows, tokens: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.bool_]]:
    """Of each token of a forward: its sequence, its place there, and whether it is no padding."""
    width = tokens // len(rows.sequences)
    seq_id, starts, lengths = (np.array(each, np.uint32) for each in rows[:3])
    if width == 1:
        return seq_id, starts, lengths > 0
    within = np.arange(width, dtype=np.uint32)
    return np.repeat(seq_id, width), (starts[:, None] + within).ravel(), (within < lengths[:, None]).ravel()
