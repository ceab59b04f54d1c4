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
    logprobs: Any
    finish_reason: str | None
    prompt_cache: Any
    all_tokens: list[int] | None


@dataclass
class _Sequence:
    uid: int
    tokens: list[int]  # Those of the prompt that are still to be computed, then the one that was sampled last.
    left: int
    sampler: Any
    processors: list[Any]
    cache: Any
    computed: list[int]  # Those that the cache holds.
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

    def insert(
        self,
        prompts: list[list[int]],
        max_tokens: list[int],
        *,
        samplers: list[Any],
        caches: list[Any] | None = None,
        all_tokens: list[list[int]] | None = None,
        logits_processors: list[list[Any]] | None = None,
    ) -> list[int]:
        """Queue prompts; a sampler that is None is greedy.

        Args:
            caches: for each prompt what was computed before, or None; ``all_tokens``: of which tokens.
        """
        first = self._uids
        many = len(prompts)
        for prompt, left, sampler, processors, cache, computed in zip(
            prompts, max_tokens, samplers, logits_processors or [[]] * many, caches or [None] * many,
            all_tokens or [[]] * many, strict=True,
        ):  # fmt: skip
            sequence = _Sequence(self._uids, list(prompt), left, sampler, processors, cache, list(computed))
            self._sequences.append(sequence)
            self._uids += 1
        return list(range(first, self._uids))

    def remove(self, uids: list[int], return_prompt_caches: bool = False) -> dict[int, tuple[Any, list[int]]]:
        """Forget sequences; unknown ones are no error.  Returns, if asked to, their caches, and of which tokens."""
        found = {
            sequence.uid: (sequence.cache or [], sequence.computed)
            for sequence in self._sequences
            if return_prompt_caches and sequence.uid in uids
        }
        self._sequences = deque(sequence for sequence in self._sequences if sequence.uid not in uids)
        return found

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
        sequence.computed += sequence.tokens[:length]
        del sequence.tokens[:length]
        return _Progress(sequence.uid, False)

    def _decode(self, sequence: _Sequence) -> _Answer:
        logits = self._model(mx.array([sequence.tokens]), cache=sequence.cache)[:, -1, :]
        sequence.computed += sequence.tokens
        if sequence.processors:
            context = mx.array(sequence.computed)
            for process in sequence.processors:
                logits = process(context, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        sampled = mx.argmax(logprobs, axis=-1) if sequence.sampler is None else sequence.sampler(logprobs)
        chosen: Any = sampled.item()
        token = int(chosen)
        sequence.tokens = [token]
        sequence.left -= 1
        reason = "stop" if token in self._ends else "length" if sequence.left == 0 else None
        if reason is None:
            return _Answer(sequence.uid, token, logprobs[0], None, None, None)
        self.remove([sequence.uid])
        return _Answer(sequence.uid, token, logprobs[0], reason, sequence.cache, sequence.computed)
