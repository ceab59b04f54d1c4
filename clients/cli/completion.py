"""``expertd completion bash | zsh | fish``: the script with which a shell completes commands, options and models.

The scripts are click's; what is completed where a MODEL is asked for is in ``expertd.clients.cli.parameters``.
"""

from __future__ import annotations

import sys

import click

from expertd.protocol.errors import ExpertdError

PLACES = {
    "bash": 'add this line to ~/.bashrc:  eval "$(expertd completion bash)"',
    "zsh": 'add this line to ~/.zshrc, below compinit:  eval "$(expertd completion zsh)"',
    "fish": "write it to a file:  expertd completion fish > ~/.config/fish/completions/expertd.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(tuple(PLACES)))
def completion(shell: str) -> None:
    """Print the script that completes commands, options and models in SHELL.

    \b
    bash  add this line to ~/.bashrc:
            eval "$(expertd completion bash)"
    zsh   add this line to ~/.zshrc, below compinit:
            eval "$(expertd completion zsh)"
    fish  write it to a file:
            expertd completion fish > ~/.config/fish/completions/expertd.fish

    Bash has to be 4.4 or newer; macOS comes with an older one, but its own shell is zsh.
    """
    from click.shell_completion import get_completion_class

    from expertd.clients.cli import main

    kind = get_completion_class(shell)
    if kind is None:
        raise ExpertdError(f"click has no completion for {shell}")
    # Not ``source()``, which would look for a bash here and judge its version.
    about = kind(main, {}, "expertd", "_EXPERTD_COMPLETE")
    click.echo(about.source_template % about.source_vars())
    if sys.stdout.isatty():
        click.echo(f"# to use it, {PLACES[shell]}", err=True)
