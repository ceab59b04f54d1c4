"""The routing log: what routers chose, packed for the wire (PROTOCOL.md, "Routing log").

A log is a sequence of records of little-endian uint16: layer, count, then ``count`` distinct expert ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from expertd.protocol.errors import MessageInvalid


def pack(layer: int, experts: Sequence[int]) -> bytes:
    """One record of what a router chose; an expert that several tokens chose may stand there several times."""
    distinct = dict.fromkeys(experts)
    return struct.pack(f"<HH{len(distinct)}H", layer, len(distinct), *distinct)


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
