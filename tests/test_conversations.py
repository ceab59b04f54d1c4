"""What was said and what may be called, as each API's clients send it: one conversation for the model."""

from __future__ import annotations

from typing import Any

import pytest

from expertd.clients.gateway import anthropic, chat, responses

HI = {"role": "user", "content": "hi"}


def of_chat(messages: list[Any], **more: Any) -> Any:
    return chat.parse({"model": "m", "messages": messages} | more)


def of_responses(items: list[Any], **more: Any) -> Any:
    return responses.parse({"model": "m", "input": items} | more).with_messages([])


def of_claude(messages: list[Any], **more: Any) -> Any:
    return anthropic.parse({"model": "m", "max_tokens": 5, "messages": messages} | more)


def said(wanted: Any) -> list[dict[str, Any]]:
    """What a worker is told."""
    return list(wanted.generate(1).messages)


@pytest.mark.parametrize("parsed", [
    of_chat([{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, HI]),
    of_responses([{"role": "developer", "content": "b"}, HI], instructions="a"),
    of_claude([{"role": "system", "content": "b"}, HI], system="a"),
])  # fmt: skip
def test_system_messages_at_the_beginning_are_one(parsed: Any) -> None:
    assert said(parsed) == [{"role": "system", "content": "a\n\nb"}, HI]


def test_a_system_message_that_comes_later_stays_there() -> None:
    messages = [HI, {"role": "system", "content": "a"}, {"role": "system", "content": "b"}]
    assert said(of_chat(messages)) == messages
