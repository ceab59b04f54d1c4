"""``expertd status``: what the daemon holds and how well it does.

What it shows is ``expertd.clients.terminal.glance``, or ``figures`` there, which has every figure.  Called without more
than its own options, ``expertd status`` in the shell takes a shorter way than this (``expertd.clients.quick_status``).
"""

from __future__ import annotations

import click

from expertd.clients.terminal.screens import every_figure, screen
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect


def ask_status(home: Home) -> Status:
    """The state of the home's daemon.

    Raises:
        DaemonNotRunning: there is none.
    """
    with connect(home, "cli") as connection:
        return connection.ask(AskStatus(), Status)


def as_object(status: Status) -> dict[str, object]:
    """The object that ``--json`` prints: the Status message without its type."""
    import msgspec

    found = msgspec.to_builtins(status)
    assert isinstance(found, dict)
    del found["type"]
    return found


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Show every figure of the daemon and of each model.")
@click.option("--layers", is_flag=True, help="Show each MoE layer of the models too.")
@click.option("--journal", is_flag=True, help="Show what memory pressure changed, and why.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with all there is.")
def status(verbose: bool, layers: bool, journal: bool, as_json: bool) -> None:
    """Show what the daemon holds, how well it does, and who uses it.

    Exits with 3 if no daemon runs in this home.
    """
    found = ask_status(Home.current())
    if as_json:
        import json

        click.echo(json.dumps(as_object(found), indent=2))
        return
    every = verbose or layers or journal
    for line in every_figure(found, layers=layers, journal=journal) if every else screen(found):
        click.echo(line)
