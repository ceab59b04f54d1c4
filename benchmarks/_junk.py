"""Frames that no peer should send: random bytes, and messages of every type cut, flipped and spliced.

What is made follows the classes of ``expertd.protocol.messages`` by itself, so that a new message is attacked too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from expertd.protocol import messages
from expertd.protocol.errors import MessageInvalid

HARMFUL = (
    messages.Stop,
    messages.SetBudget,
    messages.Detach,
    messages.Released,
    messages.WorkerReady,
    messages.WorkerFailed,
)
"""Valid messages that may rightly change something; what is sent must not happen to be one of them."""

NUMBERS = (0, 1, 2, 255, 256, 65535, 65536, 2**31, 2**32, 2**48 + 7, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63))


class Junk:
    """A source of bad frames; equal seeds give equal frames."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._types = [inspect.type_info(kind) for kind in messages.MESSAGES]
        self._valid = [self._message() for _ in range(1000)]

    def frames(self, count: int) -> Iterator[bytes]:
        """``count`` frames, none of them one that a peer may rightly act upon."""
        while count > 0:
            frame = self.frame()
            if harmless(frame):
                count -= 1
                yield frame

    def frame(self) -> bytes:
        """Random bytes, or a message of any type, whole or mutated; one in five is not mutated."""
        chance = self._chance
        if chance.random() < 0.1:
            return chance.randbytes(chance.choice((0, 1, 7, 64, 600)))
        frame = chance.choice(self._valid)
        return frame if chance.random() < 0.2 else self.mutated(frame)

    def mutated(self, frame: bytes) -> bytes:
        """``frame`` with one to three things wrong."""
        chance, raw = self._chance, bytearray(frame)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(raw) + 1)
            match chance.randrange(6):
                case 0:
                    del raw[place:]
                case 1 if place < len(raw):
                    raw[place] ^= 1 << chance.randrange(8)
                case 2:
                    raw[place:place] = chance.randbytes(chance.randint(1, 9))
                case 3 if place < len(raw):
                    raw[place] = chance.choice((0xC0, 0xC1, 0xDF, 0xDD, 0xC6, 0xDB, 0x80, 0xCF, 0xD3, 0xCB))
                case 4:
                    del raw[place : place + chance.randint(1, 9)]
                case _:
                    other = chance.choice(self._valid)
                    raw[place:] = other[chance.randrange(len(other)) :]
        return bytes(raw)

    def _message(self) -> bytes:
        """A message of a random type whose fields have the right types and extreme values."""
        kind = self._chance.choice(self._types)
        assert isinstance(kind, inspect.StructType)
        return msgspec.msgpack.encode(self._value(kind))

    def _value(self, kind: inspect.Type) -> Any:
        chance = self._chance
        match kind:
            case inspect.StructType():
                fields = {field.encode_name: self._value(field.type) for field in kind.fields}
                return fields if kind.tag is None else {str(kind.tag_field): kind.tag, **fields}
            case inspect.IntType():
                number = chance.choice(NUMBERS)
                return number if chance.random() < 0.2 else number % 1000
            case inspect.FloatType():
                return chance.choice((0.0, 0.5, 1.0, -1.0, 1e308, float("inf"), float("nan")))
            case inspect.BoolType():
                return chance.random() < 0.5
            case inspect.StrType():
                return chance.choice(("", "a", "../../etc/passwd", "\0", "\U0001f600", "x" * 300))
            case inspect.BytesType():
                return chance.randbytes(16 if chance.random() < 0.8 else chance.randrange(200))
            case inspect.ListType() | inspect.VarTupleType():
                return [self._value(kind.item_type) for _ in range(chance.choice((0, 1, 1, 2, 20)))]
            case inspect.TupleType():
                return [self._value(item) for item in kind.item_types]
            case inspect.DictType():
                return {"role": "user", "content": "x" * chance.randrange(50)}
            case inspect.LiteralType():
                return chance.choice(kind.values)
            case inspect.UnionType():
                return self._value(chance.choice(kind.types))
            case _:
                return None


def harmless(frame: bytes) -> bool:
    """Whether nobody may rightly act upon ``frame``."""
    try:
        return not isinstance(messages.decode(frame), HARMFUL)
    except MessageInvalid:
        return True
