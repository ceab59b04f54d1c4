"""Clients of ``benchmarks serving``: one request each, on a connection of its own, read as it comes."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

APIS = ("chat/completions", "completions", "responses", "messages")
ENDS = {
    "chat/completions": (b"data: [DONE]",),
    "completions": (b"data: [DONE]",),
    "responses": (b'"type":"response.completed"', b'"type":"response.incomplete"'),
    "messages": (b'"type":"message_stop"',),
}
ERRORS = (b'data: {"error"', b"event: error")
STAMP = re.compile(rb"\b(\d{12,20}) ")
LONGEST_S = 300.0
"""So long a client waits for all of its answer: longer than 64 of them take on two busy processors."""
PROGRAMS = 4
"""The gateway is fair between programs, which it tells by their User-Agent."""
SLOW_S = 0.05
"""How long a slow reader waits before it reads on."""
TEXTS = ("What is the module socket for?", "Explain os.path.join.", "Go on: The ship went down in the night.",
         "Write the function clamp: Limit a value to a range.")  # fmt: skip


@dataclass
class Outcomes:
    """What came of all requests.

    Attributes:
        lags_ns: of each streamed token, from the worker's send to this process's receive.
        hang_ups: seeds of those who hung up, and when (monotonic nanoseconds).
        errors: what went wrong, in words.
    """

    requests: int = 0
    refused: int = 0
    streams: int = 0
    lags_ns: list[int] = field(default_factory=list)
    hang_ups: dict[int, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Behaviour:
    """How one client behaves."""

    api: str
    stream: bool
    tokens: int
    slow: bool = False
    hangs_up: bool = False
    endless: bool = False  # the tokens that end an answer of the demo model are never chosen


def behaviours(chance: random.Random) -> Behaviour:
    """One of all that there are: two thirds stream, one in eight hangs up, one in eight reads slowly."""
    stream = chance.random() < 2 / 3
    hangs_up = chance.random() < 1 / 8
    slow = stream and not hangs_up and chance.random() < 1 / 8
    return Behaviour(chance.choice(APIS), stream, chance.randrange(8, 48), slow, hangs_up)


async def ask(port: int, model: str, client: Behaviour, seed: int, out: Outcomes) -> None:
    """One request, from its connection to its end."""
    text = TEXTS[seed % len(TEXTS)]
    body: dict[str, Any] = {"model": model, "stream": client.stream, "temperature": 0}
    body["max_output_tokens" if client.api == "responses" else "max_tokens"] = client.tokens
    if client.api != "messages":  # Anthropic's has no seed, so its cancels are not measured
        body["seed"] = seed
    if client.endless:
        body["logit_bias"] = {"0": -100, "2": -100}
    prompt: Any = [{"role": "user", "content": f"{text} ({seed})"}]
    name = {"completions": "prompt", "responses": "input"}.get(client.api, "messages")
    body[name] = prompt[0]["content"] if client.api == "completions" else prompt
    data = json.dumps(body).encode()
    head = f"POST /v1/{client.api} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    head += f"User-Agent: program-{seed % PROGRAMS}\r\n"
    out.requests += 1
    out.streams += client.stream
    try:
        async with asyncio.timeout(LONGEST_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + b"\r\n" + data)
                await _read(reader, client, seed, out)
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        out.errors.append(f"{client}: {error!r}")


async def _read(reader: asyncio.StreamReader, client: Behaviour, seed: int, out: Outcomes) -> None:
    if client.hangs_up and not client.stream:
        await asyncio.sleep(0.2)  # it may wait, or be computed
        out.hang_ups[seed] = time.monotonic_ns()
        return
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    if status in (429, 503):
        out.refused += 1
        wait = re.search(rb"(?i)\r\nretry-after: (\d+)", head)
        if wait is None:
            out.errors.append(f"{client}: a {status} without Retry-After")
        await asyncio.sleep(float(wait[1]) if wait else 1.0)  # as all clients do that are worth the name
        return
    said = b""
    seen: set[int] = set()
    while piece := await reader.read(1 << 16):
        now = time.monotonic_ns()
        if client.stream and not client.slow:
            new = {int(found[1]) for found in STAMP.finditer(piece)} - seen  # a response tells all its text once more
            out.lags_ns += [now - sent for sent in new]
            seen |= new
        said += piece
        if client.hangs_up and len(STAMP.findall(said)) >= 3:
            out.hang_ups[seed] = time.monotonic_ns()
            return
        if client.slow:
            await asyncio.sleep(SLOW_S)
    if problem := judge(client, status, said):
        out.errors.append(f"{client}: {problem}")


def judge(client: Behaviour, status: int, said: bytes) -> str | None:
    """What is wrong with a whole answer, if anything is."""
    if status != 200:
        return f"status {status}: {said[:200]!r}"
    if any(error in said for error in ERRORS):
        return f"an error: {said[-200:]!r}"
    if client.stream and not any(end in said for end in ENDS[client.api]):
        return f"the stream ended without its end: {said[-200:]!r}"
    return None


def median_us(lags_ns: Sequence[int]) -> float:
    """The median in microseconds."""
    return round(sorted(lags_ns)[len(lags_ns) // 2] / 1000, 1) if lags_ns else 0.0
