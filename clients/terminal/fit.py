"""How wide the terminal is, and lines that fit it.  Imports nothing that takes time."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # as typing's, which takes longer to import than all of this
if TYPE_CHECKING:
    from typing import TextIO

USUAL = 80
"""Columns of what is no terminal and has not said how wide it is."""


def columns() -> int:
    """The columns that a screen may have on standard output, which need not be a terminal."""
    return _said() or width_of(sys.stdout) or USUAL


def width_of(stream: TextIO) -> int | None:
    """The columns of the terminal behind ``stream``.  None: it is none, and what a program may read stays in its lines.

    COLUMNS in the environment says how wide a terminal is, but makes nothing one.
    """
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        return None
    return _said() or width or USUAL


def _said() -> int:
    said = os.environ.get("COLUMNS", "")
    return int(said) if said.isdecimal() else 0


def wrapped(text: str, width: int, indent: int = 0) -> list[str]:
    """``text`` in lines of at most ``width``; a longer word stays whole.  Later lines are indented."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) + 1 > width and lines[-1].strip():
            lines.append(" " * indent + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return [line.rstrip() for line in lines]


def folded(text: str, width: int | None, indent: int = 0) -> list[str]:
    """``text`` as it is where it fits ``width`` (None: anywhere), else ``wrapped``."""
    return [text] if width is None or len(text) <= width else wrapped(text, width, indent)


def beside(label: str, text: str, width: int | None) -> list[str]:
    """``text`` beside ``label``, in as many lines as a terminal of ``width`` columns takes (None: one)."""
    if width is None:
        return [label + text]
    first, *others = wrapped(text, width - len(label))
    return [label + first, *(" " * len(label) + line for line in others)]
