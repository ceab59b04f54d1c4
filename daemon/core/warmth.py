"""What somebody wants to be resident, whoever uses it: blocks to bring in where there is room, and blocks that stay.

Functions over a model. Wishes are brought in by ``slots.fill``, behind all that sessions fetch and expect, as long as
somebody uses the model and there are free slots; nothing goes for them, not even for pins. A pinned block is evicted
only where a Fetch would find no room otherwise (``core.Core``), so pins never keep a session waiting, and they
survive a move to another generation as far as there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from expertd.daemon.core import events
from expertd.daemon.core.state import Model, Pool, Recalled
from expertd.daemon.policy import Block

PINNED = 2
"""One in so many slots of a pool may be pinned: the rest follows use."""


def unknown(model: Model, blocks: Iterable[Block]) -> str | None:
    """What is wrong with these blocks, as a sentence, or None."""
    layers = model.manifest.layers
    for layer, expert in blocks:
        if layer >= len(layers):
            return f"the model has {len(layers)} MoE layers, there is no layer {layer}"
        if expert >= layers[layer].experts:
            return f"layer {layer} has {layers[layer].experts} experts, there is no expert {expert}"
    return None


def wish(model: Model, blocks: Sequence[Block]) -> None:
    """Wish for ``blocks``, the best first; none: for all, those first that are likely to be used."""
    there = {block for pool in model.pools for block in (*pool.where, *pool.wish)}
    for block in dict.fromkeys(blocks or _by_use(model)):
        if block not in there:
            model.pool_of_layer[block[0]].wish.append(block)


def wished(model: Model) -> int:
    """How many blocks are wished for and not resident yet."""
    return sum(len(pool.wish) + len(pool.background) for pool in model.pools)


def too_many_pins(model: Model, blocks: Iterable[Block]) -> str | None:
    """Why ``blocks`` cannot be pinned beside those that are, as a sentence, or None."""
    pinned = model.pinned.union(blocks)
    for pool in model.pools:
        most = pool.layout.slots // PINNED
        wanted = sum(layer in pool.layers for layer, _ in pinned)
        if wanted > most and not pool.holds_all:
            return f"{wanted} pinned blocks would share a pool of {pool.layout.slots} slots; {most} may be pinned there"
    return None


def pin(model: Model, blocks: Sequence[Block], pinned: bool) -> None:
    """Pin ``blocks``, and wish for those that are absent; or let them go again (none: all of them)."""
    if pinned:
        model.pinned.update(blocks)
        wish(model, blocks)
    else:
        model.pinned.difference_update(blocks or list(model.pinned))


def recall(model: Model, event: events.Recall) -> None:
    """Wish for what an earlier daemon held of ``model``, which is new here, and go on from what its policy knew.

    Blocks that it does not have are passed over.  Where there is no room for all, the first are brought in.
    """
    sizes = [layer.experts for layer in model.manifest.layers]
    blocks = [
        (layer, expert)
        for layer, expert in dict.fromkeys(event.blocks)
        if 0 <= layer < len(sizes) and 0 <= expert < sizes[layer]
    ]
    if not model.policy.take_over(event.statistics) and event.chances is not None:
        model.policy.expect(event.chances)
    for topic in event.topics:
        model.topics.know(topic)
    if blocks:
        model.recalled = Recalled(tuple(blocks), event.recorded_at)
        wish(model, blocks)


def still_out(model: Model, pool: Pool) -> list[Block]:
    """What an earlier daemon held in the layers of ``pool``, in its order, without what has been back once.

    That is the policy's since: if it has gone again, others are worth more.
    """
    left = model.recalled
    return [] if left is None else [b for b in left.blocks if b[0] in pool.layers and b not in left.back]


def _by_use(model: Model) -> list[Block]:
    """All blocks, those first that are likely to be used; what is as likely is spread over the layers."""
    blocks = [block for pool in model.pools for block in pool.blocks]
    return sorted(blocks, key=lambda block: (-model.policy.chance(block), block[1], block[0]))
