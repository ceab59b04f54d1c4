"""The command line: one module a command, each with a click command of the module's name.

Commands import what they need when they run, so that ``expertd status`` does not wait for mlx.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from expertd.protocol.errors import ExpertdError

COMMANDS = {
    "serve": "Serve a model over an OpenAI API.",
    "generate": "Generate text from a prompt.",
    "chat": "Chat with a model.",
    "status": "Show what the daemon holds and how well it does.",
    "top": "Show live what the daemon does.",
    "budget": "Show or change the memory that experts may take.",
    "config": "Show the settings that daemons start with.",
    "unload": "Give a model's memory back.",
    "pack": "Write a model's experts so that each is one read.",
    "doctor": "Explain the default budget and memory pressure.",
    "trace": "Record which experts routers choose, and look at it.",
    "daemon": "Run or stop the cache daemon.",
    "verify": "Compare a worker's logits and tokens with plain mlx-lm.",
    "worker": "Run one worker for a gateway (started by 'expertd serve').",
}


class _Commands(click.Group):
    """Loads a command's module when it is called, and turns every ExpertdError into one sentence and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"expertd.clients.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ExpertdError as error:
            click.echo(f"expertd: {error.message} [{error.code}]", err=True)
            sys.exit(error.exit_status)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="expertd", prog_name="expertd")
def main() -> None:
    """One warm cache of Mixture-of-Experts weights for every app on the machine."""
