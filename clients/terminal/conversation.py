"""What is said in a chat: its messages, the commands that a user types between them, and how it is saved.

Pure: no terminal, no model.  Tokens and caches are ``expertd.worker.turns``, the terminal ``expertd.clients.cli.chat``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HELP = """\
/help          this list
/reset         forget what was said, and begin anew
/system TEXT   tell the model TEXT before all else; - for nothing
/system        show what it is told
/save FILE     write the chat to a new file; as JSON if its name ends in .json
/quit          leave, as Ctrl-D does
Ctrl-C         stops an answer
\"\"\"            begins and ends a message of several lines; a line that ends
               in \\ goes on with the next, too
A message that begins with / needs a space before it."""

MARK = '"""'
"""Begins and ends a message of several lines."""


class SaveFailed(Exception):
    """A chat could not be saved; the message says why."""


@dataclass(frozen=True)
class Command:
    """A line that is for the chat and not for the model: ``name`` without its slash, and what follows it."""

    name: str
    rest: str


def parse(line: str) -> Command | str:
    """What a line is: a command, or the text of a message."""
    if not line.startswith("/"):
        return line.strip()
    name, _, rest = line[1:].partition(" ")
    return Command(name.strip(), rest.strip())


@dataclass
class Conversation:
    """The messages of a chat, in turns: the user's, then the model's."""

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns]

    def ask(self, text: str) -> None:
        """The user says ``text``."""
        self.turns.append({"role": "user", "content": text})

    def answered(self, text: str) -> None:
        """The model has said ``text``, all of it or up to where it was stopped."""
        self.turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """The last question was not answered: it is as if it had not been asked."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def reset(self) -> None:
        """Forget what was said; the system's message stays."""
        self.turns.clear()

    def save(self, path: Path, model: str) -> None:
        """Write the chat to a new file.

        Raises:
            SaveFailed: the file exists, or cannot be written.
        """
        if path.suffix == ".json":
            text = json.dumps({"model": model, "messages": self.messages}, indent=2, ensure_ascii=False) + "\n"
        else:
            text = "\n".join(f"{message['role']}:\n{message['content']}\n" for message in self.messages)
        try:
            with path.open("x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(text)
        except FileExistsError:
            raise SaveFailed(f"{path} exists already; choose another name") from None
        except OSError as error:
            raise SaveFailed(f"{path} cannot be written ({error.strerror})") from error


def read_message(first: str, more: Callable[[], str]) -> str:
    """A message that begins with the line ``first``, with the lines that belong to it, which ``more`` asks for.

    ``more`` raises EOFError when there are none; then the message ends there.
    """
    if first.strip().startswith(MARK):
        return _block(first.strip().removeprefix(MARK), more)
    lines = [first]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        try:
            lines.append(more())
        except EOFError:
            break
    return "\n".join(lines)


def _block(rest: str, more: Callable[[], str]) -> str:
    lines = []
    while not rest.rstrip().endswith(MARK):
        lines.append(rest)
        try:
            rest = more()
        except EOFError:
            break
    else:
        lines.append(rest.rstrip().removesuffix(MARK))
    text = "\n".join(lines)
    return text.strip("\n")


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters but newlines and tabs."""
    return "".join(letter for letter in text if letter in "\n\t" or not (ord(letter) < 32 or 127 <= ord(letter) < 160))
