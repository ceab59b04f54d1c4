"""What happened between two ``Status`` messages of one daemon: figures a second, for ``expertd top``.

Pure: time is the daemon's own (its ``uptime_s``).  How they look is ``expertd.clients.terminal.live``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertd.protocol.messages import LayerStatus, ModelStatus, SessionStatus, Status
from expertd.protocol.model_names import shown_name


@dataclass(frozen=True)
class LayerRates:
    """One MoE layer: lookups of blocks that hit and missed in the time, and bytes read a second."""

    hits: int
    misses: int
    read_bytes_per_s: float


@dataclass(frozen=True)
class SessionRates:
    """One session.  ``waited`` is the part of the time in which it waited for Fetches, from 0 to 1."""

    id: int
    pid: int
    tokens_per_s: float
    prompt_tokens_per_s: float
    fetches_per_s: float
    waited: float
    waiting: bool
    left_behind: bool


@dataclass(frozen=True)
class ModelRates:
    """One model.  What it holds is of now; the rest happened in the time."""

    id: str
    name: str
    blocks: int
    resident_blocks: int
    pool_bytes: int
    hits: int
    misses: int
    read_bytes_per_s: float
    layers: list[LayerRates]
    sessions: list[SessionRates]


@dataclass(frozen=True)
class Rates:
    """All of a daemon's models.  ``seconds`` is the time that the rates are of; sizes are of now."""

    seconds: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    hits: int
    misses: int
    read_bytes_per_s: float
    used_bytes: int
    limit_bytes: int
    budget_bytes: int
    pressure: str
    models: list[ModelRates]

    @property
    def hit_rate(self) -> float | None:
        """The part of the lookups that hit, from 0 to 1; None if there were none."""
        return hit_rate(self.hits, self.misses)


def hit_rate(hits: int, misses: int) -> float | None:
    """The part that hit; None of nothing."""
    return hits / (hits + misses) if hits + misses else None


def rates(before: Status, after: Status) -> Rates | None:
    """What happened between two answers; None if they are not of one daemon, or no time has passed.

    What was not there before, or counts less than it did (a model that was given back and came again), began at 0.
    """
    seconds = after.daemon.uptime_s - before.daemon.uptime_s
    if before.daemon.pid != after.daemon.pid or seconds <= 0:
        return None
    known = {model.id: model for model in before.models}
    models = [_model(known.get(model.id), model, seconds) for model in after.models]
    sessions = [session for model in models for session in model.sessions]
    return Rates(
        seconds=seconds,
        tokens_per_s=sum(session.tokens_per_s for session in sessions),
        prompt_tokens_per_s=sum(session.prompt_tokens_per_s for session in sessions),
        hits=sum(model.hits for model in models),
        misses=sum(model.misses for model in models),
        read_bytes_per_s=sum(model.read_bytes_per_s for model in models),
        used_bytes=after.used_bytes,
        limit_bytes=after.limit_bytes,
        budget_bytes=after.budget_bytes,
        pressure=after.pressure,
        models=models,
    )


def _model(before: ModelStatus | None, after: ModelStatus, seconds: float) -> ModelRates:
    if before is not None and (before.hits > after.hits or before.misses > after.misses):
        before = None
    layers: Sequence[LayerStatus | None] = before.layers if before is not None else ()
    if len(layers) != len(after.layers):
        layers = [None] * len(after.layers)
    known = {session.id: session for session in before.sessions} if before is not None else {}
    return ModelRates(
        id=after.id,
        name=shown_name(Path(after.path)),
        blocks=after.blocks,
        resident_blocks=after.resident_blocks,
        pool_bytes=after.pool_bytes,
        hits=after.hits - (before.hits if before is not None else 0),
        misses=after.misses - (before.misses if before is not None else 0),
        read_bytes_per_s=(after.bytes_read - (before.bytes_read if before is not None else 0)) / seconds,
        layers=[_layer(one, other, seconds) for one, other in zip(layers, after.layers, strict=True)],
        sessions=[_session(known.get(session.id), session, seconds) for session in after.sessions],
    )


def _layer(before: LayerStatus | None, after: LayerStatus, seconds: float) -> LayerRates:
    hits, misses, read = (before.hits, before.misses, before.bytes_read) if before is not None else (0, 0, 0)
    return LayerRates(after.hits - hits, after.misses - misses, (after.bytes_read - read) / seconds)


def _session(before: SessionStatus | None, after: SessionStatus, seconds: float) -> SessionRates:
    def since(name: str) -> float:
        return float(getattr(after, name)) - (float(getattr(before, name)) if before is not None else 0.0)

    return SessionRates(
        id=after.id,
        pid=after.pid,
        tokens_per_s=since("decode_tokens") / seconds,
        prompt_tokens_per_s=since("prompt_tokens") / seconds,
        fetches_per_s=since("fetches") / seconds,
        waited=min(1.0, max(0.0, since("waited_s") / seconds)),
        waiting=after.waiting,
        left_behind=after.left_behind,
    )


class Window:
    """The answers of the last seconds: what is shown is what happened since the oldest of them.

    A session reports what it computes with its Fetches, and when nothing misses every hundred forwards; so a window of
    some seconds shows steady work as steady.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._kept: list[Status] = []

    def add(self, found: Status) -> Rates | None:
        """Take one more answer; the rates since the oldest in the window, None if it is the first of its daemon."""
        if self._kept and rates(self._kept[-1], found) is None:
            self._kept.clear()
        self._kept.append(found)
        while len(self._kept) > 2 and found.daemon.uptime_s - self._kept[1].daemon.uptime_s >= self._seconds:
            self._kept.pop(0)
        return rates(self._kept[0], found)
