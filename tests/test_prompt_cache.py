"""What is kept of earlier requests: whom it serves, what takes whose place, and what goes when room is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from expertd.protocol.errors import MemoryPressure
from expertd.protocol.messages import Finished, Generate, Refused
from expertd.worker.engine import Engine
from expertd.worker.kv_memory import CacheMemory, LayerCache
from expertd.worker.prompt_cache import PromptCache

DEMO = Path(__file__).parents[1] / "models" / "demo"


class Layer:
    """What the prompt cache needs to know of a cache whose end cannot be taken off."""

    state: tuple[()] = ()

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def is_trimmable(self) -> bool:
        return False


def test_the_prompt_cache_is_bounded_in_bytes() -> None:
    cache = PromptCache(100)
    for number in range(10):
        cache.keep([number, 1, 2], [Layer(20), Layer(20)])
        assert cache.size <= 100
    assert cache.size == 80
    cache.keep([77], [Layer(101)])
    assert cache.size == 80, "what is too large alone drives nothing out"
    assert cache.take([9, 1, 2, 3])[1] == [3]
    assert cache.take([0, 1, 2, 3]) == (None, [0, 1, 2, 3])
    cache.give_back()
    assert cache.size == 0


class Trimmable(Layer):
    """One whose end can be taken off."""

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        return count


def test_a_long_prompt_is_looked_up_by_its_beginning_only() -> None:
    cache = PromptCache(1000)
    tokens = list(range(100_000))
    cache.keep(tokens, [Layer(10)])
    assert cache.take([*tokens, 7])[1] == [7]
    assert cache.take([*tokens[:50_000], -1])[0] is None, "its end cannot be taken off"


def test_a_turn_takes_the_place_of_the_one_before_although_its_end_is_written_otherwise() -> None:
    cache = PromptCache(1000)
    turn = list(range(100))
    cache.keep([*turn, 777], [Trimmable(10)])
    cache.keep([*turn, 888, 5, 6], [Trimmable(10)])
    assert cache.size == 10
    assert cache.take([*turn, 888, 5, 6, 7])[1] == [7]
    cache.keep([*turn[:50], 999], [Trimmable(10)])
    assert cache.size == 20, "another conversation"
    cache.keep([1, 2, 3], [Trimmable(10)])
    cache.keep([1, 2, 4, 5], [Trimmable(10)])
    assert cache.size == 40, "of a few tokens a few are much"


def test_nothing_is_kept_where_nothing_may_be() -> None:
    cache = PromptCache(0)
    cache.keep([1], [Layer(1)])
    assert cache.size == 0


def test_what_cannot_be_cut_stays_beside_what_became_of_it() -> None:
    cache = PromptCache(1000)
    cache.keep([1, 2, 3], [Layer(10)])
    cache.keep([1, 2, 3, 4, 5], [Layer(10)])
    assert cache.size == 20
    assert cache.take([1, 2, 3, 9])[1] == [9]
    cache.keep([1, 2, 3], [Layer(10)])
    assert cache.size == 20, "the same again takes its own place"
    turn = list(range(100))
    cache.keep([*turn, 777], [Layer(10)])
    cache.keep([*turn, 888], [Layer(10)])
    assert cache.size == 40, "one whose end is another serves other prompts"


CONVERSATION = list(range(5000))


def small(number: int) -> list[int]:
    """A question that nobody goes on with."""
    return [100_000 + number, *range(20)]


@pytest.mark.parametrize("kind", [Layer, Trimmable])
def test_many_small_questions_do_not_drive_out_a_conversation(kind: type[Layer]) -> None:
    cache = PromptCache(10_000, most=16)
    cache.keep(CONVERSATION, [kind(5000)])
    for number in range(100):
        cache.keep(small(number), [kind(21)])
    assert cache.take([*CONVERSATION, 1])[1] == [1]
    assert cache.take([*small(99), 1])[1] == [1], "the latest are there"
    assert cache.take([*small(0), 1])[0] is None
    assert cache.size < 5000 + 16 * 21, "each counts as a sixteenth of what there is"


def test_a_conversation_that_is_gone_on_with_stays_and_one_that_is_not_goes() -> None:
    cache = PromptCache(30_000)
    others = ([number, *range(9_000)] for number in range(10_000, 10_100))
    cache.keep([77, *range(9_000)], [Trimmable(9_000)])
    said = [88, *range(5000)]
    cache.keep(said, [Trimmable(len(said))])
    for turn in range(8):
        found, rest = cache.take([*said, turn])
        assert found is not None, f"turn {turn}"
        assert len(rest) == 1
        said = [*said, turn]
        cache.keep(said, [Trimmable(len(said))])
        cache.keep(next(others), [Trimmable(9_000)])
        cache.keep(next(others), [Trimmable(9_000)])
    assert cache.take([77, *range(9_000), 1])[0] is None
    for other in others:
        cache.keep(other, [Trimmable(9_000)])
    assert cache.take([*said, 1])[0] is None, "nobody has gone on with it for long"
    assert cache.size == 27_000


def test_what_begins_many_prompts_is_worth_more_than_what_begins_none() -> None:
    cache = PromptCache(3000, most=1000)
    system = list(range(900))
    cache.keep([*system, 1], [Trimmable(900)])
    for number in range(2, 30):
        assert len(cache.take([*system, number, number])[1]) == 2
        cache.keep([*range(5000 * number, 5000 * number + 1000)], [Trimmable(1000)])
    assert len(cache.take([*system, 77])[1]) == 1


def test_the_least_is_given_back_first() -> None:
    cache = PromptCache(1000)
    for number in range(3):
        cache.keep([number, 1, 2], [Trimmable(10)])
    cache.take([0, 1, 2, 3])
    cache.give_back_least()
    assert cache.size == 20
    assert cache.take([1, 1, 2, 3])[0] is None
    assert cache.take([0, 1, 2, 3])[0] is not None


# -- an engine that is short of memory ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return mlx_lm.load(str(DEMO))[:2]


def engine_with(demo: tuple[Any, Any], tokens: int) -> Engine:
    """An engine on a machine with memory for the caches of so many tokens, what is kept among them."""
    plain = Engine(*demo, prompt_cache=1 << 30)
    cached(plain, 1, [5] * 20)
    per_token = plain._kept.size // 20
    memory = CacheMemory([LayerCache(0, per_token)], lambda: tokens * per_token - engine._kept.size)
    engine = Engine(*demo, memory=memory, prompt_cache=1 << 30)
    return engine


def end_of(engine: Engine, request: int, prompt: list[int], max_tokens: int = 1) -> Finished | Refused:
    engine.submit(Generate(request=request, tokens=prompt, max_tokens=max_tokens))
    events = [event for _ in range(200) if engine.busy for event in engine.step()]
    assert isinstance(events[-1], Finished | Refused)
    return events[-1]


def cached(engine: Engine, request: int, prompt: list[int]) -> int:
    end = end_of(engine, request, prompt)
    assert isinstance(end, Finished)
    return end.cached_tokens


def test_a_request_takes_no_more_of_what_is_kept_than_it_needs(demo: tuple[Any, Any]) -> None:
    engine = engine_with(demo, 100)
    prompts = [[100 + number] * 20 for number in range(4)]
    for number, prompt in enumerate(prompts):
        assert cached(engine, number, prompt) == 0
    assert cached(engine, 10, [99] * 30) == 0
    assert cached(engine, 11, prompts[3]) == 19
    assert cached(engine, 12, prompts[0]) == 0


def test_a_request_that_can_never_fit_takes_nothing(demo: tuple[Any, Any]) -> None:
    engine = engine_with(demo, 100)
    assert cached(engine, 1, [100] * 20) == 0
    refused = end_of(engine, 2, [99] * 20, max_tokens=500)
    assert isinstance(refused, Refused)
    assert refused.code == MemoryPressure.code
    assert cached(engine, 3, [100] * 20) == 19
