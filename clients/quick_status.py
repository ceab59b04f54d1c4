"""``expertd status`` without click, ZeroMQ and msgspec, whose import takes longer than all else.

What it prints is what ``expertd.clients.cli.status`` prints; a test compares them.  All that is not plain goes that
way: other options than its own, no daemon, one that leaves out what is shown, and whatever else goes wrong.
"""

from __future__ import annotations

import os
import sys
from json import dumps, loads

from expertd.protocol.quick import quick_status

TYPE_CHECKING = False  # see terminal.fit
if TYPE_CHECKING:
    from typing import Any

OPTIONS = {"-v": "verbose", "--verbose": "verbose", "--layers": "layers", "--journal": "journal", "--json": "json"}


class _Object:
    """One object of the answer: its fields are attributes, as those of the messages are."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__ = fields


def show_status(arguments: list[str]) -> bool:
    """Print what ``expertd status`` with these arguments prints; False: nothing was printed, ask the ordinary way."""
    if not set(arguments) <= OPTIONS.keys():
        return False
    wanted = {OPTIONS[argument] for argument in arguments}
    home = os.path.expanduser(os.environ.get("EXPERTD_HOME") or "~/.expertd")  # noqa: PTH111
    answer = quick_status(home)
    if answer is None:
        return False
    try:
        text = dumps(loads(answer), indent=2) if "json" in wanted else _for_people(answer, wanted)
        if text is None:
            return False
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except (OSError, ValueError):  # a full disk, a closed pipe, characters that there are not
        return False
    return True


def _for_people(answer: bytes, wanted: set[str]) -> str | None:
    from expertd.clients.terminal.screens import every_figure, screen

    found: Any = loads(answer, object_hook=_Object)
    try:
        if not wanted:
            return "\n".join(screen(found))
        return "\n".join(every_figure(found, layers="layers" in wanted, journal="journal" in wanted))
    except AttributeError:
        return None  # an older daemon leaves a field out, and only the message's class knows the default
