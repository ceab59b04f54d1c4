"""What ``benchmarks serving`` calls an error, and how it measures; the run itself takes minutes."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks._clients import APIS, Behaviour, Outcomes, ask, behaviours, judge, median_us
from benchmarks.serving import _cancels_ms


@pytest.mark.parametrize(
    ("api", "end"),
    [
        ("chat/completions", b"data: [DONE]\n\n"),
        ("completions", b"data: [DONE]\n\n"),
        ("responses", b'data: {"type":"response.incomplete","sequence_number":9}\n\n'),
        ("messages", b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    ],
)
def test_a_stream_has_to_end_as_its_api_says(api: str, end: bytes) -> None:
    client = Behaviour(api, True, 8)
    assert judge(client, 200, b"data: {}\n\n" + end) is None
    assert "ended without its end" in (judge(client, 200, b"data: {}\n\n") or "")
    assert "an error" in (judge(client, 200, b'data: {"error":{}}\n\n' + end) or "")
    assert "status 500" in (judge(client, 500, end) or "")


def test_clients_are_of_all_kinds() -> None:
    chance = random.Random(0)
    found = [behaviours(chance) for _ in range(4000)]
    assert set(Counter(client.api for client in found)) == set(APIS)
    for share, expected in (
        (sum(client.stream for client in found), 4000 * 2 / 3),
        (sum(client.hangs_up for client in found), 4000 / 8),
        (sum(client.slow for client in found), 4000 * 2 / 3 * 7 / 64),
    ):
        assert 0.8 < share / expected < 1.2
    assert not any(client.slow and not client.stream for client in found)


def test_each_token_is_timed_once_however_often_it_is_told() -> None:
    """A response's last events tell all its text again."""

    async def measure() -> Outcomes:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            sent = f"{time.monotonic_ns()} ".encode()
            told = b'data: {"delta":"%s"}\n\ndata: {"text":"%s"}\n\n' % (sent, sent)
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + told + b'data: {"type":"response.completed"}\n\n')
            await writer.drain()
            writer.close()

        out = Outcomes()
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            await ask(server.sockets[0].getsockname()[1], "m", Behaviour("responses", True, 8), 1, out)
        return out

    out = asyncio.run(measure())
    assert (out.requests, out.streams, out.errors, len(out.lags_ns)) == (1, 1, [], 1)
    assert out.lags_ns[0] > 0


def test_nobody_there_is_an_error() -> None:
    out = Outcomes()
    asyncio.run(ask(1, "m", Behaviour("messages", False, 8), 1, out))
    assert (out.requests, len(out.errors)) == (1, 1)


def test_a_cancel_is_from_the_hang_up_to_the_worker(tmp_path: Path) -> None:
    out = Outcomes(hang_ups={1: 1_000_000, 2: 5_000_000})
    (tmp_path / "cancels").write_text("1 4000000\nNone 4000000\n")
    assert _cancels_ms(out, tmp_path / "cancels") == [3.0], "the second had ended when its client hung up"
    assert _cancels_ms(out, tmp_path / "none") == []
    assert median_us([3000, 1000, 2000]) == 2.0
