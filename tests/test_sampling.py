"""How an answer's tokens are chosen: seeds, penalties, log-probabilities, grammars, and what earlier requests leave."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from expertd.protocol.errors import RequestInvalid
from expertd.protocol.messages import Delta, Finished, Generate, Refused, Sampling, TokenLogprob
from expertd.worker.engine import Engine
from expertd.worker.grammar import Vocabulary
from expertd.worker.sampling import processors_of, sampler_of

DEMO = Path(__file__).parents[1] / "models" / "demo"
QUESTION = "What is the module socket for?"


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return mlx_lm.load(str(DEMO))[:2]


@pytest.fixture
def engine(demo: tuple[Any, Any]) -> Engine:
    return Engine(*demo)


class Answer:
    """What came of one request."""

    def __init__(self) -> None:
        self.text = self.reasoning = ""
        self.logprobs: list[TokenLogprob] = []
        self.end: Finished | Refused | None = None


def run(engine: Engine, *requests: Generate) -> list[Answer]:
    for request in requests:
        engine.submit(request)
    answers = {request.request: Answer() for request in requests}
    while engine.busy:
        for event in engine.step():
            answer = answers[event.request]
            if isinstance(event, Delta):
                answer.text += event.text
                answer.logprobs += event.logprobs
            else:
                answer.end = event
    return list(answers.values())


def ask(
    number: int, sampling: Sampling | None = None, text: str = QUESTION, max_tokens: int = 16, **more: Any
) -> Generate:
    messages = [{"role": "user", "content": text}]
    return Generate(request=number, messages=messages, max_tokens=max_tokens, sampling=sampling or Sampling(), **more)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(engine: Engine) -> None:
    warm = Sampling(temperature=1.0, seed=7)
    (alone,) = run(engine, ask(1, warm))
    beside = run(engine, ask(2, Sampling(temperature=1.0)), ask(3, warm), ask(4, warm), ask(5, text="Write a loop."))
    assert beside[1].text == beside[2].text == alone.text
    (other,) = run(engine, ask(6, Sampling(temperature=1.0, seed=8)))
    assert other.text != alone.text


def test_without_a_seed_answers_differ(engine: Engine) -> None:
    answers = run(engine, *(ask(number, Sampling(temperature=1.5)) for number in range(4)))
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize("one", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}, {"temperature": 1e-9}], ids=str)
def test_what_leaves_one_token_is_greedy(engine: Engine, one: dict[str, Any]) -> None:
    greedy, other = run(engine, ask(1), ask(2, Sampling(**({"temperature": 1.5} | one))))
    assert other.text == greedy.text


def chosen(sampling: Sampling, logits: list[float], times: int = 200) -> set[int]:
    sampler = sampler_of(sampling)
    assert sampler is not None
    logprobs = mx.array([logits]) - mx.logsumexp(mx.array([logits]))
    return {int(sampler(logprobs).item()) for _ in range(times)}


def test_filters_keep_what_they_should() -> None:
    logits = [math.log(share) for share in (0.5, 0.3, 0.15, 0.05)]
    assert chosen(Sampling(temperature=1.0, seed=1), logits, 500) == {0, 1, 2, 3}
    assert chosen(Sampling(temperature=1.0, seed=1, top_k=2), logits) == {0, 1}
    assert chosen(Sampling(temperature=1.0, seed=1, top_p=0.7), logits) == {0, 1}
    assert chosen(Sampling(temperature=1.0, seed=1, min_p=0.2), logits) == {0, 1, 2}
    assert chosen(Sampling(temperature=1.0, seed=1, top_k=99), logits, 500) == {0, 1, 2, 3}


def processed(sampling: Sampling, tokens: list[int], prompt_tokens: int, logits: list[float]) -> list[float]:
    found = mx.array([logits])
    for process in processors_of(sampling, prompt_tokens):
        found = process(mx.array(tokens, dtype=mx.int32), found)
    values: Any = found[0].tolist()
    return [round(value, 5) for value in values]


def test_penalties_look_at_the_answer_and_repetition_at_the_prompt_too() -> None:
    logits = [1.0, 1.0, -1.0, 1.0]
    tokens = [3, 0, 2, 2]  # a prompt of one token, and an answer
    assert processed(Sampling(frequency_penalty=0.5), tokens, 1, logits) == [0.5, 1.0, -2.0, 1.0]
    assert processed(Sampling(presence_penalty=0.5), tokens, 1, logits) == [0.5, 1.0, -1.5, 1.0]
    assert processed(Sampling(repetition_penalty=2.0), tokens, 1, logits) == [0.5, 1.0, -2.0, 0.5]
    assert processed(Sampling(presence_penalty=1.0), [3], 1, logits) == logits
    assert processed(Sampling(logit_bias={1: 5.0}), tokens, 1, logits) == [1.0, 6.0, -1.0, 1.0]
    assert processors_of(Sampling(), 1) == []


def test_a_bias_decides(engine: Engine, demo: tuple[Any, Any]) -> None:
    (word,) = demo[1].encode(" the", add_special_tokens=False)
    (answer,) = run(engine, ask(1, Sampling(logit_bias={word: 100.0}), max_tokens=3))
    assert answer.text == "the the the"
    (refused,) = run(engine, ask(2, Sampling(logit_bias={999_999: 1.0})))
    assert isinstance(refused.end, Refused)
    assert (refused.end.param, refused.end.code) == ("logit_bias", "request_invalid")


# -- log-probabilities -------------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_model(engine: Engine, demo: tuple[Any, Any]) -> None:
    model, tokenizer = demo
    (answer,) = run(engine, ask(1, max_tokens=6, top_logprobs=3))
    assert b"".join(told.token for told in answer.logprobs).decode() == answer.text
    prompt = list(tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True))
    for told, plain in zip(
        answer.logprobs, mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=6), strict=True
    ):
        assert told.logprob == pytest.approx(plain.logprobs[plain.token].item(), abs=1e-4)
        assert [top.logprob for top in told.top] == sorted((top.logprob for top in told.top), reverse=True)
        assert (told.top[0].token, told.top[0].logprob) == (told.token, told.logprob)
        assert len(told.top) == 3


def test_no_log_probabilities_unless_asked_for(engine: Engine) -> None:
    first, second = run(engine, ask(1, max_tokens=3), ask(2, max_tokens=3, top_logprobs=0))
    assert first.logprobs == []
    assert [told.top for told in second.logprobs] == [[], [], []]


def test_models_in_bfloat16_tell_log_probabilities_too(demo: tuple[Any, Any]) -> None:
    class Narrow:
        """The model, with the logits of one whose weights have 16 bits."""

        def __getattr__(self, name: str) -> Any:
            return getattr(demo[0], name)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return demo[0](*args, **kwargs).astype(mx.bfloat16)

    (answer,) = run(Engine(Narrow(), demo[1]), ask(1, max_tokens=2, top_logprobs=1))
    assert isinstance(answer.end, Finished)
    assert [len(told.top) for told in answer.logprobs] == [1, 1]


# -- grammars ----------------------------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99, "minimum": 1}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_an_answer_fits_its_schema(engine: Engine, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=3)
    requests = [ask(number, sampling, max_tokens=200, schema=json.dumps(PERSON)) for number in (1, 2)]
    plain = ask(3)
    *enforced, free = run(engine, *requests, plain)
    for answer in enforced:
        assert isinstance(answer.end, Finished)
        assert answer.end.reason == "stop"
        found = json.loads(answer.text)
        assert found.keys() == {"name", "age"}
        assert len(found["name"]) <= 8
        assert 1 <= found["age"] <= 99
    assert free.text == run(engine, plain)[0].text, "who has no schema is not touched"


@pytest.mark.parametrize("schema", ['{"not": {"const": 1}}', '{"type": "nonsense"}', "{", "[]"])
def test_a_schema_that_cannot_be_enforced_is_refused(engine: Engine, schema: str) -> None:
    (answer,) = run(engine, ask(1, schema=schema))
    assert isinstance(answer.end, Refused)
    assert (answer.end.code, answer.end.param) == ("request_invalid", "response_format")
    assert "cannot be enforced" in answer.end.message


@pytest.mark.parametrize("seed", [1, 2])
def test_an_answer_that_cannot_be_kept_to_its_schema_to_the_end_is_refused(engine: Engine, seed: int) -> None:
    # Whether it is more than the library can do shows only in the middle of an answer.
    schema = json.dumps({"type": "string", "pattern": "^(.{0,200}a.{0,200}){4}$"})
    (plain,) = run(engine, ask(1))
    broken, other = run(engine, ask(2, Sampling(temperature=1.0, seed=seed), max_tokens=200, schema=schema), ask(3))
    assert isinstance(broken.end, Refused)
    assert (broken.end.code, broken.end.param) == ("request_invalid", "response_format")
    assert "too many expressions" in broken.end.message
    assert "\n" not in broken.end.message
    assert other.text == plain.text
    assert isinstance(other.end, Finished)


def test_a_call_that_cannot_be_kept_to_its_tool_is_a_problem_of_the_tools(demo: tuple[Any, Any]) -> None:
    parameters = {"type": "object", "properties": {"t": {"type": "string", "pattern": "^(.{0,200}a.{0,200}){4}$"}},
                  "required": ["t"], "additionalProperties": False}  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    enforce = Vocabulary(demo[1]).calls(tools, ("<tool_call>", "</tool_call>"), several=False, prompt_tokens=0)
    sampler = sampler_of(Sampling(temperature=1.0, seed=1))
    assert sampler is not None
    tokens: list[int] = []
    while enforce.problem is None:
        assert len(tokens) < 300
        logits = enforce(mx.array(tokens, dtype=mx.int32), mx.zeros((1, 4096)))
        tokens.append(int(sampler(logits - mx.logsumexp(logits)).item()))
    assert enforce.problem.param == "tools"
    assert tokens[-1] in demo[1].eos_token_ids, "nothing but the end may follow"


def test_nothing_is_enforced_before_the_reasoning_ends(demo: tuple[Any, Any]) -> None:
    vocabulary = Vocabulary(demo[1])
    enforce = vocabulary.json('{"type": "object"}', prompt_tokens=1, after=(5, 6))
    logits = mx.zeros((1, 4096))

    def allowed(tokens: list[int]) -> int:
        return int((enforce(mx.array(tokens), logits) == 0).sum().item())

    assert allowed([1]) == 4096
    assert allowed([1, 5]) == 4096
    assert allowed([1, 5, 7, 5]) == 4096
    assert allowed([1, 5, 7, 5, 6]) < 10


def written(demo: tuple[Any, Any], enforce: Any, seed: int) -> str:
    """What a model writes that knows no token from another, as far as its grammar lets it."""
    tokenizer = demo[1]
    sampler = sampler_of(Sampling(temperature=1.0, seed=seed))
    assert sampler is not None
    tokens: list[int] = []
    while not tokens or tokens[-1] not in tokenizer.eos_token_ids:
        assert len(tokens) < 300
        logits = enforce(mx.array(tokens, dtype=mx.int32), mx.zeros((1, 4096)))
        tokens.append(int(sampler(logits - mx.logsumexp(logits)).item()))
    return str(tokenizer.decode(tokens[:-1]))


def test_calls_fit_their_tool(demo: tuple[Any, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": PERSON}}]
    enforce = Vocabulary(demo[1]).calls(tools, ("<tool_call>", "</tool_call>"), several=False, prompt_tokens=0)
    text = written(demo, enforce, seed=5).strip()
    assert text.startswith("<tool_call>")
    assert text.endswith("</tool_call>")
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call["name"] == "add"
    assert call["arguments"].keys() == {"name", "age"}


def test_with_a_schema_beside_tools_an_answer_is_calls_or_fits_it(demo: tuple[Any, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": PERSON}}]
    schema = json.dumps({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"],
                         "additionalProperties": False})  # fmt: skip
    found = set()
    for seed in range(12):
        enforce = Vocabulary(demo[1]).calls(
            tools, ("<tool_call>", "</tool_call>"), several=False, prompt_tokens=0, schema=schema
        )
        text = written(demo, enforce, seed).strip()
        assert enforce.problem is None
        if text.startswith("<tool_call>"):
            call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            assert call["arguments"].keys() == {"name", "age"}
            found.add("call")
        else:
            assert json.loads(text)["ok"] in (True, False)
            found.add("answer")
    assert found == {"call", "answer"}
    with pytest.raises(RequestInvalid, match="cannot be enforced") as caught:
        Vocabulary(demo[1]).calls(tools, ("<a>", "</a>"), several=True, prompt_tokens=0, schema='{"not": {}}')
    assert caught.value.param == "response_format"


def test_a_tool_s_schema_may_refer_to_parts_of_itself(demo: tuple[Any, Any]) -> None:
    parameters = {
        "type": "object",
        "properties": {"who": {"$ref": "#/$defs/Person"}},
        "required": ["who"],
        "$defs": {"Person": PERSON},
    }
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in ("a", "b")]
    assert Vocabulary(demo[1]).calls(tools, ("<a>", "</a>"), several=True, prompt_tokens=0)


def test_a_tool_whose_schema_cannot_be_enforced_is_named_so(demo: tuple[Any, Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]
    with pytest.raises(RequestInvalid, match="cannot be enforced"):
        Vocabulary(demo[1]).calls(tools, ("<a>", "</a>"), several=True, prompt_tokens=0)


# -- what earlier requests leave ---------------------------------------------------------------------------------------


def chat(number: int, *texts: str, max_tokens: int = 8) -> Generate:
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]
    return Generate(request=number, messages=messages, max_tokens=max_tokens)


def test_a_growing_conversation_is_not_computed_again(engine: Engine, demo: tuple[Any, Any]) -> None:
    (first,) = run(engine, chat(1, QUESTION))
    (second,) = run(engine, chat(2, QUESTION, first.text, "And then?"))
    assert isinstance(first.end, Finished)
    assert isinstance(second.end, Finished)
    assert first.end.cached_tokens == 0
    assert second.end.cached_tokens >= first.end.prompt_tokens
    fresh = run(Engine(*demo, prompt_cache=0), chat(3, QUESTION, first.text, "And then?"))[0]
    assert isinstance(fresh.end, Finished)
    assert fresh.end.cached_tokens == 0
    assert second.text == fresh.text


def test_the_same_prompt_twice_computes_one_token(engine: Engine) -> None:
    (first,), (second,) = run(engine, ask(1)), run(engine, ask(2))
    assert isinstance(second.end, Finished)
    assert second.end.cached_tokens == second.end.prompt_tokens - 1
    assert second.text == first.text


def test_several_requests_grow_from_one(engine: Engine) -> None:
    (first,) = run(engine, chat(1, QUESTION))
    second, third = run(engine, chat(2, QUESTION, first.text, "More!"), chat(3, QUESTION, first.text, "Less!"))
    again = run(engine, chat(4, QUESTION, first.text, "More!"))[0]
    assert isinstance(second.end, Finished)
    assert isinstance(third.end, Finished)
    assert min(second.end.cached_tokens, third.end.cached_tokens) > 0
    assert again.text == second.text


def test_what_a_cancelled_request_has_computed_stays(engine: Engine) -> None:
    engine.submit(ask(1, max_tokens=100))
    for _ in range(6):
        engine.step()
    engine.cancel(1)
    (answer,) = run(engine, ask(2))
    assert isinstance(answer.end, Finished)
    assert answer.end.cached_tokens == answer.end.prompt_tokens - 1


def test_a_kept_cache_does_not_hold_on_to_those_that_ran_beside_it(demo: tuple[Any, Any]) -> None:
    engine = Engine(*demo, prompt_cache=1 << 30)
    prompts = [Generate(request=n, tokens=[5 + n] * 700, max_tokens=1) for n in range(6)]
    mx.clear_cache()
    before = mx.get_active_memory()
    run(engine, *prompts)
    mx.clear_cache()
    assert engine._kept.size > 0
    assert mx.get_active_memory() - before < 1.5 * engine._kept.size
