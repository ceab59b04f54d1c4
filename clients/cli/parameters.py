"""Parameters that several commands take: one help text, one check; and the model that may have to be fetched first."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from expertd.protocol.errors import ExpertdError, ModelIncomplete, ModelNotHere
from expertd.protocol.model_names import find_model, hub_id
from expertd.protocol.sizes import parse_budget, show_size


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


def find_or_pull(model: str) -> Path:
    """The folder of MODEL; on a terminal the user may have a model of the hub that is not here downloaded first.

    Raises:
        ExpertdError: as ``find_model``; or the hub has no such model, or does not answer, or the download broke off.
    """
    try:
        return find_model(model)
    except (ModelNotHere, ModelIncomplete) as missing:
        wanted = hub_id(model)
        on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
        if wanted is None or "/" not in wanted[0] or Path(model).parent.is_dir() or not on_terminal:
            raise
        click.echo(f"expertd: {missing.message.partition(';')[0]}", err=True)
        _offer(*wanted, missing)
    return find_model(model)


def _offer(id: str, revision: str | None, missing: ExpertdError) -> None:
    """Download a model if the user says so; else raise ``missing``."""
    # Late, because it imports what speaks HTTP.
    from expertd.clients.cli.pull import fetch
    from expertd.clients.hub.download import look_up

    found = look_up(id, revision)
    if not click.confirm(f"Download {show_size(found.missing_bytes)} now?", err=True):
        raise missing
    fetch(found)
