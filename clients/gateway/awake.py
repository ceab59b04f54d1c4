"""Deadlines that a sleeping machine does not use up.

Whoever is stopped together with all it waits for (a laptop's lid, SIGSTOP) finds every deadline passed when it wakes,
and nobody at fault.  So a deadline is counted here in short pieces, each of which needs the event loop to run: however
long a process was stopped, that costs a deadline one piece.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator

__all__ = ["pieces", "timeout"]

PIECES = 16
LONGEST_PIECE_S = 1.0


def pieces(seconds: float) -> tuple[int, float]:
    """``(count, piece_s)``: how many pieces make ``seconds`` at least, and how long each is."""
    piece_s = min(LONGEST_PIECE_S, seconds / PIECES)
    return (math.ceil(seconds / piece_s), piece_s) if piece_s > 0 else (0, 0.0)


@contextlib.asynccontextmanager
async def timeout(seconds: float) -> AsyncIterator[None]:
    """``asyncio.timeout``, counted in time that this process was awake.

    Raises:
        TimeoutError: the body took longer, and was cancelled.
    """
    loop = asyncio.get_running_loop()
    count, piece_s = pieces(seconds)
    timer: asyncio.Handle | None = None
    async with asyncio.timeout(None) as deadline:

        def next_piece(left: int) -> None:
            nonlocal timer
            if left:
                timer = loop.call_later(piece_s, next_piece, left - 1)
            else:
                deadline.reschedule(loop.time())

        next_piece(count)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
