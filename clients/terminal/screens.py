"""A daemon's state for the terminal behind standard output: its width, its characters, its user.

What is said is ``glance`` and ``figures``.
"""

from __future__ import annotations

import os
import sys

from expertd.clients.terminal.fit import columns, width_of
from expertd.clients.terminal.glance import BLOCKS, PLAIN_BLOCKS, glance
from expertd.clients.terminal.programs import programs

TYPE_CHECKING = False  # see terminal.fit
if TYPE_CHECKING:
    from expertd.protocol.messages import Status


def screen(found: Status) -> list[str]:
    """The state at a glance."""
    pids = [session.pid for model in found.models for session in model.sessions]
    return glance(found, programs(pids), columns(), blocks(), os.path.expanduser("~"))  # noqa: PTH111


def every_figure(found: Status, *, layers: bool, journal: bool) -> list[str]:
    """The state with all figures; on a terminal, as wide as that."""
    # Late, because the screen needs none of it.
    from expertd.clients.terminal.figures import table

    return table(found, width=width_of(sys.stdout), layers=layers, journal=journal)


def blocks() -> str:
    """The characters of bars that standard output can show."""
    try:
        BLOCKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_BLOCKS
    return BLOCKS
