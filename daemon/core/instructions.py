"""What the core wants done.  The server carries them out in the order in which they were returned."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from expertd.protocol.errors import ExpertdError
from expertd.protocol.layout import PoolLayout
from expertd.protocol.messages import PoolInfo


class Priority(IntEnum):
    """What a read is for; what comes first here is read first."""

    DEMAND = 0
    """A Fetch waits for it."""
    AHEAD = 1
    """A session will soon need it, as far as it can tell."""
    BACKGROUND = 2
    """Nobody has asked for it."""


@dataclass(frozen=True)
class CreatePool:
    """Create a segment of ``layout``, for ``layers`` of ``model`` (a key); answered by PoolCreated or PoolFailed.

    ``least``: it has room for one event of one session, without which nobody could go on.
    """

    segment: int
    generation: int
    layout: PoolLayout
    model: str
    layers: tuple[int, ...]
    least: bool = False


@dataclass(frozen=True)
class UnlinkPool:
    """Nobody needs this segment any more: give it back."""

    segment: int


@dataclass(frozen=True)
class StartRead:
    """Read a block into a slot; answered by ReadDone or ReadFailed."""

    model: str
    segment: int
    slot: int
    layer: int
    expert: int
    priority: Priority


@dataclass(frozen=True)
class Promote:
    """Somebody waits for a StartRead that was asked for without demand: from now on it is demand."""

    segment: int
    slot: int


@dataclass(frozen=True)
class Cancel:
    """Nobody wants a StartRead any more: if it has not begun, call it off (ReadCancelled); else nothing happens."""

    segment: int
    slot: int


@dataclass(frozen=True)
class StartCopy:
    """Copy a block from a slot of an older generation into a slot; answered by ReadDone or ReadFailed."""

    source: int
    source_slot: int
    segment: int
    slot: int


@dataclass(frozen=True)
class Publish:
    """Write ``slot`` into the table of a segment, at ``row`` (the layer's place in its pool) and ``expert``."""

    segment: int
    row: int
    expert: int
    slot: int


@dataclass(frozen=True)
class Grant:
    """Open a session: hand over these segments' descriptors, then answer Attached.

    The server adds the nonces of the segments, which the core does not know, to ``pools``.
    """

    session: int
    model: str
    version: int
    pools: tuple[PoolInfo, ...]
    announce: int = -1


@dataclass(frozen=True)
class Move:
    """Hand a session the new generation of one of its pools (the server adds the nonce)."""

    session: int
    pool: PoolInfo


@dataclass(frozen=True)
class Refuse:
    """Answer a session's Attach or Fetch with an error."""

    session: int
    error: ExpertdError
    sequence: int | None


@dataclass(frozen=True)
class Answer:
    """Answer a Fetch: its blocks are resident and leased.  ``announce``: see ``messages.Resident``."""

    session: int
    sequence: int
    version: int
    slots: tuple[int, ...]
    announce: int = -1


@dataclass(frozen=True)
class AskAck:
    """Ask a session for an ack of ``version``."""

    session: int
    version: int


@dataclass(frozen=True)
class Announce:
    """Tell a session that the pool in ``segment`` is complete."""

    session: int
    segment: int


Instruction = (
    CreatePool | UnlinkPool | StartRead | Promote | Cancel | StartCopy | Publish | Grant | Move | Refuse | Answer
    | AskAck | Announce
)  # fmt: skip
