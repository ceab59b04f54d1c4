"""A core whose files, memory and sessions do at once what they are asked to: for what comes of many events."""

from __future__ import annotations

from collections import deque

from expertd.daemon.core import Core, events, instructions
from expertd.daemon.core.state import Model
from expertd.daemon.policy import Forecast, PolicyFactory
from expertd.protocol.errors import ExpertdError, SegmentFailed
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import Layer, Manifest, Part


def model_of(pages: tuple[int, ...], experts: int = 128, name: str = "m") -> Manifest:
    """A model with a layer for each of ``pages``, the size of its blocks; a token uses four experts."""
    layers = tuple(
        Layer(f"layers.{n}", experts, 4, (Part("up_proj.weight", "U8", (size * PAGE,), ("tensor",), (0,)),))
        for n, size in enumerate(pages)
    )
    return Manifest(f"/{name}", "family", (), layers)


class Runner:
    """Attributes:
    memory_left: bytes that the system can still give for segments.
    stopped: sessions that hear nothing: they neither ack nor leave older generations.
    most_used: bytes that the core used at most.
    """

    def __init__(self, budget: int, policy: PolicyFactory = Forecast) -> None:
        self.core = Core(budget, policy)
        self.sequence = 0
        self.answered: set[int] = set()
        self.stopped: set[int] = set()
        self.most_used = 0
        self.memory_left = 1 << 60
        self._sizes: dict[int, int] = {}

    def attach(self, session: int, manifest: Manifest) -> Model:
        """Open a session; raises what it is refused with."""
        self.feed(events.Attach(session, 100 + session, "shm", manifest))
        return self.core.models[manifest.key]

    def feed(self, event: events.Event) -> None:
        """An event, and all that follows from it."""
        todo = deque([event])
        refused: ExpertdError | None = None
        while todo:
            for out in self.core.handle(todo.popleft()):
                match out:
                    case instructions.CreatePool(segment, _, layout, _, _):
                        todo.append(self._create(segment, layout.size))
                    case instructions.UnlinkPool(segment):
                        self.memory_left += self._sizes.pop(segment)
                    case instructions.StartRead(_, segment, slot):
                        todo.append(events.ReadDone(segment, slot, PAGE))
                    case instructions.StartCopy(_, _, segment, slot):
                        todo.append(events.ReadDone(segment, slot, 0))
                    case instructions.AskAck(session, version) if session not in self.stopped:
                        todo.append(events.Ack(session, version, self.sequence))
                    case instructions.Move(session) if session not in self.stopped:
                        todo.extend(self.releases(session))
                    case instructions.Answer(_, sequence):
                        self.answered.add(sequence)
                    case instructions.Refuse(_, error, None):
                        refused = error
            self.most_used = max(self.most_used, self.core.used)
        if refused is not None:
            raise refused

    def _create(self, segment: int, size: int) -> events.Event:
        if size > self.memory_left:
            return events.PoolFailed(segment, SegmentFailed("no memory"))
        self.memory_left -= size
        self._sizes[segment] = size
        return events.PoolCreated(segment)

    def releases(self, session: int) -> list[events.Event]:
        """What ``session`` says when it leaves all older generations that it has."""
        old = self.core.models[self.core.sessions[session].model].old
        return [events.Released(session, pool.segment) for pool in old if session in pool.holders]

    def wake(self, session: int) -> None:
        """A session that was stopped is heard again, and follows."""
        self.stopped.discard(session)
        for event in (events.Heard(session), *self.releases(session)):
            self.feed(event)

    def use(self, session: int, layer: int, experts: list[int]) -> None:
        """An event, fetched again until it is answered: the pool may have moved meanwhile."""
        model = self.core.models[self.core.sessions[session].model]
        for _ in range(10):
            self.sequence += 1
            segment = model.pool_of_layer[layer].segment
            self.feed(events.Fetch(session, self.sequence, segment, layer, tuple(experts)))
            if self.sequence in self.answered:
                return
        raise AssertionError(f"an event of session {session} in layer {layer} is not answered")
