"""A daemon's state by the shortest way: one question and its answer on the lifeline's socket, in JSON.

For ``expertd status``, which people call again and again.  It imports little, tells no error and starts nothing: what
comes of trouble is None, and whoever asked goes the ordinary way (``expertd.protocol.rendezvous``), which says what is
wrong.
"""

from __future__ import annotations

import os
import socket

from expertd.protocol import PROTOCOL

STATUS_TOKEN = bytes(16)
"""In place of a session's token: no session opens, the state is told."""

_ANSWER_S = 2.0


def quick_status(home: str) -> bytes | None:
    """The object that ``expertd status --json`` prints, as JSON on one line; None: ask the ordinary way.

    Args:
        home: path of the daemon's home.
    """
    try:
        if not all(_private(os.path.join(home, folder)) for folder in ("", "run", "log")):  # noqa: PTH118
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(_ANSWER_S)
            line.connect(f"{home}/run/lifeline.sock")
            line.sendall(PROTOCOL.to_bytes(4, "little") + STATUS_TOKEN)
            pieces: list[bytes] = []
            while piece := line.recv(1 << 20):
                if not pieces and not piece.startswith(b"{"):
                    return None  # a daemon that does not know the question takes it for a session's greeting
                pieces.append(piece)
    except OSError:
        return None
    answer = b"".join(pieces)
    return answer if answer.endswith(b"}\n") else None


def _private(folder: str) -> bool:
    """Whether ``folder`` is one where only this user can have put a socket (see ``protocol.paths``)."""
    found = os.stat(folder)  # noqa: PTH116
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022
