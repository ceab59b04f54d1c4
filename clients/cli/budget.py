"""``expertd budget [SIZE]``: show or change the memory that experts may take, while the daemon runs.

What a daemon starts with is in ``expertd.protocol.config``.
"""

from __future__ import annotations

import json

import click

from expertd.clients.cli.parameters import json_option
from expertd.protocol.errors import SizeInvalid
from expertd.protocol.messages import AskStatus, BudgetSet, SetBudget, Status
from expertd.protocol.paths import Home
from expertd.protocol.quick import quick_status
from expertd.protocol.rendezvous import connect
from expertd.protocol.sizes import parse_budget, show_size

LEAST = 10_000
"""Bytes; whoever asks for less has forgotten the unit."""


@click.command()
@click.argument("size", required=False)
@json_option("Print one JSON object, in bytes.")
def budget(size: str | None, as_json: bool) -> None:
    """Set the running daemon's budget to SIZE (512MB, 2GiB, bytes, or auto: what the machine can spare), or show it.

    A smaller budget gives memory back, without a restart of anything.  It holds for now, until this daemon ends; for
    good, write it into config.toml, where each daemon that starts finds it ('expertd config show' names the file).
    Exits with 3 if no daemon runs in this home, with 4 if the models in use need more.
    """
    wanted = None if size is None else parse_budget(size)
    if size is not None and wanted is not None and wanted < LEAST:
        meant = f"; did you mean {size}GB?" if size.isdecimal() else ""
        raise SizeInvalid(f"{show_size(wanted)} is less than any model's experts can do with{meant}")
    with connect(Home.current(), "cli") as connection:
        if size is None:
            status = connection.ask(AskStatus(), Status)
            found = {name: getattr(status, name) for name in ("budget_bytes", "limit_bytes", "used_bytes")}
            limit = ""
            if status.limit_bytes < status.budget_bytes:
                limit = f", of which memory pressure leaves {show_size(status.limit_bytes)}"
            said = f"the budget is {show_size(status.budget_bytes)}{limit}; {show_size(status.used_bytes)} in use"
        else:
            answer = connection.ask(SetBudget(budget=wanted), BudgetSet)
            found = {"budget_bytes": answer.budget, "before_bytes": answer.before}
            said = f"the budget is {show_size(answer.budget)} now; it was {show_size(answer.before)}"
    click.echo(json.dumps(found, indent=2) if as_json else said)


def cache_holds(home: Home) -> int:
    """Bytes that the home's daemon holds, and those that sessions still hold of one that has ended.

    They are no memory that others have taken, neither to a daemon that starts nor to ``expertd budget auto``.
    """
    from expertd.daemon.holders import Holders

    told, holders = quick_status(str(home.root)), Holders(home.daemon_holders)
    if told is None:
        return holders.before
    status = json.loads(told)
    here = {model["id"] for model in status["models"] if model["sessions"]}
    return int(status["used_bytes"]) + holders.beside(here)
