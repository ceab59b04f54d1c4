"""``expertd serve MODEL...``: an OpenAI API over one model or several, until it is stopped.

Output: one line on stdout once requests are taken, ``expertd: serving NAME at URL``.  Exit status 0 after SIGTERM or
Ctrl-C; 2 where MODEL is no checkpoint; 5 where the port is taken; otherwise that of the error.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.clients.cli.parameters import (
    budget_option,
    complete_model,
    config_option,
    find_or_pull,
    log_options,
    model_folder_option,
)
from expertd.protocol.checkpoint import weight_files
from expertd.protocol.config import KEYS, NOT_QUANTIZED, Config, read_config
from expertd.protocol.errors import ExpertdError
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import counted, why_refused
from expertd.protocol.rendezvous import connect_or_start, stop_if_idle

if TYPE_CHECKING:
    from expertd.clients.gateway.served import Models


def _check_names(ctx: click.Context, param: click.Parameter, aliases: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what cannot be a name in a URL or on a line."""
    for alias in aliases:
        name = alias.partition("=")[0]
        if not name or not name.isprintable() or any(letter in " ?#%" for letter in name):
            raise click.BadParameter(f"{name!r} is no name of a model; use letters, digits and '-', '_', '.', ':', '/'")
    return aliases


alias_option = click.option(
    "--alias", "aliases", metavar="NAME[=MODEL]", multiple=True, callback=_check_names,
    help="Serve a model under this name, too; MODEL may be left out where there is one.  May be given several times.",
)
pin_option = click.option(
    "--pin", "pins", metavar="MODEL", multiple=True,
    help="Load this one of several models at once, and keep it.  May be given several times.",
)


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, shell_complete=complete_model)
@model_folder_option
@config_option("serve_port")
@config_option("serve_host")
@config_option("serve_api_key_file")
@config_option("serve_allow_hosts", note="; may be given several times")
@config_option("serve_allow_origins", note="; may be given several times")
@config_option("serve_kv_bits")
@budget_option
@alias_option
@pin_option
@config_option("serve_ttl")
@config_option("serve_deadline")
@log_options
@click.option("--service", is_flag=True, hidden=True, help="Run as a service manager's: it is not restarted for ever.")
def serve(models: tuple[str, ...], service: bool, **options: Any) -> None:
    """Serve MODEL over an OpenAI API, until Ctrl-C or SIGTERM.

    MODEL is a checkpoint's folder, or the name of one, as an id of the hub ('expertd models' lists what is here).
    Clients call it by its id, or else by the folder's name, or by an --alias: for programs that only know names such
    as gpt-4o.

    Several models may be served at one address.  Each is loaded by the first request for it, which waits meanwhile,
    and its worker ends when nobody has asked for a while (--ttl).  One model alone is loaded at once and stays.

    Prints one line on stdout when it takes requests.  What it does is in its log ('expertd logs'); warnings are on
    stderr, too.  Exits with 5 if the port is taken.
    """
    # Until the gateway takes them over: to be told to end is no failure, however early.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(0))
    if not service:
        return _serve(models, **options)
    home = Home.current()
    home.prepare()
    with counted(home, "gateway") as may_start:
        if may_start:
            return _serve(models, **options)
    click.echo(f"expertd: {why_refused(home, 'gateway')}", err=True)
    return None


@dataclass
class Named:
    """A model of a command line."""

    path: Path
    aliases: list[str]
    pinned: bool

    @property
    def names(self) -> set[str]:
        return {shown_name(self.path), *self.aliases}


def named_models(models: Sequence[str], aliases: Sequence[str], pins: Sequence[str]) -> list[Named]:
    """The models with what was said of each.

    Raises:
        UsageError: an alias or a pin is of none of them, or a name is of two.
        ExpertdError: one of them is not here, or no checkpoint.
    """
    found: dict[str, Named] = {}
    for model in models:
        path = find_or_pull(model)
        weight_files(path)
        if any(other.path == path for other in found.values()):
            raise click.UsageError(f"{model} is named twice")
        found[model] = Named(path, [], False)

    def one_of(text: str, option: str) -> Named:
        for model, named in found.items():
            if text in (model, shown_name(named.path), named.path.name, str(named.path)):
                return named
        raise click.UsageError(f"{option}: {text} is none of the models that are to be served: {', '.join(found)}")

    for alias in aliases:
        name, _, model = alias.partition("=")
        if not model and len(found) > 1:
            raise click.UsageError(f"--alias {name}: of which model?  Write --alias {name}=MODEL")
        one_of(model or models[0], "--alias").aliases.append(name)
    for pin in pins:
        one_of(pin, "--pin").pinned = True
    seen: dict[str, Named] = {}
    for named in found.values():
        for name in named.names:
            if seen.setdefault(name, named) is not named:
                both = f"{seen[name].path} and {named.path}"
                raise click.UsageError(f"{both} are both called {name}; rename one of the folders, or the alias")
    return list(found.values())


def _serve(
    models: Sequence[str], budget: str | None, aliases: Sequence[str], pins: Sequence[str], **flags: Any
) -> None:
    from expertd.clients.gateway import lifetime
    from expertd.clients.gateway.access import Access
    from expertd.clients.gateway.keys import KeyFile, check_exposure
    from expertd.protocol import logs

    named = named_models(models, aliases, pins)
    home = Home.current()
    config = read_config(home, **flags)
    host, port = config.serve_host.value, config.serve_port.value
    key_file = config.serve_api_key_file.value
    check_exposure(host, key_file is not None)
    keys = None if key_file is None else KeyFile(key_file)
    access = Access(host, config.serve_allow_hosts.value, config.serve_allow_origins.value, keys)
    os.environ[KEYS["serve_kv_bits"].variable] = str(config.serve_kv_bits.value or NOT_QUANTIZED)  # for its worker
    home.prepare()
    logs.set_up("gateway", home.gateway_log(os.getpid()), home, config)
    os.environ.update(logs.environment(config))  # its workers, and the daemon if there is none, log as it does
    # The port comes first: whoever cannot listen should not have started anything.
    with lifetime.listen(host, port) as listener:
        connection, started = connect_or_start(
            home, "gateway", budget=budget, announce=lambda line: click.echo(f"expertd: {line}", err=True)
        )
        connection.close()

        def announce(url: str) -> None:
            click.echo(f"expertd: serving {', '.join(shown_name(one.path) for one in named)} at {url}")
            sys.stdout.flush()

        try:
            make = _maker(home, named, config, budget)
            asyncio.run(lifetime.serve(listener, host, make, home, access=access, ready=announce))
        except ExpertdError:
            if started:
                stop_if_idle(home, "gateway")
            raise


def _maker(home: Home, named: Sequence[Named], config: Config, budget: str | None) -> Callable[[], Models]:
    """What makes the gateway's models, within its loop."""

    def make() -> Models:
        from expertd.clients.gateway.served import Limits, Models, Served

        options = ("--budget", budget) if budget is not None else ()
        limits = Limits(ttl_s=config.serve_ttl.value, deadline_s=config.serve_deadline.value)
        return Models([
            Served(
                home, one.path, number=number, aliases=one.aliases, options=options, limits=limits,
                always=one.pinned or len(named) == 1,
            )
            for number, one in enumerate(named)
        ])  # fmt: skip

    return make
