"""``expertd load MODEL``: have a model's experts resident before somebody needs them.

What is brought in is decided by the daemon (``expertd.protocol.messages.Warm``), which reads as long as some session
uses the model; where none does, this command keeps one open meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from expertd.clients.cli.parameters import budget_option, complete_model, model_folder_option
from expertd.clients.cli.progress import Progress
from expertd.clients.client import Block, Client
from expertd.protocol.errors import CheckpointError, DaemonNotRunning, ModelNotLoaded
from expertd.protocol.messages import ModelStatus
from expertd.protocol.model_names import find_model, shown_name, shown_path

_POLL_S = 0.1


@click.command()
@click.argument("model", shell_complete=complete_model)
@model_folder_option
@budget_option
def load(model: str, budget: str | None) -> None:
    """Read the experts of MODEL (a checkpoint's folder or name) into free memory, those first that are used most.

    Whoever loads it afterwards finds them resident.  Nothing is evicted for them, and what others wait for is read
    first.  Ctrl-C ends it; what was read stays.  'expertd warm' reads what given prompts use.
    """
    folder = find_model(model)
    with ExitStack() as stack:
        key = in_use(folder) or stack.enter_context(kept_open(folder, budget))
        client = stack.enter_context(Client())
        for found in filling(client, folder, key):
            if not found.sessions:  # whoever used it has ended, and without anybody nothing is read
                stack.enter_context(kept_open(folder, budget))
        click.echo(show_resident(status_of(client, folder, key)))


def status_of(client: Client, folder: Path, key: str | None = None) -> ModelStatus:
    """What the daemon holds of the model in ``folder``: of the version with that key, else of the one that came last.

    Raises:
        ModelNotLoaded: nothing.
    """
    models = client.status().models
    for model in reversed(models):
        if model.path == str(folder) and key in (None, model.id):
            return model
    held = ", ".join(shown_name(model.path) for model in models) or "no model"
    name = shown_path(str(folder))
    raise ModelNotLoaded(
        f"the daemon holds nothing of {name} now (it holds {held}); a program that uses it brings it, or: "
        f"expertd load {name}"
    )


def show_resident(model: ModelStatus) -> str:
    """One sentence about what is resident."""
    share = 100 * model.resident_blocks // max(1, model.blocks)
    return f"{shown_path(model.path)}: {model.resident_blocks} of {model.blocks} blocks ({share} %) are resident"


def in_use(folder: Path) -> str | None:
    """The key of the model if some session uses it already, as its files are now; None if that is not known."""
    from expertd.clients.planning.shape import read_shape

    try:
        with Client() as client:
            found = status_of(client, folder)
        # Where headers do not tell the key (mlx-lm computes the experts), a session of one's own does.
        return found.id if found.sessions and read_shape(folder).manifest.key == found.id else None
    except (DaemonNotRunning, ModelNotLoaded, CheckpointError):
        return None


@contextmanager
def kept_open(folder: Path, budget: str | None) -> Iterator[str]:
    """A session of the model, whose key this gives; the weights that are not experts' are not read for it."""
    from expertd.worker.load import load as load_model
    from expertd.worker.load import session_of, unload

    loaded, _ = load_model(folder, lazy=True, budget=budget)
    try:
        yield session_of(loaded).manifest.key
    finally:
        unload(loaded)


def filling(client: Client, folder: Path, key: str, blocks: Sequence[Block] = ()) -> Iterator[ModelStatus]:
    """What the daemon holds of the model with that key, again and again until it has brought in what there is room for.

    That is ``blocks``, the first first; without any all, those first that are used most.
    """
    before = status_of(client, folder, key)
    wanted = client.warm(key, blocks)
    if not wanted or before.resident_blocks >= before.slots:
        return
    size, there = before.block_bytes, before.resident_blocks
    with Progress(shown_name(folder), min(wanted, before.slots - there) * size) as progress:
        warming = True
        while warming:
            time.sleep(_POLL_S)
            found = status_of(client, folder, key)
            progress.moved(max(0, found.resident_blocks - there) * size)
            there, warming = max(there, found.resident_blocks), found.warming > 0
            yield found
