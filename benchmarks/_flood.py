"""``python -m benchmarks._flood SOCKET COUNT SEED``: send that many bad frames to a ROUTER, as fast as it takes them.

Answers are read and forgotten, as fast as they come, because a ROUTER drops what its peer does not read.
"""

from __future__ import annotations

import sys

import zmq

from benchmarks._junk import Junk

READ_EACH = 50
"""After so many frames the answers are read."""
LINGER_MS = 60_000


def main() -> None:
    """See the module."""
    path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.connect(f"ipc://{path}")
    for number, frame in enumerate(Junk(seed).frames(count), 1):
        socket.send(frame)
        if number % READ_EACH == 0:
            while socket.poll(0, zmq.POLLIN):
                socket.recv_multipart()
    while socket.poll(500, zmq.POLLIN):
        socket.recv_multipart()
    socket.close()
    zmq.Context.instance().term()


if __name__ == "__main__":
    main()
