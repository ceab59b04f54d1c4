"""Clients that hang up: whatever state their requests are in, and whatever API they came by, the worker stops.

The worker's log tells how far each request was.  The gateway is a real process: aiohttp's own test server cancels
handlers where a real one may not.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway_stage import (
    DEADLINE_S,
    ENDLESS,
    HELLO,
    Served,
    eventually,
    idle,
    serving_alone,
)
from tools.tool_model import write_tool_model

APIS = ("chat/completions", "completions", "responses", "messages")
BEGUN = 10_000
"""Bytes of a stream that are some fifty tokens: far more than a worker computes before it begins what has come."""
CANCELLED = re.compile(r"request (\d+) was cancelled (while it waited|in its prompt|after (\d+) tokens)")


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving_alone(write_tool_model, "--log-level", "debug") as served:
        yield served


def send(served: Served, api: str, text: str, stream: bool) -> socket.socket:
    """A connection on which an endless answer was asked for and nothing was read."""
    body: dict[str, Any] = {"model": served.model, "stream": stream, "temperature": 0}
    body |= {"max_output_tokens" if api == "responses" else "max_tokens": ENDLESS}
    # No answer ends before it is cancelled: the tokens that would end it are never chosen.
    body |= {} if api in ("responses", "messages") else {"logit_bias": {"0": -100, "2": -100}}
    messages = [{"role": "user", "content": text}] if text else HELLO
    body["prompt" if api == "completions" else "input" if api == "responses" else "messages"] = (
        text or "Hello there." if api == "completions" else messages
    )
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S)
    head = f"POST /v1/{api} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


class WorkerLog:
    """What the worker writes from now on."""

    def __init__(self, served: Served) -> None:
        self._path = served.home.worker_log(served.worker.pid)
        self._begin = len(self._path.read_text())

    @property
    def came(self) -> int:
        """How many requests have come."""
        return self._path.read_text()[self._begin :].count("a request came")

    @property
    def cancelled(self) -> list[str]:
        """Where each request was that was cancelled."""
        return [found[2] for found in CANCELLED.finditer(self._path.read_text()[self._begin :])]


def long(number: int) -> str:
    """A prompt that takes a while, and that no other begins like."""
    return f"{number} " + "a b c d " * 300


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_in_the_queue_and_in_the_prompt(served: Served, stream: bool) -> None:
    log = WorkerLog(served)
    first = [send(served, api, long(number + 10 * stream), stream) for number, api in enumerate(APIS)]
    assert eventually(lambda: log.came == 4)
    waiting = [send(served, api, "", stream) for api in APIS]
    assert eventually(lambda: log.came == 8), "four prompts are computed at a time, so these wait"
    for connection in waiting:
        connection.close()
    assert eventually(lambda: log.cancelled == ["while it waited"] * 4), log.cancelled
    for connection in first:
        connection.close()
    assert eventually(lambda: log.cancelled[4:] == ["in its prompt"] * 4), log.cancelled
    assert eventually(lambda: idle(served.worker))


def test_in_the_answer(served: Served) -> None:
    log = WorkerLog(served)
    # The chats and completions go on for ever; whether the others do is the model's business, so they are not counted.
    whole = [send(served, api, "", False) for api in APIS[:2]]
    streams = [send(served, api, "", True) for api in APIS[:2]]
    assert eventually(lambda: log.came == 4)
    for connection in streams:
        assert connection.makefile("rb").read(BEGUN), "the answers that are not streamed have begun, too"
    for connection in (*whole, *streams):
        connection.close()
    assert eventually(lambda: len(log.cancelled) == 4), log.cancelled
    tokens = [int(words.split()[1]) for words in log.cancelled]
    assert all(0 <= number < ENDLESS for number in tokens)
    assert eventually(lambda: idle(served.worker)), "nothing is computed for nobody"


@pytest.mark.parametrize("api", ["responses", "messages"])
def test_in_the_answer_of_the_other_apis(served: Served, api: str) -> None:
    log = WorkerLog(served)
    whole, stream = send(served, api, "", False), send(served, api, "", True)
    assert stream.recv(1)
    whole.close()
    stream.close()
    assert eventually(lambda: idle(served.worker))
    assert len(log.cancelled) <= 2
    assert log.came == 2
