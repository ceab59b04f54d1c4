"""What all messages share: their class, the types of their fields, and the three that every connection may carry."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from expertd.protocol.errors import ExpertdError, from_code

Count = Annotated[int, Meta(ge=0)]
Name = Annotated[str, Meta(max_length=4096)]
LONGEST_TEXT = 1 << 24
Text = Annotated[str, Meta(max_length=LONGEST_TEXT)]
Token = Annotated[bytes, Meta(min_length=16, max_length=16)]
Routing = Annotated[bytes, Meta(max_length=8 << 20)]
Expert = Annotated[int, Meta(ge=0, lt=65536)]
Experts = Annotated[list[Expert], Meta(min_length=1, max_length=65536)]
Announce = Annotated[int, Meta(ge=-1, lt=3)]
"""What a session should announce: -1 nothing, 0 the rest of events and the next layer of prompts, 1 and 2: of single
tokens too what so many of the next layers will need."""
AliasMode = Literal["shm", "copy"]


class Message(msgspec.Struct, tag_field="type", tag=str.lower, kw_only=True):
    """Base of all messages; the tag is the class name in lower case."""


class Hello(Message):
    """First message of every connection."""

    protocol: int
    package: Name
    role: Name


class Welcome(Message):
    """Answer to Hello."""

    protocol: int
    package: Name
    pid: Count


class Error(Message):
    """Answer to a message that cannot be served.  ``sequence`` repeats the one of the Fetch that failed."""

    code: Name
    message: Text
    sequence: Count | None = None

    def exception(self) -> ExpertdError:
        """The error as an exception of the tree in ``expertd.protocol.errors``."""
        return from_code(self.code, self.message)

    @classmethod
    def of(cls, error: ExpertdError, sequence: int | None = None) -> Error:
        """The message for ``error``."""
        return cls(code=error.code, message=error.message, sequence=sequence)
