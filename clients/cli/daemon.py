"""``expertd daemon run | stop``."""

from __future__ import annotations

import time

import click
import psutil

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonLost
from expertd.protocol.messages import Stop, Stopping
from expertd.protocol.paths import Home
from expertd.protocol.sizes import parse_size


@click.group()
def daemon() -> None:
    """Run or stop the cache daemon of this home (EXPERTD_HOME)."""


@daemon.command()
@click.option("--budget", metavar="SIZE", help="Memory for expert weights: 512MB, 2GiB, bytes.  [default: half of RAM]")
@click.option("--idle-exit", type=float, metavar="SECONDS", help="End after so long without a session.")
def run(budget: str | None, idle_exit: float | None) -> None:
    """Run the daemon in the foreground until Ctrl-C, SIGTERM or 'expertd daemon stop'."""
    from expertd.daemon.__main__ import run as run_daemon

    if budget is not None:
        parse_size(budget)
    run_daemon(budget, idle_exit)


@daemon.command()
@click.option("--timeout", type=float, default=30.0, show_default=True, metavar="SECONDS", help="How long to wait.")
def stop(timeout: float) -> None:
    """Stop the daemon; sessions that use it lose it.  Its memory is free when this returns."""
    home = Home.current()
    with Connection(home.daemon_socket, "cli") as connection:
        pid = connection.daemon.pid
        connection.ask(Stop(), Stopping)
    deadline = time.monotonic() + timeout
    while psutil.pid_exists(pid) and _running(pid):
        if time.monotonic() > deadline:
            raise DaemonLost(f"the daemon (process {pid}) did not end in {timeout:.0f} s; end it with: kill {pid}")
        time.sleep(0.02)
    click.echo(f"stopped the daemon (process {pid})")


def _running(pid: int) -> bool:
    """Whether the process still runs; one that has ended and was not waited for by its parent does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
