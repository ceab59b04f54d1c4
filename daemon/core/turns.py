"""What is done when a session turns to another topic: the policy is told, and where it pays, blocks are read ahead.

Functions over a model, its pools and sessions, as in ``ahead``.  That a session has turned, and what its new topic is
likely to use, is found in ``topics``.  Of what is likely and absent it is seen how much the session uses within HORIZON
tokens, and compared with as many absent blocks of the same layers that were named without knowledge.  It is read only
where enough of it is used (``foresight.Gate``); otherwise that is only counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.core.expected import expect, expect_no_more
from expertd.daemon.core.foresight import Kind
from expertd.daemon.core.slots import Out
from expertd.daemon.core.state import Model, Pool, Session, Turn
from expertd.daemon.core.topics import TOKENS
from expertd.daemon.policy import Block

HORIZON = 8
"""Tokens in which a block has to be used that is read because of a topic."""
LIKELY = 2.0
"""A block is likely if a token uses it at least so many times as often as the average block of its layer."""
SHARE = 8
"""Of a pool one in so many slots may be read for a turn."""


def turn(model: Model, session: Session, layer: int, chances: NDArray[np.float32], reads: bool, out: Out) -> None:
    """``session`` was found, with an event in ``layer``, to have turned to a topic with these ``chances``.

    ``reads``: this daemon reads ahead at all.
    """
    forget(model, session, out)
    model.policy.turned(chances)
    if not reads:
        return
    session.turn = found = Turn(layer, HORIZON)
    gate, acted_on = model.foresight.gates[Kind.TOPIC], model.foresight.reads(Kind.TOPIC)
    for pool in model.pools:
        likely = _likely(model, pool, chances)
        found.absent.update(likely)
        found.shuffled.update(_without_knowledge(model, pool, likely))
        if acted_on:
            found.blocks.update(likely)
            expect(pool, likely, pool.likely)
    found.named = len(found.absent)
    gate.announced += found.named


def passed(model: Model, session: Session, layer: int, experts: Collection[int], out: Out) -> None:
    """An event of ``session`` in ``layer`` uses ``experts``: is it what its topic made likely?"""
    found = session.turn
    if found is None:
        return
    if layer <= found.layer:
        found.left -= 1
        if not found.left:
            gate = model.foresight.gates[Kind.TOPIC]
            gate.judge(found.named, found.named - len(found.absent), found.named - len(found.shuffled))
            forget(model, session, out)
            return
    found.layer = layer
    used = {(layer, expert) for expert in experts}
    _use(model, found, used, out)
    if len(experts) > TOKENS * model.manifest.layers[layer].top_k:
        forget(model, session, out)  # a prompt, which uses nearly everything, tells nothing
        return
    found.absent -= used
    found.shuffled -= used


def forget(model: Model, session: Session, out: Out) -> None:
    """Nothing is expected any more because of the topic of ``session``."""
    found, session.turn = session.turn, None
    if found is None:
        return
    gate = model.foresight.gates[Kind.TOPIC]
    for block in found.begun:
        pool = model.pool_of_layer[block[0]]
        if block in pool.going_ahead:
            pool.late[block] = gate  # it may still be called off
        else:
            gate.wasted_bytes += model.manifest.layers[block[0]].block_bytes
    expect_no_more(model, found.blocks, (), out)


def forget_pool(session: Session, pool: Pool) -> None:
    """``pool`` has another generation: what its layers would use is neither expected nor judged any more."""
    found = session.turn
    if found is None:
        return
    before = len(found.absent)
    for blocks in (found.blocks, found.absent, found.shuffled, found.begun):
        blocks -= {block for block in blocks if block[0] in pool.layers}
    found.named -= before - len(found.absent)


def _use(model: Model, found: Turn, used: set[Block], out: Out) -> None:
    """Of what was expected ``used`` is used."""
    gate = model.foresight.gates[Kind.TOPIC]
    for block in found.begun & used:
        found.begun.discard(block)
        if block in model.pool_of_layer[block[0]].where:
            gate.useful_bytes += model.manifest.layers[block[0]].block_bytes
    now = found.blocks & used
    found.blocks -= now
    expect_no_more(model, sorted(now), now, out)


def _likely(model: Model, pool: Pool, chances: NDArray[np.float32]) -> list[Block]:
    """The absent blocks of ``pool`` that are likely, the likeliest first; as many as may be read."""
    found = []
    for layer in pool.layers:
        kind = model.manifest.layers[layer]
        row = chances[layer, : kind.experts]
        for expert in np.flatnonzero(row >= LIKELY * kind.top_k / kind.experts).tolist():
            if (layer, expert) not in pool.where:
                found.append((-row.item(expert), layer, expert))
    return [(layer, expert) for _, layer, expert in sorted(found)[: pool.layout.slots // SHARE]]


def _without_knowledge(model: Model, pool: Pool, likely: Iterable[Block]) -> list[Block]:
    """As many absent blocks of the same layers as ``likely``, none of them likelier than another."""
    found = []
    for layer, count in Counter(layer for layer, _ in likely).items():
        could = [expert for expert in range(pool.layout.experts) if (layer, expert) not in pool.where]
        found += [(layer, expert) for expert in model.foresight.without_knowledge(could, count)]
    return found
