"""``expertd budget [SIZE]``: show or change the memory that experts may take, while the daemon runs.

What a daemon starts with is in ``expertd.protocol.config``.
"""

from __future__ import annotations

import click

from expertd.protocol.messages import AskStatus, BudgetSet, SetBudget, Status
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect
from expertd.protocol.sizes import parse_budget, show_size


@click.command()
@click.argument("size", required=False)
def budget(size: str | None) -> None:
    """Set the running daemon's budget to SIZE (512MB, 2GiB, bytes, or auto: what the machine can spare), or show it.

    A smaller budget gives memory back, without a restart of anything.  It holds for now, until this daemon ends; for
    good, write it into config.toml, where each daemon that starts finds it ('expertd config show' names the file).
    Exits with 3 if no daemon runs in this home.
    """
    wanted = None if size is None else parse_budget(size)
    with connect(Home.current(), "cli") as connection:
        if size is None:
            status = connection.ask(AskStatus(), Status)
            limit = ""
            if status.limit_bytes < status.budget_bytes:
                limit = f", of which memory pressure leaves {show_size(status.limit_bytes)}"
            click.echo(f"the budget is {show_size(status.budget_bytes)}{limit}; {show_size(status.used_bytes)} in use")
        else:
            answer = connection.ask(SetBudget(budget=wanted), BudgetSet)
            click.echo(f"the budget is {show_size(answer.budget)} now; it was {show_size(answer.before)}")
