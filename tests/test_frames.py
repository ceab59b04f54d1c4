"""Frames that no peer should send, by the thousand and in chosen forms: nothing crashes, sticks or grows."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq

from benchmarks._junk import HARMFUL, Junk, harmless
from benchmarks.frames import WARM_UP, flood
from expertd.protocol import PROTOCOL, messages
from expertd.protocol.connection import Connection
from expertd.protocol.lifeline import GREETING
from expertd.protocol.paths import Home
from tests.conftest import DEADLINE_S, StartDaemon
from tools.stage import ask_status

FRAMES = 20_000
FETCH = {"type": "fetch", "session": 1, "sequence": 1, "segment": 1, "layer": 0, "experts": [0]}
ZMTP = b"\xff\0\0\0\0\0\0\0\1\x7f"
"""How a ZeroMQ connection begins."""


def test_a_flood_of_bad_frames_changes_nothing() -> None:
    figures = flood(FRAMES)
    assert figures["frames"] == FRAMES
    assert figures["crashes"] == 0
    assert figures["wrong_during"] == 0
    assert figures["right_during"] > 0
    assert figures["right_after"]
    # A valid message in the wrong place may be answered with another error, so not all count as no message at all.
    assert figures["dropped_by_daemon"] > 0.8 * 0.8 * FRAMES
    assert figures["dropped_by_gateway"] > 0.9 * (0.2 * FRAMES + WARM_UP)
    assert figures["rss_growth_second_half_mb"] < 8


def test_junk_is_of_every_type_and_repeats_itself() -> None:
    junk, again = Junk(7), Junk(7)
    frames = list(junk.frames(3000))
    assert frames == list(again.frames(3000))
    named = {kind for kind in messages.MESSAGES if any(kind.__name__.lower().encode() in frame for frame in frames)}
    assert named == set(messages.MESSAGES)
    assert not any(isinstance(message, HARMFUL) for message in map(_decoded, frames) if message is not None)


def test_a_message_that_may_be_obeyed_is_no_junk() -> None:
    assert not harmless(messages.encode(messages.Stop()))
    assert harmless(messages.encode(messages.AskStatus()))
    assert harmless(b"\xc1")


@pytest.fixture
def stranger(home: Home, start_daemon: StartDaemon) -> Iterator[zmq.Socket[bytes]]:
    """A socket that is connected to a running daemon and has not said who it is."""
    start_daemon()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.connect(f"ipc://{home.daemon_socket}")
        yield dealer


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x80",
        b"\xc1",
        b"\x81\xa4type\xc0",
        b"\x81\xa4type\xa5attach",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x82\xa4type\xa5hello\xa8protocol" + b"\xcf" + b"\xff" * 8,
        msgspec.msgpack.encode(FETCH | {"session": -1}),
        msgspec.msgpack.encode(FETCH | {"experts": []}),
        msgspec.msgpack.encode(FETCH | {"experts": [65536]}),
        msgspec.msgpack.encode({"type": "setbudget", "budget": 0}),
        msgspec.msgpack.encode({"type": "welcome", "protocol": 1, "package": "x", "pid": 1}),
        msgspec.msgpack.encode({"type": "shutdown"}),
    ],
    ids=lambda frame: f"{len(frame)} bytes {frame[:24].hex()}",
)  # fmt: skip
def test_what_is_no_message_is_answered_and_counted(home: Home, stranger: zmq.Socket[bytes], frame: bytes) -> None:
    stranger.send(frame)
    assert stranger.poll(DEADLINE_S * 1000)
    answer = messages.decode(stranger.recv())
    assert isinstance(answer, messages.Error)
    assert answer.code == "message_invalid"
    assert ask_status(home).frames_dropped == 1


def test_several_frames_are_no_message(home: Home, stranger: zmq.Socket[bytes]) -> None:
    stranger.send_multipart([messages.encode(messages.AskStatus()), b""])
    answer = messages.decode(stranger.recv())
    assert isinstance(answer, messages.Error)
    assert ask_status(home).frames_dropped == 1


@pytest.mark.parametrize("path", ["daemon_socket", "lifeline_socket"])
@pytest.mark.parametrize(
    "said", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", ZMTP, ZMTP + b"\3\0NULL" + b"\0" * 48, b"\xff" * 4096]
)
def test_bytes_that_are_not_the_protocol_disturb_nobody(
    home: Home, start_daemon: StartDaemon, path: str, said: bytes
) -> None:
    daemon = start_daemon()
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(getattr(home, path)))
            connection.sendall(said)
    assert ask_status(home).daemon.pid == daemon.pid


def test_connections_that_say_nothing_leave_no_descriptors(home: Home, start_daemon: StartDaemon) -> None:
    daemon = psutil.Process(start_daemon().pid)
    ask_status(home)
    before = daemon.num_fds()
    open_ones = []
    for path in (home.daemon_socket, home.lifeline_socket):
        for _ in range(50):
            open_ones.append(socket.socket(socket.AF_UNIX))
            open_ones[-1].connect(str(path))
    for connection in open_ones:
        connection.close()
    deadline = time.monotonic() + DEADLINE_S
    while daemon.num_fds() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert daemon.num_fds() <= before


def test_lifelines_without_attach_open_no_session(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon()
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(DEADLINE_S)
        line.connect(str(home.lifeline_socket))
        line.sendall(GREETING.pack(PROTOCOL, secrets.token_bytes(16)) + os.urandom(1000))
        assert line.recv(1) == b"\x01"
        assert ask_status(home).models == []


def test_a_dead_flooder_is_forgotten(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon()
    command = [sys.executable, "-m", "benchmarks._flood", str(home.daemon_socket), "1000000", "1"]
    flooder = subprocess.Popen(command, cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + DEADLINE_S
    while ask_status(home).frames_dropped < 500:
        assert time.monotonic() < deadline
    flooder.kill()
    flooder.wait()
    with Connection(home.daemon_socket, "test") as connection:
        connection.ask(messages.AskStatus(), messages.Status)


def _decoded(frame: bytes) -> messages.Message | None:
    try:
        return messages.decode(frame)
    except messages.MessageInvalid:
        return None
