"""The core's state as ``expertd status`` shows it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import msgspec
import psutil

from expertd.daemon.core import Core, warmth
from expertd.daemon.core.bases import Bases
from expertd.daemon.core.foresight import Kind
from expertd.daemon.core.state import Model, Recalled, Session
from expertd.daemon.devices import ReadStatistics
from expertd.daemon.files import device_name
from expertd.daemon.memory_watch import MemoryWatch
from expertd.daemon.tokens import Tokens
from expertd.daemon.waits import Waited
from expertd.protocol import PROTOCOL
from expertd.protocol.connection import package_version
from expertd.protocol.messages import (
    AheadStatus,
    DaemonStatus,
    DeviceStatus,
    FetchToRead,
    LayerStatus,
    ModelStatus,
    RecalledStatus,
    SessionStatus,
    Status,
)
from expertd.protocol.paths import Home

NOT_PACKED: Mapping[str, str] = MappingProxyType({})
KINDS: Mapping[Kind, Literal["prompt", "next layer", "second next layer", "topic"]] = MappingProxyType(
    {Kind.PROMPT: "prompt", Kind.NEXT: "next layer", Kind.SECOND: "second next layer", Kind.TOPIC: "topic"}
)
TOKENS = (Kind.NEXT, Kind.SECOND)
NOBODY_WAITED: Mapping[int, Waited] = MappingProxyType({})
NOBODY_WAITED_BEFORE: Mapping[str, Waited] = MappingProxyType({})
NO_WAIT = Waited()
NOTHING_COMPUTED: Mapping[int, Tokens] = MappingProxyType({})


def as_line(status: Status) -> bytes:
    """``status`` as the object that ``expertd status --json`` prints, on one line."""
    found = msgspec.to_builtins(status)
    del found["type"]
    return msgspec.json.encode(found) + b"\n"


def daemon_status(
    home: Home,
    core: Core,
    memory: MemoryWatch,
    bases: Bases,
    waited: Mapping[int, Waited],
    tokens: Mapping[int, Tokens],
    uptime_s: float,
    tracing: str,
    frames_dropped: int,
    simulated_ssd: str,
    reads: ReadStatistics,
    packed: Mapping[str, str] = NOT_PACKED,
    waited_before: Mapping[str, Waited] = NOBODY_WAITED_BEFORE,
) -> Status:
    """All there is to show of this process, which is the daemon of ``home``.

    Args:
        waited, tokens: by sessions.
        packed: paths of the packed stores in use, by models' keys.
        waited_before: by sessions that have ended, by models' keys.
    """
    daemon = DaemonStatus(
        pid=os.getpid(),
        version=package_version(),
        uptime_s=round(uptime_s, 3),
        rss_bytes=_rss(),
    )
    return Status(
        protocol=PROTOCOL,
        home=str(home.root),
        daemon=daemon,
        budget_bytes=memory.governor.budget,
        used_bytes=core.used + bases.used,
        limit_bytes=memory.governor.limit,
        pressure=memory.pressure.level,
        pressure_figure=memory.pressure.figure,
        journal=memory.journal,
        tracing=tracing,
        frames_dropped=frames_dropped,
        simulated_ssd=simulated_ssd,
        devices=_devices(reads),
        fetch_to_read_us=FetchToRead(p50=round(reads.fetch_to_read_p50_us), p99=round(reads.fetch_to_read_p99_us)),
        models=[
            model_status(model, waited, packed.get(key, ""), tokens, bases, waited_before.get(key, Waited()))
            for key, model in core.models.items()
        ],
    )


def _devices(reads: ReadStatistics) -> list[DeviceStatus]:
    return [
        DeviceStatus(
            name=device_name(device.number),
            reads=device.reads,
            bytes=device.bytes,
            p50_us=round(device.p50_us),
            p95_us=round(device.p95_us),
            p99_us=round(device.p99_us),
            depth_mean=round(device.depth_mean, 2),
            depth_max=device.depth_max,
        )
        for device in reads.devices
    ]


def _rss() -> int:
    try:
        return int(psutil.Process().memory_info().rss)
    except (OSError, psutil.Error):  # no descriptor is left to read it with: that is no reason to end
        return 0


def model_status(
    model: Model,
    waited: Mapping[int, Waited] = NOBODY_WAITED,
    packed: str = "",
    tokens: Mapping[int, Tokens] = NOTHING_COMPUTED,
    bases: Bases | None = None,
    waited_before: Waited = NO_WAIT,
) -> ModelStatus:
    """One model's figures.  ``experts`` and ``block_bytes`` are the largest of its layers where they differ."""
    layers = model.manifest.layers
    in_all = waited_before
    for number in model.sessions:
        in_all = in_all.plus(waited.get(number, NO_WAIT))
    known = bases or Bases(0)
    shared = known.of_model(model.key)
    return ModelStatus(
        id=model.key,
        path=model.manifest.folder,
        family=model.manifest.family,
        moe_layers=len(layers),
        experts=max(layer.experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        block_bytes=max(layer.block_bytes for layer in layers),
        blocks=sum(layer.experts for layer in layers),
        slots=sum(pool.layout.slots for pool in model.pools),
        resident_blocks=sum(pool.sealed for pool in model.pools),
        hits=model.hits,
        misses=model.misses,
        bytes_read=model.bytes_read,
        evictions=model.evictions,
        pool_bytes=model.size + model.extra,
        sessions=[
            _session(
                model, session, waited.get(session.number, Waited()), tokens.get(session.number, Tokens()),
                (base := known.of_session(session.number)) is not None and not base.copy,
            )
            for session in model.sessions.values()
        ],
        layers=_layers(model),
        moves=model.moves,
        blocks_copied=model.copied,
        packed=packed,
        ahead=_ahead(model),
        warming=warmth.wished(model),
        pinned=len(model.pinned),
        waited_s=round(in_all.all_s, 6),
        read_wait_s=round(in_all.read_s, 6),
        recalled=_recalled(model.recalled),
        base_bytes=sum(base.size for base in shared),
        base_read=sum(base.read for base in shared),
        base_problem=known.problems.get(model.key, ""),
    )


def _recalled(left: Recalled | None) -> RecalledStatus | None:
    if left is None:
        return None
    return RecalledStatus(
        recorded_at=left.recorded_at, blocks=len(left.blocks), back=len(left.back), adopted=left.adopted
    )


def _ahead(model: Model) -> list[AheadStatus]:
    return [
        AheadStatus(
            kind=KINDS[kind],
            reading=model.foresight.reads(kind),
            announced=gate.announced,
            useful=round(gate.useful_part, 3),
            shuffled=round(gate.shuffled_part, 3),
            useful_bytes=gate.useful_bytes,
            wasted_bytes=gate.wasted_bytes,
            waits=round(model.foresight.comparison.better or 0.0, 3) if kind in TOKENS else 0.0,
            turns=model.topics.turns if kind is Kind.TOPIC else 0,
        )
        for kind, gate in model.foresight.gates.items()
    ]


def _session(model: Model, session: Session, waited: Waited, tokens: Tokens, shares_base: bool) -> SessionStatus:
    return SessionStatus(
        id=session.number,
        pid=session.pid,
        mode=session.mode,
        waiting=session.waiting is not None,
        fetches=session.fetches,
        left_behind=session.silent,
        held_bytes=model.held_by(session.number),
        waited_s=round(waited.all_s, 6),
        read_wait_s=round(waited.read_s, 6),
        decode_tokens=tokens.decode,
        prompt_tokens=tokens.prompt,
        shares_base=shares_base,
    )


def _layers(model: Model) -> list[LayerStatus]:
    pool_of_layer = {layer: number for number, pool in enumerate(model.pools) for layer in pool.layers}
    resident = Counter(block[0] for pool in model.pools for block in pool.where if pool.sealed_slot(block) is not None)
    return [
        LayerStatus(
            pool=pool_of_layer[layer],
            pool_slots=model.pools[pool_of_layer[layer]].layout.slots,
            resident_blocks=resident[layer],
            hits=counts.hits,
            misses=counts.misses,
            bytes_read=counts.bytes_read,
            evictions=counts.evictions,
        )
        for layer, counts in enumerate(model.counts)
    ]
