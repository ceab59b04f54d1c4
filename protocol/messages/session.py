"""A session: what worker and daemon tell each other while weights are shared."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from expertd.protocol.manifest import Manifest
from expertd.protocol.messages.base import (
    AliasMode,
    Announce,
    Count,
    Expert,
    Experts,
    Message,
    Name,
    Routing,
    Text,
    Token,
)


class PoolInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One pool as a worker needs to know it.  Its segment's descriptor comes over the lifeline under ``segment``."""

    segment: Count
    generation: Count
    layers: list[Count]
    slots: Count
    complete: bool
    nonce: Token


class BaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Base weights in shared memory, for good.  The segment's descriptor comes over the lifeline under ``segment``."""

    segment: Count
    size: Count
    nonce: Token


class Attach(Message):
    """Open a session for a model.  ``token`` is the one that the lifeline was opened with.

    ``held``: pools of an earlier daemon whose descriptors were sent over the lifeline, under ``segment``;
    ``held_base``: likewise its base weights, which the session goes on with.
    """

    token: Token
    pid: Count
    mode: AliasMode
    manifest: Manifest
    held: Annotated[list[PoolInfo], Meta(max_length=1024)] = []
    held_base: BaseInfo | None = None


class Attached(Message):
    """A session is open.  ``version`` is the table's at this moment, and counts as acked.

    ``base`` has the tensors of ``Manifest.base``; None: the worker reads them itself.
    """

    session: Count
    model: Name
    version: Count
    pools: list[PoolInfo]
    announce: Announce = -1
    base: BaseInfo | None = None


class Fetch(Message):
    """Ask for all blocks of one event or group, hits too.  Waiting for the answer counts as an ack of everything.

    ``segment`` is the generation that the worker looks this layer up in.  ``then`` is what the next Fetches of the same
    event will ask for, in this order.  ``leases_only`` promises that until the next Fetch the session looks nothing up,
    and reads nothing but the slots of the answer.
    """

    session: Count
    sequence: Count
    segment: Count
    layer: Count
    experts: Experts
    routing: Routing = b""
    then: Annotated[list[Expert], Meta(max_length=65536)] = []
    leases_only: bool = False
    decode_tokens: Count = 0
    prompt_tokens: Count = 0


class Resident(Message):
    """The blocks of a Fetch are resident and leased: ``slots`` in the order of its ``experts``."""

    session: Count
    sequence: Count
    version: Count
    slots: list[Count]
    announce: Announce = -1


class Ahead(Message):
    """The session expects that its next event in ``layer`` needs ``experts``, the likeliest first.  No answer.

    ``distance``: it is so many MoE layers after the event that runs now.  ``prompt``: it will be of many tokens.
    """

    session: Count
    segment: Count
    layer: Count
    experts: Experts
    distance: Annotated[int, Meta(ge=1, lt=3)]
    prompt: bool
    routing: Routing = b""


class Ack(Message):
    """The session uses nothing any more that it looked up before it was told ``version``.

    ``sequence`` is that of its last Fetch: an ack that was overtaken by a newer Fetch frees none of its leases.
    """

    session: Count
    version: Count
    sequence: Count
    routing: Routing = b""
    decode_tokens: Count = 0
    prompt_tokens: Count = 0


class AckRequest(Message):
    """The daemon wants an ack of ``version``."""

    session: Count
    version: Count


class Complete(Message):
    """Every block of the pool in ``segment`` is resident, and none will be evicted from this generation."""

    session: Count
    segment: Count


class Moved(Message):
    """The layers of ``pool`` have a new generation, whose descriptor came over the lifeline."""

    session: Count
    pool: PoolInfo


class Released(Message):
    """The session has unmapped ``segment`` and never looks there again."""

    session: Count
    segment: Count


class Ping(Message):
    """Asks whether the other end of a session is alive; answered at once with Pong."""

    session: Count


class Pong(Message):
    """Answer to Ping."""

    session: Count


class Pressure(Message):
    """How short of memory the machine is: ``level`` has changed, or is what a new session finds.

    From the daemon to its sessions; a gateway's worker passes it on.  ``figure``: the number that decided it, in words.
    """

    level: Literal["normal", "warning", "critical"]
    figure: Text


class Record(Message):
    """The daemon wants the session's routing to be recorded in the file ``path``; empty: no more."""

    session: Count
    path: Name


class Recorded(Message):
    """A recording has ended, with so many tokens in ``path``; ``error`` says why it failed, or could not begin."""

    session: Count
    path: Name
    tokens: Count
    error: Text = ""


class RoutingLog(Message):
    """What the routers chose since the last report (PROTOCOL.md, "Routing log"), and how many tokens were computed."""

    session: Count
    routing: Routing
    decode_tokens: Count = 0
    prompt_tokens: Count = 0


class Detach(Message):
    """Close the session."""

    session: Count


class Detached(Message):
    """Answer to Detach."""

    session: Count
