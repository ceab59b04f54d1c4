"""How the tokens of one request are chosen: its sampler, and what its logits pass through before.

The filters are mlx-lm's.  Its own samplers draw from one stream of random numbers for all requests, and its penalties
look at a window of prompt and answer; here a seed belongs to a request, whatever runs beside it, and penalties for
presence and frequency look at the whole answer and nothing else, as OpenAI describes them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from expertd.protocol.messages import Sampling

__all__ = ["LogitsProcessor", "Sampler", "processors_of", "sampler_of"]

Sampler = Callable[[mx.array], mx.array]
"""Log-probabilities ``[1, vocabulary]`` -> a token ``[1]``."""
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
"""The tokens so far ``[tokens]`` and logits ``[1, vocabulary]`` -> logits ``[1, vocabulary]``."""

COLDEST = 1e-5
"""Below this a temperature is greedy: its inverse would overflow to NaN on the way to the same token."""


def sampler_of(sampling: Sampling) -> Sampler | None:
    """The sampler of one request; None: the likeliest token."""
    if sampling.temperature <= COLDEST or sampling.top_k == 1:
        return None
    filters: list[Callable[[mx.array], mx.array]] = []
    if sampling.top_p < 1.0:
        filters.append(partial(apply_top_p, top_p=sampling.top_p))
    if sampling.min_p > 0.0:
        filters.append(partial(apply_min_p, min_p=sampling.min_p))
    if sampling.top_k > 0:
        filters.append(partial(_top_k, top_k=sampling.top_k))
    heat = 1.0 / sampling.temperature
    key = None if sampling.seed is None else mx.random.key(sampling.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        for keep in filters:
            logprobs = keep(logprobs)
        if key is None:
            return mx.random.categorical(logprobs * heat)
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs * heat, key=now)

    return sample


def processors_of(sampling: Sampling, prompt_tokens: int) -> list[LogitsProcessor]:
    """What the logits of one request pass through; ``prompt_tokens``: how many of the tokens so far are its prompt."""
    found: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1.0:
        found.append(partial(_repetition, sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(partial(_penalties, sampling.presence_penalty, sampling.frequency_penalty, prompt_tokens))
    if sampling.logit_bias:
        found += make_logits_processors(logit_bias=sampling.logit_bias)
    return found


def _top_k(logprobs: mx.array, top_k: int) -> mx.array:
    return apply_top_k(logprobs, top_k) if top_k < logprobs.shape[-1] else logprobs


def _repetition(penalty: float, tokens: mx.array, logits: mx.array) -> mx.array:
    """Whatever stands in prompt or answer gets less likely (Keskar et al. 2019, arXiv:1909.05858)."""
    if not tokens.size:
        return logits
    there = logits[:, tokens]
    logits[:, tokens] = mx.where(there < 0, there * penalty, there / penalty)
    return logits


def _penalties(presence: float, frequency: float, prompt_tokens: int, tokens: mx.array, logits: mx.array) -> mx.array:
    """logit - frequency * (how often it stands in the answer) - presence * (whether it does)."""
    answer = tokens[prompt_tokens:]
    if not answer.size:
        return logits
    counts = mx.zeros(logits.shape[-1:], dtype=logits.dtype).at[answer].add(1)
    return logits - frequency * counts - presence * (counts > 0)
