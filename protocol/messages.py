"""Every message of the protocol, as typed classes, and the one codec for them.

On the wire a message is a msgpack map with its ``type`` beside its fields.  Decoding checks presence, types and bounds;
fields that are not known are ignored, so that a newer peer may add some.  When each message is sent, and by whom, is in
PROTOCOL.md.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from expertd.protocol.errors import ExpertdError, MessageInvalid, from_code
from expertd.protocol.manifest import Manifest

FRAME_LIMIT = 64 << 20
"""Longest frame that anybody accepts, in bytes (a manifest of 100,000 separate tensors takes about 10 MB)."""

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


# -- a session: worker <-> daemon --------------------------------------------------------------------------------------


class PoolInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One pool as a worker needs to know it.  Its segment's descriptor comes over the lifeline under ``segment``."""

    segment: Count
    generation: Count
    layers: list[Count]
    slots: Count
    complete: bool
    nonce: Token


class BaseInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Base weights in shared memory, for good.  The segment's descriptor comes over the lifeline under ``segment``."""

    segment: Count
    size: Count
    nonce: Token


class Attach(Message):
    """Open a session for a model.  ``token`` is the one that the lifeline was opened with.

    ``held``: pools of an earlier daemon whose descriptors were sent over the lifeline, under ``segment``;
    ``held_base``: likewise its base weights, which the session goes on with.
    """

    token: Token
    pid: Count
    mode: AliasMode
    manifest: Manifest
    held: Annotated[list[PoolInfo], Meta(max_length=1024)] = []
    held_base: BaseInfo | None = None


class Attached(Message):
    """A session is open.  ``version`` is the table's at this moment, and counts as acked.

    ``base`` has the tensors of ``Manifest.base``; None: the worker reads them itself.
    """

    session: Count
    model: Name
    version: Count
    pools: list[PoolInfo]
    announce: Announce = -1
    base: BaseInfo | None = None


class Fetch(Message):
    """Ask for all blocks of one event or group, hits too.  Waiting for the answer counts as an ack of everything.

    ``segment`` is the generation that the worker looks this layer up in.  ``then`` is what the next Fetches of the same
    event will ask for, in this order.  ``leases_only`` promises that until the next Fetch the session looks nothing up,
    and reads nothing but the slots of the answer.
    """

    session: Count
    sequence: Count
    segment: Count
    layer: Count
    experts: Experts
    routing: Routing = b""
    then: Annotated[list[Expert], Meta(max_length=65536)] = []
    leases_only: bool = False
    decode_tokens: Count = 0
    prompt_tokens: Count = 0


class Resident(Message):
    """The blocks of a Fetch are resident and leased: ``slots`` in the order of its ``experts``."""

    session: Count
    sequence: Count
    version: Count
    slots: list[Count]
    announce: Announce = -1


class Ahead(Message):
    """The session expects that its next event in ``layer`` needs ``experts``, the likeliest first.  No answer.

    ``distance``: it is so many MoE layers after the event that runs now.  ``prompt``: it will be of many tokens.
    """

    session: Count
    segment: Count
    layer: Count
    experts: Experts
    distance: Annotated[int, Meta(ge=1, lt=3)]
    prompt: bool
    routing: Routing = b""


class Ack(Message):
    """The session uses nothing any more that it looked up before it was told ``version``.

    ``sequence`` is that of its last Fetch: an ack that was overtaken by a newer Fetch frees none of its leases.
    """

    session: Count
    version: Count
    sequence: Count
    routing: Routing = b""
    decode_tokens: Count = 0
    prompt_tokens: Count = 0


class AckRequest(Message):
    """The daemon wants an ack of ``version``."""

    session: Count
    version: Count


class Complete(Message):
    """Every block of the pool in ``segment`` is resident, and none will be evicted from this generation."""

    session: Count
    segment: Count


class Moved(Message):
    """The layers of ``pool`` have a new generation, whose descriptor came over the lifeline."""

    session: Count
    pool: PoolInfo


class Released(Message):
    """The session has unmapped ``segment`` and never looks there again."""

    session: Count
    segment: Count


class Ping(Message):
    """Asks whether the other end of a session is alive; answered at once with Pong."""

    session: Count


class Pong(Message):
    """Answer to Ping."""

    session: Count


class Pressure(Message):
    """How short of memory the machine is: ``level`` has changed, or is what a new session finds.

    From the daemon to its sessions; a gateway's worker passes it on.  ``figure``: the number that decided it, in words.
    """

    level: Literal["normal", "warning", "critical"]
    figure: Text


class Record(Message):
    """The daemon wants the session's routing to be recorded in the file ``path``; empty: no more."""

    session: Count
    path: Name


class Recorded(Message):
    """A recording has ended, with so many tokens in ``path``; ``error`` says why it failed, or could not begin."""

    session: Count
    path: Name
    tokens: Count
    error: Text = ""


class RoutingLog(Message):
    """What the routers chose since the last report (PROTOCOL.md, "Routing log"), and how many tokens were computed."""

    session: Count
    routing: Routing
    decode_tokens: Count = 0
    prompt_tokens: Count = 0


class Detach(Message):
    """Close the session."""

    session: Count


class Detached(Message):
    """Answer to Detach."""

    session: Count


# -- asking and steering: clients <-> daemon ---------------------------------------------------------------------------


class AskStatus(Message):
    """Ask for the daemon's state."""


class SessionStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One session, as ``expertd status --json`` prints it.

    What has a default may be left out, as by daemons of this version of the protocol that do not measure it.  Tokens
    are those that the session has reported: it does so with its Fetches, and now and then.  ``shares_base``: it
    computes with the base weights in shared memory, and not with its own.
    """

    id: int
    pid: int
    mode: str
    waiting: bool
    fetches: int
    left_behind: bool
    held_bytes: int
    waited_s: float = 0.0
    read_wait_s: float = 0.0
    decode_tokens: int = 0
    prompt_tokens: int = 0
    shares_base: bool = False


class LayerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer, as ``expertd status --json`` prints it.

    Layers that share a pool share its slots: ``pool_slots`` is what all of them have together, ``resident_blocks`` what
    this one has of them now.
    """

    pool: int
    pool_slots: int
    resident_blocks: int
    hits: int
    misses: int
    bytes_read: int
    evictions: int


class AheadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one kind of announcements, as ``expertd status --json`` prints it.

    Blocks count that were absent when they were announced.  ``useful`` is the part of them that the announced event
    used, lately; ``shuffled`` the same for as many blocks of the same layer that a predictor without knowledge named.
    Bytes are those read because of announcements: used by their event, or not.  ``waits``: how long sessions waited
    with reading ahead for single tokens over how long without, when that was compared last; 0 if it was not.

    The kind ``topic`` is nobody's announcement, but what sessions were likely to use when they had turned to another
    topic, as they did ``turns`` times.  It is judged by the few tokens that follow.
    """

    kind: Literal["prompt", "next layer", "second next layer", "topic"]
    reading: bool
    announced: int
    useful: float
    shuffled: float
    useful_bytes: int
    wasted_bytes: int
    waits: float = 0.0
    turns: int = 0


class RecalledStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What an earlier daemon has left of a model, as ``expertd status --json`` prints it.

    ``recorded_at`` is in seconds since 1970, 0 if it is what a profile names; ``blocks`` were worth keeping, ``back``
    of them have come since, ``adopted`` of these without a read, because a session still had them.
    """

    recorded_at: float
    blocks: int
    back: int
    adopted: int = 0


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model, as ``expertd status --json`` prints it.  Hits and misses count blocks, once an event.

    ``layers`` and all that follows ``sessions`` may be left out, as by daemons of this version of the protocol that do
    not know them.  ``packed`` is the store that blocks are read from, empty if there is none; ``warming``: blocks that
    are still to be brought in for somebody who asked for that; ``pinned``: blocks that somebody wants to stay;
    ``waited_s`` and ``read_wait_s`` are the sums of its sessions', those that have ended included;
    ``recalled``: what came of what an earlier daemon held, None if it left nothing.
    ``base_bytes``: base weights in shared memory; ``base_read``: bytes read for them; ``base_problem``: why they are
    not shared, "" if they are, or nobody wanted that.
    """

    id: str
    path: str
    family: str
    moe_layers: int
    experts: int
    top_k: int
    block_bytes: int
    blocks: int
    slots: int
    resident_blocks: int
    hits: int
    misses: int
    bytes_read: int
    evictions: int
    pool_bytes: int
    sessions: list[SessionStatus]
    layers: list[LayerStatus] = []
    moves: int = 0
    blocks_copied: int = 0
    packed: str = ""
    ahead: list[AheadStatus] = []
    warming: int = 0
    pinned: int = 0
    waited_s: float = 0.0
    read_wait_s: float = 0.0
    recalled: RecalledStatus | None = None
    base_bytes: int = 0
    base_read: int = 0
    base_problem: str = ""


class DaemonStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon itself."""

    pid: int
    version: str
    uptime_s: float
    rss_bytes: int


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One device that blocks were read from: its reads, and how many were under way when one began."""

    name: str
    reads: int
    bytes: int
    p50_us: int
    p95_us: int
    p99_us: int
    depth_mean: float
    depth_max: int


class FetchToRead(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds from a Fetch's coming to its first read; 0: no Fetch has led to a read at once."""

    p50: int
    p99: int


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A change of what the pools may use: ``at`` is in seconds since 1970."""

    at: float
    pressure: str
    why: str
    before_bytes: int
    after_bytes: int


class Status(Message):
    """Answer to AskStatus: the object that ``expertd status --json`` prints.

    ``limit_bytes``: what pressure leaves of the budget now; ``simulated_ssd``: the SSD that reads are slowed down to,
    "" if they are not.  It may be left out, and ``devices`` and ``fetch_to_read_us``, as by daemons of this version of
    the protocol that do not know them.
    """

    protocol: int
    home: str
    daemon: DaemonStatus
    budget_bytes: int
    used_bytes: int
    pressure: str
    tracing: str
    frames_dropped: int
    models: list[ModelStatus]
    limit_bytes: int
    pressure_figure: str
    journal: list[JournalEntry]
    simulated_ssd: str = ""
    devices: list[DeviceStatus] = []
    fetch_to_read_us: FetchToRead | None = None


class SetBudget(Message):
    """Change the budget of a running daemon; pools shrink or grow to it.  None: what the machine can spare."""

    budget: Annotated[int, Meta(ge=1)] | None


class BudgetSet(Message):
    """Answer to SetBudget: the budget before and now, in bytes."""

    before: Count
    budget: Count


class Unload(Message):
    """Give back the memory of a model that nobody uses: its key, its hub id, or the path or the name of its folder."""

    model: Name


class Unloaded(Message):
    """Answer to Unload: so many bytes are given back."""

    path: Name
    bytes: Count


class Warm(Message):
    """Bring blocks of a loaded model in while there is room, the first first; none: all, the most used first.

    ``model`` as in Unload; ``blocks`` are packed as a routing log (``protocol.routing``).  Nothing is evicted for it,
    and whoever waits for a read goes first.
    """

    model: Name
    blocks: Routing = b""


class Warming(Message):
    """Answer to Warm: so many blocks are to be brought in (``ModelStatus.warming`` counts down)."""

    path: Name
    blocks: Count


class Pin(Message):
    """Have blocks of a loaded model stay, and bring them in; or with ``pinned`` false no longer (none: all of them)."""

    model: Name
    blocks: Routing = b""
    pinned: bool = True


class Pinned(Message):
    """Answer to Pin: so many blocks of the model are pinned now."""

    path: Name
    blocks: Count


class Subscribe(Message):
    """Be told what happens, for half a minute; to be renewed in time."""


class Subscribed(Message):
    """Answer to Subscribe, each time."""


class Happened(Message):
    """Something happened that the daemon's log tells too.

    ``at`` is in seconds since 1970; ``facts`` are texts, numbers or truth values.
    """

    at: float
    level: Name
    event: Text
    facts: dict[str, Any]


class StartTrace(Message):
    """Have every session's routing recorded, each in a file of its own in ``folder``, until StopTrace."""

    folder: Name


class TraceStarted(Message):
    """Answer to StartTrace: how many sessions there are now; those that come later are recorded too."""

    sessions: Count


class StopTrace(Message):
    """Have recording ended; the answer comes when all sessions have written their files, or do not answer."""


class TraceStopped(Message):
    """Answer to StopTrace: the recordings that have ended, and the paths of those that have not answered."""

    ended: list[Recorded]
    unfinished: list[Name]


class Stop(Message):
    """Ask the daemon to end; with ``if_idle`` only if no session is open or being opened."""

    if_idle: bool = False


class Stopping(Message):
    """Answer to Stop, sent before it ends."""


# -- generation: gateway <-> worker ------------------------------------------------------------------------------------


class WorkerReady(Message):
    """A worker has loaded its model and takes requests.

    ``context`` is the longest prompt and answer, in tokens; ``at_once``: answers that it computes at a time.
    """

    pid: Count
    model: Name
    context: Count
    at_once: Count


class WorkerFailed(Message):
    """A worker cannot load its model, and ends."""

    pid: Count
    code: Name
    message: Text


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of an answer are chosen.  The defaults: the likeliest token, whatever came before.

    ``seed`` None: another answer each time, where ``temperature`` is above 0.  ``logit_bias``: added to the logits of
    these tokens.  Presence and frequency penalties look at the answer, the repetition penalty at the prompt too.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0)] | None = None
    logit_bias: dict[Count, float] = {}
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0


class Generate(Message):
    """Start generating.

    Exactly one of the three is given: ``messages``, chat messages as the tokenizer's template takes them (with
    ``tools``, and ``template`` and ``hints`` for its further variables: an unknown one of ``template`` is an error, of
    ``hints`` it is left out); ``text``, a prompt as it is; ``tokens``, one in tokens.
    ``tool_choice`` required: one of the tools has to be called; without ``parallel_calls`` a call ends the answer.
    ``goes_on``: the answer is the rest of the last message, which the assistant has begun.

    ``max_tokens`` None: as many as fit into the context behind the prompt.  ``schema``: a JSON schema, itself JSON,
    that the answer has to fit; None: no such.  ``top_logprobs``: so many of the likeliest tokens are told with each
    token of the answer, and its own log-probability; None: neither.  ``count``: nothing is generated, and Finished
    tells how long the prompt is.
    """

    request: Count
    messages: list[dict[str, Any]] | None = None
    text: Text | None = None
    tokens: list[Count] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "required"] = "auto"
    parallel_calls: bool = True
    template: dict[str, Any] = {}
    hints: dict[str, Any] = {}
    goes_on: bool = False
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    stop: list[Name] = []
    sampling: Sampling = Sampling()
    schema: Text | None = None
    count: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, lt=21)] | None = None


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool; ``arguments`` are JSON."""

    id: Name
    name: Text
    arguments: Text


class TopToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token that might have been: its bytes and log-probability."""

    token: Routing
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """A token of an answer: its bytes, its log-probability, and the likeliest that might have stood there."""

    token: Routing
    logprob: float
    top: list[TopToken] = []


class Cancel(Message):
    """Stop generating; no further message about the request follows."""

    request: Count


class Delta(Message):
    """More of an answer (no text while a character is incomplete); ``tokens`` counts those since the last.

    ``reasoning``: what comes before the answer itself, without its markers; ``calls``: tools that it calls.
    ``prompt_tokens`` and ``cached_tokens`` are told once, in the first of an answer, and are 0 in all others.
    """

    request: Count
    text: Text
    tokens: Count
    reasoning: Text = ""
    calls: list[ToolCall] = []
    logprobs: list[TokenLogprob] = []
    prompt_tokens: Count = 0
    cached_tokens: Count = 0


class Finished(Message):
    """An answer is complete: ``reason`` is OpenAI's.

    ``cached_tokens`` of the prompt were not computed, because an earlier request had; ``stop``: the stop string that
    ended the answer, if one did.
    """

    request: Count
    reason: Literal["stop", "length", "tool_calls"]
    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0
    stop: Name | None = None


class Refused(Message):
    """A request cannot be served or failed on the way."""

    request: Count
    code: Name
    message: Text
    param: Name | None = None


class Shutdown(Message):
    """The gateway ends its worker."""


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
