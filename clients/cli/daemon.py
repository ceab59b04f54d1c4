"""``expertd daemon run | stop``."""

from __future__ import annotations

from pathlib import Path

import click

from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon
from expertd.protocol.sizes import parse_size

POLICY_NAMES = ("forecast", "lru", "lfu", "lcp", "ewma")
"""Of ``expertd.daemon.policy.POLICIES``; the first is the default, the others are there to be compared with."""


@click.group()
def daemon() -> None:
    """Run or stop the cache daemon of this home (EXPERTD_HOME)."""


@daemon.command()
@click.option(
    "--budget",
    metavar="SIZE",
    help="Memory for expert weights: 512MB, 2GiB, bytes; auto: what the machine can spare.  [default: auto]",
)
@click.option("--idle-exit", type=float, metavar="SECONDS", help="End after so long without a session.")
@click.option(
    "--policy",
    type=click.Choice(POLICY_NAMES),
    default=POLICY_NAMES[0],
    show_default=True,
    help="How to choose the blocks that go.",
)
@click.option(
    "--keep-alive",
    type=float,
    metavar="SECONDS",
    help="Give a model's memory back when nobody has used it for so long.  [default: when memory is needed]",
)
@click.option(
    "--simulate-pressure",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Memory pressure from a script, lines of 'SECONDS normal|warning|critical', not the system's.",
)
def run(
    budget: str | None, idle_exit: float | None, policy: str, keep_alive: float | None, simulate_pressure: Path | None
) -> None:
    """Run the daemon in the foreground until Ctrl-C, SIGTERM or 'expertd daemon stop'."""
    from expertd.daemon.__main__ import run as run_daemon

    if budget not in (None, "auto"):
        parse_size(budget)
    run_daemon(budget, idle_exit, policy, keep_alive_s=keep_alive, simulate_pressure=simulate_pressure)


@daemon.command()
@click.option("--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="How long to wait.")
def stop(timeout: float) -> None:
    """Stop the daemon, of whatever version; sessions that use it lose it.

    Its memory is free when this returns, except what a process that still has a model loaded keeps until it ends.
    """
    pid = stop_daemon(Home.current(), "cli", timeout_s=timeout)
    click.echo(f"stopped the daemon (process {pid})")
