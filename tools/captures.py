"""``python -m tools.captures [NAME ...]``: what commands show, for the documents.

Runs the real commands on the demo model, in a throw-away home, in terminals of 80 and of 200 columns, and writes
``docs/pictures/NAME_COLUMNS.svg`` and ``.txt``.  Which commands: ``SCENES``; one more is one more function.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from tools.demo import DEMO_MODEL, QUESTIONS, SHARE, Gateway, budget_of
from tools.stage import ask_status, running_daemon, temporary_home
from tools.terminal import CTRL_D, Terminal

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
COLUMNS = (80, 200)
ANSWER_TOKENS = 60
STYLED = re.compile(r"\x1b\[(?![0-9;]*m)[0-9;?]*[ -/]*[@-~]|\r")
"""What steers a terminal but colours."""
FONT = "Menlo, 'DejaVu Sans Mono', Consolas, monospace"


def command(*arguments: str) -> Callable[[str, int], str]:
    """A scene: one command until it ends; MODEL stands for the model's folder."""

    def play(model: str, columns: int) -> str:
        given = [model if word == "MODEL" else word for word in arguments]
        typed = f"$ expertd {shlex.join(arguments).replace('MODEL', '~/models/demo')}"
        with Terminal(*given, columns=columns) as terminal:
            terminal.ended()
            return f"{typed}\n{terminal.raw}"

    return play


def chat(model: str, columns: int) -> str:
    """A scene: two turns, and the end."""
    with Terminal("chat", model, "--max-tokens", str(ANSWER_TOKENS), columns=columns) as terminal:
        terminal.expect(">>> ")
        for question in (QUESTIONS[0], "And the module socket?"):
            since = len(terminal.text)
            terminal.send(f"{question}\n")
            terminal.expect(" new)", since)
            terminal.expect(">>> ", len(terminal.text) - 6)
        terminal.send(CTRL_D)
        terminal.ended()
        return f"$ expertd chat ~/models/demo\n{terminal.raw}"


SCENES: dict[str, Callable[[str, int], str]] = {
    "status": command("status"),
    "status_verbose": command("status", "--verbose"),
    "top": command("top", "--once", "--interval", "3"),
    "generate": command("generate", "MODEL", QUESTIONS[0]),
    "chat": chat,
}


def main() -> None:
    """See the module."""
    scenes = ", ".join(SCENES)
    parser = argparse.ArgumentParser(prog="python -m tools.captures", description="Draw what commands show.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {scenes}; all of them, if none is given")
    wanted = parser.parse_args().names or list(SCENES)
    if unknown := [name for name in wanted if name not in SCENES]:
        parser.error(f"there is no {unknown[0]!r}; there are: {scenes}")
    PICTURES.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        user = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertd-user-")))
        model = shutil.copytree(DEMO_MODEL, user / "models" / "demo")
        os.environ["HOME"] = str(user)  # so that nothing shows where this was run
        stack.enter_context(running_daemon(home, budget_of(model, SHARE)))
        gateway = stack.enter_context(Gateway(model))
        stack.enter_context(chats(gateway.url, model.name))
        while not any(session.decode_tokens > 200 for session in ask_status(home).models[0].sessions):
            time.sleep(0.1)
        for name in wanted:
            for columns in COLUMNS:
                shown = SCENES[name](str(model), columns).replace(str(user), "~").replace(str(home.root), "~/.expertd")
                write(f"{name}_{columns}", shown, columns)


@contextmanager
def chats(url: str, model: str) -> Iterator[None]:
    """Somebody chats over the gateway for as long as the block lasts."""
    command = [sys.executable, "-m", "tools.chat_client", url, model, "A", "2000", "Write a function for me"]
    loop = f"import subprocess\nwhile True: subprocess.run({command!r}, check=True)"
    with subprocess.Popen(
        [sys.executable, "-c", loop], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, 9)


def write(name: str, shown: str, columns: int) -> None:
    """The picture and the text of what a terminal of so many columns has shown."""
    text = Text.from_ansi(STYLED.sub("", shown).rstrip())
    console = Console(width=columns, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(text)
    svg = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL).replace("Fira Code", FONT)
    title = f"{columns} columns"
    picture = console.export_svg(title=title, code_format=svg, unique_id=name, clear=False)
    lines = (line.rstrip() for line in picture.splitlines())
    (PICTURES / f"{name}.svg").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plain = "\n".join(line.rstrip() for line in text.plain.splitlines())
    (PICTURES / f"{name}.txt").write_text(plain + "\n", encoding="utf-8")
    print(f"{name}: {len(plain.splitlines())} lines, {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
