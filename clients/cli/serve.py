"""``expertd serve MODEL``: an OpenAI API over one model, until it is stopped.

Output: one line on stdout once requests are taken, ``expertd: serving NAME at URL``.  Exit status 0 after SIGTERM or
Ctrl-C; 2 where MODEL is no checkpoint; 5 where the port is taken; otherwise that of the error.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import click

from expertd.clients.cli.parameters import budget_option, complete_model, config_option, find_or_pull, log_options
from expertd.protocol.checkpoint import weight_files
from expertd.protocol.config import KEYS, NOT_QUANTIZED, read_config
from expertd.protocol.errors import ExpertdError
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import counted, why_refused
from expertd.protocol.rendezvous import connect_or_start, stop_if_idle


def _names(ctx: click.Context, param: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what cannot be a name in a URL or on a line."""
    for name in names:
        if not name or not name.isprintable() or any(letter in " ?#%=" for letter in name):
            raise click.BadParameter(f"{name!r} is no name of a model; use letters, digits and '-', '_', '.', ':', '/'")
    return names


@click.command()
@click.argument("model", shell_complete=complete_model)
@config_option("serve_port")
@config_option("serve_host")
@config_option("serve_kv_bits")
@budget_option
@log_options
@click.option(
    "--alias", "aliases", metavar="NAME", multiple=True, callback=_names,
    help="Serve the model under this name, too.  May be given several times.",
)
@click.option("--service", is_flag=True, hidden=True, help="Run as a service manager's: it is not restarted for ever.")
def serve(model: str, budget: str | None, aliases: tuple[str, ...], service: bool, **flags: Any) -> None:
    """Serve MODEL over an OpenAI API, until Ctrl-C or SIGTERM.

    MODEL is a checkpoint's folder, or the name of one, as an id of the hub ('expertd models' lists what is here).
    Clients call it by its id, or else by the folder's name, or by an --alias: for programs that only know names such
    as gpt-4o.

    Prints one line on stdout when it takes requests.  What it does is in its log ('expertd logs'); warnings are on
    stderr, too.  Exits with 5 if the port is taken.
    """
    # Until the gateway takes them over: to be told to end is no failure, however early.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(0))
    if not service:
        return _serve(model, budget, aliases, flags)
    home = Home.current()
    home.prepare()
    with counted(home, "gateway") as may_start:
        if may_start:
            return _serve(model, budget, aliases, flags)
    click.echo(f"expertd: {why_refused(home, 'gateway', home.service_gateway_log)}", err=True)
    return None


def _serve(model: str, budget: str | None, aliases: tuple[str, ...], flags: dict[str, Any]) -> None:
    from expertd.clients.gateway import lifetime
    from expertd.protocol import logs

    path = find_or_pull(model)
    weight_files(path)
    home = Home.current()
    config = read_config(home, **flags)
    host, port = config.serve_host.value, config.serve_port.value
    os.environ[KEYS["serve_kv_bits"].variable] = str(config.serve_kv_bits.value or NOT_QUANTIZED)  # for its worker
    home.prepare()
    logs.set_up("gateway", home.gateway_log(os.getpid()), home, config)
    os.environ.update(logs.environment(config))  # its worker, and the daemon if there is none, log as it does
    if host not in ("127.0.0.1", "localhost", "::1"):
        click.echo(f"expertd: there is no key: whoever can reach {host} can use the model, and your machine", err=True)
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
            asyncio.run(
                lifetime.serve(listener, host, path, home=home, aliases=aliases, budget=budget, ready=announce)
            )
        except ExpertdError:
            if started:
                stop_if_idle(home, "gateway")
            raise
