"""One attachment to one daemon: two sockets, the lifeline, and the pools that came over it.

Two sockets, because ZeroMQ sockets belong to one thread: whoever computes uses ``data`` (Fetch, acks within a forward),
a session's control thread the other and the lifeline.  What is said on them is ``expertd.worker.attach``'s business.
No mlx here: arrays over the pools are ``expertd.worker.alias``.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import select
import socket
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import zmq
from numpy.typing import NDArray

from expertd.protocol import lifeline, messages
from expertd.protocol.connection import Connection, control_identity, data_identity
from expertd.protocol.errors import AliasFailed, DaemonLost, ExpertdError
from expertd.protocol.layout import BASE_GENERATION, PoolLayout, base_layout, pool_layout, read_header
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.protocol.segments import map_readonly

log = logging.getLogger("expertd.worker")

Mode = Literal["shm", "copy"]

ATTACH_S = 600.0
"""Attaching reserves the pool's memory, which takes seconds for large pools."""

SEGMENT_S = 10.0
"""A segment's descriptor is sent before the message that names it."""

GOODBYE_S = 2.0
"""How long a session that is closed waits for the daemon to have heard its last words."""


@dataclass(eq=False)
class MappedPool:
    """One generation of one pool as this process sees it: read-only pages, and the table ``slot[row, expert]`` in them.

    ``complete`` is set by the control thread once the daemon has said so; it never goes back.  ``descriptor`` is kept,
    as long as the pages are mapped, for a daemon that comes after this one: it may copy from them.
    """

    link: Link
    segment: int
    layers: tuple[int, ...]
    layout: PoolLayout
    mapping: mmap.mmap
    table: NDArray[np.int32]
    complete: bool
    info: messages.PoolInfo
    descriptor: int


@dataclass(frozen=True)
class HeldBase:
    """Base weights that are mapped, and their descriptor, which is there as long as they are."""

    info: messages.BaseInfo
    descriptor: int


class Link:
    """Open from construction until ``hang_up`` (control thread) and ``data.close`` (whoever computes).

    Attributes:
        number: of the session in this daemon.
        pools: as they were when it attached.
        base: the pages of ``Manifest.base``, if they came over this link.
        held_base: those that the session has, to hand them to the next daemon; None if it has its own.
        told_by_request, told_by_answer: newest versions that the control and the computing thread were told.
        sequence: of the last Fetch.
        announce: what the daemon wants to be announced, as it said last (``messages.Announce``).
        lost: the daemon is gone, or does not know the session any more; nothing more is sent.
        handed: numbers of the segments that were handed back to this daemon: it waits to hear of their release.
    """

    def __init__(
        self,
        home: Home,
        manifest: Manifest,
        mode: Mode,
        held: Sequence[MappedPool] = (),
        held_base: HeldBase | None = None,
    ) -> None:
        """Attach.

        Args:
            held: pools of a daemon that has gone, which this one may copy from.
            held_base: base weights of such a daemon, which the session goes on with, and this one may hand to others.
        Raises:
            DaemonNotRunning, ProtocolMismatch, BudgetTooSmall, CheckpointError, SegmentFailed: as the daemon says.
        """
        self._home = home
        self._manifest = manifest
        self.lost = False
        self.sequence = 0
        self.told_by_answer = 0
        self._descriptors: dict[int, tuple[int, int]] = {}
        token = secrets.token_bytes(16)
        with contextlib.ExitStack() as stack:
            open_socket = home.daemon_socket
            self.control = stack.enter_context(
                Connection(open_socket, "worker", identity=control_identity(token))
            )
            self.data = stack.enter_context(Connection(open_socket, "worker", identity=data_identity(token)))
            self.line = stack.enter_context(lifeline.connect(home.lifeline_socket, token))
            stack.callback(self._drop_descriptors)
            for pool in held:
                lifeline.hand_back(self.line, pool.segment, pool.layout.size, pool.descriptor)
            if held_base is not None:
                lifeline.hand_back(self.line, held_base.info.segment, held_base.info.size, held_base.descriptor)
            attached = self._await_attached(
                messages.Attach(
                    token=token, pid=os.getpid(), mode=mode, manifest=manifest, held=[pool.info for pool in held],
                    held_base=None if held_base is None else held_base.info,
                )
            )  # fmt: skip
            self.number = attached.session
            self.told_by_request = attached.version
            self.announce = attached.announce
            self.pools = [self.receive_pool(info) for info in attached.pools]
            # A session that was cut off from a daemon that lives is given back the very segments that it has.
            self.handed = {pool.segment for pool in held} - {pool.segment for pool in self.pools}
            self.base: mmap.mmap | None = None
            self.held_base = held_base
            if attached.base is not None:
                self.base, self.held_base = self._receive_base(attached.base)
            stack.pop_all()

    def _await_attached(self, request: messages.Attach) -> messages.Attached:
        """Send ``request`` and wait for its answer, as long as it takes while the daemon lives.

        Segments come over the lifeline before the answer, so something to read there is an end of file only if peeking
        says so.
        """
        self.control.send(request)
        deadline = time.monotonic() + ATTACH_S
        while time.monotonic() < deadline:
            answer = self.control.receive(0.2)
            if answer is not None:
                return messages.expect(answer, messages.Attached)
            if self.ended():
                # It may have said why on the other socket, just before.
                answer = self.control.receive(0.5)
                if answer is not None:
                    return messages.expect(answer, messages.Attached)
                break
        raise DaemonLost(f"the daemon of {self._home.root} went away while a session was opened; load the model again")

    def ended(self) -> bool:
        """Whether the daemon has closed the lifeline, or we have."""
        if self.line.fileno() < 0:
            return True
        readable, _, _ = select.select([self.line], [], [], 0)
        if not readable:
            return False
        try:
            return not self.line.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def receive_pool(self, info: messages.PoolInfo) -> MappedPool:
        """Map the pool that a message names; its descriptor is on the lifeline already.

        Raises:
            DaemonLost: it does not come.
            AliasFailed: what came is not the segment that was announced.
        """
        mapping, size, kept = self._receive_segment(info.segment)
        first = self._manifest.layers[info.layers[0]]
        layout = pool_layout(len(info.layers), first.experts, first.parts, info.slots)
        if size != layout.size or read_header(memoryview(mapping)) != (info.nonce, info.generation):
            raise AliasFailed("the segment that the daemon handed over is not the one that it announced")
        count = layout.layers * layout.experts
        table = np.frombuffer(mapping, np.int32, count, layout.table_offset).reshape(layout.layers, layout.experts)
        return MappedPool(self, info.segment, tuple(info.layers), layout, mapping, table, info.complete, info, kept)

    def _receive_base(self, info: messages.BaseInfo) -> tuple[mmap.mmap, HeldBase]:
        mapping, size, kept = self._receive_segment(info.segment)
        expected = base_layout(self._manifest.base)[1]
        if size != expected or read_header(memoryview(mapping)) != (info.nonce, BASE_GENERATION):
            raise AliasFailed("the base weights that the daemon handed over are not those that it announced")
        return mapping, HeldBase(info, kept)

    def _receive_segment(self, wanted: int) -> tuple[mmap.mmap, int, int]:
        """Its mapping, its size, and its descriptor, which is there as long as the mapping."""
        self.line.settimeout(SEGMENT_S)
        while wanted not in self._descriptors:
            segment, size, descriptor = lifeline.receive_segment(self.line)
            self._descriptors[segment] = (size, descriptor)
        size, descriptor = self._descriptors.pop(wanted)
        kept = os.dup(descriptor)
        try:
            mapping = map_readonly(descriptor, size)
        except ExpertdError:
            os.close(kept)
            raise
        weakref.finalize(mapping, os.close, kept).atexit = False
        return mapping, size, kept

    def _drop_descriptors(self) -> None:
        for _, descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def say_goodbye(self) -> None:
        """See that the daemon has heard all that was said, before it sees the lifeline end."""
        if not self.lost:
            try:
                self.control.send(messages.Detach(session=self.number))
                while not isinstance(self.control.receive(GOODBYE_S), messages.Detached | None):
                    pass
            except (ExpertdError, zmq.ZMQError) as error:
                log.debug("nobody heard the end of session %d: %s", self.number, error)

    def hang_up(self) -> None:
        """Tell the daemon, if it lives, that nobody answers here any more, and close what is the control thread's."""
        self.lost = True
        if self.line.fileno() >= 0:
            with contextlib.suppress(OSError):  # it may have hung up itself
                self.line.shutdown(socket.SHUT_RDWR)
            self.line.close()
        self._drop_descriptors()
        self.control.close()

    @property
    def frames(self) -> int:
        """Frames that passed over both sockets, both ways."""
        return sum(c.frames_sent + c.frames_received for c in (self.control, self.data))
