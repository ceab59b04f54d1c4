"""``expertd pin MODEL``: have those experts stay that everything uses, as the model's profiles tell.

A pinned expert is evicted only where a request would find no other room (``expertd.daemon.core.warmth``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from expertd.clients.cli.load import status_of
from expertd.clients.cli.parameters import complete_loaded, complete_profile, model_folder_option
from expertd.clients.client import Block, Client
from expertd.protocol.errors import ModelNotLoaded, ProfileInvalid
from expertd.protocol.messages import ModelStatus
from expertd.protocol.model_names import find_model, shown_name
from expertd.protocol.paths import Home
from expertd.protocol.profiles import Profile, profile_names, profiles_in_use, read_profile

MOST = 50
"""Percent of a pool that may be pinned; the daemon takes no more (``daemon.core.warmth.PINNED``)."""


@click.command()
@click.argument("model", shell_complete=complete_loaded)
@click.option(
    "--profile", "names", multiple=True, shell_complete=complete_profile, metavar="NAME",
    help="Go by this profile; repeatable.  [default: every profile that fits the model]",
)  # fmt: skip
@click.option(
    "--share", default=10, show_default=True, type=click.IntRange(1, MOST), metavar="PERCENT",
    help="Of the model's memory, at most so much.",
)  # fmt: skip
@model_folder_option
@click.option("--none", "ends", is_flag=True, help="Nothing need stay any longer.")
def pin(model: str, names: tuple[str, ...], share: int, ends: bool) -> None:
    """Pin the experts of MODEL that are in use everywhere: by half of the prompts of each profile, or more.

    They are brought in and stay for as long as the daemon holds the model, in the place of what was pinned before.
    'expertd status' counts them.
    """
    folder = find_model(model)
    with Client() as client:
        found = status_of(client, folder)
        if ends:
            client.unpin(found.id)
            click.echo(f"{shown_name(folder)}: nothing is pinned")
            return
        profiles = list(_profiles(Home.current(), names, found, folder))
        everywhere = in_use_everywhere([profile for _, profile in profiles])
        blocks = within(everywhere, found, share)
        client.unpin(found.id)
        pinned = client.pin(found.id, blocks)
    whence = ", ".join(name for name, _ in profiles)
    click.echo(f"{shown_name(folder)}: {pinned} experts are pinned, of {len(everywhere)} in use everywhere in {whence}")


def _profiles(
    home: Home, names: Sequence[str], found: ModelStatus, folder: Path
) -> Iterator[tuple[str, Profile]]:
    """The profiles to go by.

    Raises:
        ProfileInvalid: one that was named does not fit, or there is none.
        ModelNotLoaded: the daemon does not tell the model's layers.
    """
    layers, experts = found.moe_layers, found.experts
    used = profiles_in_use(home).get(str(folder))
    fit = 0
    for name in names or profile_names(home):
        profile = read_profile(home, name)
        if (len(profile.experts), max(profile.experts)) == (layers, experts):
            fit += 1
            yield name, profile
        elif names or name == used:
            raise ProfileInvalid(
                f"the profile {name} is for {len(profile.experts)} MoE layers of {max(profile.experts)} experts, and "
                f"{shown_name(folder)} has {layers} of {experts}"
            )
    if not fit:
        raise ProfileInvalid(
            f"no profile fits {shown_name(folder)}; make one with: expertd profile record NAME {shown_name(folder)}"
        )
    if len(found.layers) != layers:
        raise ModelNotLoaded("the daemon is older than this command and does not tell of layers; restart it")


def in_use_everywhere(profiles: Sequence[Profile]) -> list[Block]:
    """The blocks that half of the prompts of each of ``profiles`` used, or more; those first that the most did."""
    rank: Counter[Block] = Counter()
    times: Counter[Block] = Counter()
    for profile in profiles:
        for place, block in enumerate(profile.everywhere):
            rank[block] += place
            times[block] += 1
    return sorted((block for block in rank if times[block] == len(profiles)), key=lambda block: (rank[block], block))


def within(blocks: Sequence[Block], found: ModelStatus, share: int) -> list[Block]:
    """The first of ``blocks`` that are at most ``share`` percent of the slots of each pool of the model."""
    most = {layer.pool: layer.pool_slots * share // 100 for layer in found.layers}
    kept = []
    for block in blocks:
        pool = found.layers[block[0]].pool
        if most[pool]:
            most[pool] -= 1
            kept.append(block)
    return kept
