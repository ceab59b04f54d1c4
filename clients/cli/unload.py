"""``expertd unload MODEL``: give a model's memory back now."""

from __future__ import annotations

import click

from expertd.clients.cli.parameters import complete_loaded
from expertd.clients.client import ask_about
from expertd.protocol.messages import Unload, Unloaded
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect
from expertd.protocol.sizes import show_size


@click.command()
@click.argument("model", shell_complete=complete_loaded)
def unload(model: str) -> None:
    """Give back the memory of MODEL (its hub id, or the name or path of its folder), which nobody uses any more.

    The next program that loads it begins anew: what was worth keeping of it is forgotten, too.  Exits with 3 if no
    daemon runs in this home.
    """
    home = Home.current()
    with connect(home, "cli") as connection:
        answer = ask_about(connection, home, model, lambda name: Unload(model=name), Unloaded)
    click.echo(f"unloaded {answer.path}: {show_size(answer.bytes)}")
