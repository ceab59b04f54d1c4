"""Quantized KV caches: mlx-lm's tokens with the same caches, alone and in batches; refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from expertd.protocol.errors import KvBitsUnsupported
from expertd.protocol.messages import Finished
from expertd.worker.engine import Engine
from expertd.worker.kv_memory import cache_bytes, check_kv_bits, measure
from expertd.worker.kv_quantized import GROUP_SIZE, BatchQuantizedCache, QuantizedCache, new_caches
from expertd.worker.turns import Turns
from tests.test_engine import generate, prompt_of, run

DEMO = Path(__file__).parents[1] / "models" / "demo"
TEXTS = ("What is the module socket for?", "Explain os.path.join. " * 60, "Write the function clamp.")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The demo model as mlx-lm loads it: what its caches are does not depend on where its experts are."""
    model, tokenizer, *_ = mlx_lm.load(str(DEMO))
    return model, tokenizer


def plain_caches(model: Any, bits: int) -> list[QuantizedKVCache]:
    return [QuantizedKVCache(GROUP_SIZE, bits) for _ in model.layers]


def expected(loaded: tuple[Any, Any], text: str, bits: int, max_tokens: int = 40) -> str:
    """What mlx-lm says with its own quantized caches."""
    return str(
        mlx_lm.generate(
            *loaded, prompt_of(loaded, text), max_tokens=max_tokens, prompt_cache=plain_caches(loaded[0], bits),
            prefill_step_size=512,
        )
    )  # fmt: skip


@pytest.mark.parametrize("bits", [8, 4])
def test_the_tokens_are_those_of_mlx_lm_with_the_same_bits(loaded: tuple[Any, Any], bits: int) -> None:
    engine = Engine(*loaded, kv_bits=bits)
    assert [run(engine, generate(1, text))[1].text for text in TEXTS] == [
        expected(loaded, text, bits) for text in TEXTS
    ]


def test_requests_side_by_side_each_get_their_own_tokens(loaded: tuple[Any, Any]) -> None:
    answers = run(Engine(*loaded, kv_bits=8), *(generate(i, text) for i, text in enumerate(TEXTS)))
    assert [answers[i].text for i in range(3)] == [expected(loaded, text, 8) for text in TEXTS]


def test_a_conversation_that_grows_is_not_computed_again(loaded: tuple[Any, Any]) -> None:
    engine = Engine(*loaded, kv_bits=8)
    first = run(engine, generate(1, TEXTS[1], max_tokens=8))[1].end
    again = run(engine, generate(2, TEXTS[1] + "And then?"))[2]
    assert isinstance(first, Finished) and isinstance(again.end, Finished)
    assert again.end.cached_tokens > first.prompt_tokens - 16
    assert again.text == expected(loaded, TEXTS[1] + "And then?", 8)


def test_a_chat_keeps_its_quantized_cache(loaded: tuple[Any, Any]) -> None:
    turns = Turns(*loaded, kv_bits=8)
    prompt = prompt_of(loaded, TEXTS[0])
    text = "".join(response.text for response in turns.answer(prompt, 40))
    assert text == expected(loaded, TEXTS[0], 8)
    list(turns.answer([*prompt[:-1], 7, 8, 9], 1))
    assert turns.computed == 3, "the end of a quantized cache can be taken off"


def test_a_quantized_cache_takes_less_memory(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    plain, in_8, in_4 = (cache_bytes(measure(model, bits), 1024) for bits in (None, 8, 4))
    # float32 here: 32 bits a number, or 8 or 4 and a scale and a bias of 32 for each 64
    assert (in_8 / plain, in_4 / plain) == ((8 + 1) / 32, (4 + 1) / 32)
    caches = new_caches(model, 8)
    model(mx.array([[1] * 300]), cache=caches)
    assert sum(cache.nbytes for cache in caches) == cache_bytes(measure(model, 8), 300)


def filled(tokens: int, seed: int) -> QuantizedCache:
    cache = QuantizedCache(GROUP_SIZE, 8)
    if tokens:
        cache.update_and_fetch(*mx.random.normal((2, 1, 2, tokens, 64), key=mx.random.key(seed)))
    return cache


def same(one: QuantizedCache, other: QuantizedCache) -> bool:
    pairs = zip(one.keys_and_values(), other.keys_and_values(), strict=True)
    return one.offset == other.offset and all(
        mx.array_equal(a, b).item() for left, right in pairs for a, b in zip(left, right, strict=True)
    )


def test_what_goes_into_a_batch_comes_out_of_it() -> None:
    alone = [filled(tokens, tokens) for tokens in (5, 300, 17)]
    batch = QuantizedCache.merge(alone[:2])
    batch.extend(QuantizedCache.merge(alone[2:]))
    assert all(same(batch.extract(place), cache) for place, cache in enumerate(alone))
    batch.filter([0, 2])
    assert batch.size() == 17, "the padding of the longest has gone with it"
    assert all(same(batch.extract(place), cache) for place, cache in enumerate((alone[0], alone[2])))
    assert same(batch.extract(1), alone[2])


def test_an_empty_batch_takes_prompts_of_any_length() -> None:
    batch = QuantizedCache.merge([filled(0, 0), filled(0, 0)])
    assert isinstance(batch, BatchQuantizedCache) and batch.empty()
    keys, values = mx.random.normal((2, 2, 2, 4, 64), key=mx.random.key(1))
    batch.prepare(lengths=[4, 1], right_padding=[0, 3])
    batch.update_and_fetch(keys, values)
    batch.finalize()
    assert [batch.extract(place).offset for place in (0, 1)] == [4, 1]
    short = QuantizedCache(GROUP_SIZE, 8)
    short.update_and_fetch(keys[1:, :, :1], values[1:, :, :1])
    assert same(batch.extract(1), short)


@pytest.mark.parametrize("bits", [8, 4])
def test_rotating_windows_are_refused(bits: int) -> None:
    class Windows:
        def make_cache(self) -> Any:
            return [KVCache(), RotatingKVCache(max_size=8)]

    with pytest.raises(KvBitsUnsupported) as caught:
        check_kv_bits(Windows(), bits)
    assert caught.value.message == "the model's caches (RotatingKVCache) cannot be quantized; leave --kv-bits out"


def test_heads_that_are_too_narrow_are_refused(checkpoints: dict[str, Path]) -> None:
    model, *_ = mlx_lm.load(str(checkpoints["stacked"]))
    check_kv_bits(model, None)
    with pytest.raises(KvBitsUnsupported, match=r"caches cannot be quantized \(.+\); leave --kv-bits out$"):
        check_kv_bits(model, 8)
