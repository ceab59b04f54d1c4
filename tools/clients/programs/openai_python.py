"""openai for Python: chat completions, responses, tools."""

import json
import os

import openai

client = openai.OpenAI(base_url=os.environ["EXPERTD_URL"], api_key="none", max_retries=0)
question = os.environ["EXPERTD_QUESTION"]
ask = {"model": os.environ["EXPERTD_MODEL"], "messages": [{"role": "user", "content": question}], "max_tokens": 16}
answer = client.chat.completions.create(**ask)
assert answer.choices[0].message.content and answer.usage.completion_tokens
assert client.responses.create(model=ask["model"], input=question, max_output_tokens=16).output_text
print("plain", flush=True)

chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert chunks[-1].usage.completion_tokens
print("streamed", flush=True)

function = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
                   "additionalProperties": False},
}  # fmt: skip
ask |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "parallel_tool_calls": False}
ask |= {"max_tokens": 96, "temperature": 0}
(call,) = client.chat.completions.create(**ask).choices[0].message.tool_calls
assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
with client.chat.completions.stream(**ask) as stream:
    stream.until_done()
    (call,) = stream.get_final_completion().choices[0].message.tool_calls
assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
print("tools", flush=True)
