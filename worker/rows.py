"""Whose tokens a forward computes: mlx-lm's generators call the model with bare arrays, so they are listened to."""

from __future__ import annotations

import functools
import threading
import weakref
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

KEPT = 4096
"""So many sequences are remembered; of one that went silent before so many others, the rest counts as a new one."""


@dataclass(frozen=True)
class Rows:
    """The rows of one forward's inputs ``[B, T]``.

    Attributes:
        sequences: ``[B]``, numbers that count the sequences from 0 on as they come.
        starts: ``[B]``, the place in its sequence of each row's first token.
        lengths: ``[B]``, how many tokens of each row are real; what follows is padding.
        decode: whether they are tokens of answers.
    """

    sequences: tuple[int, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    decode: bool


class _Announced(threading.local):
    """What a generator of mlx-lm is about to compute on this thread: its sequences' tokens, and of a prompt its end."""

    tokens: list[list[int]] | None = None
    starts: tuple[int, ...] = ()
    lengths: tuple[int, ...] | None = None
    done: int = 0


_announced = _Announced()
_listening = threading.Lock()


def listen() -> None:
    """From now on know what mlx-lm's batches compute (idempotent)."""
    with _listening:
        if hasattr(GenerationBatch._step, "__wrapped__"):
            return
        step, prompt = GenerationBatch._step, PromptProcessingBatch.prompt

        @functools.wraps(step)
        def announced_step(batch: Any) -> Any:
            _announced.tokens = batch.tokens
            _announced.starts, _announced.lengths = tuple(map(len, batch.tokens)), None
            try:
                return step(batch)
            finally:
                _announced.tokens = None

        @functools.wraps(prompt)
        def announced_prompt(batch: Any, tokens: list[list[int]]) -> Any:
            _announced.tokens = batch.tokens
            _announced.starts, _announced.lengths = tuple(map(len, batch.tokens)), tuple(map(len, tokens))
            _announced.done = 0
            try:
                return prompt(batch, tokens)
            finally:
                _announced.tokens = None

        GenerationBatch._step, PromptProcessingBatch.prompt = announced_step, announced_prompt


class Sequences:
    """Numbers the sequences of one recording."""

    def __init__(self) -> None:
        # By the identity of what stands for a sequence: (its number, its next place, what keeps the identity its own).
        self._known: dict[int, tuple[int, int, Any]] = {}
        self.count = 0

    def rows(self, shape: tuple[int, ...], cache: Any) -> Rows:
        """The rows of a forward of inputs ``shape`` that is about to run on this thread with ``cache``."""
        batch, length = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
        tokens = _announced.tokens
        if tokens is None or len(tokens) != batch:
            start = offset(cache)
            held = next((entry for entry in cache or () if hasattr(entry, "__weakref__")), None)
            known = self._continued(id(held), batch, start, length, weakref.ref(held)) if held is not None else None
            numbers = known if known is not None else tuple(self._new() for _ in range(batch))
            return Rows(numbers, (start,) * batch, (length,) * batch, length == 1)
        starts, lengths = _announced.starts, _announced.lengths
        if lengths is not None:
            done = _announced.done
            _announced.done += length
            starts = tuple(start + done for start in starts)
            lengths = tuple(max(0, min(length, of - done)) for of in lengths)
        numbers = tuple(
            self._number(id(row), start, start + count, row)
            for row, start, count in zip(tokens, starts, lengths or (1,) * batch, strict=True)
        )
        return Rows(numbers, starts, lengths or (1,) * batch, lengths is None)

    def _continued(self, key: int, batch: int, start: int, length: int, held: Any) -> tuple[int, ...]:
        """The numbers of rows that a caller of the model keeps in one cache."""
        first = self._number(key, start, start + length, held, batch)
        return tuple(range(first, first + batch))

    def _new(self, count: int = 1) -> int:
        self.count += count
        return self.count - count

    def _number(self, key: int, start: int, end: int, held: Any, count: int = 1) -> int:
        known = self._known.pop(key, None)
        same = known is not None and (known[2]() is held() if isinstance(held, weakref.ref) else known[2] is held)
        number = known[0] if known is not None and same and known[1] == start else self._new(count)
        self._known[key] = number, end, held
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return number


def offset(cache: Any) -> int:
    """How many tokens ``cache`` (as models take it) holds, 0 if it does not say."""
    for entry in cache or ():
        found = getattr(entry, "offset", None)
        if isinstance(found, int):
            return found
    return 0
