"""Chat messages as the tokens that a model's chat template makes of them."""

from __future__ import annotations

from typing import Any

from expertd.protocol.errors import RequestInvalid


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    """The prompt for the next answer to ``messages``, at least one token.

    Raises:
        RequestInvalid: there is no template, it refuses the messages, or it makes nothing of them.
    """
    if not tokenizer.has_chat_template:
        raise RequestInvalid("the model's tokenizer has no chat template, so it takes no chat messages")
    try:
        prompt = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    except Exception as error:
        # A template is a program of the model's author: it may raise anything, about what the messages contain.
        raise RequestInvalid(f"the model's chat template refused the messages ({error})", param="messages") from error
    if not prompt:
        raise RequestInvalid("the model's chat template made no tokens of the messages", param="messages")
    return prompt
