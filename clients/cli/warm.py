"""``expertd warm MODEL``: have experts resident before they are needed, by running prompts, or as a profile says."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import click

from expertd.clients.cli.load import filling, in_use, kept_open, show_resident, status_of
from expertd.clients.cli.parameters import budget_option, complete_model, complete_profile, model_folder_option
from expertd.clients.client import Client
from expertd.protocol.model_names import find_model, shown_name
from expertd.protocol.paths import Home

_file = click.Path(path_type=Path)


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("prompt", nargs=-1)
@click.option(
    "--prompts", type=_file, metavar="FILE", help="More of them: one a line, or .jsonl with 'prompt' or 'messages'."
)
@click.option(
    "--profile", "name", shell_complete=complete_profile, metavar="NAME",
    help="Bring in what this profile names.  [default: the one that MODEL uses]",
)  # fmt: skip
@click.option("--wait", is_flag=True, help="With a profile: return only when its experts are there.")
@click.option(
    "--max-tokens",
    default=64,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest answer to each.",
)
@click.option("--raw", is_flag=True, help="Continue prompts as they are, without the model's chat template.")
@model_folder_option
@budget_option
def warm(
    model: str, prompt: tuple[str, ...], prompts: Path | None, name: str | None, wait: bool, max_tokens: int, raw: bool,
    budget: str | None,
) -> None:  # fmt: skip
    """Have the experts of MODEL (a checkpoint's folder or name) resident that PROMPTs use, or that a profile names.

    With prompts they are answered, and the answers thrown away.  Other prompts of the kind, by whatever app, then find
    most of their experts there, and the daemon knows better which to keep.

    Without prompts a profile's experts are read into free memory, those first that are used most; nothing is evicted
    for them, and what others wait for is read first.  If a program uses the model, this returns at once unless you give
    --wait; else it stays until they are there.  Ctrl-C ends either; what was read stays.
    """
    if prompt or prompts is not None:
        if name is not None or wait:
            raise click.UsageError("give prompts, or a profile, but not both")
        _answer(find_model(model), prompt, prompts, max_tokens, raw, budget)
        return
    from expertd.protocol.profiles import profiles_in_use

    home, folder = Home.current(), find_model(model)
    name = name or profiles_in_use(home).get(str(folder))
    if name is None:
        raise click.UsageError(
            f"give a PROMPT, --prompts FILE or --profile NAME ('expertd profile use {model} NAME' sets one); "
            "'expertd load' fills free memory without any"
        )
    _bring_in(home, folder, name, wait, budget)


def _answer(
    folder: Path, prompt: tuple[str, ...], prompts: Path | None, max_tokens: int, raw: bool, budget: str | None
) -> None:
    """Run the prompts, and tell what is resident."""
    from expertd.clients.traces.prompts import Prompt, read_prompts

    texts: list[Prompt] = [*prompt, *(read_prompts(prompts) if prompts is not None else ())]
    from expertd.worker.answers import answer_all, encode_prompt
    from expertd.worker.load import load, session_of, unload

    loaded, tokenizer = load(folder, budget=budget)
    key = session_of(loaded).manifest.key
    encoded = [encode_prompt(tokenizer, text, raw=raw) for text in texts]
    with Client() as client:
        before = status_of(client, folder, key)
        with click.progressbar(length=len(encoded), label="prompts", show_pos=True, file=sys.stderr) as bar:
            for _ in answer_all(loaded, tokenizer, encoded, max_tokens):
                bar.update(1)
        unload(loaded)  # so that all is told of which experts were used
        after = status_of(client, folder, key)
    hits, misses = after.hits - before.hits, after.misses - before.misses
    click.echo(show_resident(after))
    click.echo(f"{hits / max(1, hits + misses):.1%} of what these prompts used was there already")


def _bring_in(home: Home, folder: Path, name: str, wait: bool, budget: str | None) -> None:
    """Have a profile's experts read, and tell what came of it."""
    from expertd.clients.cli.profile import experts_of, fitting
    from expertd.protocol.profiles import read_profile

    blocks = fitting(read_profile(home, name), name, experts_of(home, folder), folder).blocks
    with ExitStack() as stack:
        used = in_use(folder)
        key = used or stack.enter_context(kept_open(folder, budget))
        client = stack.enter_context(Client())
        before = status_of(client, folder, key)
        if used and not wait:
            coming = client.warm(key, blocks)
            click.echo(f"{shown_name(folder)}: {coming} experts of the profile {name} are on their way")
            return
        for found in filling(client, folder, key, blocks):
            if not found.sessions:  # whoever used it has ended, and without anybody nothing is read
                stack.enter_context(kept_open(folder, budget))
        after = status_of(client, folder, key)
    click.echo(show_resident(after))
    brought = max(0, after.resident_blocks - before.resident_blocks)
    told = f"{brought} experts came in for the profile {name}, which names {len(blocks)}"
    if before.resident_blocks >= before.blocks:
        told = f"the profile {name} had nothing to bring in: all experts are there"
    elif before.resident_blocks >= before.slots:
        told += f"; there was no free memory, and what is there stays: 'expertd unload {shown_name(folder)}' empties it"
    click.echo(told)
