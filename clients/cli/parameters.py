"""Parameters that several commands take: one help text, one check."""

from __future__ import annotations

import click

from expertd.protocol.sizes import parse_budget


def _checked(ctx: click.Context, param: click.Parameter, budget: str | None) -> str | None:
    """Refuse a wrong budget before the command does anything.  It is passed on as it was written."""
    if budget is not None:
        parse_budget(budget)
    return budget


budget_option = click.option(
    "--budget",
    metavar="SIZE",
    callback=_checked,
    help="Memory for expert weights, if this starts a daemon: 512MB, 2GiB, bytes; auto: what the machine can spare.  "
    "[default: as 'expertd config show' says]",
)
