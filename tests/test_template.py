"""Conversations through chat templates: where system messages go, and what a request may tell a template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import load

from expertd.protocol.errors import ParameterUnsupported, RequestInvalid
from expertd.worker.template import render_chat

DEMO = Path(__file__).parents[1] / "models" / "demo"
SAID = "[{{ message.role }}: {{ message.content | trim }}]"
EACH = "{% for message in messages %}" + SAID + "{% endfor %}"
STRICT = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}" + SAID + "{% endfor %}"
)
SILENT = (
    "{% for message in messages %}{% if message.role != 'system' or loop.first %}" + SAID + "{% endif %}{% endfor %}"
)
"""As gpt-oss has it: what it has no place for is missing from the prompt."""
SYSTEM, USER, LATE = (
    {"role": role, "content": text} for role, text in (("system", "a"), ("user", "b"), ("system", " c\n"))
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load(DEMO)


def prompt(tokenizer: Any, template: str, messages: list[dict[str, Any]], **more: Any) -> str:
    tokenizer._tokenizer.chat_template = template
    return render_chat(tokenizer, messages, **more)


@pytest.mark.parametrize(("template", "role"), [(EACH, "system"), (STRICT, "user"), (SILENT, "user")])
def test_a_late_system_message_goes_where_the_template_takes_it(tokenizer: Any, template: str, role: str) -> None:
    assert prompt(tokenizer, template, [SYSTEM, USER, LATE]) == f"[system: a][user: b][{role}: c]"


def test_a_template_that_refuses_more_than_that_is_told_of(tokenizer: Any) -> None:
    with pytest.raises(RequestInvalid, match=r"refused the messages \(never\)") as caught:
        prompt(tokenizer, "{{ raise_exception('never') }}", [USER, LATE])
    assert caught.value.param == "messages"


KNOWING = EACH + (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{% generation %}{{ thinking }}{% endgeneration %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize("name", ["message", "messages", "role", "add_generation_prompt", "raise_exception", "tools"])
def test_what_is_no_variable_of_a_template_is_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(ParameterUnsupported, match=f"'{name}'.*leave it out") as caught:
        prompt(tokenizer, KNOWING + STRICT, [USER], variables={name: False})
    assert caught.value.param == name


def test_variables_reach_the_template_and_hints_if_it_knows_them(tokenizer: Any) -> None:
    assert prompt(tokenizer, KNOWING, [USER], variables={"thinking": "yes"}) == "[user: b]yes>"
    assert prompt(tokenizer, KNOWING, [USER], hints={"thinking": "yes", "message": 1}) == "[user: b]yes>"
    assert prompt(tokenizer, KNOWING, [USER], variables={"enable_thinking": False}) == "[user: b]False>"
