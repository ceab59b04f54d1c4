"""Recording what a model's routers choose, while it computes.

On the computing thread a forward costs a few references a layer: what the layers were called with is read when it has
long been computed, and packed and written by a thread of the recorder (``expertd.worker.packing``).
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
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from expertd.protocol.errors import TraceWriteFailed, from_code
from expertd.protocol.manifest import Manifest
from expertd.protocol.model_names import shown_name
from expertd.protocol.traces import TraceFile, TraceInfo, part_of
from expertd.worker.packing import Forward, Packer
from expertd.worker.routers import Witness, find_router
from expertd.worker.rows import Sequences, call_of, listen

log = logging.getLogger("expertd.worker")

CHUNK_TOKENS = 4096
CHUNK_S = 1.0
"""A chunk is written when it has so many tokens, or is so old: what a killed recorder loses."""
READ_FORWARDS = 32
READ_TOKENS = 256
"""What was computed is read when there are so many forwards or tokens: code that runs 32 times in a row is fast, what
runs once a token is not."""
WAITING_FORWARDS = 1024
"""So many forwards wait for the disk; then the model waits too."""


class Recorder:
    """Writes one trace of one model.  ``begin``, ``note``, ``end`` and ``collect`` are for the thread that computes."""

    def __init__(self, path: Path, model: Any, manifest: Manifest, *, scores: bool = True) -> None:
        """Begin to record.

        Args:
            model: the one that ``expertd.load`` returned, of which ``manifest`` names the layers.
            scores: record what routers thought of twice as many experts as they chose.
        Raises:
            TraceWriteFailed: the file cannot be begun, or the model has layers that a trace cannot hold together.
        """
        self.path = path
        shapes = {(layer.experts, layer.top_k) for layer in manifest.layers}
        if len(shapes) > 1:
            raise TraceWriteFailed(f"the layers of {manifest.folder} differ in their experts; no trace can hold them")
        ((experts, top_k),) = shapes
        self._layers = len(manifest.layers)
        info = TraceInfo(
            model=shown_name(Path(manifest.folder)),
            layers=self._layers,
            experts=experts,
            top_k=top_k,
            candidates=min(2 * top_k, experts) if scores else 0,
        )
        file = TraceFile(path, info)
        self._witnesses: list[Witness | None] = [None] * self._layers
        if scores:
            found = [find_router(model, layer.path, experts) for layer in manifest.layers]
            self._witnesses = [None if router is None else Witness(*router) for router in found]
        self._computes = [witness is not None and witness.computes for witness in self._witnesses]
        self._packer = Packer(file, [_bias(witness) for witness in self._witnesses])
        listen()
        self._sequences = Sequences()
        self._now: Forward | None = None
        self._computed: deque[Forward] = deque()
        self._unread = 0  # tokens in these
        self._queue: queue.SimpleQueue[Forward | threading.Event | None] = queue.SimpleQueue()
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

    @property
    def failed(self) -> bool:
        """Whether nothing more is recorded, because it could not be written; ``check`` tells why."""
        return self._packer.failed is not None

    def check(self) -> None:
        """See whether what is recorded can be written.

        Raises:
            TraceWriteFailed: the disk is full, or fails; nothing more is recorded.
        """
        if self._packer.failed is not None:
            raise from_code(self._packer.failed.code, self._packer.failed.message)

    def begin(self, inputs: Any, cache: Any) -> None:
        """A forward of ``inputs`` starts on this thread; one that is given no tokens is not recorded."""
        self._now = None if inputs is None else Forward(call_of(inputs.shape, cache))

    def note(self, layer: int, indices: Any) -> None:
        """The router of ``layer`` chose ``indices`` in the forward that runs."""
        now = self._now
        if now is None:
            return  # somebody calls a layer without its model, or recording began in the middle of a forward
        if layer != len(now.ids):
            self._now = None  # a layer was left out, or computed twice
            return
        witness = self._witnesses[layer]
        now.ids.append(indices)
        now.scores.append(None if witness is None else witness.scores())

    def end(self) -> None:
        """The forward is over: keep it if it was whole."""
        now, self._now = self._now, None
        if now is None or len(now.ids) != self._layers:
            return
        # Only this thread can have that computed which nobody else asks for: scores that are not on the way to the
        # choice, and the last layer of a prompt's chunk.
        arrays = [score for score, extra in zip(now.scores, self._computes, strict=True) if extra]
        if now.tokens > now.call.batch:
            arrays = [array for array in now.ids + now.scores if array is not None]
        if arrays:
            mx.async_eval(arrays)  # type: ignore[no-untyped-call]
        self._computed.append(now)
        self._unread += now.tokens

    def collect_many(self, keep: int) -> None:
        """``collect`` if it is worth it."""
        if self._unread >= READ_TOKENS or len(self._computed) >= READ_FORWARDS:
            self.collect(keep)

    def collect(self, keep: int) -> None:
        """Hand all but the last ``keep`` forwards to the writer.

        What nobody has evaluated is evaluated here, but that only the thread can that built it: on another one, it and
        what came after it stay.
        """
        while len(self._computed) > keep:
            forward = self._computed[0]
            if self._packer.failed is None:
                try:
                    forward.read(self._sequences)
                except RuntimeError as error:
                    log.debug("a forward is not recorded yet: %s", error)
                    return
                self._queue.put(forward)
            self._computed.popleft()
            self._unread -= forward.tokens
            while self._queue.qsize() > WAITING_FORWARDS and self._thread.is_alive():
                time.sleep(0.01)

    def listen(self) -> None:
        """Listen to the routers, as it does from the beginning, until ``leave``."""
        for witness in self._witnesses:
            if witness is not None:
                witness.listen()

    def leave(self) -> None:
        """Let the routers be."""
        for witness in self._witnesses:
            if witness is not None:
                witness.leave()

    def flush(self) -> None:
        """Return when all that was computed is in the file; between two forwards only."""
        self.collect(0)
        written = threading.Event()
        self._queue.put(written)
        while not written.wait(CHUNK_S) and self._thread.is_alive():
            pass

    def finish(self) -> TraceInfo:
        """Collect what is computed, write the trace, and let the model be; between two forwards only; once is enough.

        Raises:
            TraceWriteFailed: the disk is full, or fails; says where what was recorded is.
        """
        self.leave()
        self.collect(0)
        if self._computed:
            log.warning("%d forwards could not be recorded, because nobody evaluated them", len(self._computed))
            self._computed.clear()
        if self._end.detach() is not None:  # at exit it must not be called: finalizers may be shut down
            self._queue.put(None)
        self._thread.join()
        self.check()
        return self.info


def _bias(witness: Witness | None) -> Any:
    if witness is None or witness.bias is None:
        return None
    return np.array(witness.bias.astype(mx.float32))


def _write(forwards: queue.SimpleQueue[Forward | threading.Event | None], packer: Packer) -> None:
    """The writer: a chunk when there is enough for one, or when it is old enough; at the end the trace."""
    gathered: list[Forward] = []
    tokens, began = 0, 0.0
    while True:
        try:
            came = forwards.get(timeout=max(0.0, began + CHUNK_S - time.monotonic()) if gathered else None)
        except queue.Empty:
            came = threading.Event()  # the chunk is old enough
        if isinstance(came, Forward):
            began = began if gathered else time.monotonic()
            gathered.append(came)
            tokens += came.tokens
            if tokens < CHUNK_TOKENS:
                continue
        try:
            packer.write(gathered)
        except Exception as error:  # a router whose ids or scores are like no other's
            log.exception("a recording is given up")
            rest = part_of(packer.file.path)
            packer.fail(TraceWriteFailed(f"recording failed ({error!r}); {rest} holds what came before"))
        gathered, tokens = [], 0
        if isinstance(came, threading.Event):
            came.set()
        if came is None:
            break
    packer.finish()


@contextlib.contextmanager
def recording(model: Any, path: Path, *, scores: bool = True) -> Iterator[Recorder]:
    """Record what ``model``, which ``expertd.load`` returned, does in the block; the trace is there when it ends.

    Raises:
        TraceWriteFailed: the file cannot be begun or finished, or the model is being recorded already.
        SessionClosed: it is not such a model.
    """
    from expertd.worker.load import events_of

    events = events_of(model)
    with events.session.between_forwards():
        if events.recorder is not None:
            raise TraceWriteFailed(f"the model is being recorded already, in {events.recorder.path}; end that first")
        recorder = events.recorder = Recorder(path, model, events.session.manifest, scores=scores)
    try:
        yield recorder
    finally:
        if events.recorder is recorder:  # closing the model has ended it otherwise
            with events.session.between_forwards():
                events.recorder = None
                recorder.finish()
        recorder.check()
