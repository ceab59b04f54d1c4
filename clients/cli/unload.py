"""``expertd unload MODEL``: give a model's memory back now."""

from __future__ import annotations

from pathlib import Path

import click

from expertd.clients.cli.parameters import complete_loaded
from expertd.protocol.messages import Unload, Unloaded
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect
from expertd.protocol.sizes import show_size


@click.command()
@click.argument("model", shell_complete=complete_loaded)
def unload(model: str) -> None:
    """Give back the memory of MODEL (the name or path of its folder), which nobody uses any more.

    The next program that loads it reads its experts from disk again.  Exits with 3 if no daemon runs in this home.
    """
    wanted = str(Path(model).resolve()) if Path(model).is_dir() else model
    with connect(Home.current(), "cli") as connection:
        answer = connection.ask(Unload(model=wanted), Unloaded)
    click.echo(f"unloaded {answer.path}: {show_size(answer.bytes)}")
