"""What is expected of a pool: blocks that sessions will soon need, as far as they say, or as their topics tell.

Functions over a model and its pools, for ``ahead``, which reads it, and ``turns``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from expertd.daemon.core.instructions import Cancel
from expertd.daemon.core.slots import Out
from expertd.daemon.core.state import Model, Pool
from expertd.daemon.policy import Block


def expect(pool: Pool, blocks: Collection[Block], queue: dict[Block, None]) -> None:
    """Somebody expects ``blocks`` of ``pool``; those that are absent are to be read from its ``queue``."""
    pool.expected.update(blocks)
    queue.update(dict.fromkeys(block for block in blocks if block not in pool.where))


def expect_no_more(model: Model, blocks: Iterable[Block], fetched: Collection[Block], out: Out) -> None:
    """Somebody expects ``blocks`` no more: call their reads off, except those that are ``fetched`` now."""
    for block in blocks:
        pool = model.pool_of_layer[block[0]]
        pool.expected[block] -= 1
        if pool.expected[block] > 0:
            continue
        del pool.expected[block]
        pool.read_ahead.discard(block)
        pool.ahead.pop(block, None)
        pool.likely.pop(block, None)
        if block in pool.going_ahead and block not in fetched:
            out.append(Cancel(pool.segment, pool.where[block]))
