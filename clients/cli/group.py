"""How all commands behave: help without a command, the nearest name for a wrong one, errors as one line.

An ``ExpertdError`` ends a command with one line on stderr, ``expertd: SENTENCE [CODE]``, and the exit status of its
class.  With ``--json`` that line is an object: ``{"error": {"code", "message", "exit_status"}}``.  On a terminal it
takes as many lines as it needs.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from typing import Any

import click

from expertd.clients.cli.wrap import note
from expertd.clients.terminal.fit import width_of, wrapped
from expertd.protocol.errors import ExpertdError

INTERRUPTED = 130
"""What a command that Ctrl-C ends exits with, as shells have it: 128 and the signal's number."""

USAGE = "usage"
"""The code, with ``--json``, of what click refuses."""


class Group(click.Group):
    """A command that consists of commands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"invoke_without_command": True, "no_args_is_help": False, **options})

    def invoke(self, ctx: click.Context) -> Any:
        found = super().invoke(ctx)
        if ctx.invoked_subcommand is None:
            click.echo(ctx.get_help())
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with whole first sentences, where click would cut them off."""
        with formatter.section("Commands"):
            commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
            formatter.write_dl([(name, found.get_short_help_str(limit=200)) for name, found in commands if found])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in (names := self.list_commands(ctx)):
            from expertd.protocol.config import near  # late, because a command that exists needs none of it

            meant = near(args[0], names)
            suggestion = f"did you mean {meant!r}?" if meant else f"there are: {', '.join(names)}"
            ctx.fail(f"there is no command {args[0]!r}; {suggestion}")
        return super().resolve_command(ctx, args)


class Program(Group):
    """The outermost group: ends the process as the module says."""

    def invoke(self, ctx: click.Context) -> Any:
        as_json = "--json" in ctx.args  # not parsed yet, so that what goes wrong in parsing is told as JSON too
        try:
            return super().invoke(ctx)
        except ExpertdError as error:
            _tell(error.message, error.code, error.exit_status, as_json)
        except click.ClickException as error:
            if not as_json:
                raise _fitting(error) from None
            _tell(error.format_message(), USAGE, error.exit_code, as_json)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what waits there could not be written either
            _tell(f"what was asked for could not be written ({error.strerror})", "internal", 1, as_json)
        except KeyboardInterrupt:
            click.echo(err=True)  # the terminal has written ^C
            sys.exit(INTERRUPTED)


def _fitting(error: click.ClickException) -> click.ClickException:
    """What click refuses, with its sentence in the width of the terminal."""
    text = error.format_message()
    width = width_of(sys.stderr)
    if width is None or not isinstance(error, click.UsageError) or len(text) <= width - len("Error: "):
        return error
    return click.UsageError("\n".join(wrapped(text, width - len("Error: "))), error.ctx)


def _tell(message: str, code: str, status: int, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": {"code": code, "message": message, "exit_status": status}}), err=True)
    else:
        note(f"{message} [{code}]")
    sys.exit(status)
