"""Chat messages as the tokens of a prompt, by the model's own template.

Raw text is the business of whoever has it; what an answer consists of is ``expertd.worker.channels``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from expertd.protocol.errors import ParameterUnsupported, RequestInvalid


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    goes_on: bool = False,
    hints: Mapping[str, Any] | None = None,
) -> list[int]:
    """The prompt of a conversation, at least one token.

    Args:
        tools: what may be called, as OpenAI describes tools.
        variables: further variables of the template; that nothing should be thought is taken from any model.
        goes_on: the answer is the rest of the last message.
        hints: variables that the template is told if it knows them.
    Raises:
        RequestInvalid: the model has no template, or it refuses the messages.
        ParameterUnsupported: the template knows no tools, or not one of the variables; names it.
    """
    if not tokenizer.has_chat_template:
        raise RequestInvalid("the model's tokenizer has no chat template, so it takes no chat messages")
    if tools and not tokenizer.has_tool_calling:
        raise ParameterUnsupported("this model's chat template knows no tools; leave them out", param="tools")
    template = str(getattr(tokenizer, "chat_template", "") or "")
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    for name, value in (variables or {}).items():
        known = name in template or (name == "enable_thinking" and tokenizer.has_thinking)
        if not known and not (name == "enable_thinking" and value is False):
            raise ParameterUnsupported(f"this model's chat template knows no '{name}'; leave it out", param=name)
        if known:
            more[name] = value
    more = {name: value for name, value in (hints or {}).items() if name in template} | more
    more |= {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    try:
        prompt = list(tokenizer.apply_chat_template([_with_objects(message) for message in messages], **more))
    except Exception as error:
        # A template is a program of the model's author: it may raise anything, about what the messages contain.
        raise RequestInvalid(f"the model's chat template refused the messages ({error})", param="messages") from error
    if not prompt:
        raise RequestInvalid("the model's chat template made no tokens of the messages", param="messages")
    return prompt


def _with_objects(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with the arguments of its calls as objects, which is how templates take them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    if not isinstance(function["arguments"], str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call  # it was cut off: most templates take a text too
    return {**call, "function": {**function, "arguments": arguments}}
