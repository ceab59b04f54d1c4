"""What the daemon tells of itself: ``Status`` and what it consists of."""

from __future__ import annotations

from typing import Literal

import msgspec

from expertd.protocol.messages.base import Message


class AskStatus(Message):
    """Ask for the daemon's state."""


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One session, as ``expertd status --json`` prints it.

    What has a default may be left out, as by daemons of this version of the protocol that do not measure it.  Tokens
    are those that the session has reported: it does so with its Fetches, and now and then.  ``shares_base``: it
    computes with the base weights in shared memory, and not with its own.
    """

    id: int
    pid: int
    mode: str
    waiting: bool
    fetches: int
    left_behind: bool
    held_bytes: int
    waited_s: float = 0.0
    read_wait_s: float = 0.0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    shares_base: bool = False


class LayerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer, as ``expertd status --json`` prints it.

    Layers that share a pool share its slots: ``pool_slots`` is what all of them have together, ``resident_blocks`` what
    this one has of them now.
    """

    pool: int
    pool_slots: int
    resident_blocks: int
    hits: int
    misses: int
    bytes_read: int
    evictions: int


class AheadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one kind of announcements, as ``expertd status --json`` prints it.

    Blocks count that were absent when they were announced.  ``useful`` is the part of them that the announced event
    used, lately; ``shuffled`` the same for as many blocks of the same layer that a predictor without knowledge named.
    Bytes are those read because of announcements: used by their event, or not.  ``waits``: how long sessions waited
    with reading ahead for single tokens over how long without, when that was compared last; 0 if it was not.

    The kind ``topic`` is nobody's announcement, but what sessions were likely to use when they had turned to another
    topic, as they did ``turns`` times.  It is judged by the few tokens that follow.
    """

    kind: Literal["prompt", "next layer", "second next layer", "topic"]
    reading: bool
    announced: int
    useful: float
    shuffled: float
    useful_bytes: int
    wasted_bytes: int
    waits: float = 0.0
    turns: int = 0


class RecalledStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier daemon has left of a model, as ``expertd status --json`` prints it.

    ``recorded_at`` is in seconds since 1970, 0 if it is what a profile names; ``blocks`` were worth keeping, ``back``
    of them have come since, ``adopted`` of these without a read, because a session still had them.
    """

    recorded_at: float
    blocks: int
    back: int
    adopted: int = 0


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as ``expertd status --json`` prints it.  Hits and misses count blocks, once an event.

    ``layers`` and all that follows ``sessions`` may be left out, as by daemons of this version of the protocol that do
    not know them.  ``packed`` is the store that blocks are read from, empty if there is none; ``warming``: blocks that
    are still to be brought in for somebody who asked for that; ``pinned``: blocks that somebody wants to stay;
    ``waited_s`` and ``read_wait_s`` are the sums of its sessions', those that have ended included;
    ``recalled``: what came of what an earlier daemon held, None if it left nothing.
    ``base_bytes``: base weights in shared memory; ``base_read``: bytes read for them; ``base_problem``: why they are
    not shared, "" if they are, or nobody wanted that.
    """

    id: str
    path: str
    family: str
    moe_layers: int
    experts: int
    top_k: int
    block_bytes: int
    blocks: int
    slots: int
    resident_blocks: int
    hits: int
    misses: int
    bytes_read: int
    evictions: int
    pool_bytes: int
    sessions: list[SessionStatus]
    layers: list[LayerStatus] = []
    moves: int = 0
    blocks_copied: int = 0
    packed: str = ""
    ahead: list[AheadStatus] = []
    warming: int = 0
    pinned: int = 0
    waited_s: float = 0.0
    read_wait_s: float = 0.0
    recalled: RecalledStatus | None = None
    base_bytes: int = 0
    base_read: int = 0
    base_problem: str = ""


class DaemonStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon itself."""

    pid: int
    version: str
    uptime_s: float
    rss_bytes: int


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device that blocks were read from: its reads, and how many were under way when one began."""

    name: str
    reads: int
    bytes: int
    p50_us: int
    p95_us: int
    p99_us: int
    depth_mean: float
    depth_max: int


class FetchToRead(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds from a Fetch's coming to its first read; 0: no Fetch has led to a read at once."""

    p50: int
    p99: int


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A change of what the pools may use: ``at`` is in seconds since 1970."""

    at: float
    pressure: str
    why: str
    before_bytes: int
    after_bytes: int


class Status(Message):
    """Answer to AskStatus: the object that ``expertd status --json`` prints.

    ``limit_bytes``: what pressure leaves of the budget now; ``simulated_ssd``: the SSD that reads are slowed down to,
    "" if they are not.  It may be left out, and ``devices`` and ``fetch_to_read_us``, as by daemons of this version of
    the protocol that do not know them.
    """

    protocol: int
    home: str
    daemon: DaemonStatus
    budget_bytes: int
    used_bytes: int
    pressure: str
    tracing: str
    frames_dropped: int
    models: list[ModelStatus]
    limit_bytes: int
    pressure_figure: str
    journal: list[JournalEntry]
    simulated_ssd: str = ""
    devices: list[DeviceStatus] = []
    fetch_to_read_us: FetchToRead | None = None
