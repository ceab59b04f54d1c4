"""What the daemon's log says of models, sessions, pools and reads, and what it has said already.

The server tells of everything here; what comes often is told now and then, with how often it came.  How a line is
written, and where to, is ``expertd.protocol.logs``.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from expertd.daemon.core.state import Model, Pool, Recalled
from expertd.protocol.layout import PoolLayout
from expertd.protocol.logs import Log, Sparsely
from expertd.protocol.model_names import shown_name
from expertd.protocol.sizes import show_size

log = Log("expertd.daemon")


@dataclass(frozen=True)
class _Session:
    pid: int
    model: str
    began: float


def _goes_to(pool: Pool, segment: int) -> bool:
    return pool.segment == segment or (pool.next is not None and pool.next.segment == segment)


def warm_again(left: Recalled) -> str:
    """What came of bringing blocks in again, for a person."""
    at = datetime.fromtimestamp(left.recorded_at)
    record = f"the record of {at:%Y-%m-%d %H:%M:%S}" if left.recorded_at else "its profile"
    whence = "the daemon before, which sessions held" if left.adopted else record
    return f"warm again: {len(left.back)} of {len(left.blocks)} blocks from {whence}"


class Diary:
    """Owned by the daemon's loop."""

    def __init__(self) -> None:
        self.drops = Sparsely()
        self._failures = Sparsely()
        self._models: dict[str, str] = {}
        self._sessions: dict[int, _Session] = {}

    def session_opened(self, session: int, pid: int, mode: str, model: Model) -> None:
        """A session was granted; its model may be new here."""
        name = shown_name(Path(model.manifest.folder))
        if model.key not in self._models:
            self._models[model.key] = name
            log.info(
                "model opened",
                model=name, folder=model.manifest.folder, size=show_size(model.size), pools=len(model.pools),
                slots=sum(pool.layout.slots for pool in model.pools),
                blocks=sum(layer.experts for layer in model.manifest.layers),
            )  # fmt: skip
        self._sessions[session] = _Session(pid, name, time.monotonic())
        log.info("session opened", session=session, pid=pid, model=name, mode=mode)

    def session_ended(self, session: int, why: str | None = None) -> None:
        """It closed its lifeline, which a process does too that dies; or it was hung up on, and ``why``."""
        known = self._sessions.pop(session, None)
        if known is not None:
            seconds = round(time.monotonic() - known.began, 1)
            log.info("session ended", session=session, pid=known.pid, model=known.model, seconds=seconds, why=why)

    def session_left_behind(self, session: int) -> None:
        """It does not answer."""
        known = self._sessions.get(session)
        log.warning("session left behind, because it does not answer", session=session, pid=known and known.pid)

    def models_kept(self, keys: Collection[str]) -> None:
        """These are all that the daemon still holds something of."""
        for key in self._models.keys() - keys:
            log.info("model closed, its memory is free", model=self._models.pop(key))

    def pool_created(self, segment: int, layout: PoolLayout, generation: int, models: Iterable[Model]) -> None:
        """The first generation belongs to a model that is being opened; a later one takes the place of one before."""
        told = log.info if generation > 1 else log.debug
        folders = [model.manifest.folder for model in models for pool in model.pools if _goes_to(pool, segment)]
        told(
            "pool moved" if generation > 1 else "pool created",
            model=shown_name(Path(folders[0])) if folders else None, generation=generation, layers=layout.layers,
            slots=layout.slots, size=show_size(layout.size),
        )  # fmt: skip

    def recalled(self, models: Iterable[Model]) -> None:
        """What was to be brought in again of these is there, or there is no more room."""
        for model in models:
            left = model.recalled
            coming = not model.ready or any(pool.wish or pool.background for pool in model.pools)
            if left is None or left.told or coming:
                continue
            left.told = True
            log.info(warm_again(left), model=self._models.get(model.key))

    def dropped(self, why: str) -> None:
        """A frame came that is no message."""
        if self.drops.add():
            log.warning("frames that are no messages were dropped", frames=self.drops.new, last=why[:200])

    def read_failed(self, why: str) -> None:
        """The system could not read a block."""
        if self._failures.add():
            log.warning("read failed: %s", why, others=(self._failures.new - 1) or None)
