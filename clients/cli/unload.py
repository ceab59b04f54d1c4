"""``expertd unload MODEL``: give a model's memory back now."""

from __future__ import annotations

from pathlib import Path

import click

from expertd.clients.cli.parameters import complete_loaded
from expertd.protocol.errors import CheckpointError, ModelNotLoaded
from expertd.protocol.messages import Unload, Unloaded
from expertd.protocol.model_names import find_model
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
        # The daemon knows its models by name, also those whose folder is gone.
        wanted = str(Path(model).resolve()) if Path(model).is_dir() else model
        try:
            answer = connection.ask(Unload(model=wanted), Unloaded)
        except ModelNotLoaded as error:
            folder = _folder(model, home)
            if folder == wanted:
                raise
            try:
                answer = connection.ask(Unload(model=folder), Unloaded)
            except ModelNotLoaded:
                raise error from None  # it has the name that the user wrote
    click.echo(f"unloaded {answer.path}: {show_size(answer.bytes)}")


def _folder(model: str, home: Home) -> str:
    """The path by which the daemon knows a model that it does not know by ``model``; ``model`` if there is none."""
    try:
        return str(find_model(model, home))
    except CheckpointError:
        return model
