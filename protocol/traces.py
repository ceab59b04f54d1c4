"""Routing traces: what a model's routers chose, token by token, in files (PROTOCOL.md, "Trace files").

While it is recorded a trace is ``OUT.npz.part``: records, each of which is whole or not there, so that whatever happens
to the recorder or the disk, what was recorded stays readable.  Finished it is ``OUT.npz``, which ``numpy.load`` reads,
with ``OUT.json`` beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import TraceInvalid, TraceWriteFailed

FORMAT = 1
"""Of the files that this module writes; it reads this and older ones."""
DECODE, PREFILL = 1, 0
ARRAYS = ("experts", "candidates", "scores", "seq_id", "pos", "forward", "phase")
"""The arrays of a trace, in the order in which they are stored; candidates and scores may be left out."""

_RECORD = struct.Struct("<4sII")
_MAGIC = b"XPTR"
_REQUIRED = ("experts", "seq_id", "pos")
_KINDS = {"experts": ("ui", 3), "candidates": ("ui", 3), "scores": ("f", 3)}
"""NumPy's kinds of the elements, and the axes, of the arrays that are not one integer a token."""


class TraceInfo(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is known of a trace besides its arrays; the object in ``OUT.json``.

    Attributes:
        model: the checkpoint's folder or name.
        layers, experts, top_k: MoE layers, experts of a layer, experts that a token uses.
        candidates: how many candidates are kept of each choice, 0 for none.
        tokens, decode_tokens, sequences: how many there are (0 while it is recorded).
        agreement: of each layer, the share of tokens whose experts are those with the highest scores; what is below 1
            tells that the router chooses by more than its scores.
    """

    format: int = 0
    model: str = ""
    layers: int = 0
    experts: int = 0
    top_k: int = 0
    candidates: int = 0
    tokens: int = 0
    decode_tokens: int = 0
    sequences: int = 0
    agreement: list[float] = []


Arrays = dict[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Trace:
    """A trace in memory; ``T`` tokens in the order in which they were computed.

    Attributes:
        experts: ``[T, layers, top_k]``, ids in the router's order.
        candidates, scores: ``[T, layers, candidates]``, falling by score, the chosen ones first; None if not recorded.
        seq_id, pos: ``[T]``: which sequence a token belongs to, and its place in it.
        forward: ``[T]``: which forward pass computed it; tokens of one pass share each layer's event.
        phase: ``[T]``: ``PREFILL`` or ``DECODE``.
        finished: False if it is what an unfinished recording left.
    """

    info: TraceInfo
    experts: NDArray[np.integer]
    candidates: NDArray[np.integer] | None
    scores: NDArray[np.float16] | None
    seq_id: NDArray[np.uint32]
    pos: NDArray[np.uint32]
    forward: NDArray[np.uint32]
    phase: NDArray[np.uint8]
    finished: bool = True


def part_of(path: Path) -> Path:
    """Where a trace is while it is recorded."""
    return path.with_name(path.name + ".part")


def in_the_way(path: Path) -> Path | None:
    """What is where the trace ``path`` would be written, beside it or before it is finished."""
    return next((each for each in (path, path.with_suffix(".json"), part_of(path)) if each.exists()), None)


def trace_exists(path: Path) -> bool:
    """Whether something is in the way of ``path``; nothing is where no path can lead."""
    try:
        return in_the_way(path) is not None
    except OSError:  # a name that is too long, a folder that may not be read: whoever writes there will be told
        return False


def check_new(path: Path) -> None:
    """See whether a trace could be begun at ``path``.

    Raises:
        TraceWriteFailed: the name does not end in ``.npz``, or something is there, or in the way.
    """
    if path.suffix != ".npz":
        raise TraceWriteFailed(f"a trace's name ends in .npz, and {path.name} does not")
    try:
        other = in_the_way(path)
    except OSError as error:
        raise TraceWriteFailed(f"no trace can be written to {str(path)[:200]!r} ({error.strerror})") from error
    if other == part_of(path):
        raise TraceWriteFailed(
            f"{other} is there already: a recording that runs, or the rest of one that was killed; "
            f"'expertd trace recover {path}' makes a trace of the rest"
        )
    if other is not None:
        raise TraceWriteFailed(f"{other} is there already; choose another name or remove it")
    if not path.parent.is_dir():
        raise TraceWriteFailed(f"there is no folder {path.parent} to write {path.name} into; create it first")


class TraceFile:
    """A trace that is being recorded.  One thread appends; nothing that was appended is ever lost."""

    def __init__(self, path: Path, info: TraceInfo) -> None:
        """Begin ``path`` (its name ends in ``.npz``).

        Raises:
            TraceWriteFailed: there is such a file, or the rest of a recording, or the folder cannot be written.
        """
        check_new(path)
        self.path = path
        self.info = msgspec.structs.replace(info, format=FORMAT)
        self.tokens = 0
        self._size = 0
        try:
            self._descriptor = os.open(part_of(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)  # so that nobody recovers what is still recorded
        except OSError as error:
            raise TraceWriteFailed(f"{part_of(path)} could not be created ({error.strerror})") from error
        try:
            self._write(msgspec.json.encode(self.info))
        except TraceWriteFailed:
            self.discard()
            raise

    def append(self, arrays: Arrays) -> None:
        """Add tokens: arrays as in ``Trace``, all of one length.

        Raises:
            TraceWriteFailed: the disk is full, or fails; what was appended before is still there.
        """
        packed = io.BytesIO()
        np.savez(packed, allow_pickle=False, **arrays)
        self._write(packed.getvalue())
        self.tokens += len(arrays["pos"])

    def finish(self, agreement: list[float] | None = None) -> TraceInfo:
        """Write ``OUT.npz`` and ``OUT.json``, and remove the part; of no tokens nothing is written.

        Raises:
            TraceWriteFailed: there is no room for it; the part stays.
        """
        if not self.tokens:
            self.discard()
            return self.info
        try:
            self.info = _finish(self.path, agreement)
        finally:
            self.leave()
        return self.info

    def leave(self) -> None:
        """Record no more; the part stays, for ``recover``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def discard(self) -> None:
        """Forget the recording."""
        self.leave()
        part_of(self.path).unlink(missing_ok=True)

    def _write(self, payload: bytes) -> None:
        record = _RECORD.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload
        try:
            rest = memoryview(record)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # what is torn at the end is skipped by readers, too
                os.ftruncate(self._descriptor, self._size)
                os.lseek(self._descriptor, self._size, os.SEEK_SET)
            raise TraceWriteFailed(
                f"{part_of(self.path)} could not be written ({error.strerror}); its {self.tokens} tokens stay "
                f"readable, and 'expertd trace recover {self.path}' makes a trace of them"
            ) from error
        self._size += len(record)


def recover(path: Path) -> TraceInfo:
    """Make the finished trace ``path`` of the part that a recorder has left, which is removed then.

    Raises:
        TraceInvalid: there is no part, or it is none.
        TraceWriteFailed: it is still recorded, or the disk is full, or fails; the part stays.
    """
    try:
        with part_of(path).open("rb") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _finish(path)
    except BlockingIOError as error:
        raise TraceWriteFailed(f"{path} is still being recorded; end that first") from error
    except OSError as error:
        raise TraceInvalid(f"{part_of(path)} could not be read ({error.strerror})") from error


def _finish(path: Path, agreement: list[float] | None = None) -> TraceInfo:
    part, fresh, beside = part_of(path), path.with_name(path.name + ".new"), path.with_suffix(".json")
    info, shapes = _survey(part)
    if not info.tokens:
        raise TraceInvalid(f"{part} holds no token; remove it")
    if agreement is not None:
        info.agreement = agreement
    try:
        with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, (dtype, inner) in shapes.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(
                        member, {"descr": dtype, "fortran_order": False, "shape": (info.tokens, *inner)}
                    )
                    for arrays in _chunks(part):
                        member.write(np.ascontiguousarray(arrays[name]).tobytes())
        beside.write_bytes(msgspec.json.format(msgspec.json.encode(info), indent=2) + b"\n")
        fresh.replace(path)
    except (OSError, ValueError) as error:  # ValueError: zipfile, when it closes after an OSError
        for unfinished in (fresh, beside):
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        raise TraceWriteFailed(
            f"{path} could not be written ({getattr(error, 'strerror', error)}); the {info.tokens} recorded tokens "
            f"stay readable in {part.name}: make room and run 'expertd trace recover {path}'"
        ) from error
    part.unlink()
    return info


def read_trace(path: Path) -> Trace:
    """Read a trace, finished or not, or one that has ``experts``, ``seq_id`` and ``pos`` only.

    Raises:
        TraceInvalid: there is none, it is damaged, or something else.
    """
    if not path.exists() and part_of(path).exists():
        path = part_of(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise TraceInvalid(f"{path} could not be read ({error.strerror})") from error
    if head == _MAGIC:
        info, _ = _survey(path)
        chunks = list(_chunks(path))
        joined = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}
        return _checked(path, info, joined, finished=False)
    if head[:2] != b"PK":
        raise TraceInvalid(f"{path} is no routing trace: it is not an .npz file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays: Arrays = {name: archive[name] for name in ARRAYS if name in archive}
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise TraceInvalid(f"{path} is damaged ({error}); record it again") from error
    return _checked(path, _info_beside(path), arrays, finished=True)


def _info_beside(path: Path) -> TraceInfo:
    beside = path.with_suffix(".json")
    try:
        return msgspec.json.decode(beside.read_bytes(), type=TraceInfo)
    except FileNotFoundError:
        return TraceInfo()
    except (OSError, msgspec.DecodeError) as error:
        raise TraceInvalid(f"{beside}, which tells about {path.name}, cannot be used ({error})") from error


def _checked(path: Path, info: TraceInfo, arrays: Arrays, *, finished: bool) -> Trace:
    if info.format > FORMAT:
        raise TraceInvalid(f"{path} has format {info.format}; this expertd reads up to {FORMAT}: update it")
    missing = [name for name in _REQUIRED if name not in arrays]
    if missing and (finished or arrays):
        raise TraceInvalid(f"{path} is no routing trace: it has no array '{missing[0]}'")
    if missing:
        raise TraceInvalid(f"{path} holds no token yet")
    for name, array in arrays.items():
        kinds, dimensions = _KINDS.get(name, ("ui", 1))
        if array.dtype.kind not in kinds or array.ndim != dimensions or not array.size:
            raise TraceInvalid(
                f"{path}: '{name}' is {array.dtype}{list(array.shape)}, not {'floats' if kinds == 'f' else 'integers'} "
                f"{'[T, layers, k]' if dimensions == 3 else '[T]'}"
            )
    experts = arrays["experts"]
    for name, array in arrays.items():
        axes = 2 if array.ndim == 3 else 1
        if array.shape[:axes] != experts.shape[:axes]:
            raise TraceInvalid(f"{path}: '{name}' has shape {list(array.shape)}, which does not fit 'experts'")
    lowest, highest = int(experts.min()), int(experts.max())
    if lowest < 0 or (info.experts and highest >= info.experts):
        wrong = lowest if lowest < 0 else highest
        raise TraceInvalid(f"{path} names expert {wrong}, which is none of {info.experts or 'any'}; record it again")
    count = len(experts)
    info = msgspec.structs.replace(
        info,
        layers=experts.shape[1],
        top_k=experts.shape[2],
        experts=info.experts or highest + 1,
        tokens=count,
    )
    phase = np.asarray(arrays.get("phase", np.full(count, DECODE)), np.uint8)
    info.decode_tokens = int((phase == DECODE).sum())
    info.sequences = np.unique(arrays["seq_id"]).size
    return Trace(
        info=info,
        experts=experts,  # type: ignore[arg-type]
        candidates=arrays.get("candidates"),  # type: ignore[arg-type]
        scores=arrays.get("scores"),  # type: ignore[arg-type]
        seq_id=np.asarray(arrays["seq_id"], np.uint32),
        pos=np.asarray(arrays["pos"], np.uint32),
        forward=np.asarray(arrays.get("forward", np.arange(count)), np.uint32),
        phase=phase,
        finished=finished,
    )


def _records(part: Path) -> Iterator[bytes]:
    """The whole records of a part; what is torn at its end, or damaged, ends it."""
    try:
        with part.open("rb") as file:
            while len(head := file.read(_RECORD.size)) == _RECORD.size:
                magic, length, checksum = _RECORD.unpack(head)
                payload = file.read(length) if magic == _MAGIC else b""
                if magic != _MAGIC or len(payload) != length or zlib.crc32(payload) != checksum:
                    return
                yield payload
    except OSError as error:
        raise TraceInvalid(f"{part} could not be read ({error.strerror})") from error


def _chunks(part: Path) -> Iterator[Arrays]:
    records = _records(part)
    next(records, None)
    for payload in records:
        with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
            yield {name: archive[name] for name in ARRAYS if name in archive}


def _survey(part: Path) -> tuple[TraceInfo, dict[str, tuple[str, tuple[int, ...]]]]:
    """A part's info with its counts, and of each array the element type and the shape of one token."""
    first = next(_records(part), None)
    if first is None:
        raise TraceInvalid(f"{part} is not the rest of a recording, or nothing of it is whole")
    try:
        info = msgspec.json.decode(first, type=TraceInfo)
    except msgspec.DecodeError as error:
        raise TraceInvalid(f"{part} is not the rest of a recording ({error})") from error
    if info.format > FORMAT:
        raise TraceInvalid(f"{part} has format {info.format}; this expertd reads up to {FORMAT}: update it")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    sequences: set[int] = set()
    for arrays in _chunks(part):
        shapes = {name: (array.dtype.str, array.shape[1:]) for name, array in arrays.items()}
        info.tokens += len(arrays["pos"])
        info.decode_tokens += int((arrays["phase"] == DECODE).sum())
        sequences.update(np.unique(arrays["seq_id"]).tolist())
    info.sequences = len(sequences)
    return info, shapes
