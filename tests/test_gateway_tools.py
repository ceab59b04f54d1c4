"""Calls of tools, from an HTTP request to the wire's events, over a model whose template knows tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.gateway_stage import Served, serving_alone
from tools.tool_model import DEMO, write_tool_model

ASK: list[Any] = [{"role": "user", "content": "Is it warm in Oslo?"}]
WEATHER = {
    "name": "weather",
    "description": "The weather somewhere.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
CLOCK = {
    "name": "clock",
    "parameters": {"type": "object", "properties": {"zone": {"enum": ["utc"]}}, "required": ["zone"],
                   "additionalProperties": False},
}  # fmt: skip
TOOLS: list[Any] = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]
FLAT: list[Any] = [{"type": "function", **tool} for tool in (WEATHER, CLOCK)]
CLAUDES: list[Any] = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in (WEATHER, CLOCK)]
MODEL = "demo-tools"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving_alone(write_tool_model, "--kv-bits", "8") as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.port}", api_key="none", max_retries=0) as client:
        yield client


def fits(name: str | None, arguments: Any) -> bool:
    """Whether a call is one of a tool above, with arguments that its schema allows."""
    if name == "weather":
        return set(arguments) == {"city", "days"} and arguments["city"] in ("Oslo", "Rome") and arguments["days"] < 4
    return name == "clock" and arguments == {"zone": "utc"}


def chat(client: openai.OpenAI, **options: Any) -> Any:
    given: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": TOOLS, "max_tokens": 96, "temperature": 0}
    return client.chat.completions.create(**(given | options))


def test_a_required_call_is_a_call(client: openai.OpenAI) -> None:
    choice = chat(client, tool_choice="required", parallel_tool_calls=False).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert call.id.startswith("call_")
    assert fits(call.function.name, json.loads(call.function.arguments))


@pytest.mark.parametrize("name", ["weather", "clock"])
@pytest.mark.parametrize("form", ["function", "allowed_tools"])
def test_a_named_tool_is_the_one_that_is_called(client: openai.OpenAI, name: str, form: str) -> None:
    named: dict[str, Any] = {"type": "function", "function": {"name": name}}
    if form == "allowed_tools":
        named = {"type": form, "allowed_tools": {"mode": "required", "tools": [named]}}
    answer = chat(client, tool_choice=named, parallel_tool_calls=False)
    assert [call.function.name for call in answer.choices[0].message.tool_calls] == [name]


def test_several_calls_come_where_they_may(client: openai.OpenAI) -> None:
    # Each call is as likely as its end: only how many there may be differs.
    choice = chat(client, tool_choice="required", max_tokens=200).choices[0]
    assert len(choice.message.tool_calls) >= 1
    assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)
    assert all(fits(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls)


def test_a_streamed_call_adds_up_to_the_whole_one(client: openai.OpenAI) -> None:
    whole = chat(client, tool_choice="required", parallel_tool_calls=False).choices[0].message.tool_calls[0]
    chunks = list(chat(client, tool_choice="required", parallel_tool_calls=False, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.index for call in deltas] == [0] * len(deltas)
    assert len(deltas) > 5, "the arguments come while they are written"
    first, *more = deltas
    assert (first.id is not None, {(call.id, call.function.name) for call in more}) == (True, {(None, None)})
    assert "".join(call.function.name or "" for call in deltas) == whole.function.name
    assert "".join(call.function.arguments or "" for call in deltas) == whole.function.arguments
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_numbers_of_any_size_and_calls_that_were_cut_off_go_back_to_the_model(client: openai.OpenAI) -> None:
    for arguments in ('{"days": 123456789012345678901234}', '{"city": "Os'):
        call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        said = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}]
        answer = chat(client, messages=[*said, {"role": "tool", "tool_call_id": "c1", "content": "?"}], max_tokens=1)
        assert answer.usage.prompt_tokens > len(arguments) // 4


def test_a_result_goes_back_to_the_model(client: openai.OpenAI) -> None:
    call = chat(client, tool_choice="required", parallel_tool_calls=False).choices[0].message
    said = [*ASK, call.to_dict(), {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "9 degrees"}]
    answer = chat(client, messages=said, tool_choice="none")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.choices[0].message.tool_calls is None
    assert answer.usage.prompt_tokens > len(ASK[0]["content"]) // 4


def test_responses_call_functions_too(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "input": ASK, "tools": FLAT, "parallel_tool_calls": False, "temperature": 0}
    clock = {"type": "function", "name": "clock"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [clock]}
    for choice in ("required", clock, allowed):
        (item,) = client.responses.create(**ask, tool_choice=choice).output
        assert item.type == "function_call"
        assert fits(item.name, json.loads(item.arguments))
        assert choice == "required" or item.name == "clock"
    events = list(client.responses.create(**ask, tool_choice="required", stream=True))
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 5
    assert "".join(deltas) == done.arguments
    assert fits(done.name, json.loads(done.arguments))


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}], ids=str)
def test_messages_use_tools(claude: anthropic.Anthropic, choice: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": CLAUDES, "max_tokens": 96, "tool_choice": choice}
    ask["extra_body"] = {"temperature": 0}
    answer = claude.messages.create(**ask)
    (block,) = answer.content
    assert (block.type, answer.stop_reason) == ("tool_use", "tool_use")
    assert fits(block.name, block.input)
    with claude.messages.stream(**ask) as stream:
        partial = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    (block,) = final.content
    assert block.type == "tool_use"
    assert len(partial) > 5
    assert json.loads("".join(partial)) == block.input
    assert fits(block.name, block.input)


def test_a_message_begins_with_how_long_its_prompt_is(claude: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "system": "Be brief.", "max_tokens": 2}
    counted = claude.messages.count_tokens(model=MODEL, messages=ASK, system="Be brief.").input_tokens
    for _ in range(2):
        with claude.messages.stream(**ask) as stream:
            begins = [event.message.usage for event in stream if event.type == "message_start"]
    (usage,) = begins
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted
    assert usage.input_tokens == 1, "the second time all but the last token is there already"


def test_what_claude_code_always_sends_is_taken(claude: anthropic.Anthropic) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": ASK, "max_tokens": 1, "output_config": {"effort": "high"}}
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    assert claude.messages.create(**ask, thinking={"type": "adaptive"}, extra_body={"context_management": edits})
    edits["edits"][0]["keep"] = "none"
    with pytest.raises(anthropic.BadRequestError, match="'context_management' is not supported"):
        claude.messages.create(**ask, extra_body={"context_management": edits})
    with pytest.raises(anthropic.BadRequestError, match=r"'output_config\.effort' has to be one of low"):
        claude.messages.create(model=MODEL, messages=ASK, max_tokens=1, output_config={"effort": "most"})  # type: ignore[typeddict-item]


def test_a_format_beside_tools_leaves_an_answer_or_calls(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"],
              "additionalProperties": False}  # fmt: skip
    named = {"type": "json_schema", "name": "n", "schema": schema}
    form = {"type": "json_schema", "json_schema": named}
    ask: dict[str, Any] = {"response_format": form, "parallel_tool_calls": False, "max_tokens": 200}
    (call,) = chat(client, **ask).choices[0].message.tool_calls
    assert fits(call.function.name, json.loads(call.function.arguments))
    # The model calls something wherever it may; so here it may not begin to.
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    never = {str(number): -100 for token, number in vocabulary.items() if token.startswith("<")}
    message = chat(client, **ask, logit_bias=never).choices[0].message
    assert message.tool_calls is None
    assert json.loads(message.content).keys() == {"warm"}
    flat: dict[str, Any] = {"tools": FLAT, "parallel_tool_calls": False, "text": {"format": named}, "temperature": 0}
    (item,) = client.responses.create(model=MODEL, input=ASK, max_output_tokens=200, **flat).output
    assert fits(item.name, json.loads(item.arguments))
    used = claude.messages.create(
        model=MODEL, messages=ASK, max_tokens=96, tools=CLAUDES, extra_body={"temperature": 0},
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )  # fmt: skip
    (block,) = used.content
    assert block.type == "tool_use"
    assert fits(block.name, block.input)


def test_several_system_messages_pass_a_template_that_takes_one(
    client: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    # As Codex does it, and agents that put a reminder in between.
    rules: list[Any] = [{"role": "developer", "content": "Use the shell."}, *ASK]
    two, one = (
        client.responses.create(model=MODEL, instructions=system, input=items, max_output_tokens=1)
        for system, items in (("You code.", rules), ("You code.\n\nUse the shell.", ASK))
    )
    assert two.usage.input_tokens == one.usage.input_tokens
    late: list[Any] = [*rules, {"role": "assistant", "content": "Yes."}, {"role": "system", "content": "Be brief."}]
    assert chat(client, messages=late, tools=[], max_tokens=1).choices
    counted = claude.messages.count_tokens(model=MODEL, messages=late[1:], system="You code.")
    asked: list[Any] = [*late[1:-1], {"role": "user", "content": "Be brief."}]
    assert counted == claude.messages.count_tokens(model=MODEL, messages=asked, system="You code.")


def test_a_choice_of_nothing_is_refused_everywhere(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    asks: list[Any] = [
        lambda: chat(client, tools=[], tool_choice="required"),
        lambda: client.responses.create(model=MODEL, input=ASK, tool_choice="required"),
        lambda: claude.messages.create(model=MODEL, messages=ASK, max_tokens=1, tool_choice={"type": "any"}),
    ]
    for ask in asks:
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError), match="there are no tools"):
            ask()


def test_beside_a_format_an_answer_is_calls_or_fits_it(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = chat(client, response_format=form, parallel_tool_calls=False, n=4, temperature=1, seed=1, max_tokens=300)
    for choice in answer.choices:
        if calls := choice.message.tool_calls:
            assert choice.message.content is None
            assert [fits(call.function.name, json.loads(call.function.arguments)) for call in calls] == [True]
        else:
            assert choice.finish_reason == "stop"
            assert json.loads(choice.message.content)["warm"] in (True, False)
    required = chat(client, response_format=form, parallel_tool_calls=False, tool_choice="required", max_tokens=300)
    assert required.choices[0].finish_reason == "tool_calls"
