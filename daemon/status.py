"""The core's state as ``expertd status`` shows it."""

from __future__ import annotations

from expertd.daemon.core.state import Model
from expertd.protocol.messages import ModelStatus, SessionStatus


def model_status(model: Model) -> ModelStatus:
    """One model's figures.  ``experts`` and ``block_bytes`` are the largest of its layers where they differ."""
    layers = model.manifest.layers
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
            SessionStatus(
                id=session.number,
                pid=session.pid,
                mode=session.mode,
                waiting=session.waiting is not None,
                fetches=session.fetches,
                left_behind=session.silent,
                held_bytes=model.held_by(session.number),
            )
            for session in model.sessions.values()
        ],
    )
