"""Answers to many prompts, one after another or some at a time, for whoever wants the model to have run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from expertd.protocol.errors import RequestInvalid
from expertd.worker.engine import new_generator
from expertd.worker.kv_quantized import new_caches
from expertd.worker.template import encode_chat


def check_text(said: object) -> None:
    """Refuse what no tokenizer takes: halves of characters, as which bytes are read that are not UTF-8.

    Raises:
        RequestInvalid: there are some in ``said``, however deep.
    """
    try:
        json.dumps(said, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise RequestInvalid(
            "the text has bytes that are not UTF-8, so it cannot be read; convert it (iconv -t UTF-8 does)"
        ) from error


def encode_prompt(tokenizer: Any, prompt: str | list[dict[str, Any]], *, raw: bool = False) -> list[int]:
    """The tokens of a text, as a user's message unless ``raw``, or of chat messages; a text if there is no template.

    Raises:
        RequestInvalid: the text is not Unicode, or the template refuses it.
    """
    check_text(prompt)
    if isinstance(prompt, str):
        if raw or not tokenizer.has_chat_template:
            return list(tokenizer.encode(prompt))
        prompt = [{"role": "user", "content": prompt}]
    return encode_chat(tokenizer, prompt)


def answer_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    parallel: int = 1,
    kv_bits: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Generate an answer to each of ``prompts``: ``(its place in prompts, tokens)``, as they come to their end.

    Args:
        prompts: token ids; each has at least one.
        max_tokens: longest answer.
        temperature: 0 is greedy; above, ``seed`` makes it repeatable.
        parallel: how many are generated at a time.
        kv_bits: as in ``new_caches``.
    """
    mx.random.seed(seed)
    sampler = make_sampler(temperature) if temperature else None
    generator = new_generator(model, tokenizer, parallel, parallel)
    waiting = list(enumerate(prompts))[::-1]
    running: dict[int, tuple[int, list[int]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                place, prompt = waiting.pop()
                (uid,) = generator.insert(
                    [prompt], [max_tokens], samplers=[sampler], caches=[new_caches(model, kv_bits)]
                )
                running[uid] = place, []
            for answer in generator.next()[1]:
                place, tokens = running[answer.uid]
                tokens.append(answer.token)
                if answer.finish_reason is not None:
                    del running[answer.uid]
                    yield place, tokens
    finally:
        generator.close()
