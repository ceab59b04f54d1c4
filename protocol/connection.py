"""A blocking DEALER connection to a daemon: handshake, one question and its answer, deadlines."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq

from expertd.protocol import PROTOCOL, VERSION
from expertd.protocol.errors import DaemonLost, DaemonNotRunning, MessageInvalid, ProtocolMismatch
from expertd.protocol.messages import Hello, Message, Welcome, decode, encode, expect

M = TypeVar("M", bound=Message)


def control_identity(token: bytes) -> bytes:
    """Name of the socket of the session with this lifeline over which it attaches, acks while idle, and is asked."""
    return b"c" + token


def data_identity(token: bytes) -> bytes:
    """Name of the socket of the session with this lifeline that the computing thread uses."""
    return b"d" + token


def package_version() -> str:
    """Version of the package that this process runs (which may have been upgraded on disk meanwhile)."""
    return VERSION


class Connection:
    """One DEALER socket.  Not thread-safe: each thread has its own.

    Counts what passes (``frames_sent``, ``frames_received``), so that "a hit costs no message" can be measured.
    """

    def __init__(self, path: Path, role: str, *, handshake_s: float = 5.0, identity: bytes | None = None) -> None:
        """Connect and shake hands.

        Args:
            identity: the socket's name, where the daemon has to know it again.
        Raises:
            DaemonNotRunning: nobody listens (known at once), or nobody answers within ``handshake_s``.
            ProtocolMismatch: the daemon speaks another version.
        """
        self._path = path
        self.frames_sent = 0
        self.frames_received = 0
        self._socket = _dial(path, identity)
        try:
            self.send(Hello(protocol=PROTOCOL, package=package_version(), role=role))
            answer = self.receive(handshake_s)
            if answer is None:
                raise DaemonNotRunning(f"no daemon answers at {path}; start one with: expertd daemon run")
            self.daemon = expect(answer, Welcome)
        except BaseException:
            self.close()
            raise
        if self.daemon.protocol != PROTOCOL:
            self.close()
            raise ProtocolMismatch(
                f"the daemon (process {self.daemon.pid}, expertd {self.daemon.package}) speaks protocol "
                f"{self.daemon.protocol}, this is {PROTOCOL}; restart it with: expertd daemon stop"
            )

    def send(self, message: Message) -> None:
        """Queue one message."""
        self._socket.send(encode(message))
        self.frames_sent += 1

    def receive(self, timeout_s: float | None) -> Message | None:
        """The next message, or None after ``timeout_s`` (None: wait for ever)."""
        if not self._socket.poll(None if timeout_s is None else max(0, round(timeout_s * 1000)), zmq.POLLIN):
            return None
        self.frames_received += 1
        return decode(self._socket.recv())

    def ask(self, message: Message, kind: type[M], timeout_s: float = 30.0) -> M:
        """Send ``message`` and return its answer of type ``kind``.

        Raises:
            ExpertdError: the error that the daemon answered with.
            DaemonLost: no answer within ``timeout_s``.
        """
        self.send(message)
        began = time.monotonic()
        answer = self.receive(timeout_s)
        if answer is None:
            waited = time.monotonic() - began
            raise DaemonLost(f"the daemon at {self._path} did not answer {type(message).__name__} in {waited:.0f} s")
        return expect(answer, kind)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For polling it together with others."""
        return self._socket

    def close(self) -> None:
        """Drop what was not sent and close."""
        self._socket.close(linger=0)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def ask_any_version(path: Path, message: Message, timeout_s: float = 2.0) -> Message | None:
    """What a daemon of whatever version answers to ``message``; None if it says nothing that this version understands.

    There is no handshake: a daemon judges each message by itself, so a version that takes this one answers it.

    Raises:
        DaemonNotRunning: nobody listens.
    """
    with _dial(path) as dealer:
        dealer.send(encode(message))
        if not dealer.poll(round(timeout_s * 1000), zmq.POLLIN):
            return None
        try:
            return decode(dealer.recv())
        except MessageInvalid:
            return None


def _dial(path: Path, identity: bytes | None = None) -> zmq.Socket[bytes]:
    """A DEALER to the daemon that listens at ``path``.

    Raises:
        DaemonNotRunning: nobody does.
    """
    # ZeroMQ would wait for a daemon to come.  One that was killed leaves its socket's file, which says nothing.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # more connections wait to be taken than may: there is somebody, if a busy one
            pass
        except OSError as error:
            home = path.parent.parent
            raise DaemonNotRunning(f"no daemon runs in {home}; start one with: expertd daemon run") from error
    dealer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.setsockopt(zmq.SNDHWM, 0)
    if identity is not None:
        dealer.setsockopt(zmq.ROUTING_ID, identity)
    dealer.connect(f"ipc://{path}")
    return dealer
