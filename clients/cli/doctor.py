"""``expertd doctor``: what this machine has, and what expertd makes of it."""

from __future__ import annotations

import click


@click.command()
def doctor() -> None:
    """Explain the default budget, and how short of memory this machine is now."""
    from expertd.daemon.machine import default_budget, this_machine
    from expertd.daemon.pressure import system_source

    click.echo("default budget")
    for line in default_budget(this_machine()).why:
        click.echo(f"  {line}")
    reading = system_source().read()
    click.echo(f"memory pressure: {reading.level.word}")
    click.echo(f"  {reading.figure}")
