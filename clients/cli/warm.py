"""``expertd warm MODEL PROMPT...``: have the experts resident that prompts like these use, by running them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from expertd.clients.cli.load import show_resident, status_of
from expertd.clients.cli.parameters import budget_option, complete_model
from expertd.clients.client import Client
from expertd.protocol.model_names import find_model

_file = click.Path(path_type=Path)


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("prompt", nargs=-1)
@click.option(
    "--prompts", type=_file, metavar="FILE", help="More of them: one a line, or .jsonl with 'prompt' or 'messages'."
)
@click.option(
    "--max-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest answer to each.",
)
@click.option("--raw", is_flag=True, help="Continue prompts as they are, without the model's chat template.")
@budget_option
def warm(
    model: str, prompt: tuple[str, ...], prompts: Path | None, max_tokens: int, raw: bool, budget: str | None
) -> None:
    """Answer PROMPTs with MODEL (a checkpoint's folder or name), so that the experts which they use are resident.

    The answers are thrown away.  Other prompts of the kind, by whatever app, then find most of their experts there, and
    the daemon knows better which to keep.  Ctrl-C ends it; what was read stays.
    """
    from expertd.clients.traces.prompts import Prompt, read_prompts

    texts: list[Prompt] = [*prompt, *(read_prompts(prompts) if prompts is not None else ())]
    if not texts:
        raise click.UsageError("give a PROMPT or --prompts FILE; without any, 'expertd load' fills free memory")
    folder = find_model(model)
    from expertd.worker.answers import answer_all, encode_prompt
    from expertd.worker.load import load, unload

    loaded, tokenizer = load(folder, budget=budget)
    encoded = [encode_prompt(tokenizer, text, raw=raw) for text in texts]
    with Client() as client:
        before = status_of(client, folder)
        with click.progressbar(length=len(encoded), label="prompts", show_pos=True, file=sys.stderr) as bar:
            for _ in answer_all(loaded, tokenizer, encoded, max_tokens):
                bar.update(1)
        unload(loaded)  # so that all is told of which experts were used
        after = status_of(client, folder)
    hits, misses = after.hits - before.hits, after.misses - before.misses
    click.echo(show_resident(after))
    click.echo(f"{hits / max(1, hits + misses):.1%} of what these prompts used was there already")
