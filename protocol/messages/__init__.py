"""Every message of the protocol, as typed classes, and the one codec for them.

On the wire a message is a msgpack map with its ``type`` beside its fields.  Decoding checks presence, types and bounds;
fields that are not known are ignored, so that a newer peer may add some.  When each message is sent, and by whom, is in
PROTOCOL.md.  The classes are in the modules of this package, by who talks to whom; all are imported from here.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from expertd.protocol.errors import MessageInvalid
from expertd.protocol.messages.base import (
    LONGEST_TEXT,
    AliasMode,
    Announce,
    Error,
    Hello,
    Message,
    Welcome,
)
from expertd.protocol.messages.generation import (
    Cancel,
    Delta,
    Finished,
    Generate,
    Refused,
    Sampling,
    Shutdown,
    TokenLogprob,
    ToolCall,
    TopToken,
    WorkerFailed,
    WorkerReady,
)
from expertd.protocol.messages.session import (
    Ack,
    AckRequest,
    Ahead,
    Attach,
    Attached,
    BaseInfo,
    Complete,
    Detach,
    Detached,
    Fetch,
    Moved,
    Ping,
    Pong,
    PoolInfo,
    Pressure,
    Record,
    Recorded,
    Released,
    Resident,
    RoutingLog,
)
from expertd.protocol.messages.status import (
    AheadStatus,
    AskStatus,
    DaemonStatus,
    DeviceStatus,
    FetchToRead,
    JournalEntry,
    LayerStatus,
    ModelStatus,
    RecalledStatus,
    SessionStatus,
    Status,
)
from expertd.protocol.messages.steering import (
    BudgetSet,
    Happened,
    Pin,
    Pinned,
    SetBudget,
    StartTrace,
    Stop,
    Stopping,
    StopTrace,
    Subscribe,
    Subscribed,
    TraceStarted,
    TraceStopped,
    Unload,
    Unloaded,
    Warm,
    Warming,
)

__all__ = [
    "FRAME_LIMIT",
    "LONGEST_TEXT",
    "MESSAGES",
    "Ack",
    "AckRequest",
    "Ahead",
    "AheadStatus",
    "AliasMode",
    "Announce",
    "AskStatus",
    "Attach",
    "Attached",
    "BaseInfo",
    "BudgetSet",
    "Cancel",
    "Complete",
    "DaemonStatus",
    "Delta",
    "Detach",
    "Detached",
    "DeviceStatus",
    "Error",
    "Fetch",
    "FetchToRead",
    "Finished",
    "Generate",
    "Happened",
    "Hello",
    "JournalEntry",
    "LayerStatus",
    "Message",
    "ModelStatus",
    "Moved",
    "Pin",
    "Ping",
    "Pinned",
    "Pong",
    "PoolInfo",
    "Pressure",
    "RecalledStatus",
    "Record",
    "Recorded",
    "Refused",
    "Released",
    "Resident",
    "RoutingLog",
    "Sampling",
    "SessionStatus",
    "SetBudget",
    "Shutdown",
    "StartTrace",
    "Status",
    "Stop",
    "StopTrace",
    "Stopping",
    "Subscribe",
    "Subscribed",
    "TokenLogprob",
    "ToolCall",
    "TopToken",
    "TraceStarted",
    "TraceStopped",
    "Unload",
    "Unloaded",
    "Warm",
    "Warming",
    "Welcome",
    "WorkerFailed",
    "WorkerReady",
    "decode",
    "encode",
    "expect",
]

FRAME_LIMIT = 64 << 20
"""Longest frame that anybody accepts, in bytes (a manifest of 100,000 separate tensors takes about 10 MB)."""


MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Error,
    Attach, Attached, Fetch, Resident, Ahead, Ack, AckRequest, Complete, Moved, Released, RoutingLog, Ping, Pong,
    Pressure, Record, Recorded, Detach, Detached,
    AskStatus, Status, SetBudget, BudgetSet, Unload, Unloaded, Warm, Warming, Pin, Pinned,
    Subscribe, Subscribed, Happened,
    StartTrace, TraceStarted, StopTrace, TraceStopped, Stop, Stopping,
    WorkerReady, WorkerFailed, Generate, Cancel, Delta, Finished, Refused, Shutdown,
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
    Hello | Welcome | Error
    | Attach | Attached | Fetch | Resident | Ahead | Ack | AckRequest | Complete | Moved | Released | RoutingLog
    | Ping | Pong
    | Pressure | Record | Recorded | Detach | Detached
    | AskStatus | Status | SetBudget | BudgetSet | Unload | Unloaded | Warm | Warming | Pin | Pinned
    | Subscribe | Subscribed | Happened
    | StartTrace | TraceStarted | StopTrace | TraceStopped | Stop | Stopping
    | WorkerReady | WorkerFailed | Generate | Cancel | Delta | Finished | Refused | Shutdown
)  # fmt: skip

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The frame of ``message``."""
    return _encoder.encode(message)


def decode(frame: bytes) -> Message:
    """The message in ``frame``.

    Raises:
        MessageInvalid: not msgpack, unknown type, missing field, wrong type, out of bounds, too deep, or too long.
    """
    if len(frame) > FRAME_LIMIT:
        raise MessageInvalid(f"a frame of {len(frame)} bytes is longer than the {FRAME_LIMIT} that are allowed")
    try:
        return _decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MessageInvalid(f"a message was not understood: {error}") from error


def expect(message: Message, kind: type[M]) -> M:
    """``message`` if it is of ``kind``; the error that it carries, or MessageInvalid, otherwise."""
    if isinstance(message, Error):
        raise message.exception()
    if not isinstance(message, kind):
        raise MessageInvalid(f"{kind.__name__} was expected and {type(message).__name__} came")
    return message
