"""One conversation over one model: its KV cache is kept between answers, so that only new tokens are computed.

Texts, messages and the terminal are ``expertd.clients``; many conversations at a time are ``expertd.worker.engine``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from expertd.protocol.errors import ContextLengthExceeded
from expertd.worker.engine import context_length
from expertd.worker.kv_memory import check_kv_bits
from expertd.worker.kv_quantized import new_caches
from expertd.worker.sampling import COLDEST

__all__ = ["Reuse", "Turns", "reuse"]

PIECE_TOKENS = 2048
"""Tokens of a prompt that are computed at a time: mlx-lm's own, since each piece needs most experts once."""


class Reuse(NamedTuple):
    """How a prompt begins with what a cache holds: ``kept`` tokens stay, ``dropped`` have to leave from its end."""

    kept: int
    dropped: int


def reuse(cached: Sequence[int], prompt: Sequence[int], can_drop: bool) -> Reuse:
    """What of a cache that holds the tokens ``cached`` serves ``prompt``.

    The last token of the prompt is always computed, because its logits are wanted.

    Args:
        can_drop: tokens can be taken off the cache's end; else it serves only a prompt that begins with all of them.
    """
    most = min(len(cached), len(prompt) - 1)
    kept = next((place for place in range(most) if cached[place] != prompt[place]), most)
    if kept < len(cached) and not can_drop:
        kept = 0
    return Reuse(kept, len(cached) - kept)


class _Stopped(Exception):
    """The user wants no answer any more, in the middle of the prompt."""


class Turns:
    """Not thread-safe.

    Attributes:
        cached: the tokens that the cache holds.
        computed: how many tokens of the last prompt were not in it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, piece_tokens: int = PIECE_TOKENS, kv_bits: int | None = None
    ) -> None:
        """Take a model and its tokenizer as ``expertd.load`` or ``mlx_lm.load`` returns them.

        Raises:
            KvBitsUnsupported: the model's caches cannot have ``kv_bits``.
        """
        check_kv_bits(model, kv_bits)
        self._kv_bits = kv_bits
        self._piece_tokens = piece_tokens
        self._model = model
        self._tokenizer = tokenizer
        self._cache: list[Any] = []
        self.context = context_length(model)
        self.cached: list[int] = []
        self.computed = 0

    def forget(self) -> None:
        """Give the cache back; the next prompt is computed from its beginning."""
        self._cache, self.cached = [], []

    def answer(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Any]:
        """Generate what follows ``prompt``: mlx-lm's responses, one a token, the last with a ``finish_reason``.

        Whoever has enough closes the iterator, or says so through ``stopped``, which is asked between pieces of the
        prompt and after each token; what was computed until then is kept.  After any other end nothing is.

        Args:
            prompt: at least one token.
            max_tokens: longest answer; shorter where the model's context ends.
            temperature: 0 is greedy.
        Raises:
            ContextLengthExceeded: there is no room for an answer in the model's context.
        """
        room = self.context - len(prompt)
        if room < 1:
            raise ContextLengthExceeded(
                f"the chat has {len(prompt)} tokens, which leaves no room in the model's context of {self.context}"
            )
        kept, dropped = reuse(self.cached, prompt, not self._cache or can_trim_prompt_cache(self._cache))
        if not kept or not self._cache:
            self._cache = new_caches(self._model, self._kv_bits)
        elif dropped:
            trim_prompt_cache(self._cache, dropped)
        self.computed = len(prompt) - kept
        done = list(prompt[:kept])

        def progress(processed: int, total: int) -> None:
            done[:] = prompt[: kept + processed]
            if processed < total and stopped():  # with all of it the first token is in the cache already
                raise _Stopped

        whole = False
        self.cached = []
        responses = stream_generate(
            self._model,
            self._tokenizer,
            list(prompt[kept:]),
            max_tokens=min(max_tokens, room),
            sampler=make_sampler(temperature) if temperature > COLDEST else None,
            prompt_cache=self._cache,
            prefill_step_size=self._piece_tokens,
            prompt_progress_callback=progress,
        )
        try:
            for response in responses:
                done.append(response.token)
                yield response
                if stopped():
                    break
            whole = True
        except _Stopped:
            whole = True
        except GeneratorExit:
            whole = True
            raise
        finally:
            responses.close()
            if whole:
                self.cached = done
            else:
                self.forget()  # the cache may be half written
