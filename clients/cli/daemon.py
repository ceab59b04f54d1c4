"""``expertd daemon run | stop``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expertd.clients.cli.group import Group
from expertd.clients.cli.parameters import config_option, log_options
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon


@click.group(cls=Group)
def daemon() -> None:
    """Run or stop the cache daemon of this home (EXPERTD_HOME)."""


@daemon.command()
@config_option("budget")
@config_option("idle_exit")
@config_option("policy")
@config_option("keep_alive")
@config_option("background_rate")
@config_option("read_ahead")
@config_option("remember")
@log_options
@click.option(
    "--simulate-pressure",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Memory pressure from a script, lines of 'SECONDS normal|warning|critical', not the system's.",
)
@click.option(
    "--simulate-ssd",
    metavar="RATE[,LATENCY]",
    help="Slow reads down to those of a slower SSD, for example 2GB,100us; 'expertd status' says so.",
)
def run(simulate_pressure: Path | None, simulate_ssd: str | None, **flags: Any) -> None:
    """Run the daemon in the foreground until Ctrl-C, SIGTERM or 'expertd daemon stop'.

    Defaults may be changed by variables (EXPERTD_BUDGET and so on) and by config.toml: see 'expertd config show'.
    """
    from expertd.daemon.__main__ import run as run_daemon

    run_daemon(simulate_pressure=simulate_pressure, simulate_ssd=simulate_ssd, **flags)


@daemon.command()
@click.option("--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="How long to wait.")
def stop(timeout: float) -> None:
    """Stop the daemon, of whatever version; sessions that use it lose it.

    Its memory is free when this returns, except what a process that still has a model loaded keeps until it ends.
    """
    pid = stop_daemon(Home.current(), "cli", timeout_s=timeout)
    click.echo(f"stopped the daemon (process {pid})")
