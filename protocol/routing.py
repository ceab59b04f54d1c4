"""The routing log: what routers chose, packed for the wire (PROTOCOL.md, "Routing log").

A log is a sequence of records of little-endian uint16: layer, count, then ``count`` distinct expert ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from expertd.protocol.errors import MessageInvalid

_HEAD = struct.Struct("<HH")


def pack(layer: int, experts: NDArray[np.integer]) -> bytes:
    """One record of what a router chose: ``experts[..., k]``, any integer type, repeated from token to token."""
    distinct = experts if experts.size == experts.shape[-1] else np.unique(experts)  # one token repeats nothing
    return _HEAD.pack(layer, distinct.size) + distinct.astype("<u2").tobytes()


def unpack(log: bytes) -> Iterator[tuple[int, list[int]]]:
    """The records ``(layer, experts)`` of a log, oldest first.

    Raises:
        MessageInvalid: the log ends inside a record.
    """
    if len(log) % 2:
        raise MessageInvalid("a routing log has an odd number of bytes")
    words = np.frombuffer(log, "<u2").tolist()
    place = 0
    while place < len(words):
        if place + 2 > len(words) or place + 2 + words[place + 1] > len(words):
            raise MessageInvalid("a routing log ends inside a record")
        count = words[place + 1]
        yield words[place], words[place + 2 : place + 2 + count]
        place += 2 + count
