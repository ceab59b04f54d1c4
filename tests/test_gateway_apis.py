"""Every API of the gateway as its users meet it: real processes, and the vendors' own clients."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from tests.gateway_stage import Served, serving_alone

DEMO = Path(__file__).parents[1] / "models" / "demo"
QUESTION = "What is the module socket for?"
"""The demo model answers it and stops."""
GREEDY = {"temperature": 0}
"""A parameter that Anthropic's client does not have any more."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving_alone(DEMO) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.port}", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def said(served: Served) -> str:
    """What the model answers to QUESTION."""
    with served.client() as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0
        )
        assert answer.choices[0].finish_reason == "stop"
        return str(answer.choices[0].message.content)


# -- chat completions and completions ----------------------------------------------------------------------------------


def test_several_answers_with_seeds_and_log_probabilities(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": QUESTION}], max_tokens=8, **more
        )

    first, again = (ask(seed=1, n=2, temperature=1.0, logprobs=True, top_logprobs=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert texts[0] != texts[1]
    for choice in first.choices:
        assert len(choice.logprobs.content) == 8
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    assert first.usage.completion_tokens == 16
    streamed = {0: "", 1: ""}
    for chunk in ask(seed=1, n=2, temperature=1.0, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts


def test_a_schema_is_kept_to_in_a_stream_too(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}},
        "required": ["name"],
        "additionalProperties": False,
    }
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": QUESTION}],
        response_format={"type": "json_schema", "json_schema": {"name": "named", "schema": schema, "strict": True}},
        stream=True,
        max_tokens=100,
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text).keys() == {"name"}


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": QUESTION}],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}},
        )
    assert caught.value.param == "response_format"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_tools_are_refused_where_the_template_knows_none(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": QUESTION}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert (caught.value.param, caught.value.code) == ("tools", "parameter_unsupported")


def test_a_prompt_in_and_text_out(served: Served) -> None:
    def ask(**fields: Any) -> tuple[int, Any]:
        body = json.dumps({"prompt": "def f(", "max_tokens": 6} | fields).encode()
        return served.request("POST", "/generate", body)[::2]

    status, whole = ask()
    assert status == 200
    assert {name: whole[name] for name in ("model", "reason", "completion_tokens")} == {
        "model": "demo",
        "reason": "length",
        "completion_tokens": 6,
    }
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        body = json.dumps({"prompt": "def f(", "max_tokens": 6, "stream": True}).encode()
        head = f"POST /generate HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        stream = connection.makefile().read().split("\n\n")
    events = [json.loads(event.partition("data: ")[2]) for event in stream if "{" in event]
    assert "".join(event.get("text", "") for event in events) == whole["text"]
    assert events[-1]["completion_tokens"] == 6
    assert stream[-2:] == ["data: [DONE]", ""]
    for fields, param in ({"prompt": 5}, "prompt"), ({"n": 2}, "n"), ({"messages": []}, "messages"):
        status, refused = ask(**fields)
        assert (status, refused["error"]["param"]) == (400, param)


@pytest.mark.parametrize("depth", [*range(940, 1000, 3)])
def test_a_body_that_is_nested_deeply_takes_nobodys_place(served: Served, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    message = '{"role": "user", "content": "a"}'
    body = f'{{"model": "demo", "messages": [{message}], "max_tokens": 1, "chat_template_kwargs": {{"a": {nested}}}}}'
    status, _, _ = served.request("POST", "/v1/chat/completions", body.encode())
    assert status in (200, 400)
    health = served.request("GET", "/health")[2]["models"]["demo"]
    assert (health["running"], health["waiting"]) == (0, 0)


def test_a_text_that_no_message_takes_is_too_large(served: Served) -> None:
    body = json.dumps({"prompt": "a" * ((1 << 24) + 1)}).encode()
    status, _, answer = served.request("POST", "/generate", body)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_raw_completions_of_text_and_tokens(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="demo", prompt=["def f(", [5, 6]], max_tokens=6, temperature=0, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 6
    stream = client.completions.create(model="demo", prompt="def f(", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_a_token_that_the_model_does_not_have(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no token 999999"):
        client.completions.create(model="demo", prompt=[999_999])


def test_what_is_cached_is_told(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "How do I open a file for reading?"}]
    answers = [client.chat.completions.create(model="demo", messages=messages, max_tokens=4) for _ in range(2)]
    details = [answer.usage.prompt_tokens_details for answer in answers if answer.usage is not None]
    assert details[1] is not None
    assert answers[1].usage is not None
    assert details[1].cached_tokens == answers[1].usage.prompt_tokens - 1


@pytest.mark.parametrize("path", ["embeddings", "images/generations", "audio/speech", "nothing"])
def test_what_is_not_offered_is_said_so(served: Served, client: openai.OpenAI, path: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.post(f"/{path}", body={}, cast_to=object)
    assert caught.value.code == "route_not_found"


# -- responses ---------------------------------------------------------------------------------------------------------


def test_a_response_and_one_that_goes_on_from_it(client: openai.OpenAI, said: str) -> None:
    first = client.responses.create(model="demo", input=QUESTION, temperature=0, metadata={"a": "b"})
    assert (first.status, first.output_text, first.metadata) == ("completed", said, {"a": "b"})
    assert first.usage is not None
    second = client.responses.create(
        model="demo", input="And then?", previous_response_id=first.id, temperature=0, max_output_tokens=4
    )
    assert second.status == "incomplete"
    assert second.incomplete_details is not None
    assert second.incomplete_details.reason == "max_output_tokens"
    assert second.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens
    messages: list[Any] = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And then?"},
    ]
    chat = client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=4)
    assert second.output_text == chat.choices[0].message.content


def test_responses_are_kept_looked_at_and_forgotten(client: openai.OpenAI) -> None:
    made = client.responses.create(model="demo", input=QUESTION, max_output_tokens=2)
    assert client.responses.retrieve(made.id).output_text == made.output_text
    (item,) = client.responses.input_items.list(made.id)
    assert item.to_dict()["content"] == [{"type": "input_text", "text": QUESTION}]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(made.id)
    assert caught.value.code == "response_not_found"
    unkept = client.responses.create(model="demo", input=QUESTION, max_output_tokens=2, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.create(model="demo", input="And?", previous_response_id=unkept.id)
    assert caught.value.param == "previous_response_id"


def test_a_streamed_response_has_its_events_in_their_order(client: openai.OpenAI, said: str) -> None:
    with client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == said
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert client.responses.retrieve(final.id).output_text == said


def test_what_a_response_cannot_be_asked_for_is_named(client: openai.OpenAI) -> None:
    for name, value in {"background": True, "tools": [{"type": "web_search"}], "conversation": "c"}.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(model="demo", input=QUESTION, **{name: value})  # type: ignore[call-overload]
        assert str(caught.value.param).startswith(name)


def test_a_response_that_has_ended_is_neither_streamed_again_nor_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(model="demo", input=QUESTION, max_output_tokens=2)
    with pytest.raises(openai.BadRequestError, match="cannot be streamed again") as caught:
        client.responses.retrieve(made.id, stream=True)
    assert caught.value.param == "stream"
    with pytest.raises(openai.BadRequestError, match="only a response in the background can be cancelled"):
        client.responses.cancel(made.id)


def test_a_response_that_was_never_made_is_not_there_whatever_is_asked_of_it(client: openai.OpenAI) -> None:
    asks: list[Any] = [
        lambda: client.responses.retrieve("resp_1"),
        lambda: client.responses.retrieve("resp_1", stream=True),
        lambda: client.responses.delete("resp_1"),
        lambda: client.responses.cancel("resp_1"),
        lambda: client.responses.input_items.list("resp_1"),
    ]
    for ask in asks:
        with pytest.raises(openai.NotFoundError, match="there is no response 'resp_1'"):
            ask()


def test_what_is_not_offered_of_responses_and_chats_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/responses/compact is not offered here"):
        client.responses.compact(model="demo")
    with pytest.raises(openai.NotFoundError, match="chat completions are not kept, responses are"):
        client.chat.completions.retrieve("chatcmpl-1")


# -- Anthropic's messages ----------------------------------------------------------------------------------------------


def test_a_message(claude: anthropic.Anthropic, said: str) -> None:
    answer = claude.messages.create(
        model="demo", max_tokens=100, messages=[{"role": "user", "content": QUESTION}], extra_body=GREEDY
    )
    assert [block.to_dict() for block in answer.content] == [{"type": "text", "text": said}]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert answer.usage.output_tokens > 0


def test_a_message_says_why_it_ended(claude: anthropic.Anthropic, said: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    short = claude.messages.create(model="demo", max_tokens=2, messages=messages, extra_body=GREEDY)
    assert short.stop_reason == "max_tokens"
    stop = said[4:8]
    stopped = claude.messages.create(
        model="demo", max_tokens=100, messages=messages, extra_body=GREEDY, stop_sequences=[stop]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert stopped.content[0].to_dict()["text"] == said[: said.index(stop)]


def test_a_streamed_message_has_its_events_in_their_order(claude: anthropic.Anthropic, said: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with claude.messages.stream(model="demo", max_tokens=100, messages=messages, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream if event.type not in ("text",)]
        final = stream.get_final_message()
    assert final.content[0].to_dict()["text"] == said
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens > 0
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_tokens_are_counted(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    counted = claude.messages.count_tokens(model="demo", messages=messages)
    answer = claude.messages.create(model="demo", max_tokens=1, messages=messages)
    used = answer.usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_a_line_that_changes_with_each_request_breaks_no_cache(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for number in range(2):
        system: list[Any] = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=1; cch={number};"},
            {"type": "text", "text": "Answer in one sentence.", "cache_control": {"type": "ephemeral"}},
        ]
        answer = claude.messages.create(model="demo", max_tokens=2, messages=messages, system=system)
    assert answer.usage.input_tokens == 1
    assert (answer.usage.cache_read_input_tokens or 0) > 10


def test_what_means_nothing_here_is_left_alone_and_the_rest_is_named(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    counted = claude.messages.count_tokens(
        model="demo", messages=messages, extra_body={"speed": "standard", "user_profile_id": "u", "workspace_id": "w"}
    )
    assert counted == claude.messages.count_tokens(model="demo", messages=messages)
    with pytest.raises(anthropic.BadRequestError, match="'speed' is not supported"):
        claude.messages.count_tokens(model="demo", messages=messages, extra_body={"speed": "fast"})


def test_errors_are_written_as_anthropic_writes_them(claude: anthropic.Anthropic) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="nobody", max_tokens=1, messages=messages)
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "the model 'nobody' is not served here; 'demo' is [model_not_found]",
        },
    }
    with pytest.raises(anthropic.BadRequestError, match="image"):
        source = {"type": "base64", "media_type": "image/png", "data": ""}
        claude.messages.create(
            model="demo",
            max_tokens=1,
            messages=[{"role": "user", "content": [{"type": "image", "source": source}]}],  # type: ignore[list-item]
        )


def test_an_answer_that_was_begun_goes_on(claude: anthropic.Anthropic, said: str) -> None:
    begun, rest = said[: said.index(" module")], said[said.index(" module") :]
    messages: list[Any] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": begun}]
    answer = claude.messages.create(model="demo", max_tokens=100, messages=messages, extra_body=GREEDY)
    assert answer.content[0].to_dict()["text"].strip() == rest.strip()


# -- what clients' libraries send back, and what they are told ---------------------------------------------------------


class Named(pydantic.BaseModel):
    name: Literal["socket", "module"]


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # openai's own, when it sends its message back
def test_what_was_parsed_goes_back_as_it_came(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    for _ in range(2):
        answer = client.chat.completions.parse(model="demo", messages=messages, response_format=Named, max_tokens=200)
        assert isinstance(answer.choices[0].message.parsed, Named)
        messages += [answer.choices[0].message, {"role": "user", "content": "Again."}]
    told: list[Any] = [{"role": "user", "content": QUESTION}]
    response = client.responses.parse(model="demo", input=told, text_format=Named, max_output_tokens=200)
    assert isinstance(response.output_parsed, Named)
    assert client.responses.create(model="demo", input=[*told, *response.output], max_output_tokens=1).output


def test_items_are_referred_to_as_the_ai_sdk_does(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input=QUESTION, max_output_tokens=4)
    more: list[Any] = [{"role": "user", "content": "Again."}]
    (asked,) = client.responses.input_items.list(first.id).data
    references: list[Any] = [{"type": "item_reference", "id": id} for id in (asked.id, first.output[0].id)]
    again, other = (
        client.responses.create(model="demo", max_output_tokens=1, **given)
        for given in ({"input": [*references, *more]}, {"input": more, "previous_response_id": first.id})
    )
    assert again.usage.input_tokens == other.usage.input_tokens
    assert len(client.responses.input_items.list(again.id).data) == 3
    for response in (first, again):
        client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError, match=first.output[0].id):
        client.responses.create(model="demo", input=[references[1], *more], store=False)


def test_errors_of_the_worker_name_what_was_sent(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError, match=r"knows no 'reasoning\.effort'") as caught:
        client.responses.create(model="demo", input=QUESTION, reasoning={"effort": "low"})
    assert caught.value.param == "reasoning.effort"
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as caught:
        client.responses.create(
            model="demo", input=QUESTION, text={"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}
        )
    assert caught.value.param == "text.format"
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with pytest.raises(anthropic.BadRequestError, match="knows no 'thinking'"):
        claude.messages.create(
            model="demo", max_tokens=1, messages=messages, thinking={"type": "enabled", "budget_tokens": 1024}
        )
    for name in ("message", "add_generation_prompt"):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="demo", messages=messages, extra_body={"chat_template_kwargs": {name: False}}
            )
        assert caught.value.param == f"chat_template_kwargs.{name}"


# -- what nobody should send -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": [[5], [1 << 70]]}),
        ("completions", {"prompt": "a", "max_tokens": 1 << 70}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "logit_bias": {"9" * 5000: 1}}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_k": 1 << 70}),
        ("responses", {"input": [{"type": "reasoning", "content": 5}]}),
        ("responses", {"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": 5}]}]}),
        ("responses", {"metadata": {"a": "b", "c": [[]]}, "stream": True}),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_a_400(served: Served, path: str, body: dict[str, Any]) -> None:
    status, _, answer = served.request("POST", f"/v1/{path}", json.dumps({"model": "demo"} | body).encode())
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
    assert answer["error"]["param"] is not None


def test_pages_of_other_sites_are_refused(served: Served) -> None:
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    for origin, expected in (("http://evil.example", 400), (f"http://localhost:{served.port}", 200), ("null", 400)):
        status, _, _ = served.request("POST", "/v1/chat/completions", body, {"Origin": origin})
        assert status == expected, origin


def test_a_model_that_cannot_think_takes_it_that_it_should_not(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    assert client.chat.completions.create(model="demo", messages=messages, max_tokens=1, reasoning_effort="none")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=messages, max_tokens=1, reasoning_effort="low")
    assert caught.value.param == "reasoning_effort"
