"""The gateway's end of the socket to its worker: frames in and out, and nothing about what they mean.

Anybody who can reach the socket may send anything; what is no message is dropped and counted.  The folder is private
to the user (0700) and the socket's file too (0600), so this keeps accidents out, and not an attacker who is the user.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import zmq

from expertd.protocol.errors import MessageInvalid, QueueFull, WorkerUnavailable
from expertd.protocol.logs import Sparsely
from expertd.protocol.messages import FRAME_LIMIT, Message, decode

__all__ = ["Link"]

log = logging.getLogger(__name__)

RECEIVE_FRAMES = 256
"""Frames of one peer that wait in the socket.  A peer with more keeps them in its own memory: none is lost.  (A
worker's own socket takes any number, so that it never waits for its gateway.)"""
SEND_FRAMES = 256
"""Frames that wait for a worker that reads none of them, while clients come and go."""
FRAMES_AT_A_TIME = 32
"""Frames handled before others on the loop get a turn: as long as there are frames, receiving never waits."""
LONGEST_REASON = 200
NOBLOCK = int(zmq.NOBLOCK)
"""As a plain number: each token is received once, and pyzmq's enumerations cost as much as the receiving."""


class Link:
    """A ROUTER socket at ``path``."""

    def __init__(self, path: Path) -> None:
        self.address = f"ipc://{path}"
        self._path = path
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._handle: Callable[[bytes, Message], None] | None = None
        self._drops = Sparsely()

    def bind(self) -> None:
        """Listen; a dead file of an earlier process is replaced."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, SEND_FRAMES)
        self._socket.setsockopt(zmq.RCVHWM, RECEIVE_FRAMES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, FRAME_LIMIT)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(self.address)
        self._path.chmod(0o600)

    async def listen(self, handle: Callable[[bytes, Message], None]) -> None:
        """Hand all messages and who sent them to ``handle``, for ever.  What it raises drops the frame."""
        loop = asyncio.get_running_loop()
        self._handle = handle
        # Not by zmq.asyncio, whose futures cost more than all else that a token costs here.
        loop.add_reader(self._socket, self._read)
        self._read()
        try:
            await loop.create_future()
        finally:
            self._handle = None
            loop.remove_reader(self._socket)

    def _read(self) -> None:
        """Take what is there, and leave the rest for the loop's next round.

        The descriptor tells only that something has changed, and each look at the socket takes that back: so whoever
        has sent, or has not taken all, has to look again.
        """
        for _ in range(FRAMES_AT_A_TIME):
            if self._handle is None:
                return
            try:
                peer = self._socket.recv(NOBLOCK)
                frame = self._socket.recv(NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                if frame.more:
                    rest = self._socket.recv_multipart(NOBLOCK)
                    raise MessageInvalid(f"a message of {2 + len(rest)} frames came where two were expected")
                self._handle(peer, decode(frame.bytes))
            except MessageInvalid as error:
                self._drop(error.message)
            except Exception as error:
                # Whatever a stranger found, the worker's next message has to be heard.
                self._drop(repr(error))
        asyncio.get_running_loop().call_soon(self._read)

    def send(self, peer: bytes, frame: bytes) -> None:
        """Send without waiting.

        Raises:
            QueueFull: the peer has read nothing for long.
            WorkerUnavailable: nobody of that name is connected.
        """
        try:
            self._socket.send_multipart([peer, frame], flags=zmq.NOBLOCK)
        except zmq.Again as error:
            raise QueueFull("the worker is busy and takes no more messages now; try again later") from error
        except zmq.ZMQError as error:
            raise WorkerUnavailable("the worker is gone; try again in a moment") from error
        finally:
            asyncio.get_running_loop().call_soon(self._read)

    def close(self) -> None:
        """Give up the socket and its file."""
        self._socket.close(linger=0)
        self._context.term()
        self._path.unlink(missing_ok=True)

    def _drop(self, why: str) -> None:
        if self._drops.add():
            log.warning("%d frames dropped so far; the last: %s", self._drops.total, why[:LONGEST_REASON])
