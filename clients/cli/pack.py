"""``expertd pack MODEL``: write a model's experts once more, each in one piece, so that a miss is one read.

Output: one line on stdout that names the store; how far it is goes to stderr.  What a store is: ``protocol.packed``.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.clients.cli.group import INTERRUPTED
from expertd.clients.cli.parameters import complete_model, json_option, model_folder_option
from expertd.clients.cli.progress import Progress
from expertd.protocol.errors import PackFailed, StoreInvalid
from expertd.protocol.manifest import Manifest
from expertd.protocol.model_names import find_model
from expertd.protocol.packed import StoreLayout, check_fits, header_of, layout_of, store_name
from expertd.protocol.paths import Home
from expertd.protocol.sizes import show_size

if TYPE_CHECKING:
    from expertd.worker.manifest import LazyModel

Fill = Callable[[int, int, Sequence[memoryview]], None]
"""As in ``expertd.worker.store``."""


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR",
    help="Folder for the store; a link in the home leads to it.  [default: the folder 'packed' in the home]",
)  # fmt: skip
@model_folder_option
@click.option("--verify", is_flag=True, help="Compare a store that exists with its checksums and the model.")
@json_option()
def pack(model: str, output: Path | None, verify: bool, as_json: bool) -> None:
    """Write a packed store of MODEL, a checkpoint's folder or the name of one ('expertd models').

    A store holds all experts once more, each in one piece and with a checksum, and takes as much space as they do.  The
    daemon reads from it when the model is loaded the next time; 'expertd status' then names it.  When MODEL changes,
    its store is not used any more: delete it, and pack again.

    Where mlx-lm computes the experts while it loads, as for the original gpt-oss files, they are computed here once,
    layer by layer, and the store is what makes the model usable.

    A store is complete or not there.  A run that was interrupted leaves a file that ends in '.part', and the same
    command goes on with it.  No daemon is needed.

    With --verify nothing is written; exits with 2 if there is no store, or if a block in it is wrong.
    """
    from expertd.worker.manifest import load_lazily

    home = Home.current()
    home.check()
    if output is not None and not output.is_dir():
        raise click.BadParameter(f"{output} is no folder; create it first", param_hint="--output")
    loaded = load_lazily(find_model(model, home))
    manifest, fill = loaded.manifest, _filler(loaded)
    name = store_name(manifest.key)
    places = [home.packed / name, *([] if output is None else [output.resolve() / name])]
    layout = layout_of(header_of(manifest))
    found = _existing(places, manifest)
    lost = _leads_nowhere(places[0])
    if verify:
        _verify(found, lost, layout, fill, as_json)
        return
    _prepare(home)
    written = found is None
    if found is None:
        found = places[-1]
        if lost:
            click.echo(f"expertd: {lost}; another store is written", err=True)
        _write(layout, found, fill)
        done = f"packed {manifest.folder}"
    else:
        done = f"{manifest.folder} is packed already"
        if output is not None and found.parent != output.resolve():
            click.echo(
                f"expertd: --output is not used, because there is a store; to have it in {output}: "
                f"{shlex.join(['mv', str(found), str(output)])}, and call this command again", err=True,
            )  # fmt: skip
    _link(places[0], found)
    if as_json:
        click.echo(json.dumps({**_as_object(found, layout), "written": written}, indent=2))
        return
    click.echo(f"{done}: {layout.header.blocks} blocks, {show_size(layout.size)}, in {found}")


def _as_object(store: Path, layout: StoreLayout) -> dict[str, object]:
    header = layout.header
    return {"model": header.folder, "store": str(store), "blocks": header.blocks, "bytes": layout.size}


def _filler(loaded: LazyModel) -> Fill:
    """Where blocks come from: the model's files, or mlx-lm, where that computes them."""
    from expertd.daemon.blocks import OpenFiles, read_block
    from expertd.daemon.index import build_index
    from expertd.worker.computed import ComputedBlocks

    if loaded.manifest.derived_by:
        return ComputedBlocks(loaded).fill
    files = OpenFiles(build_index(loaded.manifest))

    def fill(layer: int, expert: int, rows: Sequence[memoryview]) -> None:
        read_block(files, layer, expert, rows)

    return fill


def _prepare(home: Home) -> None:
    home.prepare()
    try:
        home.packed.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise PackFailed(f"{home.packed} cannot be created ({error.strerror})") from error


def _existing(places: Sequence[Path], manifest: Manifest) -> Path | None:
    """The store of ``manifest`` itself (no link), if one of ``places`` has it; others are told of."""
    for path in places:
        try:
            check_fits(path, manifest)
        except FileNotFoundError:
            continue
        except StoreInvalid as error:
            click.echo(f"expertd: {error}", err=True)
        else:
            return path.resolve()
    return None


def _leads_nowhere(link: Path) -> str:
    """What is wrong with the home's link to a store on another disk; empty if nothing is, or there is none."""
    return f"{link} leads to {link.readlink()}, which is not there" if link.is_symlink() and not link.exists() else ""


def _write(layout: StoreLayout, path: Path, fill: Fill) -> None:
    from expertd.worker.store import part_path, write_store

    try:
        with Progress("packed", layout.record_bytes) as progress:
            write_store(layout, path, fill, progress.moved)
    except KeyboardInterrupt:
        click.echo(f"expertd: interrupted; {part_path(path)} is kept, and the same command goes on with it", err=True)
        sys.exit(INTERRUPTED)


def _verify(path: Path | None, lost: str, layout: StoreLayout, fill: Fill, as_json: bool) -> None:
    from expertd.worker.store import verify_store

    folder = layout.header.folder
    if path is None and lost:
        raise StoreInvalid(f"{lost}; mount its disk, or write another with: expertd pack {folder}")
    if path is None:
        raise StoreInvalid(f"there is no packed store of {folder} that fits it; write one with: expertd pack {folder}")
    with Progress("verified", layout.record_bytes) as progress:
        verify_store(layout, path, fill, progress.moved)
    if as_json:
        click.echo(json.dumps({**_as_object(path, layout), "right": True}, indent=2))
        return
    click.echo(f"{path} is right: {layout.header.blocks} blocks fit their checksums and the model")


def _link(link: Path, store: Path) -> None:
    """Have ``link`` lead to ``store``, unless it does already, or is the store itself."""
    from expertd.worker.store import sync_folder

    if link.exists() and link.samefile(store):
        return
    try:
        new = link.with_name(link.name + ".new")
        new.unlink(missing_ok=True)
        new.symlink_to(store)
        new.replace(link)
        sync_folder(link.parent)
    except OSError as error:
        raise PackFailed(f"{link}, which should lead to {store}, cannot be made ({error.strerror})") from error
