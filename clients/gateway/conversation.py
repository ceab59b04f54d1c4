"""What has been said, whatever API tells it: as the messages that chat templates take.  Pure, as ``wanted``.

Each API's module knows what its messages, items and blocks are; this reads what they consist of: texts and calls.
What may be called is in ``tools``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from expertd.clients.gateway.fields import invalid, string, unsupported
from expertd.protocol.errors import ParameterUnsupported

__all__ = ["Messages", "arguments_of", "call_of", "json_of", "kind_of", "text_of", "texts", "with_one_system"]

Messages = list[dict[str, Any]]
"""What a template takes: ``role`` and ``content``, and of an assistant ``reasoning_content`` and ``tool_calls``."""

TEXT: Mapping[str, str] = {"text": "text"}

_IDLE = frozenset(
    {"type", "id", "cache_control", "prompt_cache_breakpoint", "citations", "annotations", "logprobs", "parsed"}
) | {"parsed_output"}
"""What parts of text have beside that says nothing to a model: where a cache should end, and what an answer told with
its text, which clients send back."""


def texts(value: object, param: str, kinds: Mapping[str, str] = TEXT) -> list[str]:
    """The texts of a string, or of a list of parts: of ``kinds``, each with the name of the field that has the text.

    This and what follows raise RequestInvalid and ParameterUnsupported, which name ``param`` and the place in it.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        invalid(param, "a string or a list of parts of text")
    found = []
    for place, part in enumerate(value):
        here = f"{param}[{place}]"
        kind = kind_of(part, here)
        if kind not in kinds:
            raise not_supported(kind, here, "; only text is")
        found.append(text_of(part, here, kinds[kind]))
    return found


def kind_of(part: object, param: str) -> str:
    """The type of a part, which has to be an object."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        invalid(param, "an object with a type")
    return kind


def text_of(part: Mapping[str, Any], param: str, field: str = "text") -> str:
    """The text of a part."""
    for name, value in part.items():
        if name != field and name not in _IDLE and value is not None:
            unsupported(f"{param}.{name}")
    return string(part, field, param)


def not_supported(kind: str, param: str, rest: str = "") -> ParameterUnsupported:
    """The error for a part of a type that is not taken."""
    return ParameterUnsupported(f"'{param}' is of type {kind!r}, which is not supported{rest}", param=param)


def call_of(id: str, name: str, arguments: str) -> dict[str, Any]:
    """An earlier call; its arguments stay JSON, in which numbers may be of any size."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def arguments_of(value: object, param: str) -> str:
    """What a call was made with, as text: JSON, unless the call was cut off or the model made a mistake."""
    if value is None or value == "":
        return "{}"
    if not isinstance(value, str):
        invalid(param, "JSON, as a string")
    return value


def json_of(value: object, param: str) -> str:
    """The object that a call was made with, as JSON."""
    if not isinstance(value, dict):
        invalid(param, "an object")
    try:
        return json.dumps(value)
    except (ValueError, RecursionError):
        invalid(param, "an object of fewer levels, and of numbers with fewer digits")


def with_one_system(messages: Sequence[dict[str, Any]]) -> Messages:
    """``messages`` with all system messages that they begin with as one.

    Clients send several (instructions, and a developer's message), and many templates take one at most.  Those that
    come later stay: where a template does not take them the worker helps itself (``expertd.worker.template``).
    """
    leading = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if leading < 2:
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[:leading] if message["content"])
    return [{**messages[0], "content": text}, *messages[leading:]]
