"""Answers that keep to a grammar: what may follow is worked out by llguidance, and everything else is made impossible.

Grammars of JSON schemas and of tool calls are all that is asked for; what a schema means, and which ones can be
enforced, is the library's business.  Also the exact bytes of tokens, which the library's tokenizer knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from expertd.protocol.errors import RequestInvalid

__all__ = ["Enforced", "Vocabulary"]

SPACE = r" ?|\n {0,32}"
"""Between the parts of JSON: a space, or a new line and its indentation.  With more a model may go on for ever."""
SPACED = {"x-guidance": {"whitespace_pattern": SPACE}}
"""That, as a part of a schema."""


class Vocabulary:
    """A tokenizer as llguidance takes it; made at first use, because that takes up to a second."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._found: LLTokenizer | None = None

    @property
    def _known(self) -> LLTokenizer:
        if self._found is None:
            try:
                ends = sorted(self._tokenizer.eos_token_ids)
                self._found = from_tokenizer(self._tokenizer._tokenizer, eos_token=ends)
            except Exception as error:
                raise RequestInvalid(
                    f"this model's tokenizer cannot be used for structured answers or logprobs ({error})"
                ) from error
        return self._found

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for."""
        return self._known.decode_bytes([token])

    def json(self, schema: str, prompt_tokens: int, after: tuple[int, ...] = ()) -> Enforced:
        """Have the answer be JSON that fits ``schema`` (itself JSON).

        Args:
            prompt_tokens: how many of the tokens so far are the prompt.
            after: the tokens that end the part of the answer before which nothing is enforced (its reasoning).
        Raises:
            RequestInvalid: the schema is none, or says what cannot be enforced; says what.
        """
        return self._enforced(self._json_grammar(schema), "response_format", prompt_tokens, after)

    def calls(
        self, tools: list[dict[str, Any]], markers: tuple[str, str], several: bool, prompt_tokens: int,
        after: tuple[int, ...] = (), schema: str | None = None,
    ) -> Enforced:  # fmt: skip
        """Have the answer be a call of one of ``tools``, or with ``several`` any number of calls, between ``markers``.

        For models that write a call as JSON with a name and arguments.

        Args:
            schema: the answer may also be JSON that fits it, instead of calls.
            prompt_tokens, after: as in ``json``, as are errors.
        """
        calls = {"anyOf": [_call_of(tool["function"], place) for place, tool in enumerate(tools)], **SPACED}
        begin, end = map(self._literal, markers)
        grammar = (
            f"start: call{'+' if several else ''}{' | answer' if schema is not None else ''}\n"
            f'call: {begin} "\\n" call_json "\\n" {end} "\\n"?\n'
            f"call_json: %json {json.dumps(calls)}\n"
        )
        if schema is not None:
            self._json_grammar(schema)  # what cannot be enforced of it is not for the tools to answer for
            grammar += f"answer: %json {json.dumps({**json.loads(schema), **SPACED})}\n"
        grammar = self._checked(LLMatcher.grammar_from_lark, grammar, "tools")
        return self._enforced(grammar, "tools", prompt_tokens, after)

    def _json_grammar(self, schema: str) -> str:
        make = partial(LLMatcher.grammar_from_json_schema, overrides={"whitespace_pattern": SPACE})
        return self._checked(make, schema, "response_format")

    def _literal(self, marker: str) -> str:
        """A marker in a grammar: the token itself if it is a special one, else its text."""
        tokens = self._known.tokenize_str(marker)
        return marker if len(tokens) == 1 and self._known.is_special_token(tokens[0]) else json.dumps(marker)

    def _checked(self, make: Callable[[str], str], text: str, param: str) -> str:
        """The grammar that ``make`` makes of ``text``, if it can be enforced."""
        try:
            grammar = make(text)
            problem = LLMatcher.validate_grammar(grammar, self._known)
        except ValueError as error:
            problem = str(error)
        if problem:
            raise RequestInvalid(f"the schema cannot be enforced: {problem.splitlines()[0]}", param=param)
        return grammar

    def _enforced(self, grammar: str, param: str, prompt_tokens: int, after: tuple[int, ...]) -> Enforced:
        return Enforced(LLMatcher(self._known, grammar, log_level=0), self._known, param, prompt_tokens, after)


def _call_of(function: dict[str, Any], place: int) -> dict[str, Any]:
    """The schema of a call of ``function``; what it refers to ("#/$defs/...") is looked for in its own parameters."""
    parameters = {"$id": f"urn:tool:{place}", **function["parameters"]}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


class Enforced:
    """One answer that keeps to a grammar, as a logits processor: it takes in what was chosen since the last call.

    Attributes:
        problem: why it cannot be enforced any further (what a schema costs shows only with what is written); the answer
            is cut off then, wherever it is, and must not be taken for one that fits.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: LLTokenizer, param: str, begin: int, after: tuple[int, ...]
    ) -> None:
        self.problem: RequestInvalid | None = None
        self._matcher = matcher
        self._param = param
        self._place = begin
        self._after = list(after)
        self._last: list[int] = []
        self._mask = allocate_token_bitmask(1, vocabulary.vocab_size)
        self._ends = np.array(vocabulary.eos_tokens, np.int64)

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        new: Any = tokens[self._place :].tolist()
        self._place += len(new)
        for token in new:
            self._take(token)
        if self._after:
            return logits
        if not self._matcher.is_stopped():
            fill_next_token_bitmask(self._matcher, self._mask, 0)
        # What has failed is stopped too, and its mask allows all.  An exception here would end everybody's answers.
        if self.problem is None and self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            self.problem = RequestInvalid(
                f"the answer cannot be kept to its schema any further ({reason}); simplify its patterns and lengths",
                param=self._param,
            )
        allowed = np.zeros(logits.shape[-1], bool)
        if self._matcher.is_stopped():
            allowed[self._ends] = True
        else:
            bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: len(allowed)]
            allowed[: len(bits)] = bits
        return mx.where(mx.array(allowed), logits, -mx.inf)

    def _take(self, token: int) -> None:
        if not self._after:
            if not self._matcher.is_stopped():
                self._matcher.consume_token(token)
            return
        self._last = [*self._last, token][-len(self._after) :]
        if self._last == self._after:
            self._after = []
