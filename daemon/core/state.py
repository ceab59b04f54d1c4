"""What the core knows: models, pools, slots, sessions.  Data and its invariants; the rules are in ``core``."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

from expertd.daemon.core import events
from expertd.daemon.core.foresight import Foresight, Gate, Kind
from expertd.daemon.core.quotas import Quotas
from expertd.daemon.core.topics import Topics
from expertd.daemon.policy import Block, Policy
from expertd.protocol.errors import ExpertdError
from expertd.protocol.layout import PoolLayout
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import AliasMode, PoolInfo


class SlotState(Enum):
    """The life of a slot; each state leads to the next, and FILLING also back to FREE when a read fails."""

    FREE = "free"
    FILLING = "filling"
    SEALED = "sealed"
    RETIRED = "retired"


_NEXT = {
    (SlotState.FREE, SlotState.FILLING),
    (SlotState.FILLING, SlotState.SEALED),
    (SlotState.FILLING, SlotState.FREE),
    (SlotState.SEALED, SlotState.RETIRED),
    (SlotState.RETIRED, SlotState.FREE),
}


class InvalidTransition(AssertionError):
    """A slot was about to skip a step of its life; carries what happened to it before."""

    def __init__(self, slot: int, start: SlotState, finish: SlotState, story: list[str]) -> None:
        super().__init__(f"slot {slot}: {start.value} -> {finish.value} after {' -> '.join(story)}")


@dataclass
class Slot:
    """One slot: its state, the block in it (or on its way into it), and the version at which it was retired.

    While it fills, ``source`` is the older generation that the block is copied from, and ``carried`` tells that the
    policy counts the block as resident already.
    """

    number: int
    state: SlotState = SlotState.FREE
    block: Block | None = None
    retired_at: int = 0
    leases: set[int] = field(default_factory=set)
    carried: bool = False
    source: Pool | None = None
    story: deque[str] = field(default_factory=lambda: deque(maxlen=8))

    def move(self, state: SlotState) -> None:
        """Go to ``state``.  Raises InvalidTransition if the life of a slot has no such step."""
        if (self.state, state) not in _NEXT:
            raise InvalidTransition(self.number, self.state, state, list(self.story))
        self.story.append(f"{state.value} {self.block}")
        self.state = state


@dataclass
class Waiting:
    """A Fetch that was not answered yet.  ``missing`` are its blocks on their way, once ``granted``."""

    fetch: events.Fetch
    granted: bool = False
    missing: set[Block] = field(default_factory=set)


HANDED = 0
"""In the place of a generation, for a pool of an earlier daemon: nothing is looked up there, only copied from."""


@dataclass
class Pool:
    """One generation of one pool; those that were handed back have the number HANDED.

    Attributes:
        layers: the model's MoE layers that share it, in forward order.
        where: the slot of each block that is sealed or filling.
        free: numbers of free slots (unused where the pool holds all: there each block has its own slot).
        retired: numbers of retired slots.
        queue: fetches in the order of arrival; those granted leave it only when answered.
        holders: sessions that may have it mapped, with the model's version when it was handed to them.
        wish: blocks to bring in in the background while there is room.
        background: those of them that are on their way.
        expected: blocks that sessions will soon need, as far as they say, and how many sessions say so; they stay as
            long as a Fetch finds something else to evict.
        ahead: those of them that are to be read, in the order of their need.
        likely: the same of those that are expected because of a topic; they are read behind ``ahead``.
        read_ahead: those that were begun because of that, and are still expected.
        going_ahead: blocks whose reads ahead are on their way, and that nobody waits for.
        late: those of them whose event has passed without them, with the gate of the announcement.
        carried: blocks of ``sources`` that the policy knows as resident and that are not here yet.
        sources: the generation before, and pools that sessions handed back of a daemon that has died, as long as they
            are there.
        next: the generation after, while its memory is being created.
        quota: bytes that it should have in the place of what it has: pools, or models, give each other some.
        fresh: nothing of the generation before is copied: there is no memory or time for that.
        denied: how often the system gave no memory for a larger generation.
        outdated: the memory was divided again since ``next`` was asked for, and it should be of another size now.
        superseded: there is a newer generation; nothing is granted or evicted here any more.
    """

    segment: int
    generation: int
    layers: tuple[int, ...]
    layout: PoolLayout
    created: bool = False
    slots: list[Slot] = field(default_factory=list)
    where: dict[Block, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    retired: set[int] = field(default_factory=set)
    queue: deque[Waiting] = field(default_factory=deque)
    sealed: int = 0
    holders: dict[int, int] = field(default_factory=dict)
    wish: deque[Block] = field(default_factory=deque)
    background: set[Block] = field(default_factory=set)
    expected: Counter[Block] = field(default_factory=Counter)
    ahead: dict[Block, None] = field(default_factory=dict)
    likely: dict[Block, None] = field(default_factory=dict)
    read_ahead: set[Block] = field(default_factory=set)
    going_ahead: set[Block] = field(default_factory=set)
    late: dict[Block, Gate] = field(default_factory=dict)
    carried: set[Block] = field(default_factory=set)
    sources: list[Pool] = field(default_factory=list)
    next: Pool | None = None
    superseded: bool = False
    quota: int | None = None
    fresh: bool = False
    outdated: bool = False
    denied: int = 0
    filling: int = 0
    copies_from: int = 0

    def __post_init__(self) -> None:
        self.slots = [Slot(number) for number in range(self.layout.slots)]
        self.free = list(range(self.layout.slots - 1, -1, -1))

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every block: then nothing is ever evicted from this generation."""
        return self.layout.slots >= self.layout.layers * self.layout.experts

    @property
    def complete(self) -> bool:
        """Whether every block is resident (only such a generation is immutable)."""
        return self.holds_all and self.sealed == self.layout.layers * self.layout.experts

    @classmethod
    def handed(cls, what: events.Handed) -> Pool:
        """One of an earlier daemon; every block that its table named is sealed."""
        pool = cls(what.segment, HANDED, what.layers, what.layout, created=True, superseded=True)
        for block, number in what.where.items():
            slot = pool.slots[number]
            slot.block, slot.state = block, SlotState.SEALED
            pool.where[block] = number
        pool.sealed = len(what.where)
        return pool

    @property
    def info(self) -> PoolInfo:
        """What sessions are told of it; the nonce is in the segment's header, which only the server has."""
        return PoolInfo(
            segment=self.segment,
            generation=self.generation,
            layers=list(self.layers),
            slots=self.layout.slots,
            complete=self.complete,
            nonce=bytes(16),
        )

    @property
    def name(self) -> int:
        """What ``Quotas`` calls it: all generations have the same."""
        return self.layers[0]

    @property
    def spare(self) -> int:
        """Number of free slots."""
        return self.layout.slots - len(self.where) - len(self.retired)

    @property
    def blocks(self) -> list[Block]:
        """Every block that may be here, in the order of their natural places."""
        return [(layer, expert) for layer in self.layers for expert in range(self.layout.experts)]

    def sealed_slot(self, block: Block) -> int | None:
        """The slot of ``block`` if it is resident."""
        number = self.where.get(block)
        return number if number is not None and self.slots[number].state is SlotState.SEALED else None

    def row(self, layer: int) -> int:
        """The place of ``layer`` in the pool's table."""
        return self.layers.index(layer)

    def take(self, block: Block) -> Slot:
        """A free slot for ``block``.

        A pool that holds all keeps every block in its natural place, ``row x experts + expert``: so a layer's slots are
        its experts in order, and a worker computes on them without mapping ids.
        """
        if self.holds_all:
            return self.slots[self.row(block[0]) * self.layout.experts + block[1]]
        return self.slots[self.free.pop()]

    def give_back(self, slot: Slot) -> None:
        """``slot`` has become free."""
        slot.block = slot.source = None
        slot.carried = False
        if not self.holds_all:
            self.free.append(slot.number)


@dataclass
class Announced:
    """What a session expects of its next event in a layer.

    Attributes:
        experts: those that it named, if it is acted on: they are expected.
        absent: those of them that were neither resident nor on their way when it said so; it is judged by them.
        shuffled: as many experts that were absent, named without knowledge.
        begun: what is read because of it.
    """

    experts: set[int]
    absent: set[int]
    shuffled: set[int]
    begun: set[int] = field(default_factory=set)


@dataclass
class Turn:
    """What a session is likely to use since it has turned to another topic.

    Attributes:
        layer: that ran last.
        left: tokens until it is judged.
        named: absent blocks that were likely when it turned.
        absent: those of them that were not used yet; ``shuffled``: the same of as many, named without knowledge.
        blocks: those that are expected, if it is acted on.
        begun: what is read because of it, and was not used yet.
    """

    layer: int
    left: int
    named: int = 0
    absent: set[Block] = field(default_factory=set)
    shuffled: set[Block] = field(default_factory=set)
    blocks: set[Block] = field(default_factory=set)
    begun: set[Block] = field(default_factory=set)


@dataclass
class Session:
    """One attached process and model.

    Attributes:
        acked: newest table version that it promised to have left everything older than.
        asked: the version and the Fetch for which it was last asked to ack.
        owes: it was asked and has neither acked nor fetched since.
        silent: it is left behind: nobody waits for it until it is heard again.
        sequence: of its newest Fetch.
        waiting: that Fetch while it is not answered; a waiting session holds nothing and counts as acked.
        answer: the slots that answered it, or ``refusal``: the error; to be repeated if the answer was lost.
        leases_only: until its next Fetch it looks nothing up, and reads nothing but its leases.
        rest: what the event that it has begun will fetch next, in this order.
        announced: what it expects of later events, by layer and kind.
        turn: what it is likely to use because it has turned to another topic lately.
        waited_s: how long it had waited in all its Fetches when the newest came.
        few: whether that is for single tokens, or a few together.
        heard_at: the number of the core's event with which it said something last.
        leased: slots leased to it, all in ``leased_pool``.
    """

    number: int
    pid: int
    mode: AliasMode
    model: str
    acked: int
    asked: tuple[int, int] = (0, 0)
    owes: bool = False
    silent: bool = False
    sequence: int = 0
    fetches: int = 0
    waiting: Waiting | None = None
    answer: tuple[int, ...] | None = None
    refusal: ExpertdError | None = None
    answered_version: int = 0
    leases_only: bool = False
    rest: tuple[Block, ...] = ()
    announced: dict[tuple[int, Kind], Announced] = field(default_factory=dict)
    turn: Turn | None = None
    waited_s: float = 0.0
    few: bool = False
    heard_at: int = 0
    leased: list[int] = field(default_factory=list)
    leased_pool: Pool | None = None


@dataclass
class LayerCounts:
    """What became of the lookups in one MoE layer, since its model came; hits and misses count blocks, once an event.

    ``bytes_read`` are those from disk: a block that a new generation copies from the one before costs none.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    evictions: int = 0


@dataclass
class Recalled:
    """What an earlier daemon, or a profile, has left of a model.

    Attributes:
        blocks: those that should be brought in again, in this order.
        recorded_at: when they were recorded, in seconds since 1970; 0: they are a profile's alone.
        back: those of them that have come since.
        adopted: blocks that were copied from what sessions still held of the daemon before.
        told: the log has been told what came of it.
    """

    blocks: tuple[Block, ...]
    recorded_at: float
    back: set[Block] = field(default_factory=set)
    adopted: int = 0
    told: bool = False

    def __post_init__(self) -> None:
        self._named = frozenset(self.blocks)

    def __contains__(self, block: Block) -> bool:
        return block in self._named


@dataclass
class Model:
    """One version of one checkpoint, with all that is resident of it.

    ``pools`` are the current generations, ``old`` those before that somebody still holds or copies from; ``counts`` has
    an entry for each layer; ``pinned`` are blocks that somebody wants to stay; ``recalled``: what an earlier daemon has
    left of it; ``unwanted``: somebody wants its memory back, or its files have been replaced; ``moves`` and ``copied``
    tell how often a pool went on in another generation, and how many blocks were copied for that.
    """

    key: str
    manifest: Manifest
    pools: list[Pool]
    pool_of_layer: dict[int, Pool]
    policy: Policy
    old: list[Pool] = field(default_factory=list)
    version: int = 0  # counts evictions: only what leaves the table needs acks
    sessions: dict[int, Session] = field(default_factory=dict)
    opening: list[events.Attach] = field(default_factory=list)
    used_at: int = 0
    pinned: set[Block] = field(default_factory=set)
    recalled: Recalled | None = None
    unwanted: bool = False
    moves: int = 0
    copied: int = 0
    counts: list[LayerCounts] = field(init=False)
    quotas: Quotas = field(init=False)
    foresight: Foresight = field(init=False)
    topics: Topics = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [LayerCounts() for _ in self.manifest.layers]
        self.quotas = Quotas(len(self.counts))
        self.foresight = Foresight(len(self.counts))
        layers = self.manifest.layers
        self.topics = Topics(len(layers), max(each.experts for each in layers), max(each.top_k for each in layers))

    @property
    def hits(self) -> int:
        """The sum over its layers, as the three that follow."""
        return sum(layer.hits for layer in self.counts)

    @property
    def misses(self) -> int:
        return sum(layer.misses for layer in self.counts)

    @property
    def bytes_read(self) -> int:
        return sum(layer.bytes_read for layer in self.counts)

    @property
    def evictions(self) -> int:
        return sum(layer.evictions for layer in self.counts)

    @property
    def in_use(self) -> bool:
        """Whether it has sessions, or some are being opened."""
        return bool(self.sessions or self.opening)

    def knows(self, session: int) -> bool:
        """Whether ``session`` is open, or is being opened."""
        return session in self.sessions or any(attach.session == session for attach in self.opening)

    @property
    def ready(self) -> bool:
        """Whether all pools have their memory."""
        return all(pool.created for pool in self.pools)

    @property
    def size(self) -> int:
        """Bytes of the segments of its current generations."""
        return sum(pool.layout.size for pool in self.pools)

    @property
    def extra(self) -> int:
        """Bytes of the segments of older generations, and of those that are being created."""
        coming = [pool.next for pool in self.pools if pool.next is not None]
        return sum(pool.layout.size for pool in (*self.old, *coming))

    @property
    def copies(self) -> int:
        """How many sessions hold a copy of their own beside the segments."""
        modes = [session.mode for session in self.sessions.values()] + [attach.mode for attach in self.opening]
        return modes.count("copy")

    @property
    def busy(self) -> bool:
        """Whether a read, a copy or the creation of a segment is under way (its pools cannot be given back yet)."""
        return any(pool.filling or pool.copies_from or pool.next for pool in (*self.pools, *self.old))

    @property
    def held_by_silent(self) -> int:
        """Bytes of older generations that stay for sessions that do not answer."""
        return sum(
            pool.layout.size
            for pool in self.old
            if any(number in self.sessions and self.sessions[number].silent for number in pool.holders)
        )

    def held_by(self, session: int) -> int:
        """Bytes of older generations that ``session`` keeps from being given back."""
        return sum(pool.layout.size for pool in self.old if session in pool.holders)
