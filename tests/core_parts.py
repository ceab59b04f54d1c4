"""What ``core_world`` is made of: two small models, segments as memory, workers as their processes see themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from expertd.daemon.core import events, instructions
from expertd.daemon.core.plan import resized
from expertd.daemon.policy import LRU
from expertd.protocol.errors import ExpertdError
from expertd.protocol.layout import PAGE, PoolLayout
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.messages import AliasMode

Block = tuple[int, int]
Place = tuple[int, int]
"""A slot of a segment: (segment, slot)."""

Kind = tuple[str, int]
"""What all generations of a pool have in common: (model, number of layers)."""

Channel = Literal["data", "control"]
CHANNELS: tuple[Channel, ...] = ("data", "control")
GARBAGE: Block = (-1, -1)
UNTIL_EVALUATED = 1 << 60
"""What a session computes on a complete generation is given up by no ack."""


def _manifest(name: str, experts: int, pages: Iterable[int]) -> Manifest:
    """A model with one layer for each of ``pages``, the size of a block in it."""
    layers = tuple(
        Layer(f"layers.{n}", experts, 2, (Part("w", "U8", (count * PAGE,), ("tensor",), (0,)),))
        for n, count in enumerate(pages)
    )
    return Manifest(name, "family", (), layers)


MODELS = {"plain": _manifest("/plain", 4, (1, 1, 1)), "mixed": _manifest("/mixed", 3, (1, 2, 1))}
LAYERS = 3
"""Of each model."""

POOLS = {("/plain", 3): (0, 1, 2), ("/mixed", 2): (0, 2), ("/mixed", 1): (1,)}
"""The layers of each pool, by the folder of its model and their number."""


@dataclass
class Segment:
    """One generation of a pool as its memory: its table, and what the slots hold (GARBAGE until a read is done)."""

    manifest: Manifest
    generation: int
    layout: PoolLayout
    layers: tuple[int, ...]
    created: bool = False
    superseded: bool = False
    table: dict[Block, int] = field(default_factory=dict)
    content: dict[int, Block] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return self.manifest.key, self.layout.layers

    @property
    def blocks(self) -> int:
        return self.layout.layers * self.layout.experts

    @property
    def complete(self) -> bool:
        return len(self.table) == self.blocks

    @property
    def smallest(self) -> int:
        """Bytes of the smallest generation that there can be of this pool."""
        return resized(self.manifest, self.layers, 0).size


@dataclass
class Worker:
    """One session as its process sees it.

    Attributes:
        prompt: whether it hears what it is told at once.
        stopped: it says and hears nothing.
        told: newest version that a message told it.
        asked: whether it owes an ack.
        fetching: its newest Fetch while it has no answer; it looks nothing up meanwhile.
        again: its newest Fetch, if the pool had moved: to be sent again where the pool is now.
        leases_only: it has promised to look nothing up until its next Fetch.
        rest: what the event that it has begun will fetch next.
        reading: what it might still read, and what it had been told when it looked that up.
        leased: what the newest answer gave it, even if it has not heard of it yet.
        held: segments that the core handed it and that the core has not heard it has released.
        adopted: where it looks up, for each pool.
        spare: segments that it has mapped (or was told of) and does not look up in: to be released.
        offers: the newest generation that it heard of, for each pool, until it adopts it.
        promised: segments that the core told it, or is telling it, are complete; ``complete``: that it heard of.
    """

    number: int
    manifest: Manifest
    mode: AliasMode
    prompt: bool
    granted: bool = False
    stopped: bool = False
    told: int = 0
    asked: bool = False
    sequence: int = 0
    fetching: events.Fetch | None = None
    leases_only: bool = False
    rest: tuple[int, ...] = ()
    again: events.Fetch | None = None
    answer_lost: bool = False
    requests: dict[int, events.Fetch] = field(default_factory=dict)
    answers: dict[int, tuple[int, ...]] = field(default_factory=dict)
    refusals: dict[int, ExpertdError] = field(default_factory=dict)
    reading: dict[Place, tuple[Block, int]] = field(default_factory=dict)
    leased: dict[Place, Block] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)
    adopted: dict[Kind, int] = field(default_factory=dict)
    spare: list[int] = field(default_factory=list)
    offers: dict[Kind, int] = field(default_factory=dict)
    promised: set[int] = field(default_factory=set)
    complete: set[int] = field(default_factory=set)
    outbox: dict[Channel, deque[events.Event]] = field(default_factory=lambda: {c: deque() for c in CHANNELS})
    inbox: dict[Channel, deque[instructions.Instruction]] = field(
        default_factory=lambda: {c: deque() for c in CHANNELS}
    )

    @property
    def free(self) -> bool:
        """Whether it may do something on its own account."""
        return self.granted and not self.stopped and self.fetching is None

    @property
    def looks_up(self) -> bool:
        """Whether it may run the next event by what it finds in the tables."""
        return self.free and not self.leases_only


class WatchedLRU(LRU):
    """Fails if it is told of a block's coming or going twice; what it makes of blocks' chances changes all the time."""

    def __init__(self, layers: int, experts: int, top_k: int) -> None:
        super().__init__(layers, experts, top_k)
        self.known: set[Block] = set()
        self.observing = False
        self.asked = 0

    def chance(self, block: Block) -> float:
        self.asked += 1
        return 1.0 if block[0] % 2 != self.asked // 10 % 2 else 0.0

    def observe(self, session: int, layer: int, experts: Sequence[int]) -> None:
        self.observing = True
        super().observe(session, layer, experts)
        self.observing = False

    def admitted(self, block: Block) -> None:
        if not self.observing:
            assert block not in self.known, f"{block} was admitted twice"
            self.known.add(block)
        super().admitted(block)

    def removed(self, block: Block) -> None:
        assert block in self.known, f"{block} was removed and not there"
        self.known.remove(block)
        super().removed(block)
