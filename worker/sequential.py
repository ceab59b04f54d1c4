"""Generation one request after another, for models whose caches cannot be batched (llama4's chunked cache).

Has as much of the surface of mlx-lm's ``BatchGenerator`` as ``expertd.worker.engine`` uses, and computes what mlx-lm's
``generate_step`` computes; that one cannot be left in the middle of a prompt, which is why it is not used.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from mlx_lm.models.cache import make_prompt_cache

__all__ = ["SequentialGenerator"]


@dataclass(frozen=True)
class _Progress:
    uid: int
    end_of_prompt: bool


@dataclass(frozen=True)
class _Answer:
    uid: int
    token: int
    finish_reason: str | None


@dataclass
class _Sequence:
    uid: int
    tokens: list[int]  # Those of the prompt that are still to be computed, then the one that was sampled last.
    left: int
    sampler: Any
    cache: Any = None
    answering: bool = False


class SequentialGenerator:
    """First come, first served; a step is a piece of the first prompt or one token of its answer."""

    def __init__(self, model: Any, ends: set[int], prefill_tokens: int) -> None:
        """``ends``: the eos tokens; ``prefill_tokens``: the longest piece of a prompt that one step computes."""
        self._model = model
        self._ends = ends
        self._prefill_tokens = prefill_tokens
        self._sequences: deque[_Sequence] = deque()
        self._uids = 0

    def insert(self, prompts: list[list[int]], max_tokens: list[int], *, samplers: list[Any]) -> list[int]:
        """Queue prompts; a sampler that is None is greedy."""
        first = self._uids
        for prompt, left, sampler in zip(prompts, max_tokens, samplers, strict=True):
            self._sequences.append(_Sequence(self._uids, list(prompt), left, sampler))
            self._uids += 1
        return list(range(first, self._uids))

    def remove(self, uids: list[int]) -> None:
        """Forget sequences; unknown ones are no error."""
        self._sequences = deque(sequence for sequence in self._sequences if sequence.uid not in uids)

    def next(self) -> tuple[list[_Progress], list[_Answer]]:
        """One step: how far the first prompt is, and the token that was sampled."""
        if not self._sequences:
            return [], []
        sequence = self._sequences[0]
        with mx.stream(generation_stream):
            if sequence.cache is None:
                sequence.cache = make_prompt_cache(self._model)
            if len(sequence.tokens) > 1:
                return [self._prefill(sequence)], []
            progress = [] if sequence.answering else [_Progress(sequence.uid, True)]
            sequence.answering = True
            return progress, [self._decode(sequence)]

    def close(self) -> None:
        """Drop all sequences."""
        self._sequences.clear()

    def _prefill(self, sequence: _Sequence) -> _Progress:
        length = min(self._prefill_tokens, len(sequence.tokens) - 1)
        self._model(mx.array([sequence.tokens[:length]]), cache=sequence.cache)
        mx.eval([layer.state for layer in sequence.cache])
        mx.clear_cache()
        del sequence.tokens[:length]
        return _Progress(sequence.uid, False)

    def _decode(self, sequence: _Sequence) -> _Answer:
        logits = self._model(mx.array([sequence.tokens]), cache=sequence.cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        sampled = mx.argmax(logprobs, axis=-1) if sequence.sampler is None else sequence.sampler(logprobs)
        chosen: Any = sampled.item()
        token = int(chosen)
        sequence.tokens = [token]
        sequence.left -= 1
        reason = "stop" if token in self._ends else "length" if sequence.left == 0 else None
        if reason is not None:
            self.remove([sequence.uid])
        return _Answer(sequence.uid, token, reason)
