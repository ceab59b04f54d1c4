"""Sentences in the width of the terminal, and bytes that are no text."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap

import click

from expertd.clients.terminal.fit import folded, width_of

NARROWEST, WIDEST = 40, 160


def wrapped(head: str, text: str) -> list[str]:
    """``text`` behind ``head``, in as many lines as it takes, all of which begin below its beginning.

    Words stay whole, so that paths and commands can be copied.
    """
    width = min(WIDEST, shutil.get_terminal_size().columns)
    return textwrap.wrap(
        text, max(NARROWEST, width), initial_indent=head, subsequent_indent=" " * len(head),
        break_long_words=False, break_on_hyphens=False,
    ) or [head.rstrip()]  # fmt: skip


def take_any_bytes() -> None:
    """Read standard input, and write standard output, whatever the bytes are: what cannot use them says so.

    To be called before anything is read.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")


def note(sentence: str) -> None:
    """Say something beside what a command is asked for: on stderr, on one line where that is no terminal."""
    for line in folded(f"expertd: {sentence}", width_of(sys.stderr)):
        click.echo(line, err=True)
