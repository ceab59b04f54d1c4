"""Whose tokens a forward computes: mlx-lm's generators call the model with bare arrays, so they are listened to.

While the model runs only a ``Call`` is noted; which sequences its rows belong to is worked out later, for many calls.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any, NamedTuple

from mlx_lm.generate import GenerationBatch, PromptProcessingBatch

KEPT = 4096
"""So many sequences are remembered; of one that went silent before so many others, the rest counts as a new one."""


class Rows(NamedTuple):
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


class Batch(NamedTuple):
    """What a generator of mlx-lm is about to compute: its sequences' tokens (by the lists that it keeps them in).

    ``lengths`` are those of pieces of prompts, None for one token of each answer.
    """

    tokens: list[list[int]]
    starts: list[int]
    lengths: list[int] | None


class Call(NamedTuple):
    """A call of the model: its inputs' ``[B, T]``, and whose they are.

    ``done`` counts the columns of a batch's pieces that calls before this one computed; ``cache`` and ``start`` are
    those of a caller who is no batch of mlx-lm's.
    """

    batch: int
    length: int
    of: Batch | None
    done: int
    cache: weakref.ref[Any] | None
    start: int


class _Announced(threading.local):
    of: Batch | None = None
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
            _announced.of = Batch(list(batch.tokens), [*map(len, batch.tokens)], None)
            _announced.done = 0
            try:
                return step(batch)
            finally:
                _announced.of = None

        @functools.wraps(prompt)
        def announced_prompt(batch: Any, tokens: list[list[int]]) -> Any:
            _announced.of = Batch(list(batch.tokens), [*map(len, batch.tokens)], [*map(len, tokens)])
            _announced.done = 0
            try:
                return prompt(batch, tokens)
            finally:
                _announced.of = None

        GenerationBatch._step, PromptProcessingBatch.prompt = announced_step, announced_prompt


def call_of(shape: tuple[int, ...], cache: Any) -> Call:
    """The call of a model on this thread with inputs ``shape`` and ``cache``."""
    batch, length = shape if len(shape) == 2 else (1, shape[0])
    of = _announced.of
    if of is not None and len(of.tokens) == batch:
        done = _announced.done
        _announced.done += length
        return Call(batch, length, of, done, None, 0)
    if not cache:
        return Call(batch, length, None, 0, None, 0)
    return Call(batch, length, None, 0, weakref.ref(cache[0]), offset(cache))


def offset(cache: Any) -> int:
    """How many tokens ``cache`` (as models take it) holds, 0 if it does not say."""
    for entry in cache:
        found = getattr(entry, "offset", None)
        if isinstance(found, int):
            return found
    return 0


class Sequences:
    """Numbers the sequences of one recording; takes its calls in their order."""

    def __init__(self) -> None:
        # By the identity of a sequence's list, or of the reference to its cache (there is one of each object):
        # (its number, its next place, what keeps that identity its own).
        self._known: dict[int, tuple[int, int, list[int] | weakref.ref[Any]]] = {}
        self._count = 0

    def rows(self, call: Call) -> Rows:
        """Whose tokens ``call`` computed."""
        batch, length, of = call.batch, call.length, call.of
        if of is None:
            end = call.start + length
            first = self._new(batch) if call.cache is None else self._continued(call.cache, call.start, end, batch)
            numbers = tuple(range(first, first + batch))
            return Rows(numbers, (call.start,) * batch, (length,) * batch, length == 1)
        starts = tuple(start + call.done for start in of.starts)
        lengths = (1,) * batch
        if of.lengths is not None:
            lengths = tuple(max(0, min(length, whole - call.done)) for whole in of.lengths)
        numbers = tuple(
            self._continued(tokens, start, start + count)
            for tokens, start, count in zip(of.tokens, starts, lengths, strict=True)
        )
        return Rows(numbers, starts, lengths, of.lengths is None)

    def _continued(self, held: list[int] | weakref.ref[Any], start: int, end: int, count: int = 1) -> int:
        """The number of the (first of ``count``) sequence that ``held`` stands for, a new one if it does not fit."""
        known = self._known.pop(id(held), None)
        number = known[0] if known is not None and known[1] == start else self._new(count)
        self._known[id(held)] = number, end, held
        if len(self._known) > KEPT:
            del self._known[next(iter(self._known))]
        return number

    def _new(self, count: int = 1) -> int:
        self._count += count
        return self._count - count
