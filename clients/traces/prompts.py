"""Files of prompts: a line each, or JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expertd.protocol.errors import TraceInvalid

Prompt = str | list[dict[str, Any]]
"""Text, or chat messages."""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts in ``path``.

    ``*.jsonl``: an object a line with ``prompt`` (text) or ``messages`` (a chat); anything else: a prompt a line.

    Raises:
        TraceInvalid: the file cannot be read, a line is not one of these, or there is none; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceInvalid(f"the prompts in {path} could not be read ({error})") from error
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise TraceInvalid(f"{path} has no prompts: write one on each line")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    return [_parsed(f"{path}, line {number}", line) for number, line in lines]


def _parsed(place: str, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceInvalid(f"{place} is no JSON ({error})") from error
    match entry:
        case {"prompt": str(text)} if text:
            return text
        case {"messages": [*messages]} if messages and all(isinstance(message, dict) for message in messages):
            return messages
    raise TraceInvalid(f'{place} is neither {{"prompt": TEXT}} nor {{"messages": [...]}}')
