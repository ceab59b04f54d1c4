"""A real daemon in a process of its own: how it starts and ends, and what strangers can do to it.

Sessions that fetch, evict and die are the business of the tests of the core and of the worker.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from expertd.daemon.attaching import SESSION_LIMIT
from expertd.protocol import PROTOCOL, lifeline
from expertd.protocol.checkpoint import FileMark, read_header
from expertd.protocol.connection import Connection, control_identity
from expertd.protocol.errors import DaemonAlreadyRunning, DaemonLost, DaemonNotRunning, HomeTooLong, SizeInvalid
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.messages import (
    MESSAGES,
    Ack,
    AskStatus,
    Attach,
    Attached,
    Complete,
    Detach,
    Detached,
    Error,
    Fetch,
    Hello,
    Message,
    Ping,
    Pong,
    Released,
    Resident,
    RoutingLog,
    Status,
    Stop,
    Stopping,
    Welcome,
    decode,
    encode,
    expect,
)
from expertd.protocol.paths import Home
from tests.conftest import DEADLINE_S, StartDaemon
from tools.stage import end, launch_daemon

EXPERTS = 4


class Raw:
    """A DEALER that sends whatever it is given; named as the control socket of the session with its ``token``."""

    def __init__(self, home: Home) -> None:
        self.token = secrets.token_bytes(16)
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, control_identity(self.token))
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"ipc://{home.daemon_socket}")

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def receive(self) -> Message:
        assert self.socket.poll(DEADLINE_S * 1000), "no answer came"
        return decode(self.socket.recv())

    def ask(self, *frames: bytes) -> Message:
        self.send(*frames)
        return self.receive()

    def attach(self, manifest: Manifest) -> Message:
        return self.ask(encode(Attach(token=self.token, pid=1, mode="shm", manifest=manifest)))


@pytest.fixture(scope="module")
def shared() -> Iterator[Home]:
    """The home of one daemon that all tests of strangers use: it has to survive them all."""
    home = Home(Path(tempfile.mkdtemp(prefix="xd-", dir="/tmp")))
    home.prepare()
    process = launch_daemon(home, "64MiB")
    yield home
    survived = process.poll() is None
    said = home.daemon_log.read_text(encoding="utf-8", errors="replace")
    end(process)
    shutil.rmtree(home.root)
    assert survived, said


@pytest.fixture
def raw(shared: Home) -> Iterator[Raw]:
    """A connection to the shared daemon."""
    opened = Raw(shared)
    yield opened
    opened.socket.close()


def _status(home: Home) -> Status:
    with Connection(home.daemon_socket, "test") as connection:
        return connection.ask(AskStatus(), Status)


def _sessions(home: Home) -> list[int]:
    return [session.id for model in _status(home).models for session in model.sessions]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run a daemon that is expected to end by itself."""
    command = [sys.executable, "-m", "expertd.daemon", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, cwd="/", check=False)


def _eventually(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S:.0f} s"
        time.sleep(0.02)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """A checkpoint of one layer of four experts of one part of 8 bytes."""
    folder = tmp_path
    entry = {"dtype": "F32", "shape": [EXPERTS, 2], "data_offsets": [0, EXPERTS * 8]}
    header = json.dumps({"w": entry}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(range(EXPERTS * 8)))
    return _of(folder, read_header(path).mark)


def _of(folder: Path, mark: FileMark) -> Manifest:
    part = Part("w", "F32", (2,), ("w",), (0,))
    return Manifest(str(folder), "test", (mark,), (Layer("mlp", EXPERTS, 2, (part,)),))


# -- starting and ending -----------------------------------------------------------------------------------------------


def test_a_daemon_answers_status(home: Home, start_daemon: StartDaemon) -> None:
    process = start_daemon("3MiB")
    status = _status(home)
    assert (status.protocol, status.daemon.pid, status.home) == (PROTOCOL, process.pid, str(home.root))
    assert (status.budget_bytes, status.used_bytes, status.frames_dropped, status.models) == (3 << 20, 0, 0, [])


def test_its_sockets_are_private(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon()
    assert home.run.stat().st_mode & 0o077 == 0
    assert home.lifeline_socket.stat().st_mode & 0o077 == 0


def test_a_second_daemon_in_the_same_home_ends_with_one_sentence(home: Home, start_daemon: StartDaemon) -> None:
    process = start_daemon()
    ended = _run()
    assert ended.returncode == DaemonAlreadyRunning.exit_status
    assert ended.stderr == (
        f"expertd: a daemon (process {process.pid}) already runs in {home.root}; "
        "stop it with: expertd daemon stop [daemon_already_running]\n"
    )
    assert _status(home).daemon.pid == process.pid


def test_stop_ends_it_and_its_sockets_are_gone(home: Home, start_daemon: StartDaemon) -> None:
    process = start_daemon()
    with Connection(home.daemon_socket, "test") as connection:
        connection.ask(Stop(), Stopping)
    assert process.wait(DEADLINE_S) == 0
    assert not home.daemon_socket.exists()
    assert not home.lifeline_socket.exists()


def test_a_daemon_with_a_session_does_not_stop_if_idle(shared: Home, raw: Raw, manifest: Manifest) -> None:
    line, _ = _attach(shared, manifest)
    with line:
        answer = raw.ask(encode(Stop(if_idle=True)))
    assert isinstance(answer, Error)
    assert answer.code == "daemon_busy"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(home: Home, start_daemon: StartDaemon, number: signal.Signals) -> None:
    process = start_daemon()
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == 0
    assert not home.daemon_socket.exists()


def test_after_a_kill_the_next_daemon_takes_over(home: Home, start_daemon: StartDaemon) -> None:
    killed = start_daemon()
    killed.kill()
    killed.wait(DEADLINE_S)
    process = start_daemon()
    assert _status(home).daemon.pid == process.pid


def test_an_idle_daemon_ends(home: Home, start_daemon: StartDaemon) -> None:
    process = start_daemon("64MiB", "--idle-exit", "0.1")
    assert process.wait(DEADLINE_S) == 0
    assert not home.daemon_socket.exists()


def test_a_daemon_with_a_session_is_not_idle(home: Home, start_daemon: StartDaemon, manifest: Manifest) -> None:
    process = start_daemon("64MiB", "--idle-exit", "0.5")
    line = _attach(home, manifest)[0]
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.0)
    line.close()
    assert process.wait(DEADLINE_S) == 0


def test_a_home_that_is_too_long_is_refused_with_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTD_HOME", "/tmp/" + "h" * 100)
    ended = _run("--budget", "1MiB")
    assert ended.returncode == HomeTooLong.exit_status == 2
    assert re.fullmatch(r"expertd: EXPERTD_HOME /tmp/h+ is too long .* \[home_too_long\]\n", ended.stderr)


@pytest.mark.parametrize("budget", ["nonsense", "0", "-1"])
def test_a_budget_that_is_no_size_is_refused_with_one_sentence(home: Home, budget: str) -> None:
    ended = _run(f"--budget={budget}")
    assert ended.returncode == SizeInvalid.exit_status == 2
    assert re.fullmatch(rf"expertd: '{budget}' is no.* \[size_invalid\]\n", ended.stderr)
    assert not home.daemon_socket.exists()


def test_without_a_daemon_a_connection_says_how_to_start_one(home: Home) -> None:
    with pytest.raises(DaemonNotRunning, match="start one with: expertd daemon run"):
        Connection(home.daemon_socket, "test")


# -- what the daemon does not load -------------------------------------------------------------------------------------

NO_MLX = """
import importlib, pkgutil, sys
import expertd.clients, expertd.protocol, expertd.daemon
for package in (expertd.protocol, expertd.daemon, expertd.clients):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("mlx", "mlx_lm", "transformers")))
"""


def test_daemon_clients_and_protocol_import_no_mlx() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_MLX], capture_output=True, text=True, timeout=DEADLINE_S, cwd="/", check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_running_daemon_has_not_loaded_mlx(home: Home, start_daemon: StartDaemon, manifest: Manifest) -> None:
    process = start_daemon()
    _attach(home, manifest)[0].close()
    assert "mlx" not in Path(f"/proc/{process.pid}/maps").read_text()


# -- handshake ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, PROTOCOL + 1, 2**63])
def test_a_foreign_protocol_is_refused_in_one_sentence(raw: Raw, protocol: int) -> None:
    answer = raw.ask(encode(Hello(protocol=protocol, package="9.9", role="worker")))
    assert isinstance(answer, Error)
    assert answer.code == "protocol_mismatch"
    assert re.fullmatch(
        rf"this daemon \(process \d+, expertd [\d.]+\) speaks protocol {PROTOCOL}, the worker \(expertd 9\.9\) speaks "
        rf"{protocol}; end it with 'expertd daemon stop' or 'kill \d+' and try again",
        answer.message,
    )


def test_a_newer_hello_with_more_fields_is_understood(raw: Raw) -> None:
    hello = {"type": "hello", "protocol": PROTOCOL, "package": "9", "role": "test", "features": ["x"]}
    answer = raw.ask(msgspec.msgpack.encode(hello))
    assert isinstance(answer, Welcome)


# -- strangers ---------------------------------------------------------------------------------------------------------


def _garbage(count: int) -> list[list[bytes]]:
    """Messages that no peer of ours sends: random bytes, damaged frames, several frames, none of them valid."""
    dice = random.Random(7)
    fetch = Fetch(session=1, sequence=1, segment=1, layer=0, experts=[0, 1])
    hello = Hello(protocol=1, package="x", role="y")
    good = [encode(message) for message in (Stop(), AskStatus(), Detach(session=1), fetch, hello)]
    out: list[list[bytes]] = [[b""], [b"", b""], [good[0], good[1]], [b"\x82\xa4type\xa4stop\xa1z" + b"\x91" * 99_999]]
    while len(out) < count:
        kind = dice.randrange(4)
        frame = bytearray(dice.choice(good))
        if kind == 0:
            frame = bytearray(dice.randbytes(dice.randrange(60)))
        elif kind == 1:
            frame = frame[: dice.randrange(len(frame))]
        elif kind == 2:
            for _ in range(dice.randrange(1, 4)):
                frame[dice.randrange(len(frame))] = dice.randrange(256)
        else:
            out.append([bytes(frame)] * dice.randrange(2, 5))
            continue
        try:
            decode(bytes(frame))
        except Exception:
            out.append([bytes(frame)])
    return out


def test_garbage_is_answered_and_counted_and_kills_nothing(shared: Home, raw: Raw) -> None:
    garbage = _garbage(400)
    before = _status(shared).frames_dropped
    for frames in garbage:
        raw.send(*frames)
    for _ in garbage:
        answer = raw.receive()
        assert isinstance(answer, Error)
        assert answer.code == "message_invalid"
    assert _status(shared).frames_dropped - before == len(garbage)


@pytest.mark.parametrize("cls", [c for c in MESSAGES if c in (Welcome, Error, Attached, Resident, Complete, Stopping)])
def test_what_only_a_daemon_says_is_refused_by_it(raw: Raw, cls: type[Message]) -> None:
    samples: dict[type[Message], Message] = {
        Welcome: Welcome(protocol=1, package="x", pid=1),
        Error: Error(code="x", message="y"),
        Attached: Attached(session=1, model="x", version=0, pools=[]),
        Resident: Resident(session=1, sequence=1, version=0, slots=[]),
        Complete: Complete(session=1, segment=1),
        Stopping: Stopping(),
    }
    answer = raw.ask(encode(samples[cls]))
    assert isinstance(answer, Error)
    assert answer.message == f"a daemon takes no {cls.__name__}"


def test_a_fetch_of_an_unknown_session_is_refused(raw: Raw) -> None:
    answer = raw.ask(encode(Fetch(session=99, sequence=1, segment=1, layer=0, experts=[0])))
    assert isinstance(answer, Error)
    assert answer.code == "session_unknown"


def test_acks_and_logs_of_an_unknown_session_are_ignored(raw: Raw) -> None:
    raw.send(encode(Ack(session=99, version=2**64 - 1, sequence=0)))
    raw.send(encode(RoutingLog(session=99, routing=b"")))
    assert isinstance(raw.ask(encode(AskStatus())), Status)


def test_detach_of_an_unknown_session_is_answered(raw: Raw) -> None:
    assert raw.ask(encode(Detach(session=99))) == Detached(session=99)


# -- lifelines and attaching -------------------------------------------------------------------------------------------


def _dial(home: Home) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(DEADLINE_S)
    line.connect(str(home.lifeline_socket))
    return line


def _hung_up(line: socket.socket) -> bool:
    try:
        return line.recv(1) == b""
    except ConnectionResetError:
        return True


def _attach(home: Home, manifest: Manifest) -> tuple[socket.socket, Attached]:
    """Open a session; it lives as long as the lifeline that is returned."""
    token = secrets.token_bytes(16)
    line = lifeline.connect(home.lifeline_socket, token)
    with Connection(home.daemon_socket, "test", identity=control_identity(token)) as connection:
        attached = connection.ask(Attach(token=token, pid=os.getpid(), mode="shm", manifest=manifest), Attached)
    return line, attached


def test_a_greeting_of_another_protocol_is_hung_up_on(shared: Home, raw: Raw) -> None:
    with _dial(shared) as line:
        line.sendall(lifeline.GREETING.pack(PROTOCOL + 1, bytes(16)))
        assert _hung_up(line)


def test_the_other_side_of_a_hang_up_is_told_what_to_do(shared: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline, "PROTOCOL", PROTOCOL + 1)
    with pytest.raises(DaemonLost, match="hung up; restart it with: expertd daemon stop"):
        lifeline.connect(shared.lifeline_socket, bytes(16))


def test_half_a_greeting_and_a_hang_up_do_no_harm(shared: Home, raw: Raw) -> None:
    token = secrets.token_bytes(16)
    for size in (0, 1, 4, 19):
        with _dial(shared) as line:
            line.sendall(lifeline.GREETING.pack(PROTOCOL, token)[:size])
    lifeline.connect(shared.lifeline_socket, token).close()


def test_a_greeting_may_come_in_pieces(shared: Home, raw: Raw) -> None:
    with _dial(shared) as line:
        for byte in lifeline.GREETING.pack(PROTOCOL, secrets.token_bytes(16)):
            line.sendall(bytes([byte]))
        assert line.recv(1) == b"\x01"


def test_a_token_that_is_in_use_is_hung_up_on(shared: Home, raw: Raw) -> None:
    token = secrets.token_bytes(16)
    with lifeline.connect(shared.lifeline_socket, token), _dial(shared) as line:
        line.sendall(lifeline.GREETING.pack(PROTOCOL, token))
        assert _hung_up(line)


def test_attach_without_a_lifeline_is_refused(raw: Raw, manifest: Manifest) -> None:
    answer = raw.ask(encode(Attach(token=bytes(16), pid=1, mode="shm", manifest=manifest)))
    assert isinstance(answer, Error)
    assert (answer.code, answer.message) == ("message_invalid", "an Attach came whose lifeline is not open")


def test_a_second_attach_on_one_lifeline_is_refused(shared: Home, raw: Raw, manifest: Manifest) -> None:
    attach = encode(Attach(token=raw.token, pid=1, mode="shm", manifest=manifest))
    with lifeline.connect(shared.lifeline_socket, raw.token):
        raw.send(attach)
        raw.send(attach)
        answers = [raw.receive(), raw.receive(), raw.receive()]
    assert sorted(type(answer).__name__ for answer in answers) == ["Attached", "Complete", "Error"]


def test_attach_hands_over_a_segment_whose_bytes_are_the_files(shared: Home, raw: Raw, manifest: Manifest) -> None:
    with lifeline.connect(shared.lifeline_socket, raw.token) as line:
        attached = expect(raw.attach(manifest), Attached)
        assert raw.receive() == Complete(session=attached.session, segment=attached.pools[0].segment)
        segment, size, descriptor = lifeline.receive_segment(line)
        content = os.pread(descriptor, size, 0)
        os.close(descriptor)
    (pool,) = attached.pools
    assert (pool.segment, pool.slots, len(content)) == (segment, EXPERTS, size)
    assert content[:8] == b"expertd\0"
    assert content[12:28] == pool.nonce
    table = struct.unpack_from(f"<{EXPERTS}i", content, 64)
    for expert, slot in enumerate(table):
        assert content[16384 + 8 * slot :][:8] == bytes(range(8 * expert, 8 * expert + 8))


def test_a_session_ends_with_its_lifeline(shared: Home, raw: Raw, manifest: Manifest) -> None:
    line, attached = _attach(shared, manifest)
    assert attached.session in _sessions(shared)
    line.close()
    _eventually(lambda: attached.session not in _sessions(shared), "the end of the session")


def test_detach_ends_the_session_and_its_lifeline(shared: Home, raw: Raw, manifest: Manifest) -> None:
    with lifeline.connect(shared.lifeline_socket, raw.token) as line:
        attached = expect(raw.attach(manifest), Attached)
        assert isinstance(raw.receive(), Complete)
        assert raw.ask(encode(Detach(session=attached.session))) == Detached(session=attached.session)
        while received := line.recv(64):
            assert len(received) <= 16  # the segment's announcement, still unread
    assert attached.session not in _sessions(shared)


def test_a_lifeline_that_ends_while_detaching_does_no_harm(shared: Home, manifest: Manifest) -> None:
    for _ in range(20):
        opened = Raw(shared)
        line = lifeline.connect(shared.lifeline_socket, opened.token)
        attached = expect(opened.attach(manifest), Attached)
        line.close()
        opened.send(encode(Detach(session=attached.session)))
        while not isinstance(opened.receive(), Detached):
            pass
        opened.socket.close()
    assert attached.session not in _sessions(shared)


def test_nobody_else_speaks_for_a_session(shared: Home, raw: Raw, manifest: Manifest) -> None:
    line, attached = _attach(shared, manifest)
    number = attached.session
    with line:
        for message in (
            Ack(session=number, version=0, sequence=0), Detach(session=number), Ping(session=number),
            Fetch(session=number, sequence=1, segment=attached.pools[0].segment, layer=0, experts=[0]),
            Released(session=number, segment=attached.pools[0].segment), RoutingLog(session=number, routing=b""),
        ):  # fmt: skip
            answer = raw.ask(encode(message))
            assert isinstance(answer, Error)
            assert answer.message == f"a message about session {number} came from somebody else"
        assert number in _sessions(shared)


def test_an_attach_from_a_socket_of_another_name_is_refused(shared: Home, raw: Raw, manifest: Manifest) -> None:
    token = secrets.token_bytes(16)
    with lifeline.connect(shared.lifeline_socket, token):
        answer = raw.ask(encode(Attach(token=token, pid=1, mode="shm", manifest=manifest)))
    assert isinstance(answer, Error)
    assert answer.message == "an Attach came from a socket that is not named after its lifeline"


def test_a_session_is_answered_when_it_asks_whether_the_daemon_lives(
    shared: Home, raw: Raw, manifest: Manifest
) -> None:
    with lifeline.connect(shared.lifeline_socket, raw.token):
        attached = expect(raw.attach(manifest), Attached)
        assert isinstance(raw.receive(), Complete)
        assert raw.ask(encode(Ping(session=attached.session))) == Pong(session=attached.session)


def test_more_sessions_than_the_limit_are_refused_by_name(shared: Home, manifest: Manifest) -> None:
    opened: list[tuple[Raw, socket.socket]] = []
    try:
        answer: Message = Stopping()
        while not isinstance(answer, Error):
            assert len(opened) <= SESSION_LIMIT, "there is no limit"
            raw = Raw(shared)
            opened.append((raw, lifeline.connect(shared.lifeline_socket, raw.token)))
            answer = raw.attach(manifest)
        assert (answer.code, f"{SESSION_LIMIT} sessions" in answer.message) == ("limit_reached", True)
    finally:
        for raw, line in opened:
            line.close()
            raw.socket.close()
    _eventually(lambda: not _sessions(shared), "the end of all sessions")


def test_of_too_many_models_the_one_unused_for_longest_goes_and_none_that_is_in_use(
    home: Home, start_daemon: StartDaemon, manifest: Manifest, tmp_path: Path
) -> None:
    def model(number: int) -> Manifest:
        folder = tmp_path / f"m{number}"
        folder.mkdir(exist_ok=True)
        file = Path(shutil.copy2(tmp_path / "model.safetensors", folder))
        return _of(folder, read_header(file).mark)

    def held() -> list[str]:
        return [Path(one.path).name for one in _status(home).models]

    start_daemon()
    models = [model(number) for number in range(35)]
    lines = [_attach(home, models[0])[0]]
    try:
        for number in range(1, 34):
            line, attached = _attach(home, models[number])
            line.close()
            _eventually(lambda over=attached.session: over not in _sessions(home), "the end of a session")
        assert held() == ["m0", *(f"m{number}" for number in range(3, 34))]
        lines += [_attach(home, models[number])[0] for number in range(3, 34)]
        opened = Raw(home)
        with lifeline.connect(home.lifeline_socket, opened.token):
            refused = opened.attach(models[34])
        opened.socket.close()
        assert isinstance(refused, Error)
        assert refused.code == "limit_reached"
        assert refused.message.startswith("32 models are in use, which is the limit; end a program that uses one")
        lines.pop().close()
        _eventually(lambda: len(_sessions(home)) == 31, "the end of a session")
        lines.append(_attach(home, models[34])[0])
        assert held() == ["m0", *(f"m{number}" for number in range(3, 33)), "m34"]
    finally:
        for line in lines:
            line.close()


HOSTILE: dict[str, Callable[[Manifest], Manifest]] = {
    "a name with a zero byte": lambda m: _of(Path(m.folder), msgspec.structs.replace(m.files[0], name="a\0b")),
    "a folder with a zero byte": lambda m: msgspec.structs.replace(m, folder="/tmp/\0"),
    "a name that is too long": lambda m: _of(Path(m.folder), msgspec.structs.replace(m.files[0], name="a" * 4000)),
    "no layers": lambda m: msgspec.structs.replace(m, layers=()),
    "no such file": lambda m: _of(Path(m.folder), msgspec.structs.replace(m.files[0], name="other")),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_manifest_that_makes_no_sense_is_refused(
    shared: Home, raw: Raw, manifest: Manifest, change: Callable[[Manifest], Manifest]
) -> None:
    with lifeline.connect(shared.lifeline_socket, raw.token):
        answer = raw.attach(change(manifest))
    assert isinstance(answer, Error)
    assert answer.code in ("header_invalid", "checkpoint_invalid")
    assert isinstance(raw.ask(encode(AskStatus())), Status)


def test_a_header_nested_without_end_is_refused(shared: Home, raw: Raw, manifest: Manifest) -> None:
    path = Path(manifest.folder) / manifest.files[0].name
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with lifeline.connect(shared.lifeline_socket, raw.token):
        answer = raw.attach(manifest)
    assert isinstance(answer, Error)
    assert answer.code == "header_invalid"


def test_a_budget_that_is_too_small_is_refused_with_the_one_that_works(
    home: Home, start_daemon: StartDaemon, manifest: Manifest
) -> None:
    start_daemon("16384")
    token = secrets.token_bytes(16)
    with (
        lifeline.connect(home.lifeline_socket, token) as line,
        Connection(home.daemon_socket, "test", identity=control_identity(token)) as connection,
    ):
        connection.send(Attach(token=token, pid=1, mode="shm", manifest=manifest))
        answer = connection.receive(DEADLINE_S)
        assert isinstance(answer, Error)
        assert (answer.code, answer.sequence) == ("budget_too_small", None)
        assert "--budget 32768 or more" in answer.message
        assert _hung_up(line)


@pytest.mark.skipif(sys.platform != "linux", reason="limits another process")
def test_lifelines_are_taken_again_after_the_daemon_ran_out_of_descriptors(
    home: Home, start_daemon: StartDaemon
) -> None:
    process = start_daemon()
    before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    lines = [lifeline.connect(home.lifeline_socket, secrets.token_bytes(16))]
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{process.pid}/fd")), before[1]))  # noqa: PTH208
    lines += [_dial(home) for _ in range(3)]
    _eventually(lambda: "could not be accepted" in home.daemon_log.read_text(), "running out of descriptors")
    for line in lines:
        line.close()
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
    lifeline.connect(home.lifeline_socket, secrets.token_bytes(16)).close()
