"""Topics, as they are learned and told apart: sessions whose tokens use one part of a model's blocks, or another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from expertd.daemon.core.topics import CHAPTER, KNOWN, MOST, RIPE, TOKENS, Topics

LAYERS, EXPERTS, TOP_K = 4, 32, 4
SOON = 10
"""A change is found within so many tokens."""

Token = list[list[int]]


def about(number: int, seed: int = 0, width: int = 8) -> Callable[[], Token]:
    """Tokens of a topic: each layer has ``width`` experts of its own for it, and one in four uses is of any expert."""
    chance = random.Random(f"{number} {seed}")
    own = [random.Random(f"{number} {layer}").sample(range(EXPERTS), width) for layer in range(LAYERS)]

    def token() -> Token:
        return [
            list(dict.fromkeys(chance.choice(mine if chance.random() < 0.75 else range(EXPERTS)) for _ in range(TOP_K)))
            for mine in own
        ]

    return token


def run(topics: Topics, tokens: Callable[[], Token], count: int, session: int = 1) -> list[tuple[int, np.ndarray]]:
    """At which tokens the session turned, and to what."""
    turned = []
    for number in range(count):
        for layer, experts in enumerate(tokens()):
            chances = topics.observe(session, layer, experts)
            if chances is not None:
                turned.append((number, chances.copy()))
    return turned


def likeliest(chances: np.ndarray, number: int, width: int = 8) -> float:
    """The part of the likeliest experts that are the topic's own."""
    own = [random.Random(f"{number} {layer}").sample(range(EXPERTS), width) for layer in range(LAYERS)]
    found = [set(np.argsort(-chances[layer])[:width].tolist()) & set(own[layer]) for layer in range(LAYERS)]
    return sum(map(len, found)) / (LAYERS * width)


def alternated(topics: Topics, numbers: Sequence[int], rounds: int, tokens: int = 4 * CHAPTER) -> None:
    for turn in range(rounds):
        for number in numbers:
            run(topics, about(number, turn), tokens)


def test_one_topic_is_one_topic_and_nobody_turns() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    assert run(topics, about(1), 600) == []
    assert topics.count == 1


def test_what_is_new_becomes_a_topic_and_who_comes_back_to_the_old_one_has_turned() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    run(topics, about(1), 100)
    run(topics, about(2), 100)
    assert topics.count == 2
    ((number, chances),) = run(topics, about(1, seed=5), 60)
    assert number <= SOON
    assert chances.shape == (LAYERS, EXPERTS)
    assert likeliest(chances, 1) > 0.9


def test_every_change_between_known_topics_is_found_soon_and_once() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    alternated(topics, (1, 2, 3), 2)
    before = topics.turns
    for turn in range(4):
        for number in (1, 2, 3):
            ((after, chances),) = run(topics, about(number, 10 + turn), 100)
            assert after <= SOON
            assert likeliest(chances, number) > 0.9
    assert topics.turns == before + 12


def test_routing_without_topics_turns_nobody() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    chance = random.Random(3)
    assert run(topics, lambda: [chance.sample(range(EXPERTS), TOP_K) for _ in range(LAYERS)], 1500) == []


def test_topics_that_are_more_than_are_kept_go_together_and_the_large_ones_stay() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    alternated(topics, (1, 2), 6)
    for number in range(3, 3 + 2 * MOST):
        run(topics, about(number), 2 * CHAPTER)
    assert topics.count == MOST
    run(topics, about(2, seed=7), 40)
    ((_, chances),) = run(topics, about(1, seed=7), 40)
    assert likeliest(chances, 1) > 0.9


def test_sessions_turn_for_themselves_and_learn_together() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    run(topics, about(1), 100, session=1)
    run(topics, about(2), 100, session=2)
    assert run(topics, about(1, seed=2), 50, session=1) == []
    ((_, chances),) = run(topics, about(2, seed=2), 50, session=1)
    assert likeliest(chances, 2) > 0.9
    assert run(topics, about(2, seed=3), 50, session=2) == []
    topics.ended(1)
    assert run(topics, about(1, seed=4), 50, session=1) == [], "it is another session of that number"


def test_profiles_are_topics_that_are_known_from_the_start() -> None:
    chances = np.zeros((2, LAYERS, EXPERTS), np.float32)
    for number in (1, 2):
        token = about(number, 9)
        for _ in range(300):
            for layer, experts in enumerate(token()):
                chances[number - 1, layer, experts] += 1 / 300
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    for each in chances:
        topics.know(each)
    assert topics.count == 2
    assert run(topics, about(1), 50) == []
    ((number, found),) = run(topics, about(2), 50)
    assert number <= SOON
    assert likeliest(found, 2) == 1


@pytest.mark.parametrize("chances", [np.zeros((LAYERS, EXPERTS)), np.ones((LAYERS, EXPERTS + 1)), np.ones(LAYERS)])
def test_what_is_no_topic_of_this_model_is_left_aside(chances: np.ndarray) -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    topics.know(chances.astype(np.float32))
    assert topics.count == 0


def test_prompts_do_not_count() -> None:
    topics = Topics(LAYERS, EXPERTS, TOP_K)
    alternated(topics, (1, 2), 2)
    run(topics, about(1), 40)
    many = [list(range(TOKENS * TOP_K + 1)) for _ in range(LAYERS)]
    assert run(topics, lambda: many, 40) == []
    assert run(topics, about(1, seed=3), 40) == []


def test_a_topic_is_ripe_before_anybody_turns_to_it() -> None:
    assert RIPE > 2 * CHAPTER, "what two chapters had by chance in common is no topic yet"
    assert KNOWN >= RIPE
