"""What clients ask of the daemon: memory, warmth, pins, news, traces, its end."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from expertd.protocol.messages.base import Count, Message, Name, Routing, Text
from expertd.protocol.messages.session import Recorded


class SetBudget(Message):
    """Change the budget of a running daemon; pools shrink or grow to it.  None: what the machine can spare."""

    budget: Annotated[int, Meta(ge=1)] | None


class BudgetSet(Message):
    """Answer to SetBudget: the budget before and now, in bytes."""

    before: Count
    budget: Count


class Unload(Message):
    """Give back the memory of a model that nobody uses: its key, its hub id, or the path or the name of its folder."""

    model: Name


class Unloaded(Message):
    """Answer to Unload: so many bytes are given back."""

    path: Name
    bytes: Count


class Warm(Message):
    """Bring blocks of a loaded model in while there is room, the first first; none: all, the most used first.

    ``model`` as in Unload; ``blocks`` are packed as a routing log (``protocol.routing``).  Nothing is evicted for it,
    and whoever waits for a read goes first.
    """

    model: Name
    blocks: Routing = b""


class Warming(Message):
    """Answer to Warm: so many blocks are to be brought in (``ModelStatus.warming`` counts down)."""

    path: Name
    blocks: Count


class Pin(Message):
    """Have blocks of a loaded model stay, and bring them in; or with ``pinned`` false no longer (none: all of them)."""

    model: Name
    blocks: Routing = b""
    pinned: bool = True


class Pinned(Message):
    """Answer to Pin: so many blocks of the model are pinned now."""

    path: Name
    blocks: Count


class Subscribe(Message):
    """Be told what happens, for half a minute; to be renewed in time."""


class Subscribed(Message):
    """Answer to Subscribe, each time."""


class Happened(Message):
    """Something happened that the daemon's log tells too.

    ``at`` is in seconds since 1970; ``facts`` are texts, numbers or truth values.
    """

    at: float
    level: Name
    event: Text
    facts: dict[str, Any]


class StartTrace(Message):
    """Have every session's routing recorded, each in a file of its own in ``folder``, until StopTrace."""

    folder: Name


class TraceStarted(Message):
    """Answer to StartTrace: how many sessions there are now; those that come later are recorded too."""

    sessions: Count


class StopTrace(Message):
    """Have recording ended; the answer comes when all sessions have written their files, or do not answer."""


class TraceStopped(Message):
    """Answer to StopTrace: the recordings that have ended, and the paths of those that have not answered."""

    ended: list[Recorded]
    unfinished: list[Name]


class Stop(Message):
    """Ask the daemon to end; with ``if_idle`` only if no session is open or being opened."""

    if_idle: bool = False


class Stopping(Message):
    """Answer to Stop, sent before it ends."""
