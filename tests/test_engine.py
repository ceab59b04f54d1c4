"""The engine: mlx-lm's greedy tokens for any number of requests; text, limits, cancelling and failures around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from expertd.protocol.errors import MessageInvalid, ReadFailed
from expertd.protocol.messages import Delta, Finished, Generate, Refused, Sampling
from expertd.worker.engine import PREFILL_TOKENS, Engine, context_length
from expertd.worker.sequential import SequentialGenerator
from expertd.worker.stops import StopText

SHORT = "Tell me about the sea."
LONG = "Tell me about the sea. " * 120


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> tuple[Any, Any]:
    """Plain mlx-lm: what the engine adds does not depend on where the weights are."""
    model, tokenizer = mlx_lm.load(str(checkpoints["stacked"]))
    return model, tokenizer


@pytest.fixture
def engine(loaded: tuple[Any, Any]) -> Engine:
    return Engine(*loaded)


@pytest.fixture
def sequential(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine as it is over a model whose caches cannot be batched."""
    ends = set(loaded[1].eos_token_ids)
    new = SequentialGenerator(loaded[0], ends, PREFILL_TOKENS)
    monkeypatch.setattr("expertd.worker.engine.new_generator", lambda *arguments: new)
    return Engine(*loaded)


class Answer:
    """What came of one request."""

    def __init__(self) -> None:
        self.text = ""
        self.deltas: list[Delta] = []
        self.end: Finished | Refused | None = None


def generate(request: int, text: str = SHORT, max_tokens: int | None = 40, **options: Any) -> Generate:
    sampling = Sampling(**{name: options.pop(name) for name in list(options) if name in Sampling.__struct_fields__})
    messages = [{"role": "user", "content": text}]
    return Generate(request=request, messages=messages, max_tokens=max_tokens, sampling=sampling, **options)


def run(engine: Engine, *requests: Generate) -> dict[int, Answer]:
    for request in requests:
        engine.submit(request)
    answers = {request.request: Answer() for request in requests}
    while engine.busy:
        for event in engine.step():
            answer = answers[event.request]
            assert answer.end is None, "nothing follows the end"
            if isinstance(event, Delta):
                answer.text += event.text
                answer.deltas.append(event)
            else:
                answer.end = event
    return answers


def prompt_of(loaded: tuple[Any, Any], text: str) -> list[int]:
    return list(loaded[1].apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True))


def expected(loaded: tuple[Any, Any], text: str = SHORT, max_tokens: int = 40) -> str:
    return str(mlx_lm.generate(*loaded, prompt_of(loaded, text), max_tokens=max_tokens))


def expected_tokens(loaded: tuple[Any, Any], text: str = SHORT, max_tokens: int = 40) -> list[int]:
    return [r.token for r in mlx_lm.stream_generate(*loaded, prompt_of(loaded, text), max_tokens=max_tokens)]


def failing(model: Any, error: Exception, at_call: int) -> Any:
    """The model, except that one of its calls raises."""

    class Failing:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at_call:
                raise error
            return model(*args, **kwargs)

    return Failing()


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["short", "longer_than_a_step"])
def test_greedy_text_is_that_of_mlx_lm(loaded: tuple[Any, Any], engine: Engine, text: str) -> None:
    answer = run(engine, generate(1, text))[1]
    assert answer.text == expected(loaded, text)


def test_a_finished_answer_says_why_and_how_many_tokens(loaded: tuple[Any, Any], engine: Engine) -> None:
    answer = run(engine, generate(1, max_tokens=7))[1]
    prompt_tokens = len(prompt_of(loaded, SHORT))
    assert answer.end == Finished(request=1, reason="length", prompt_tokens=prompt_tokens, completion_tokens=7)
    assert sum(delta.tokens for delta in answer.deltas) == 7


def test_requests_side_by_side_each_get_their_own_tokens(loaded: tuple[Any, Any], engine: Engine) -> None:
    answers = run(engine, generate(1, SHORT), generate(2, LONG), generate(3, "And you?"))
    assert [answers[i].text for i in (1, 2, 3)] == [expected(loaded, text) for text in (SHORT, LONG, "And you?")]


def test_a_request_may_come_while_another_is_answered(loaded: tuple[Any, Any], engine: Engine) -> None:
    engine.submit(generate(1))
    early = [event for _ in range(5) for event in engine.step()]
    engine.submit(generate(2))
    text = {1: "".join(event.text for event in early if isinstance(event, Delta)), 2: ""}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Delta):
                text[event.request] += event.text
    assert text == {1: expected(loaded), 2: expected(loaded)}


def test_more_requests_than_are_computed_at_a_time_are_all_answered(loaded: tuple[Any, Any], engine: Engine) -> None:
    answers = run(engine, *(generate(i, max_tokens=3) for i in range(40)))
    assert {answer.text for answer in answers.values()} == {expected(loaded, max_tokens=3)}


def test_a_model_that_cannot_be_batched_gives_the_same_text(loaded: tuple[Any, Any], sequential: Engine) -> None:
    assert isinstance(sequential._generator, SequentialGenerator)
    answers = run(sequential, generate(1, SHORT), generate(2, LONG))
    assert [answers[i].text for i in (1, 2)] == [expected(loaded, SHORT), expected(loaded, LONG)]


def test_temperature_changes_what_is_chosen(loaded: tuple[Any, Any], engine: Engine) -> None:
    texts = {run(engine, generate(1, temperature=2.0, max_tokens=20))[1].text for _ in range(3)}
    assert len(texts) > 1


@pytest.mark.parametrize("options", [{"temperature": 1e-30}, {"temperature": 1.0, "top_p": 1e-6}])
def test_a_vanishing_temperature_or_nucleus_is_greedy(
    loaded: tuple[Any, Any], engine: Engine, options: dict[str, Any]
) -> None:
    assert run(engine, generate(1, **options))[1].text == expected(loaded)


def test_an_end_token_ends_the_answer_and_is_no_text(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    tokens = expected_tokens(loaded)
    # The first token that is not a repetition of an earlier one, far enough in that there is text before it.
    place = next(i for i in range(8, len(tokens)) if tokens[i] not in tokens[:i])
    ends = set(tokenizer.eos_token_ids)
    tokenizer.eos_token_ids = {*ends, tokens[place]}
    try:
        answer = run(Engine(model, tokenizer), generate(1))[1]
        text = mlx_lm.generate(model, tokenizer, prompt_of(loaded, SHORT), max_tokens=40)
    finally:
        tokenizer.eos_token_ids = ends
    assert isinstance(answer.end, Finished)
    assert (answer.end.reason, answer.end.completion_tokens) == ("stop", place + 1)
    assert answer.text == text


def test_a_stop_string_ends_the_answer_before_itself(loaded: tuple[Any, Any], engine: Engine) -> None:
    text = expected(loaded)
    stop = text[10:14]
    answer = run(engine, generate(1, stop=["never in it", stop]))[1]
    assert answer.text == text[: text.index(stop)]
    assert isinstance(answer.end, Finished)
    assert answer.end.reason == "stop"
    assert answer.end.completion_tokens < 40


def test_a_stop_string_that_does_not_come_costs_no_text(loaded: tuple[Any, Any], engine: Engine) -> None:
    text = expected(loaded)
    answer = run(engine, generate(1, stop=[text[-3:] + "and more"]))[1]
    assert answer.text == text


def test_other_requests_go_on_when_one_is_stopped(loaded: tuple[Any, Any], engine: Engine) -> None:
    answers = run(engine, generate(1, stop=[expected(loaded)[6:9]]), generate(2))
    assert answers[2].text == expected(loaded)


def test_a_character_of_several_tokens_comes_in_one_piece(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    engine = Engine(*loaded)
    engine.submit(generate(1))
    # What the model writes is noise, so its tokens are replaced by those of a text with such characters.
    tokens = tokenizer.encode("naïve 東京 🎉 done", add_special_tokens=False)

    class Dictated:
        def __init__(self) -> None:
            self.left = list(tokens)

        def insert(self, prompts: Any, max_tokens: Any, **more: Any) -> list[int]:
            return [0]

        def next(self) -> tuple[list[Any], list[Any]]:
            token = self.left.pop(0)
            reason = None if self.left else "length"
            return [], [type("Token", (), {"uid": 0, "token": token, "finish_reason": reason, "prompt_cache": None})]

        def remove(self, uids: list[int], return_prompt_caches: bool) -> dict[int, Any]:
            return {}

    engine._generator = Dictated()
    deltas = []
    while engine.busy:
        deltas += [event for event in engine.step() if isinstance(event, Delta)]
    assert "".join(delta.text for delta in deltas) == "naïve 東京 🎉 done"
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert len(deltas) == len(tokens) > len("naïve 東京 🎉 done"), "one delta a token, empty inside a character"


def test_a_cancelled_answer_ends_without_a_word(engine: Engine) -> None:
    engine.submit(generate(1, max_tokens=10_000))
    for _ in range(3):
        engine.step()
    engine.cancel(1)
    assert not engine.busy
    assert engine.step() == []


def test_a_prompt_can_be_cancelled_between_two_steps(engine: Engine, loaded: tuple[Any, Any]) -> None:
    assert len(prompt_of(loaded, LONG * 2)) > 2 * PREFILL_TOKENS
    engine.submit(generate(1, LONG * 2))
    (delta,) = engine.step()
    assert isinstance(delta, Delta), "a step of the prompt shows that there is work"
    assert (delta.text, delta.tokens, delta.prompt_tokens) == ("", 0, len(prompt_of(loaded, LONG * 2)))
    engine.cancel(1)
    assert not engine.busy
    assert engine.step() == []


def test_cancelling_leaves_the_others_alone(loaded: tuple[Any, Any], engine: Engine) -> None:
    engine.submit(generate(1, max_tokens=10_000))
    engine.submit(generate(2, LONG))
    engine.step()
    engine.cancel(2)
    engine.cancel(77)
    answer = ""
    while len(answer) < len(expected(loaded)):
        answer += "".join(event.text for event in engine.step() if isinstance(event, Delta) and event.request == 1)
    engine.cancel(1)
    assert answer.startswith(expected(loaded)[:-1])


def test_a_request_that_does_not_fit_is_refused_with_the_numbers(loaded: tuple[Any, Any]) -> None:
    prompt_tokens = len(prompt_of(loaded, SHORT))
    engine = Engine(*loaded, context=prompt_tokens + 10)
    refused = run(engine, generate(1, max_tokens=11))[1].end
    assert isinstance(refused, Refused)
    assert (refused.code, refused.param) == ("context_length_exceeded", "messages")
    assert all(str(number) in refused.message for number in (prompt_tokens, 11, prompt_tokens + 10))


def test_a_prompt_that_fills_the_context_is_refused(loaded: tuple[Any, Any]) -> None:
    engine = Engine(*loaded, context=len(prompt_of(loaded, SHORT)))
    refused = run(engine, generate(1, max_tokens=None))[1].end
    assert isinstance(refused, Refused)
    assert refused.code == "context_length_exceeded"


def test_without_max_tokens_as_many_are_generated_as_fit(loaded: tuple[Any, Any]) -> None:
    engine = Engine(*loaded, context=len(prompt_of(loaded, SHORT)) + 6)
    end = run(engine, generate(1, max_tokens=None))[1].end
    assert isinstance(end, Finished)
    assert (end.reason, end.completion_tokens) == ("length", 6)


def test_the_context_is_read_from_the_config_where_it_is() -> None:
    def model(**arguments: Any) -> Any:
        return type("Model", (), {"args": type("Args", (), arguments)})

    assert context_length(model(max_position_embeddings=4096)) == 4096
    assert context_length(model(text_config={"max_position_embeddings": 8192})) == 8192
    assert context_length(model()) == 32768
    assert context_length(object()) == 32768


def test_messages_that_the_template_refuses_are_refused(engine: Engine) -> None:
    refused = run(engine, Generate(request=1, messages=[{"role": "user"}, "no message"], max_tokens=1))[1].end  # type: ignore[list-item]
    assert isinstance(refused, Refused)
    assert (refused.code, refused.param) == ("request_invalid", "messages")


def test_a_request_number_in_use_is_refused_to_the_caller(engine: Engine) -> None:
    engine.submit(generate(1))
    with pytest.raises(MessageInvalid):
        engine.submit(generate(1))


@pytest.mark.parametrize("at_call", [1, 4], ids=["in_the_prompt", "in_the_answer"])
def test_a_failed_read_ends_its_requests_and_not_the_engine(loaded: tuple[Any, Any], at_call: int) -> None:
    model, tokenizer = loaded
    engine = Engine(failing(model, ReadFailed("the disk is broken"), at_call), tokenizer)
    answers = run(engine, generate(1), generate(2))
    for i in (1, 2):
        assert answers[i].end == Refused(request=i, code="read_failed", message="the disk is broken")
    assert run(engine, generate(3))[3].text == expected(loaded)


def test_requests_that_still_wait_survive_a_failure(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    engine = Engine(failing(model, RuntimeError("out of memory"), 1), tokenizer)
    answers = run(engine, *(generate(i) for i in range(6)))
    refused = [answer.end for answer in answers.values() if isinstance(answer.end, Refused)]
    assert {refusal.code for refusal in refused} == {"internal"}
    assert [answers[i].text for i in (4, 5)] == [expected(loaded)] * 2


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 100])
def test_stop_strings_do_not_depend_on_how_text_is_cut(cut: int) -> None:
    def through(text: str, *stops: str) -> tuple[str, bool]:
        watch, shown = StopText(stops), ""
        for place in range(0, len(text), cut):
            segment, stopped = watch.feed(text[place : place + cut])
            shown += segment
            if stopped:
                return shown, True
        return shown + watch.flush(), False

    assert through("one two three", "two") == ("one ", True)
    assert through("one two three", "four") == ("one two three", False)
    assert through("aaab", "aab") == ("a", True)
    assert through("xabc", "b", "abc") == ("xa", True), "b was complete first"
    assert through("xabc", "bc", "abc") == ("x", True), "complete together: the longer one"
    assert through("the end", "end.") == ("the end", False)
    assert through("nothing") == ("nothing", False)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    watch = StopText(["</end>"])
    assert watch.feed("text </e") == ("text ", False)
    assert watch.feed("m>") == ("</em>", False)
    assert watch.feed("</end") == ("", False)
    assert watch.feed(">more") == ("", True)
