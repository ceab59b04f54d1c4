"""Chat messages as a prompt, by the model's own template.

Raw text is the business of whoever has it, lengths that of ``expertd.worker.prompts``; what an answer consists of is
``expertd.worker.channels``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from expertd.protocol.errors import ParameterUnsupported, RequestInvalid

__all__ = ["encode_chat", "encode_rendered", "render_chat"]

SET_HERE = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "raise_exception", "strftime_now"}
)
"""What a template is told, or may call, that no request can set as a variable."""


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The prompt of a conversation, at least one token.

    Raises:
        RequestInvalid: as ``render_chat``.
    """
    return encode_rendered(tokenizer, render_chat(tokenizer, messages))


def encode_rendered(tokenizer: Any, text: str) -> list[int]:
    """The tokens of what a template has made, or of a part of it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    goes_on: bool = False,
    hints: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a conversation as text, which is not empty.

    A system message that is not the first is a user's where the template does not take it: many refuse it, and some
    leave it out without a word.

    Args:
        tools: what may be called, as OpenAI describes tools.
        variables: further variables of the template; that nothing should be thought is taken from any model.
        goes_on: the answer is the rest of the last message.
        hints: variables that the template is told if it knows them.
    Raises:
        RequestInvalid: the model has no template, or it refuses the messages.
        ParameterUnsupported: the template knows no tools, or a variable is none of its own; names it.
    """
    if not tokenizer.has_chat_template:
        raise RequestInvalid("the model's tokenizer has no chat template, so it takes no chat messages")
    if not all(isinstance(message, Mapping) for message in messages):
        raise RequestInvalid("each message of a conversation has to be an object", param="messages")
    if tools and not tokenizer.has_tool_calling:
        raise ParameterUnsupported("this model's chat template knows no tools; leave them out", param="tools")
    known = _variables(tokenizer)
    more: dict[str, Any] = {"tools": list(tools)} if tools else {}
    for name, value in (variables or {}).items():
        if name in SET_HERE:
            raise ParameterUnsupported(f"'{name}' is not a request's to set; leave it out", param=name)
        if name in known or (name == "enable_thinking" and tokenizer.has_thinking):
            more[name] = value
        elif name != "enable_thinking" or value is not False:
            raise ParameterUnsupported(f"this model's chat template knows no '{name}'; leave it out", param=name)
    more = {name: value for name, value in (hints or {}).items() if name in known} | more
    more |= {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    messages = [_with_objects(message) for message in messages]
    said = messages if _takes_all(tokenizer, messages, more) else [messages[0], *map(_of_user, messages[1:])]
    try:
        prompt = str(tokenizer.apply_chat_template(said, tokenize=False, **more))
    except Exception as error:
        # A template is a program of the model's author: it may raise anything, about what the messages contain.
        raise RequestInvalid(f"the model's chat template refused the messages ({error})", param="messages") from error
    if not prompt:
        raise RequestInvalid("the model's chat template made no text of the messages", param="messages")
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
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return call  # it was cut off, or has half a character: most templates take a text too
    return {**call, "function": {**function, "arguments": arguments}}


def _takes_all(tokenizer: Any, messages: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> bool:
    """Whether the template has a place for each system message behind the first message."""
    late = [message for message in messages[1:] if message.get("role") == "system"]
    if not late:
        return True
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **more)
    except Exception:
        return False  # If it was for another reason, it is raised again, and told.
    return all(str(message.get("content") or "").strip() in text for message in late)


def _of_user(message: Mapping[str, Any]) -> dict[str, Any]:
    """``message``, or the same as a user's if it is the system's."""
    return {**message, "role": "user"} if message.get("role") == "system" else dict(message)


def _variables(tokenizer: Any) -> frozenset[str]:
    """What the tokenizer's template, or all of them, can be told."""
    template = getattr(tokenizer, "chat_template", None)
    several = template.values() if isinstance(template, dict) else [template]
    return frozenset().union(*(_variables_of(one) for one in several if isinstance(one, str)))


@lru_cache(maxsize=8)
def _variables_of(template: str) -> frozenset[str]:
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # transformers knows one more tag, which marks what the assistant says.
        parsed = environment.parse(re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template))
    except TemplateSyntaxError:
        return frozenset()  # Nothing can be made with it, which whoever tries is told.
    return frozenset(find_undeclared_variables(parsed))
