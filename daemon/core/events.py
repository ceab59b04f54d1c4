"""What the core is told.  The server makes these out of messages, finished reads and lifelines that ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.policy import Statistics
from expertd.protocol.errors import ExpertdError
from expertd.protocol.layout import PoolLayout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import AliasMode


@dataclass(frozen=True)
class Attach:
    """A worker wants a session.  The server has checked the manifest against the files and chose the number.

    ``holding``: bytes of pools of an earlier daemon that it has and will hand back (HandedBack); ``room``: bytes that
    the machine could give beside these.
    """

    session: int
    pid: int
    mode: AliasMode
    manifest: Manifest
    holding: int = 0
    room: int = 0


@dataclass(frozen=True)
class PoolCreated:
    """The segment of a CreatePool exists, zeroed."""

    segment: int


@dataclass(frozen=True)
class PoolFailed:
    """The system gave no memory for a CreatePool."""

    segment: int
    error: ExpertdError


@dataclass(frozen=True)
class Fetch:
    """A session asks for ``experts`` of ``layer``, which it looks up in ``segment``; ``routing`` it logged before.

    ``then``: what its next Fetches for this event will ask for.  ``leases_only``: until its next Fetch it looks nothing
    up, and reads nothing but what this one gives it.  ``waited_s``: how long it has waited in all its Fetches so far.
    """

    session: int
    sequence: int
    segment: int
    layer: int
    experts: tuple[int, ...]
    routing: tuple[tuple[int, list[int]], ...] = ()
    then: tuple[int, ...] = ()
    leases_only: bool = False
    waited_s: float = 0.0


@dataclass(frozen=True)
class Ahead:
    """A session expects to need ``experts`` in its next event in ``layer``, the likeliest first.

    ``distance``: so many layers after the one that runs; ``prompt``: for an event of many tokens.
    """

    session: int
    segment: int
    layer: int
    experts: tuple[int, ...]
    distance: int
    prompt: bool
    routing: tuple[tuple[int, list[int]], ...] = ()


@dataclass(frozen=True)
class Ack:
    """A session uses nothing any more that it looked up before it was told ``version``."""

    session: int
    version: int
    sequence: int
    routing: tuple[tuple[int, list[int]], ...] = ()


@dataclass(frozen=True)
class Routed:
    """A session reports events that were all hits."""

    session: int
    routing: tuple[tuple[int, list[int]], ...]


@dataclass(frozen=True)
class Released:
    """A session has unmapped ``segment``."""

    session: int
    segment: int


@dataclass(frozen=True)
class Silent:
    """A session of whom something is expected has said nothing for too long: it is stopped, swapped out or debugged."""

    session: int


@dataclass(frozen=True)
class Heard:
    """A session is alive: it answered a Ping."""

    session: int


@dataclass(frozen=True)
class BudgetChanged:
    """The budget is ``size`` bytes from now on; at least ``Core.smallest_budget``.

    Args:
        drop: pools that shrink copy nothing, because there is no memory or time for it.
        most: bytes that the user allows, if memory pressure has made ``size`` less: that much is there for what a model
            needs at least.
        beside: bytes of the user's budget that base weights take, which the core has nothing to do with: so that a
            refusal names a budget that is enough.
        going: bytes of base weights beside ``size`` that are there for pools once a model that nobody uses is given
            back, by its key.
    """

    size: int
    drop: bool = False
    most: int | None = None
    beside: int = 0
    going: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryWanted:
    """The system gave no memory to move to, and it is time to ask again (``Core.wanting``)."""


@dataclass(frozen=True)
class Unwanted:
    """Somebody wants the memory of ``model`` (a key) back; it goes unless somebody uses it."""

    model: str


@dataclass(frozen=True)
class Warm:
    """Bring in ``blocks`` of ``model`` (a key) where there is room, the first first; none: all, the most used first."""

    model: str
    blocks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Recall:
    """``model`` (a key), which has just come, was here before: what was worth keeping then, the most valuable first.

    ``statistics`` are the policy's, if it is of the same class; ``recorded_at`` is in seconds since 1970, 0 if all this
    is a profile's.  ``chances``: where there are no statistics, how likely a token is to use each block, as far as a
    profile tells: ``[layers, experts]``.  ``topics``: the same of every profile that there is for it, used or not.
    """

    model: str
    blocks: tuple[tuple[int, int], ...]
    statistics: Statistics
    recorded_at: float
    chances: NDArray[np.float32] | None = None
    topics: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class Handed:
    """A pool of an earlier daemon, checked and mapped: ``where`` is the slot of each block that its table names.

    ``segment`` is the number that the earlier daemon gave it; several sessions may hand the same one back.
    """

    segment: int
    layers: tuple[int, ...]
    layout: PoolLayout
    where: dict[tuple[int, int], int]


@dataclass(frozen=True)
class HandedBack:
    """``session``, of ``model`` (a key), has these of a daemon that has died, and will say when they are released."""

    session: int
    model: str
    pools: tuple[Handed, ...]


@dataclass(frozen=True)
class Pin:
    """Somebody wants ``blocks`` of ``model`` (a key) to stay (``pinned``), or does not any more (none: all of them)."""

    model: str
    blocks: tuple[tuple[int, int], ...]
    pinned: bool


@dataclass(frozen=True)
class ReadDone:
    """All bytes of a StartRead (``size`` from disk) or a StartCopy (0) are in its slot."""

    segment: int
    slot: int
    size: int


@dataclass(frozen=True)
class ReadFailed:
    """A StartRead or StartCopy failed; what the slot holds is undefined."""

    segment: int
    slot: int
    error: ExpertdError


@dataclass(frozen=True)
class ReadCancelled:
    """A StartRead was called off by a Cancel before it had begun."""

    segment: int
    slot: int


@dataclass(frozen=True)
class Ended:
    """A session is over: it detached, or its process died."""

    session: int


Event = (
    Attach | PoolCreated | PoolFailed | Fetch | Ahead | Ack | Routed | Released | Silent | Heard | BudgetChanged
    | MemoryWanted | Unwanted | Warm | Recall | HandedBack | Pin | ReadDone | ReadFailed | ReadCancelled | Ended
)  # fmt: skip
