"""Recording what a model's routers choose, while it computes.

On the computing thread a forward costs a few references a layer: what the layers were called with is read when it has
long been computed, and packed and written by a thread of the recorder.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import ExpertdError, TraceWriteFailed, from_code
from expertd.protocol.manifest import Manifest
from expertd.protocol.traces import DECODE, PREFILL, TraceFile, TraceInfo
from expertd.worker.routers import Witness, find_router
from expertd.worker.rows import Rows, Sequences, listen

log = logging.getLogger("expertd.worker")

CHUNK_TOKENS = 512
CHUNK_S = 1.0
"""A chunk is written when it has so many tokens, or is so old: what a killed recorder loses."""
WAITING_FORWARDS = 1024
"""So many forwards wait for the disk; then the model waits too."""


@dataclass
class _Forward:
    """One forward pass: its rows, and of each layer (its number, chosen ids, scores), arrays of MLX, then of NumPy."""

    rows: Rows
    tokens: int
    choices: list[tuple[int, Any, Any]] = field(default_factory=list)


class Recorder:
    """Writes one trace of one model.  ``begin``, ``note`` and ``collect`` are for the thread that computes."""

    def __init__(self, path: Path, model: Any, manifest: Manifest, *, scores: bool = True) -> None:
        """Begin to record.

        Args:
            model: the one that ``expertd.load`` returned, of which ``manifest`` names the layers.
            scores: record what routers thought of twice as many experts as they chose.
        Raises:
            TraceWriteFailed: the file cannot be begun.
        """
        self.path = path
        self._layers = len(manifest.layers)
        self._experts = max(layer.experts for layer in manifest.layers)
        top_k = max(layer.top_k for layer in manifest.layers)
        self._candidates = min(2 * top_k, self._experts) if scores else 0
        info = TraceInfo(
            model=Path(manifest.folder).name,
            layers=self._layers,
            experts=self._experts,
            top_k=top_k,
            candidates=self._candidates,
        )
        self._packer = _Packer(TraceFile(path, info), [None] * self._layers)
        self._witnesses: list[Witness | None] = [None] * self._layers
        if scores:
            self._witnesses = [find_router(model, layer.path, layer.experts) for layer in manifest.layers]
            self._packer.biases = [_bias(witness) for witness in self._witnesses]
        listen()
        self._sequences = Sequences()
        self._now: _Forward | None = None
        self._computed: deque[_Forward] = deque()
        self._queue: queue.SimpleQueue[_Forward | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=_write, args=[self._queue, self._packer], name="expertd-recorder", daemon=True
        )
        self._thread.start()
        # A model that is garbage-collected ends its recording, from whatever place, so this waits for nothing.
        self._end = weakref.finalize(self, self._queue.put, None)
        self._end.atexit = False

    @property
    def tokens(self) -> int:
        """How many tokens are in the file."""
        return self._packer.file.tokens

    @property
    def info(self) -> TraceInfo:
        """What is known of the trace, with its counts once it is finished."""
        return self._packer.file.info

    def check(self) -> None:
        """See whether what is recorded can be written.

        Raises:
            TraceWriteFailed: the disk is full, or fails; nothing more is recorded.
        """
        if self._packer.failed is not None:
            raise from_code(self._packer.failed.code, self._packer.failed.message)

    def begin(self, inputs: Any, cache: Any) -> None:
        """A forward of ``inputs`` starts; read what was computed some forwards ago."""
        self._now = _Forward(self._sequences.rows(inputs.shape, cache), inputs.size)

    def note(self, layer: int, indices: Any) -> None:
        """The router of ``layer`` chose ``indices`` in the forward that runs."""
        if self._now is None:
            return  # somebody calls a layer without its model, or recording began in the middle of a forward
        witness = self._witnesses[layer]
        self._now.choices.append((layer, indices, witness.scores() if witness is not None else None))

    def end(self) -> None:
        """The forward is over: keep it if it was whole."""
        now, self._now = self._now, None
        if now is None or len(now.choices) != self._layers:
            return
        if not now.rows.decode:
            # mlx-lm never asks for the last layer of a prompt's chunk, so nobody else has it computed.
            mx.async_eval([array for _, *arrays in now.choices for array in arrays if array is not None])  # type: ignore[no-untyped-call]
        self._computed.append(now)

    def collect(self, keep: int) -> None:
        """Hand all but the last ``keep`` forwards to the writer.

        What nobody has evaluated is evaluated here, but that only the thread can that built it: on another one, it and
        what came after it stay.
        """
        while len(self._computed) > keep:
            forward = self._computed[0]
            if self._packer.failed is None:
                try:
                    forward.choices = [(layer, _raw(ids), _raw(scores)) for layer, ids, scores in forward.choices]
                except RuntimeError as error:
                    log.debug("a forward is not recorded yet: %s", error)
                    return
                self._queue.put(forward)
            self._computed.popleft()
            while self._queue.qsize() > WAITING_FORWARDS and self._thread.is_alive():
                time.sleep(0.01)

    def finish(self) -> TraceInfo:
        """Collect what is computed, write the trace, and let the model be; between two forwards only; once is enough.

        Raises:
            TraceWriteFailed: the disk is full, or fails; says where what was recorded is.
        """
        for witness in self._witnesses:
            if witness is not None:
                witness.leave()
        self._witnesses = [None] * self._layers
        self.collect(0)
        self._end()
        self._thread.join()
        self.check()
        return self.info


def _raw(array: Any) -> Any:
    """An array's elements as NumPy has them, copied; bfloat16 as the uint16 of its bits."""
    if array is None:
        return None
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    return np.array(array)


def _bias(witness: Witness | None) -> NDArray[np.float32] | None:
    if witness is None or witness.bias is None:
        return None
    return np.array(witness.bias.astype(mx.float32))


class _Packer:
    """Turns forwards into a trace's arrays; on the writer's thread."""

    def __init__(self, file: TraceFile, biases: list[NDArray[np.float32] | None]) -> None:
        self.file = file
        self.biases = biases
        self.failed: ExpertdError | None = None
        self._forwards = 0
        self._agreed = np.zeros(file.info.layers)
        self._judged = np.zeros(file.info.layers)

    def agreement(self) -> list[float]:
        """Of each layer, the share of tokens whose experts have the highest scores; empty if no scores are kept."""
        if not self._judged.any():
            return []
        return [round(float(share), 5) for share in self._agreed / np.maximum(self._judged, 1)]

    def write(self, forwards: list[_Forward]) -> None:
        """Append forwards to the file; alike ones are packed together."""
        if self.failed is not None or not forwards:
            return
        pieces = []
        start = 0
        for place in range(1, len(forwards) + 1):
            if place == len(forwards) or forwards[place].tokens != forwards[start].tokens:
                pieces.append(self._pack(forwards[start:place]))
                start = place
        arrays = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        if not len(arrays["pos"]):
            return
        try:
            self.file.append(arrays)
        except TraceWriteFailed as error:
            self.failed = error
            log.error("recording ends: %s", error.message)

    def finish(self) -> None:
        """Make the trace of what was written; a part that could not be written stays."""
        if self.failed is not None:
            return
        try:
            self.file.finish(self.agreement())
        except ExpertdError as error:
            self.failed = error
            log.error("%s", error.message)

    def _pack(self, forwards: list[_Forward]) -> dict[str, NDArray[Any]]:
        """The arrays of forwards of equally many tokens."""
        info = self.file.info
        count, tokens = len(forwards), forwards[0].tokens
        kind = np.uint8 if info.experts <= 256 else np.uint16
        chosen = np.empty((count, tokens, info.layers, info.top_k), kind)
        for number, forward in enumerate(forwards):
            for layer, ids, _ in forward.choices:
                ids = ids.reshape(tokens, -1)
                chosen[number, :, layer, : ids.shape[1]] = ids
                chosen[number, :, layer, ids.shape[1] :] = ids[:, -1:]  # a layer that uses fewer than others
        places = [_places(forward.rows, forward.tokens) for forward in forwards]
        seq_id, pos, real = (np.concatenate([place[n] for place in places]) for n in range(3))
        phases = [DECODE if forward.rows.decode else PREFILL for forward in forwards]
        out: dict[str, NDArray[Any]] = {"experts": chosen.reshape(count * tokens, info.layers, info.top_k)}
        if info.candidates:
            out["candidates"], out["scores"] = self._rank(forwards, out["experts"], tokens, real)
        out["seq_id"], out["pos"] = seq_id, pos
        out["forward"] = np.repeat(np.arange(self._forwards, self._forwards + count, dtype=np.uint32), tokens)
        out["phase"] = np.repeat(np.array(phases, np.uint8), tokens)
        self._forwards += count
        return out if real.all() else {name: array[real] for name, array in out.items()}

    def _rank(
        self, forwards: list[_Forward], chosen: NDArray[Any], tokens: int, real: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.float16]]:
        """Candidates and scores: the chosen first, then the next best, each falling by score."""
        info = self.file.info
        shape = (len(chosen), info.layers, info.candidates)
        candidates, scores = np.zeros(shape, chosen.dtype), np.full(shape, np.nan, np.float16)
        for layer in range(info.layers):
            found = [each for forward in forwards for number, _, each in forward.choices if number == layer]
            ids = chosen[:, layer].astype(np.int64)
            if any(each is None for each in found):
                candidates[:, layer] = _padded(ids, info.candidates)
                continue
            raw = np.concatenate([each.reshape(tokens, -1) for each in found])
            values = (raw.astype(np.uint32) << 16).view(np.float32) if raw.dtype == np.uint16 else raw
            values = values.astype(np.float32)
            bias = self.biases[layer]
            merit = values if bias is None else 1 / (1 + np.exp(-values)) + bias
            rows = np.arange(len(ids))[:, None]
            lowest = merit[rows, ids].min(-1)
            others = merit.copy()
            others[rows, ids] = -np.inf
            agreed = (lowest >= others.max(-1))[real]
            self._agreed[layer] += agreed.sum()
            self._judged[layer] += agreed.size
            # The chosen ones are lifted above all others, whatever the router made of the scores.
            others[rows, ids] = merit[rows, ids] + (np.abs(merit).max() * 2 + 1)
            best = np.argpartition(-others, info.candidates - 1, axis=-1)[:, : info.candidates]
            order = np.argsort(-others[rows, best], axis=-1, kind="stable")
            best = best[rows, order]
            candidates[:, layer], scores[:, layer] = best, _rounded(values[rows, best])
        return candidates, scores


def _rounded(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """As float16 with 6 significant bits, which packs into half the bytes."""
    bits = values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return ((bits + 0x10) & 0xFFE0).astype(np.uint16).view(np.float16)


def _padded(ids: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The chosen ids, and the last of them again where a router's scores are not known."""
    return np.concatenate([ids, np.repeat(ids[:, -1:], width - ids.shape[1], axis=1)], axis=1)


def _places(rows: Rows, tokens: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.bool_]]:
    """Of each token of a forward: its sequence, its place there, and whether it is no padding."""
    width = tokens // len(rows.sequences)
    within = np.arange(width)
    seq_id = np.repeat(np.array(rows.sequences, np.uint32), width)
    pos = (np.array(rows.starts)[:, None] + within).ravel().astype(np.uint32)
    real = (within < np.array(rows.lengths)[:, None]).ravel()
    return seq_id, pos, real


def _write(forwards: queue.SimpleQueue[_Forward | None], packer: _Packer) -> None:
    """The writer: a chunk when there is enough for one, or when it is old enough; at the end the trace."""
    gathered: list[_Forward] = []
    began = 0.0
    ended = False
    while not ended:
        with contextlib.suppress(queue.Empty):
            wait = CHUNK_S if not gathered else max(0.0, began + CHUNK_S - time.monotonic())
            forward = forwards.get(timeout=wait)
            ended = forward is None
            if forward is not None:
                began = began if gathered else time.monotonic()
                gathered.append(forward)
        late = bool(gathered) and time.monotonic() - began >= CHUNK_S
        if ended or late or sum(each.tokens for each in gathered) >= CHUNK_TOKENS:
            packer.write(gathered)
            gathered = []
    packer.finish()


@contextlib.contextmanager
def recording(model: Any, path: Path, *, scores: bool = True) -> Iterator[Recorder]:
    """Record what ``model``, which ``expertd.load`` returned, does in the block; the trace is there when it ends.

    Raises:
        TraceWriteFailed: the file cannot be begun or finished.
        SessionClosed: it is not such a model.
    """
    from expertd.worker.load import events_of

    events = events_of(model)
    recorder = Recorder(path, model, events.session.manifest, scores=scores)
    with events.session.between_forwards():
        events.recorder = recorder
    try:
        yield recorder
    finally:
        if events.recorder is recorder:  # closing the model has ended it otherwise
            with events.session.between_forwards():
                events.recorder = None
                recorder.finish()
        recorder.check()
