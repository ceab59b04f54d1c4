"""``python -m tools.cli_docs``: write ``docs/cli.md`` from the commands, the settings and the errors.

``tests/test_cli_docs.py`` fails if the document is not what this would write.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from expertd.clients.cli import COMMANDS, TOPICS, main
from expertd.protocol.config import KEYS, SECTIONS
from expertd.protocol.errors import EXIT_STATUSES, error_classes

PATH = Path(__file__).parents[1] / "docs" / "cli.md"
WIDTH = 80

HEAD = """\
# The command line

Written by `python -m tools.cli_docs` from the commands themselves.

## What all commands have in common

* What was asked for is printed on stdout. How far a long command is, what it has started, warnings and errors are on
  stderr; so stdout can be piped.
* An error is one line, `expertd: SENTENCE [CODE]`; the sentence says what happened, to what, and what to do. The
  [codes](troubleshooting.md#errors) are stable. A wrong command line (an option that there is not) is told with the
  command's usage.
* With `--json`, which every command has that only reads, stdout is one JSON object (`expertd logs`: one a line), and an
  error is one on stderr: `{"error": {"code": "...", "message": "...", "exit_status": 3}}`. The code of a wrong command
  line is then `usage`.
* `-h` and `--help` explain each command. One that consists of commands does so too if it is called without any.
* Only a daemon that is started on demand goes on when a command has ended; it is announced on stderr.
* `EXPERTD_HOME` is the folder that everything is in: sockets, logs, settings, packed stores; by default `~/.expertd`.
"""

SETTINGS = """\
## Settings

A flag comes before a variable of the environment, that before `config.toml` in the home, and that before the default.
A key that there is not, and a value that cannot be used, are errors, which the command tells that would go by them.
`expertd config show` says what holds and why, `expertd config check` whether all of it can be used, and `expertd config
path` where the file is. A daemon, a gateway and a worker keep what they were started with.
"""


def document() -> str:
    """The whole page."""
    return (
        "\n".join([HEAD, *_statuses(), "", SETTINGS, *_settings(), "", *_example(), "", *_commands()]).rstrip() + "\n"
    )


def _statuses() -> Iterator[str]:
    yield "## Exit statuses"
    yield ""
    yield "| status | meaning | codes |"
    yield "|---|---|---|"
    for status, meaning in EXIT_STATUSES.items():
        codes = sorted(code for code, cls in error_classes().items() if cls.exit_status == status)
        shown = [f"`{code}`" for code in codes] + (["`usage`"] if status == 2 else [])
        yield f"| {status} | {meaning} | {', '.join(shown)} |"


def _settings() -> Iterator[str]:
    yield "| in `config.toml` | flag | variable | default | |"
    yield "|---|---|---|---|---|"
    for key in KEYS.values():
        values = f" One of: {', '.join(key.choices)}." if key.choices else ""
        flag = f"{key.flag}` / `--no-{key.flag[2:]}" if key.default is True else f"{key.flag} {key.form}"
        yield f"| `{key.dotted}` | `{flag}` | `{key.variable}` | {key.default_shown} | {key.help}{values} |"
    yield ""
    yield "Sizes are `512MB`, `2GiB` or bytes; rates the same with `/s`; seconds may be `inf`. Several folders in"
    yield "`EXPERTD_MODEL_FOLDERS` are separated by colons, hosts and sites in their variables by commas. A file in"
    yield "which everything is set:"


def _example() -> Iterator[str]:
    yield "```toml"
    for section in ("", *SECTIONS):
        if section:
            yield ""
            yield f"[{section}]"
        for key in KEYS.values():
            if key.section == section:
                yield f"{key.word} = {key.example}"
    yield "```"


def _commands() -> Iterator[str]:
    grouped = [name for names in TOPICS.values() for name in names]
    others = tuple(name for name in COMMANDS if name not in grouped)
    for topic, names in {**TOPICS, "Others": others}.items():
        found = [name for name in names if name in COMMANDS]
        if found:
            yield f"## {topic}"
            yield ""
        for name in found:
            for words, help in helps(name):
                yield f"### {words}"
                yield ""
                yield "```text"
                yield help
                yield "```"
                yield ""


def helps(name: str) -> Iterator[tuple[str, str]]:
    """``(expertd NAME, its help)`` of a command and of those that it consists of."""
    root = click.Context(main, info_name="expertd", terminal_width=WIDTH, **main.context_settings)
    command = main.get_command(root, name)
    assert command is not None
    yield from _helps(command, click.Context(command, root, info_name=name))


def _helps(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    yield context.command_path, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _helps(inner, click.Context(inner, context, info_name=name))


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
