"""Prompts of requests: what is refused for its length and in which words, and that nobody waits while one is made."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from expertd.protocol.errors import ContextLengthExceeded, MessageInvalid, RequestInvalid
from expertd.protocol.messages import Delta, Finished, Generate, Refused, Sampling
from expertd.worker.engine import SMALL_BYTES, Engine, Event
from expertd.worker.prompts import PIECE, Prompts
from expertd.worker.template import encode_chat, render_chat

DEMO = Path(__file__).parents[1] / "models" / "demo"
QUESTION = [{"role": "user", "content": "What is the module socket for?"}]
CONTEXT = 1000


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return mlx_lm.load(str(DEMO))[:2]


@pytest.fixture
def prompts(demo: tuple[Any, Any]) -> Prompts:
    return Prompts(demo[1], CONTEXT)


def asking(**fields: Any) -> Generate:
    given: dict[str, Any] = {"request": 1} | fields
    return Generate(**given)


def test_a_conversation_is_what_the_tokenizer_makes_of_it(prompts: Prompts, demo: tuple[Any, Any]) -> None:
    tokens = list(demo[1].apply_chat_template(QUESTION, add_generation_prompt=True))
    assert prompts.encode(asking(messages=QUESTION)) == tokens == encode_chat(demo[1], QUESTION)
    assert demo[1].decode(tokens) == render_chat(demo[1], QUESTION)


def test_text_and_tokens_are_taken_as_they_are(prompts: Prompts, demo: tuple[Any, Any]) -> None:
    assert prompts.encode(asking(text="import socket")) == list(demo[1].encode("import socket"))
    assert prompts.encode(asking(tokens=[5, 6])) == [5, 6]
    with pytest.raises(RequestInvalid, match="no token 4096") as caught:
        prompts.encode(asking(tokens=[5, 4096]))
    assert caught.value.param == "prompt"
    with pytest.raises(RequestInvalid, match="no tokens"):
        prompts.encode(asking(tokens=[]))


def test_an_answer_has_the_room_that_its_prompt_leaves(prompts: Prompts) -> None:
    assert prompts.room(asking(text="x"), 990) == 10
    assert prompts.room(asking(text="x", max_tokens=3), 990) == 3
    assert prompts.room(asking(text="x", max_tokens=10), 990) == 10


def test_what_leaves_no_room_is_refused_in_the_words_that_agents_know(prompts: Prompts) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        prompts.room(asking(messages=QUESTION, max_tokens=5), 1200)
    message = caught.value.message
    assert re.match(r"prompt is too long: (\d+) tokens > (\d+) maximum", message).groups() == ("1200", "999")  # type: ignore[union-attr]
    assert "this model's maximum context length is 1000 tokens" in message
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize(("max_tokens", "param"), [(11, "prompt"), (1000, "max_tokens")])
def test_an_answer_that_does_not_fit_is_told_from_a_prompt_that_does_not(
    prompts: Prompts, max_tokens: int, param: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        prompts.room(asking(text="x", max_tokens=max_tokens), 990)
    assert f"exceed context limit: 990 + {max_tokens} > 1000" in caught.value.message
    assert "this model's maximum context length is 1000 tokens" in caught.value.message
    assert caught.value.param == param


class Counting:
    """A tokenizer that counts the characters that it is asked to make tokens of."""

    has_chat_template = has_tool_calling = True
    has_thinking = False
    chat_template = "tools"

    def __init__(self) -> None:
        self.characters = 0

    def apply_chat_template(self, messages: Any, tokenize: bool, **more: Any) -> str:
        assert not tokenize
        return str((messages, more))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.characters += len(text)
        return [1] * (len(text) // 4)


LONG = "long " * 100_000
TOOL = {"type": "function", "function": {"name": "f", "description": LONG, "parameters": {}}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": LONG}, "prompt"),
        ({"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": LONG}}]}]}, "messages"),
        ({"messages": QUESTION, "tools": [TOOL]}, "messages"),
    ],
    ids=["text", "content", "parts", "arguments", "tools"],
)
def test_of_what_is_far_too_long_only_the_beginning_is_counted(fields: dict[str, Any], param: str) -> None:
    tokenizer = Counting()
    with pytest.raises(ContextLengthExceeded, match=r"prompt is too long: \d+ tokens > 999 maximum") as caught:
        Prompts(tokenizer, CONTEXT).encode(asking(**fields))
    assert tokenizer.characters == PIECE
    assert f"only the first {PIECE} characters were counted" in caught.value.message
    assert caught.value.param == param


def test_a_long_text_of_few_tokens_is_counted_to_its_end(prompts: Prompts, demo: tuple[Any, Any]) -> None:
    spaces = " " * 40_000
    tokens = list(demo[1].encode(spaces))
    assert len(tokens) < 2 * CONTEXT, "the tokenizer has tokens of many spaces"
    assert prompts.encode(asking(text=spaces)) == tokens


# -- the engine goes on meanwhile --------------------------------------------------------------------------------------


class Held:
    """A tokenizer that waits in what is long until it is let go."""

    def __init__(self, tokenizer: Any) -> None:
        self._wrapped = tokenizer
        self.begun, self.let_go = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def encode(self, text: str, **more: Any) -> Any:
        if len(text) > SMALL_BYTES:
            self.begun.set()
            assert self.let_go.wait(30), "nobody let it go"
        return self._wrapped.encode(text, **more)


@pytest.fixture
def held(demo: tuple[Any, Any]) -> Held:
    return Held(demo[1])


def long(request: int, **fields: Any) -> Generate:
    text = f"word{' ' * 20_000}word"  # of a few hundred tokens
    return Generate(request=request, messages=[{"role": "user", "content": text}], max_tokens=2, **fields)


def short(request: int, **fields: Any) -> Generate:
    return Generate(request=request, messages=QUESTION, **({"max_tokens": 4} | fields))


def steps(engine: Engine, until: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    for _ in range(5000):
        events += engine.step()
        if until(events):
            return events
    raise AssertionError(f"it does not come to that: {events[-3:]}")


def ends(events: list[Event]) -> list[int]:
    return [event.request for event in events if not isinstance(event, Delta)]


def test_others_are_answered_while_a_long_prompt_is_made(demo: tuple[Any, Any], held: Held) -> None:
    engine = Engine(demo[0], held)
    engine.submit(long(1))
    assert held.begun.wait(30)
    engine.submit(short(2))
    assert ends(steps(engine, lambda events: 2 in ends(events))) == [2]
    assert engine.busy
    with pytest.raises(MessageInvalid, match="numbered 1"):
        engine.submit(short(1))
    held.let_go.set()
    events = steps(engine, lambda events: 1 in ends(events))
    assert sum(event.tokens for event in events if isinstance(event, Delta)) == 2
    assert not engine.busy
    engine.close()


def test_a_prompt_that_is_being_made_can_be_cancelled(demo: tuple[Any, Any], held: Held) -> None:
    engine = Engine(demo[0], held)
    engine.submit(long(1))
    engine.submit(long(2))
    assert held.begun.wait(30)
    engine.cancel(1)
    engine.cancel(2)
    assert not engine.busy
    held.let_go.set()
    assert ends(steps(engine, lambda events: True)) == []
    engine.submit(short(1))
    assert ends(steps(engine, lambda events: bool(ends(events)))) == [1]
    engine.close()


def test_what_is_made_aside_is_answered_like_all_else(demo: tuple[Any, Any]) -> None:
    engine = Engine(*demo)
    warm = Sampling(temperature=1.0, seed=3, logit_bias={300: 1.0}, presence_penalty=1.0)
    engine.submit(long(1, count=True))
    engine.submit(long(2, sampling=warm))
    engine.submit(long(3, sampling=Sampling(logit_bias={9999: 1.0})))
    engine.submit(long(4, schema='{"type": "boolean"}'))
    engine.submit(Generate(request=5, text="x" * 1_000_000, max_tokens=1))
    events = steps(engine, lambda events: len(ends(events)) == 5)
    found = {event.request: event for event in events if not isinstance(event, Delta)}
    counted, answered = found[1], found[2]
    assert isinstance(counted, Finished)
    assert isinstance(answered, Finished)
    assert counted.prompt_tokens == answered.prompt_tokens > 300
    assert isinstance(found[4], Finished)
    refused = [found[place] for place in (3, 5)]
    assert [(one.code, one.param) for one in refused if isinstance(one, Refused)] == [
        ("request_invalid", "logit_bias"), ("context_length_exceeded", "prompt")
    ]  # fmt: skip
    engine.close()
