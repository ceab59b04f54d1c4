"""``expertd daemon run | stop``."""

from __future__ import annotations

from pathlib import Path

import click

from expertd.clients.cli.parameters import budget_option
from expertd.protocol.config import POLICY_NAMES
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon


@click.group()
def daemon() -> None:
    """Run or stop the cache daemon of this home (EXPERTD_HOME)."""


@daemon.command()
@budget_option
@click.option(
    "--idle-exit", type=float, metavar="SECONDS", help="End after so long without a session.  [default: never]"
)
@click.option(
    "--policy",
    type=click.Choice(POLICY_NAMES),
    help=f"How to choose the blocks that go.  [default: {POLICY_NAMES[0]}]",
)
@click.option(
    "--keep-alive",
    type=float,
    metavar="SECONDS",
    help="Give a model's memory back when nobody has used it for so long.  [default: when memory is needed]",
)
@click.option(
    "--background-rate",
    metavar="RATE",
    help="Read at most so much a second while nobody waits for it, for example 200MB/s.  [default: no limit]",
)
@click.option(
    "--read-ahead/--no-read-ahead",
    default=None,
    help="Read what sessions will soon need before they ask for it, where that pays.  [default: read-ahead]",
)
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
def run(
    budget: str | None, idle_exit: float | None, policy: str | None, keep_alive: float | None,
    background_rate: str | None, read_ahead: bool | None, simulate_pressure: Path | None, simulate_ssd: str | None,
) -> None:  # fmt: skip
    """Run the daemon in the foreground until Ctrl-C, SIGTERM or 'expertd daemon stop'.

    Defaults may be changed by variables (EXPERTD_BUDGET and so on) and by config.toml: see 'expertd config show'.
    """
    from expertd.daemon.__main__ import run as run_daemon

    run_daemon(
        budget, idle_exit, policy,
        keep_alive_s=keep_alive, background_rate=background_rate, read_ahead=read_ahead,
        simulate_pressure=simulate_pressure, simulate_ssd=simulate_ssd,
    )  # fmt: skip


@daemon.command()
@click.option("--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="How long to wait.")
def stop(timeout: float) -> None:
    """Stop the daemon, of whatever version; sessions that use it lose it.

    Its memory is free when this returns, except what a process that still has a model loaded keeps until it ends.
    """
    pid = stop_daemon(Home.current(), "cli", timeout_s=timeout)
    click.echo(f"stopped the daemon (process {pid})")
