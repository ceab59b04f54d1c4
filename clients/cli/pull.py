"""``expertd pull ID``: get a model from the hub, and tell how to go on.

Output: three lines on stdout once it is here, or one JSON object; how far it is goes to stderr.  The download itself is
``expertd.clients.hub.download``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.clients.cli.parameters import json_option
from expertd.clients.cli.progress import Progress
from expertd.clients.cli.signals import ENDS, on_signals
from expertd.protocol.model_names import hub_id
from expertd.protocol.sizes import show_size

if TYPE_CHECKING:
    from expertd.clients.hub.download import HubModel

INTERRUPTED = 130


@click.command()
@click.argument("id")
@click.option("--revision", metavar="R", help="A branch, tag or commit.  [default: main]")
@json_option("Print one JSON object when it is done.")
def pull(id: str, revision: str | None, as_json: bool) -> None:
    """Download the model ID (as mlx-community/Qwen3-30B-A3B-4bit) from the hub.

    It goes into the hub's cache, which other programs share (HF_HUB_CACHE, else HF_HOME, else ~/.cache/huggingface).
    Only the files that mlx-lm needs are fetched.  A model that is here already is brought up to date.

    If it breaks off, the same command goes on: files that are complete are kept.  HF_ENDPOINT names another hub.
    """
    from expertd.clients.hub.download import look_up
    from expertd.clients.hub.survey import survey

    wanted = hub_id(id.removeprefix("https://huggingface.co/").rstrip("/"))
    if wanted is None:
        raise click.BadParameter(f"{id!r} is no id of a model on the hub; write it as org/name", param_hint="ID")
    name, written = wanted
    if written is not None and revision is not None and written != revision:
        raise click.BadParameter(f"{id} names a revision already; leave --revision out", param_hint="--revision")
    found = look_up(name, written or revision)
    fresh = found.missing_bytes
    folder = fetch(found)
    facts = survey(folder, found.name)
    if as_json:
        told = {"id": found.id, "revision": found.commit, "path": str(folder), "bytes": found.size, "fetched": fresh}
        click.echo(json.dumps({**told, "servable": facts.servable, "why_not": facts.why_not or None}, indent=2))
        return
    got = f"{show_size(fresh)} fetched" if fresh else "nothing to fetch"
    click.echo(f"{found.name} is here: {show_size(found.size)}, {got}\n  in {folder}")
    if facts.servable:
        click.echo(f"serve it with: expertd serve {found.name}")
    else:
        click.echo(f"expertd cannot serve it: {facts.why_not}")


def fetch(found: HubModel) -> Path:
    """Download what is missing of ``found``, with progress on stderr; the folder that has it.

    Raises:
        HubError, DiskFull: as ``expertd.clients.hub.download`` says.
    """
    from expertd.clients.hub.download import check_room, download

    check_room(found)
    missing = found.missing_bytes
    try:
        with _signals() as cancelled:
            if not missing:
                return download(found, lambda size: None, cancelled)
            with Progress("fetched", found.size) as progress:
                progress.moved(found.size - missing, fresh=False)
                return download(found, progress.moved, cancelled)
    except KeyboardInterrupt:
        click.echo("expertd: interrupted; files that are complete are kept, and the same command goes on", err=True)
        sys.exit(INTERRUPTED)


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Have what ends a command set the event, and end the process at the second time."""
    cancelled = threading.Event()

    def cancel(number: int, frame: object) -> None:
        if cancelled.is_set():
            os._exit(INTERRUPTED)
        cancelled.set()
        raise KeyboardInterrupt

    with on_signals(cancel, *ENDS):
        yield cancelled
