"""``expertd serve MODEL``: an OpenAI API over one model, until it is stopped.

Output: one line on stdout once requests are taken, ``expertd: serving NAME at URL``.  Exit status 0 after SIGTERM or
Ctrl-C; 2 where MODEL is no checkpoint; 5 where the port is taken; otherwise that of the error.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

import click

from expertd.clients.cli.parameters import budget_option, find_or_pull
from expertd.protocol.checkpoint import weight_files
from expertd.protocol.errors import ExpertdError
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import counted, why_refused
from expertd.protocol.rendezvous import connect_or_start, stop_if_idle


@click.command()
@click.argument("model")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes any free port.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@budget_option
@click.option("--service", is_flag=True, hidden=True, help="Run as a service manager's: it is not restarted for ever.")
def serve(model: str, port: int, host: str, budget: str | None, service: bool) -> None:
    """Serve MODEL over an OpenAI API.

    MODEL is a checkpoint's folder, or the name of one, as an id of the hub ('expertd models' lists what is here).
    Clients call it by its id, or else by the folder's name.
    """
    # Until the gateway takes them over: to be told to end is no failure, however early.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(0))
    if not service:
        return _serve(model, port, host, budget)
    home = Home.current()
    home.prepare()
    with counted(home, "gateway") as may_start:
        if may_start:
            return _serve(model, port, host, budget)
    click.echo(f"expertd: {why_refused(home, 'gateway', home.gateway_log)}", err=True)
    return None


def _serve(model: str, port: int, host: str, budget: str | None) -> None:
    from expertd.clients.gateway import lifetime

    logging.basicConfig(
        stream=sys.stderr,
        level=logging.getLevelNamesMapping().get(os.environ.get("EXPERTD_LOG", "").upper(), logging.WARNING),
        format="expertd: %(message)s",
    )
    path = find_or_pull(model)
    weight_files(path)
    home = Home.current()
    home.prepare()
    # The port comes first: whoever cannot listen should not have started anything.
    with lifetime.listen(host, port) as listener:
        connection, started = connect_or_start(
            home, "gateway", budget=budget, announce=lambda line: click.echo(f"expertd: {line}", err=True)
        )
        connection.close()

        def announce(url: str) -> None:
            click.echo(f"expertd: serving {shown_name(path)} at {url}")
            sys.stdout.flush()

        try:
            asyncio.run(lifetime.serve(listener, host, path, home=home, budget=budget, ready=announce))
        except ExpertdError:
            if started:
                stop_if_idle(home, "gateway")
            raise
