"""The command line: ``python -m tools.factory PATH --family qwen3_moe --hidden 2048 --layers 4 ...``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from tools.factory import FAMILIES, Sizes, write_checkpoint
from tools.factory.cells import DENSE, EXPERTS
from tools.factory.forms import NAMES


def _size_options(command: Callable[..., None]) -> Callable[..., None]:
    """One option for each field of ``Sizes``, so that the two cannot drift apart."""
    for size in reversed(dataclasses.fields(Sizes)):
        option = f"--{size.name.replace('_', '-')}"
        command = click.option(option, size.name, type=int, help="Default: the family's own.")(command)
    return command


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--family", type=click.Choice(tuple(FAMILIES)), default="qwen3_moe", show_default=True)
@click.option("--experts", type=click.Choice(EXPERTS), default="mxfp4", show_default=True)
@click.option("--dense", type=click.Choice(DENSE), default="float32", show_default=True)
@click.option("--names", type=click.Choice(NAMES), default="stacked", show_default=True)
@click.option("--shards", type=int, default=1, show_default=True, help="Number of weight files.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--group-size", type=int, help="Of affine experts: 32, 64 (the default) or 128.")
@_size_options
def main(path: Path, **options: Any) -> None:
    """Write a made-up mlx-lm checkpoint to the new folder PATH."""
    start = time.monotonic()
    given = {name: value for name, value in options.items() if value is not None}
    try:
        write_checkpoint(path, **given)
    except (ValueError, FileExistsError) as error:
        raise click.ClickException(str(error)) from error
    size_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    click.echo(f"{path}: {size_bytes / 1e9:.3f} GB of weights in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
