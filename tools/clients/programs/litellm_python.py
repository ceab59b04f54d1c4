"""LiteLLM, as a library."""

import json
import os

import litellm

ask = {"model": f"openai/{os.environ['EXPERTD_MODEL']}", "api_base": os.environ["EXPERTD_URL"], "api_key": "none",
       "max_tokens": 16, "messages": [{"role": "user", "content": os.environ["EXPERTD_QUESTION"]}]}  # fmt: skip
assert litellm.completion(**ask).choices[0].message.content
print("plain", flush=True)

assert "".join(part.choices[0].delta.content or "" for part in litellm.completion(stream=True, **ask))
print("streamed", flush=True)

function = {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
    "additionalProperties": False}}  # fmt: skip
ask |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required", "max_tokens": 96,
        "temperature": 0}  # fmt: skip
call = litellm.completion(**ask, parallel_tool_calls=False).choices[0].message.tool_calls[0]
assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
print("tools", flush=True)
