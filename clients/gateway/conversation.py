"""What has been said, whatever API tells it: as the messages that chat templates take.  Pure, as ``wanted``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["with_one_system"]

Messages = list[dict[str, Any]]
"""What a template takes: ``role`` and ``content``, and of an assistant ``reasoning_content`` and ``tool_calls``."""


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
