"""The lifeline: one plain Unix connection for each session, next to the ZeroMQ sockets.

ZeroMQ reports no peer's death; this connection's end of file does.  The kernel vouches for the peer's user, and
segments' descriptors travel over it.  Four things are said on it:

    worker -> daemon    protocol (uint32) and token (16 bytes)
    daemon -> worker    one byte: the token is known, Attach may follow
    worker -> daemon    segment and size, with one descriptor: of a daemon that has died; for each, before Attach
    daemon -> worker    segment (uint64) and size (uint64), with one descriptor, once for each segment
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

from expertd.protocol import PROTOCOL
from expertd.protocol.errors import DaemonLost, DaemonNotRunning, MessageInvalid

GREETING = struct.Struct("<I16s")
_SEGMENT = struct.Struct("<QQ")
_KNOWN = b"\x01"


def connect(path: Path, token: bytes, timeout_s: float = 10.0) -> socket.socket:
    """Open a lifeline and wait until the daemon knows its token.

    Raises:
        DaemonNotRunning: nobody listens.
        DaemonLost: the daemon hung up (another protocol, or it is ending).
    """
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(timeout_s)
    try:
        line.connect(str(path))
        line.sendall(GREETING.pack(PROTOCOL, token))
        known = line.recv(1)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        line.close()
        raise DaemonNotRunning(f"no daemon listens at {path}; start one with: expertd daemon run") from error
    except OSError as error:
        line.close()
        raise DaemonLost(f"the daemon at {path} did not answer ({error})") from error
    if known != _KNOWN:
        line.close()
        raise DaemonLost(f"the daemon at {path} hung up; restart it with: expertd daemon stop")
    return line


def greet(line: socket.socket) -> None:
    """Daemon: tell the worker that its token is known."""
    line.send(_KNOWN)


def send_segment(line: socket.socket, segment: int, size: int, descriptor: int) -> None:
    """Daemon: hand over one segment.  Raises OSError if the worker is gone."""
    socket.send_fds(line, [_SEGMENT.pack(segment, size)], [descriptor])


def hand_back(line: socket.socket, segment: int, size: int, descriptor: int) -> None:
    """Worker: give a new daemon a segment of an earlier one, to copy from.

    Raises:
        DaemonLost: the daemon hung up.
    """
    try:
        send_segment(line, segment, size, descriptor)
    except OSError as error:
        raise DaemonLost(f"the daemon went away while a session was opened ({error})") from error


def receive_handed(line: socket.socket) -> tuple[int, int, int] | None:
    """Daemon: the next ``(segment, size, descriptor)`` on a line that does not block; None at its end.

    Raises:
        BlockingIOError: nothing is there now.
        MessageInvalid: something else was said.
        OSError: the line is broken.
    """
    packet, descriptors, flags, _address = socket.recv_fds(line, _SEGMENT.size, 1)
    if not packet and not descriptors:
        return None
    if len(packet) == _SEGMENT.size and len(descriptors) == 1 and not flags & socket.MSG_CTRUNC:
        segment, size = _SEGMENT.unpack(packet)
        return segment, size, descriptors[0]
    for descriptor in descriptors:
        os.close(descriptor)
    raise MessageInvalid(
        f"{len(packet)} bytes and {len(descriptors)} descriptors came on a lifeline, where a segment is "
        f"{_SEGMENT.size} bytes and one descriptor"
    )


def receive_segment(line: socket.socket) -> tuple[int, int, int]:
    """Worker: ``(segment, size, descriptor)`` of the next segment.

    Raises:
        DaemonLost: the daemon hung up or sent something else.
    """
    try:
        packet, descriptors, _flags, _address = socket.recv_fds(line, _SEGMENT.size, 1)
    except OSError as error:
        raise DaemonLost(f"the daemon went away while a session was opened ({error})") from error
    if len(packet) != _SEGMENT.size or len(descriptors) != 1:
        raise DaemonLost("the daemon went away while a session was opened")
    segment, size = _SEGMENT.unpack(packet)
    return segment, size, descriptors[0]


def peer_user(line: socket.socket) -> int:
    """The user id of the process at the other end, as the kernel knows it."""
    if sys.platform == "darwin":  # LOCAL_PEERCRED, struct xucred: version, uid, ...
        return int(struct.unpack_from("II", line.getsockopt(0, 0x001, 76))[1])
    return int(struct.unpack("iII", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])
