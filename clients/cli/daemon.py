"""``expertd daemon run | stop``."""

from __future__ import annotations

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
@click.option("--budget", metavar="SIZE", help="Memory for expert weights: 512MB, 2GiB, bytes.  [default: half of RAM]")
@click.option("--idle-exit", type=float, metavar="SECONDS", help="End after so long without a session.")
@click.option(
    "--policy",
    type=click.Choice(POLICY_NAMES),
    default=POLICY_NAMES[0],
    show_default=True,
    help="How to choose the blocks that go.",
)
def run(budget: str | None, idle_exit: float | None, policy: str) -> None:
    """Run the daemon in the foreground until Ctrl-C, SIGTERM or 'expertd daemon stop'."""
    from expertd.daemon.__main__ import run as run_daemon

    if budget is not None:
        parse_size(budget)
    run_daemon(budget, idle_exit, policy)


@daemon.command()
@click.option("--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="How long to wait.")
def stop(timeout: float) -> None:
    """Stop the daemon, of whatever version; sessions that use it lose it.

    Its memory is free when this returns, except what a process that still has a model loaded keeps until it ends.
    """
    pid = stop_daemon(Home.current(), "cli", timeout_s=timeout)
    click.echo(f"stopped the daemon (process {pid})")
