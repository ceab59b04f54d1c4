"""The prompts of requests: tokens out of chat messages, text, or tokens; and whether they fit the model's context.

How messages become text is ``expertd.worker.template``.  What is far too long is refused before tokens are made of all
of it, because that takes seconds and much memory.
"""

from __future__ import annotations

from typing import Any

from expertd.protocol.errors import ContextLengthExceeded, RequestInvalid
from expertd.protocol.messages import Generate
from expertd.worker.template import encode_rendered, render_chat

__all__ = ["Prompts"]

CHARACTERS = 4
"""Of a token, more or less.  A text of more than ``FAR`` contexts by this measure is counted in pieces first."""
FAR = 2
"""So many contexts are far too long, however the text is cut: tokens that end elsewhere at a cut do not matter then."""
PIECE = 1 << 15
"""Characters that are counted at a time."""


class Prompts:
    """Those of one tokenizer.  Any thread may ask: nothing is kept."""

    def __init__(self, tokenizer: Any, context: int) -> None:
        """``context``: longest prompt and answer together, in tokens."""
        self._tokenizer, self._context = tokenizer, context

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are."""
        return len(self._tokenizer._tokenizer)

    def encode(self, message: Generate) -> list[int]:
        """The tokens of a request's prompt, at least one.

        Raises:
            RequestInvalid: there are none, or no tokens can be made of it.
            ContextLengthExceeded: it is far too long, so that nothing was made of it.
        """
        if message.tokens is not None:
            self.check_tokens(message.tokens, "prompt")
            prompt = list(message.tokens)
        elif message.text is not None:
            self._check_far(message.text, "prompt")
            prompt = list(self._tokenizer.encode(message.text))
        else:
            text = render_chat(
                self._tokenizer, message.messages or [], message.tools, message.template, message.goes_on, message.hints
            )
            self._check_far(text, "messages")
            prompt = encode_rendered(self._tokenizer, text)
        if not prompt:
            raise RequestInvalid("the prompt has no tokens", param=_origin(message))
        return prompt

    def check_tokens(self, tokens: Any, param: str) -> None:
        """Whether the model has all of these tokens.

        Raises:
            RequestInvalid: one is unknown; names it.
        """
        size = self.vocabulary_size
        unknown = next((token for token in tokens if token >= size), None)
        if unknown is not None:
            raise RequestInvalid(f"the model has no token {unknown}", param=param)

    def room(self, message: Generate, tokens: int) -> int:
        """How many tokens the answer to a prompt of ``tokens`` may have: at most what is asked for.

        The sentences begin as those of the vendors, by which agents know that they have to shorten a conversation.

        Raises:
            ContextLengthExceeded: none, or fewer than are asked for.
        """
        room = self._context - tokens
        if room < 1:
            raise self._too_long(tokens, "", _origin(message))
        if message.max_tokens is not None and message.max_tokens > room:
            raise ContextLengthExceeded(
                f"input length and `max_tokens` exceed context limit: {tokens} + {message.max_tokens} > "
                f"{self._context}; this model's maximum context length is {self._context} tokens: shorten the prompt, "
                "or lower max_tokens",
                param="max_tokens" if message.max_tokens >= self._context else _origin(message),
            )
        return message.max_tokens or room

    def _check_far(self, text: str, param: str) -> None:
        """Refuse what is so long that the number of its tokens does not matter."""
        most = FAR * self._context
        if len(text) <= CHARACTERS * most:
            return
        tokens = 0
        for place in range(0, len(text), PIECE):
            tokens += len(encode_rendered(self._tokenizer, text[place : place + PIECE]))
            if tokens > most:
                raise self._too_long(tokens, f", and only the first {place + PIECE} characters were counted", param)

    def _too_long(self, tokens: int, more: str, param: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"prompt is too long: {tokens} tokens > {self._context - 1} maximum{more}; this model's maximum context "
            f"length is {self._context} tokens: shorten the prompt",
            param=param,
        )


def _origin(message: Generate) -> str:
    """What of the request its prompt was made of."""
    return "prompt" if message.messages is None else "messages"
