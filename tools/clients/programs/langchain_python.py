"""langchain-openai."""

import os
from typing import Literal

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url, model = os.environ["EXPERTD_URL"], os.environ["EXPERTD_MODEL"]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=96, temperature=0)
question = os.environ["EXPERTD_QUESTION"]
assert chat.invoke(question).content
print("plain", flush=True)

assert "".join(part.content for part in chat.stream(question))
print("streamed", flush=True)


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather in a city."""
    return city


bound = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
assert bound.invoke(question).tool_calls[0]["args"]["city"] in ("Oslo", "Rome")
parts = list(bound.stream(question))
assert "".join(piece["args"] or "" for part in parts for piece in part.tool_call_chunks).startswith("{")
print("tools", flush=True)
