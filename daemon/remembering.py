"""When the daemon records what is worth keeping, and what it brings in again of a model that comes back.

Due when a session has ended, when a model rests, and now and then while it works; never twice in a few seconds.  Pure
but for the clock that is given; the file is ``expertd.daemon.warm_record``, and bringing blocks in is
``expertd.daemon.core.warmth``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.core.events import Recall
from expertd.daemon.core.state import Model
from expertd.daemon.core.topics import MOST
from expertd.daemon.warm_record import WarmRecord, read
from expertd.protocol.errors import ProfileInvalid
from expertd.protocol.logs import Log
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.protocol.profiles import Profile, profile_names, profiles_in_use, read_profile

log = Log("expertd.daemon")

AT_LEAST_S = 5.0
"""Between two records of a model."""
WORKING_S = 60.0
"""While a model works without a pause, so much may be lost when the machine loses its power."""
RESTS_S = 2.0
"""A model rests if for so long nothing was asked of it."""


@dataclass
class _Seen:
    """What is known of a model: what it had done when it was recorded and when it was seen last, and when that was.

    ``stale_at``: since when it has done more than was recorded; ``ended``: a session has ended since.
    """

    recorded: int
    recorded_at: float
    last: int
    last_at: float
    stale_at: float
    sessions: frozenset[int] = frozenset()
    ended: bool = False


class Remembering:
    """Owned by the daemon's loop."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def due(self, models: Collection[Model], now: float) -> list[Model]:
        """The models that should be recorded now, in seconds of a clock that never goes back; asked once a second."""
        for gone in self._seen.keys() - {model.key for model in models}:
            del self._seen[gone]
        return [model for model in models if self._is_due(model, now) and not model.unwanted]

    def changed(self, models: Collection[Model]) -> list[Model]:
        """The models of which more is known than was recorded: what should be recorded at the end."""
        wanted = [model for model in models if not model.unwanted]
        return [m for m in wanted if m.key not in self._seen or self._seen[m.key].recorded != _done(m)]

    def _is_due(self, model: Model, now: float) -> bool:
        done = _done(model)
        seen = self._seen.get(model.key)
        if seen is None:
            seen = self._seen[model.key] = _Seen(0, now, done, now, now)
        seen.ended |= not seen.sessions <= model.sessions.keys()
        seen.sessions = frozenset(model.sessions)
        if seen.last == seen.recorded:
            seen.stale_at = now
        if done != seen.last:
            seen.last, seen.last_at = done, now
        if done == seen.recorded or now - seen.recorded_at < AT_LEAST_S:
            return False
        rests = now - seen.last_at >= RESTS_S
        if not (seen.ended or rests or now - seen.stale_at >= WORKING_S):
            return False
        seen.recorded, seen.recorded_at, seen.ended = done, now, False
        return True


def _done(model: Model) -> int:
    """A number that changes when something was used or brought in."""
    return model.hits + model.misses + model.bytes_read + model.copied


def record_of(model: Model, at: float) -> WarmRecord | None:
    """What is worth keeping of ``model``; None if nothing is there.

    What was to be brought in again, and is not there yet, stays in the record, behind all that is.
    """
    blocks = model.policy.lasting()
    there = set(blocks)
    if model.recalled is not None:
        coming = {block for pool in model.pools for block in (*pool.wish, *pool.background)}
        blocks += [block for block in model.recalled.blocks if block in coming and block not in there]
    if not blocks:
        return None
    name, statistics = type(model.policy).__name__, model.policy.statistics()
    return WarmRecord.of(model.key, model.manifest.folder, at, name, blocks, statistics)


def recall(home: Home, manifest: Manifest, policy: str, remembers: bool = True) -> Recall | None:
    """What to bring in of a model that comes back: what its record names, then what the profile in use does.

    And what its topics may be, which every profile of the home tells that fits.  None if there is nothing of all this.
    Reads files; does not raise.

    Args:
        policy: name of the class whose statistics could be taken over.
        remembers: look for a record.
    """
    record = read(home, manifest.key) if remembers else None
    profile = _profile_in_use(home, manifest)
    blocks = dict.fromkeys(record.blocks if record is not None else ())
    blocks |= dict.fromkeys(profile.blocks if profile is not None else ())
    topics = tuple(_chances(each, manifest) for each in _profiles_of(home, manifest))
    if not (blocks or topics):
        return None
    statistics = record.statistics if record is not None and record.policy == policy else {}
    chances = _chances(profile, manifest) if profile is not None else None
    return Recall(manifest.key, tuple(blocks), statistics, record.at if record is not None else 0.0, chances, topics)


def _chances(profile: Profile, manifest: Manifest) -> NDArray[np.float32]:
    """How likely a token is to use each block: ``[layers, experts]``; each layer's come to what a token uses."""
    chances = np.zeros((len(profile.experts), max(profile.experts)), np.float32)
    for row, uses, layer in zip(chances, profile.uses, manifest.layers, strict=True):
        row[: len(uses)] = np.array(uses, np.float32) * (layer.top_k / max(1, sum(uses)))
    return chances


def _profiles_of(home: Home, manifest: Manifest) -> list[Profile]:
    """The newest profiles of the home that are of a model of this shape; what cannot be read is none."""
    found = []
    with contextlib.suppress(ProfileInvalid):
        for name in profile_names(home):
            with contextlib.suppress(ProfileInvalid):
                found.append(read_profile(home, name))
    experts = [layer.experts for layer in manifest.layers]
    fitting = [profile for profile in found if profile.misfit(experts) is None]
    return sorted(fitting, key=lambda profile: -profile.made_at)[:MOST]


def _profile_in_use(home: Home, manifest: Manifest) -> Profile | None:
    """The profile that the model uses; None if it uses none that can be used, which the log tells."""
    name = profiles_in_use(home).get(manifest.folder)
    if name is None:
        return None
    try:
        profile = read_profile(home, name)
        problem = profile.misfit([layer.experts for layer in manifest.layers])
    except ProfileInvalid as error:
        problem = error.message
    if problem is not None:
        log.warning("the profile that a model uses is left aside: %s", problem, profile=name, folder=manifest.folder)
        return None
    return profile
