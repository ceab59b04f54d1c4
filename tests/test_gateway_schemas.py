"""What a real gateway answers is what OpenAI's published schemas say: whole bodies, and each event of a stream.

The document is a cut of OpenAI's OpenAPI document (MIT), which is not part of this repository.
"""

from __future__ import annotations

import http.client
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from expertd.protocol.paths import Home
from tests.gateway_stage import Served, serving, stop_daemon

DEMO = Path(__file__).parents[1] / "models" / "demo"
DOCUMENT = Path(__file__).parents[2] / "shared" / "openai-schemas.json"
MESSAGES = [{"role": "user", "content": "What is the module socket for?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"host": {"enum": ["a", "b"]}},
    "required": ["host"],
    "additionalProperties": False,
}
FUNCTION = {"name": "connect", "description": "Connects.", "parameters": PARAMETERS}
FORMAT = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
WITH_TOOLS = "{% if tools %}{# <tool_call> tool_call.name #}{{ tools | tojson }}\n{% endif %}"
"""What makes a template one of a model that calls tools as JSON."""

pytestmark = pytest.mark.skipif(not DOCUMENT.exists(), reason="OpenAI's schemas are not here")


def modern(schema: Any) -> Any:
    """A schema of the document as JSON Schema.

    It still has OpenAPI 3.0's ``nullable``; and what it says to be one of several (``oneOf``) overlaps where a
    discriminator chooses, which JSON Schema does not know.
    """
    if isinstance(schema, list):
        return [modern(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    names = {"oneOf": "anyOf"}
    found = {names.get(name, name): modern(value) for name, value in schema.items() if name != "nullable"}
    return {"anyOf": [found, {"type": "null"}]} if schema.get("nullable") is True else found


class Schemas:
    """The document's schemas."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.components: dict[str, Any] = modern(document["components"])
        # Of a stream's chunks the document only says that they look like the whole: there the reason is never null.
        # OpenAI's own chunks have null until the last one, and its libraries read that.
        chunk = json.loads(json.dumps(self.components["schemas"]["CreateCompletionResponse"]))
        reason = chunk["properties"]["choices"]["items"]["properties"]
        reason["finish_reason"] = {"anyOf": [reason["finish_reason"], {"type": "null"}]}
        self.components["schemas"]["CompletionChunk"] = chunk

    def check(self, name: str, body: Any) -> None:
        """Fail with what is wrong in ``body``."""
        schema = {"$ref": f"#/components/schemas/{name}", "components": self.components}
        wrong = [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(body)]
        assert not wrong, f"no {name}: {wrong} in {body}"

    def check_event(self, event: dict[str, Any]) -> None:
        """Check an event of a response's stream by the schema that its type has: ``anyOf`` would not say which."""
        names = [
            name
            for name, schema in self.components["schemas"].items()
            if (schema.get("properties") or {}).get("type", {}).get("enum") == [event["type"]]
            and "sequence_number" in schema["properties"]
        ]
        assert len(names) == 1, f"{names} are the schemas of {event['type']}"
        self.check(names[0], event)
        self.check("ResponseStreamEvent", event)


@pytest.fixture(scope="module")
def schemas() -> Schemas:
    return Schemas(json.loads(DOCUMENT.read_text()))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A gateway on the demo model, with a template that knows tools."""
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as root:
        home = Home(Path(root))
        home.prepare()
        model = Path(root) / "demo"
        shutil.copytree(DEMO, model)
        config = json.loads((model / "tokenizer_config.json").read_text())
        config["chat_template"] = WITH_TOOLS + config["chat_template"]
        (model / "tokenizer_config.json").write_text(json.dumps(config))
        try:
            with serving(home, model, "--alias", "gpt-4o") as served:
                yield served
        finally:
            stop_daemon(home)


def ask(served: Served, path: str, **fields: Any) -> dict[str, Any]:
    status, _, body = served.request("POST", path, json.dumps({"model": "demo", "temperature": 0} | fields).encode())
    assert status == 200, body
    return dict(body)


def events(served: Served, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    body = {"model": "demo", "temperature": 0, "stream": True} | fields
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    try:
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        lines = answer.read().decode().splitlines()
        assert answer.status == 200, lines
    finally:
        connection.close()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(one) for one in data if one != "[DONE]"]


CHATS: dict[str, dict[str, Any]] = {
    "until it ends": {},
    "cut short": {"max_tokens": 3},
    "several with log-probabilities": {"n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 4},
    "a call": {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required",
               "parallel_tool_calls": False},
    "a format": {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": FORMAT}}},
}  # fmt: skip


@pytest.mark.parametrize("asked", CHATS.values(), ids=CHATS)
def test_chat_completions(served: Served, schemas: Schemas, asked: dict[str, Any]) -> None:
    path = "/v1/chat/completions"
    whole = ask(served, path, messages=MESSAGES, **asked)
    schemas.check("CreateChatCompletionResponse", whole)
    if "tools" in asked:
        assert whole["choices"][0]["finish_reason"] == "tool_calls"
    chunks = events(served, path, messages=MESSAGES, stream_options={"include_usage": True}, **asked)
    for chunk in chunks:
        schemas.check("CreateChatCompletionStreamResponse", chunk)
    assert chunks[-1]["usage"] is not None
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(ends) == sorted(choice["finish_reason"] for choice in whole["choices"])


COMPLETIONS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "import ", "max_tokens": 4},
    "several with log-probabilities": {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "max_tokens": 3},
    "tokens": {"prompt": [1, 2, 3], "max_tokens": 2},
}


@pytest.mark.parametrize("asked", COMPLETIONS.values(), ids=COMPLETIONS)
def test_completions(served: Served, schemas: Schemas, asked: dict[str, Any]) -> None:
    schemas.check("CreateCompletionResponse", ask(served, "/v1/completions", **asked))
    chunks = events(served, "/v1/completions", stream_options={"include_usage": True}, **asked)
    for chunk in chunks:
        schemas.check("CompletionChunk", chunk)
    assert chunks[-1]["usage"]["completion_tokens"] > 0


RESPONSES: dict[str, dict[str, Any]] = {
    "until it ends": {"metadata": {"a": "b"}, "user": "me"},
    "cut short": {"max_output_tokens": 3, "instructions": "Be brief."},
    "log-probabilities": {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 3},
    "a call": {"tools": [{"type": "function", "strict": True, **FUNCTION}], "tool_choice": "required",
               "parallel_tool_calls": False},
    "a format": {"text": {"format": {"type": "json_schema", "name": "n", "schema": FORMAT}}},
}  # fmt: skip


@pytest.mark.parametrize("asked", RESPONSES.values(), ids=RESPONSES)
def test_responses(served: Served, schemas: Schemas, asked: dict[str, Any]) -> None:
    whole = ask(served, "/v1/responses", input=MESSAGES, **asked)
    schemas.check("Response", whole)
    _, _, kept = served.request("GET", f"/v1/responses/{whole['id']}")
    assert kept == whole
    _, _, items = served.request("GET", f"/v1/responses/{whole['id']}/input_items")
    for item in items["data"]:
        schemas.check("InputItem", item)
    told = events(served, "/v1/responses", input=MESSAGES, **asked)
    for event in told:
        schemas.check_event(event)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[-1]["response"]["status"] == whole["status"]
    assert [item["type"] for item in told[-1]["response"]["output"]] == [item["type"] for item in whole["output"]]


def test_a_response_needs_neither_input_nor_a_model(served: Served, schemas: Schemas) -> None:
    status, _, first = served.request("POST", "/v1/responses", b'{"max_output_tokens": 2}')
    assert (status, first["model"]) == (200, "demo")
    schemas.check("Response", first)
    second = ask(served, "/v1/responses", previous_response_id=first["id"], max_output_tokens=2)
    _, _, items = served.request("GET", f"/v1/responses/{second['id']}/input_items")
    assert (second["previous_response_id"], items["data"]) == (first["id"], [])


def test_models_and_their_aliases(served: Served, schemas: Schemas) -> None:
    _, _, listed = served.request("GET", "/v1/models")
    schemas.check("ListModelsResponse", listed)
    assert [model["id"] for model in listed["data"]] == ["demo", "gpt-4o"]
    for name in ("demo", "gpt-4o"):
        _, _, model = served.request("GET", f"/v1/models/{name}")
        schemas.check("Model", model)
        assert model["id"] == name
    answer = ask(served, "/v1/chat/completions", model="gpt-4o", messages=MESSAGES, max_tokens=1)
    assert answer["model"] == "demo"


def test_errors(served: Served, schemas: Schemas) -> None:
    for path, body in (
        ("/v1/chat/completions", b'{"model": "nobody", "messages": []}'),
        ("/v1/completions", b'{"model": "demo", "prompt": "", "suffix": "x"}'),
        ("/v1/responses", b'{"background": true}'),
        ("/v1/responses/compact", b"{}"),
        ("/v1/embeddings", b"{}"),
    ):
        status, _, refused = served.request("POST", path, body)
        assert status in (400, 404)
        schemas.check("ErrorResponse", refused)


def test_what_is_no_answer_is_told(schemas: Schemas) -> None:
    with pytest.raises(AssertionError, match="finish_reason"):
        schemas.check("CreateCompletionResponse", {"choices": [{"finish_reason": None, "index": 0, "text": ""}]})
    with pytest.raises(AssertionError, match="id"):
        schemas.check("Model", {"object": "model"})
