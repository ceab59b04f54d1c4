"""The command line: one module a command, each with a click command of the module's name.

Commands import what they need when they run, so that ``expertd status`` does not wait for mlx.
"""

from __future__ import annotations

import importlib

import click

from expertd.clients.cli.group import Program

COMMANDS = {
    "serve": "Serve a model over an OpenAI API.",
    "generate": "Generate text from a prompt.",
    "chat": "Chat with a model.",
    "status": "Show what the daemon holds and how well it does.",
    "top": "Show live what the daemon does.",
    "budget": "Show or change the memory that experts may take.",
    "config": "Show the settings and where they come from.",
    "logs": "Show what daemon, gateways and workers have done.",
    "load": "Read a model's experts into free memory.",
    "warm": "Have the experts resident that prompts use, or a profile names.",
    "profile": "Record which experts a kind of work uses.",
    "pin": "Have the experts stay that everything uses.",
    "unload": "Give a model's memory back.",
    "models": "List the models on this machine, and what can be served.",
    "pull": "Download a model from the hub.",
    "pack": "Write a model's experts so that each is one read.",
    "plan": "Show what budgets would give for a model, and the best.",
    "doctor": "Check what matters on this machine, and say what to do.",
    "trace": "Record which experts routers choose, and look at it.",
    "service": "Have launchd or systemd keep the daemon.",
    "daemon": "Run or stop the cache daemon.",
    "completion": "Print a script that completes commands in your shell.",
    "verify": "Compare a worker's logits and tokens with plain mlx-lm.",
    "worker": "Run one worker for a gateway (started by 'expertd serve').",
}


TOPICS = {
    "Use": ("serve", "chat", "generate", "load", "warm", "profile", "unload"),
    "Look": ("status", "top", "models", "plan", "doctor", "logs", "trace"),
    "Steer": ("budget", "pin", "daemon", "config"),
    "Set up": ("service", "pull", "pack", "verify", "completion"),
}
"""How ``expertd --help`` groups the commands; what is in none of these is listed last."""


class _Commands(Program):
    """Loads a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"expertd.clients.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        grouped = [name for names in TOPICS.values() for name in names]
        others = {"Others": tuple(name for name in COMMANDS if name not in grouped)}
        width = max(map(len, COMMANDS))
        for topic, names in {**TOPICS, **others}.items():
            rows = [(name.ljust(width), COMMANDS[name]) for name in names if name in COMMANDS]
            if rows:
                with formatter.section(topic):
                    formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="expertd", prog_name="expertd")
def main() -> None:
    """One warm cache of Mixture-of-Experts weights for every app on the machine.

    Whatever goes wrong is one line on stderr, 'expertd: SENTENCE [CODE]', or with --json an object.  'expertd COMMAND
    --help' tells all about a command.
    """
