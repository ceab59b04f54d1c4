"""anthropic for Python: messages, tools."""

import os

import anthropic

url = os.environ["EXPERTD_URL"].removesuffix("/v1")
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
messages = [{"role": "user", "content": os.environ["EXPERTD_QUESTION"]}]
ask = {"model": os.environ["EXPERTD_MODEL"], "messages": messages, "max_tokens": 16}
answer = client.messages.create(**ask)
assert answer.content[0].text and answer.usage.output_tokens
print("plain", flush=True)

with client.messages.stream(**ask) as stream:
    assert "".join(stream.text_stream)
    assert stream.get_final_message().usage.input_tokens
print("streamed", flush=True)

schema = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip
ask |= {"tools": [{"name": "weather", "input_schema": schema}], "max_tokens": 96}
ask |= {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}, "extra_body": {"temperature": 0}}
with client.messages.stream(**ask) as stream:
    streamed = stream.get_final_message()
for answer in (client.messages.create(**ask), streamed):
    (use,) = answer.content
    assert use.type == "tool_use" and use.input["city"] in ("Oslo", "Rome")
print("tools", flush=True)
