"""A session: one process's hold on one model's pools, and the conversation with the daemon about it.

Two sockets, because ZeroMQ sockets belong to one thread: whoever computes uses one (Fetch, acks within a forward), and
a control thread the other (acks while idle, news).  No mlx here: arrays over the pools are ``expertd.worker.alias``,
the layer that looks blocks up is ``expertd.worker.experts``.

The rule it keeps (PROTOCOL.md, "Acks"): an ack names a version that the daemon *told* in a message, and is sent only
when nothing that was looked up before is still to be read.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import zmq
from numpy.typing import NDArray

from expertd.protocol import lifeline, messages
from expertd.protocol.connection import Connection
from expertd.protocol.errors import AliasFailed, DaemonLost, ExpertdError, SessionClosed, from_code
from expertd.protocol.layout import PoolLayout, pool_layout, read_header
from expertd.protocol.manifest import Manifest
from expertd.protocol.paths import Home
from expertd.protocol.routing import pack
from expertd.protocol.segments import map_readonly

log = logging.getLogger("expertd.worker")

ATTACH_S = 600.0
"""Attaching reserves the pool's memory, which takes seconds for large pools."""

RESEND_S = 5.0
"""An unanswered Fetch is sent again after so long: it is idempotent, and a ROUTER may drop an answer."""

FLUSH_FORWARDS = 100
"""The routing log is sent after so many forwards, or with the next Fetch or ack, or when idle."""

IDLE_FLUSH_S = 1.0
_POLL_S = 0.5

_FORKED = (
    "a model that was loaded before a fork cannot be used in the child, and MLX neither; start a new process "
    "(multiprocessing's 'spawn') and load it there"
)

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


@dataclass
class MappedPool:
    """One pool as this process sees it: read-only pages, and the table ``slot[row, expert]`` in them.

    ``complete`` is set by the control thread once the daemon has said so; it never goes back.
    """

    segment: int
    layers: list[int]
    layout: PoolLayout
    mapping: mmap.mmap
    table: NDArray[np.int32]
    complete: bool


class Session:
    """Open from construction to ``close``.

    One forward at a time: between ``begin`` and ``end`` the caller may look blocks up in the tables and read the slots
    that it found.  ``end``, ``ack`` and ``fetch`` promise that whatever was looked up before them is evaluated.

    Attributes:
        owner: identity of the thread that is between ``begin`` and ``end``, 0 if none is.
        asked, acked: how often the daemon has asked for an ack, and which of these requests has been answered.  If they
            differ, the owner calls ``ack`` when it may.
        routing: what routers chose, ``(layer, experts)``, and no message has told yet.  The owner appends events that
            were all hits; the others ride in their Fetch.
        completions: how many of the pools are complete.
    """

    def __init__(self, home: Home, manifest: Manifest, mode: Literal["shm", "copy"]) -> None:
        """Attach.

        Raises:
            DaemonNotRunning, ProtocolMismatch, BudgetTooSmall, CheckpointError, SegmentFailed: as the daemon says.
        """
        self._process = os.getpid()
        self._closed: ExpertdError | None = None
        self._abandoned = False
        self._forward = threading.Lock()
        # Written by one thread each: what the control thread was told, and what a Fetch was answered with; how often an
        # ack was asked for (control), and up to which request it was given (whoever holds the forward lock).
        self._told_by_request = 0
        self._told_by_answer = 0
        self.asked = 0
        self.acked = 0
        self._sequence = 0
        self._unanswered: messages.Fetch | None = None
        self._settled = True
        self.owner = 0
        self.routing: list[tuple[int, Sequence[int]]] = []
        self._forwards = 0
        self._home = home
        token = secrets.token_bytes(16)
        self._sockets = contextlib.ExitStack()
        try:
            self._control = self._sockets.enter_context(Connection(home.daemon_socket, "worker"))
            self._data = self._sockets.enter_context(Connection(home.daemon_socket, "worker"))
            self._line = self._sockets.enter_context(lifeline.connect(home.lifeline_socket, token))
            self._wake, self._woken = map(self._sockets.enter_context, socket.socketpair())
            request = messages.Attach(token=token, pid=os.getpid(), mode=mode, manifest=manifest)
            self._line.settimeout(ATTACH_S)
            attached = self._await_attached(request)
            self.number = attached.session
            self._told_by_request = attached.version
            self.pools = self._map(manifest, attached)
        except BaseException:
            self._sockets.close()
            raise
        self.completions = sum(pool.complete for pool in self.pools)
        self.mode = mode
        self._thread = threading.Thread(target=self._run, name=f"session-{self.number}", daemon=True)
        _sessions.add(self)
        self._thread.start()

    def _await_attached(self, request: messages.Attach) -> messages.Attached:
        """Send ``request`` and wait for its answer, as long as it takes while the daemon lives.

        Segments come over the lifeline before the answer, so something to read there is an end of file only if peeking
        says so.
        """
        self._control.send(request)
        deadline = time.monotonic() + ATTACH_S
        while time.monotonic() < deadline:
            answer = self._control.receive(0.2)
            if answer is not None:
                return messages.expect(answer, messages.Attached)
            readable, _, _ = select.select([self._line], [], [], 0)
            if readable and not self._line.recv(1, socket.MSG_PEEK):
                # It may have said why on the other socket, just before.
                answer = self._control.receive(0.5)
                if answer is not None:
                    return messages.expect(answer, messages.Attached)
                break
        raise DaemonLost(f"the daemon of {self._home.root} went away while a session was opened; load the model again")

    def _map(self, manifest: Manifest, attached: messages.Attached) -> list[MappedPool]:
        descriptors: dict[int, tuple[int, int]] = {}
        try:
            for _ in attached.pools:
                segment, size, descriptor = lifeline.receive_segment(self._line)
                descriptors[segment] = (size, descriptor)
            return [self._map_pool(manifest, info, *descriptors.pop(info.segment)) for info in attached.pools]
        finally:
            for _, descriptor in descriptors.values():
                os.close(descriptor)

    @staticmethod
    def _map_pool(manifest: Manifest, info: messages.PoolInfo, size: int, descriptor: int) -> MappedPool:
        first = manifest.layers[info.layers[0]]
        layout = pool_layout(len(info.layers), first.experts, first.parts, info.slots)
        mapping = map_readonly(descriptor, size)
        if size != layout.size or read_header(memoryview(mapping)) != (info.nonce, info.generation):
            raise AliasFailed("the segment that the daemon handed over is not the one that it announced")
        count = layout.layers * layout.experts
        table = np.frombuffer(mapping, np.int32, count, layout.table_offset).reshape(layout.layers, layout.experts)
        return MappedPool(info.segment, info.layers, layout, mapping, table, info.complete)

    # -- the computing thread ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a forward (waits for one of another thread).

        Raises:
            SessionClosed: the session was closed, or this process is a fork of its owner.
            ExpertdError: whatever else has closed the session, DaemonLost above all.
        """
        self._forward.acquire()
        try:
            self._check_open()
            if self._unanswered is not None:
                self._await_answer(self._unanswered)
            self._settled = False
            self.owner = threading.get_ident()
        except BaseException:
            self._forward.release()
            raise

    def end(self, settled: bool) -> None:
        """Finish a forward.

        Args:
            settled: nothing that was looked up in it is still to be read.  If that is not known (an interrupt came
                between), the session acks nothing until a later forward has settled.
        """
        self._settled = settled
        self.owner = 0
        if not settled:
            self._forward.release()
            return
        self._forwards += 1
        flush = self._forwards % FLUSH_FORWARDS == 0 and self._closed is None
        while True:
            try:
                if flush and self.routing:
                    self._data.send(messages.RoutingLog(session=self.number, routing=self._take_routing()))
                if self.asked != self.acked:
                    self.ack()
            finally:
                self._forward.release()
            # The control thread may have noted a request after the ack and found the lock still taken.
            if self.asked == self.acked or not self._forward.acquire(blocking=False):
                return

    def ack(self) -> None:
        """Answer the daemon's request for an ack; the caller has evaluated all that was looked up until now."""
        self._send_ack(self._data)

    def fetch(self, layer: int, experts: NDArray[np.integer]) -> NDArray[np.int32]:
        """Make the blocks (``layer``, ``experts``) resident and lease them until the next fetch or ack.

        Args:
            experts: distinct ids, shape ``[n]``, at most as many as the layer's pool has slots.
        Returns:
            Their slots, shape ``[n]``.
        Raises:
            ReadFailed, FileChanged: the disk or the file failed; the next fetch may work.
            DaemonLost: the daemon is gone.
        """
        self._check_open()
        self.acked = self.asked  # a Fetch acks everything that was told
        self._sequence += 1
        request = messages.Fetch(
            session=self.number,
            sequence=self._sequence,
            layer=layer,
            experts=experts.tolist(),
            routing=self._take_routing(),
        )
        self._unanswered = request
        self._data.send(request)
        answer = self._await_answer(request)
        if isinstance(answer, messages.Error):
            raise answer.exception()
        return np.array(answer.slots, np.int32)

    def _await_answer(self, request: messages.Fetch) -> messages.Resident | messages.Error:
        """The answer to ``request``.

        A caller that is interrupted here (Ctrl-C) leaves ``_unanswered`` set: until the answer has come, the daemon
        takes this session for one that looks nothing up, so nothing may be looked up.
        """
        waited_s = 0.0
        while True:
            answer = self._data.receive(_POLL_S)
            self._check_open()
            if answer is None:
                waited_s += _POLL_S
                if waited_s >= RESEND_S:
                    waited_s = 0.0
                    self._data.send(request)
            elif isinstance(answer, messages.Resident) and answer.sequence == request.sequence:
                self._unanswered = None
                self._told_by_answer = answer.version
                return answer
            elif isinstance(answer, messages.Error) and answer.sequence == request.sequence:
                self._unanswered = None
                return answer
            elif isinstance(answer, messages.Error) and answer.sequence is None:
                # Not about this Fetch: the two sides no longer agree on what was said.
                self._closed = answer.exception()

    def _check_open(self) -> None:
        """Raise why this session is closed, if it is.

        A new exception each time: one that has been raised holds its frames, which hold the model, which must not be
        held by its own session.
        """
        if self._closed is not None:
            raise from_code(self._closed.code, self._closed.message)

    def _take_routing(self) -> bytes:
        taken, self.routing = self.routing, []
        return b"".join(pack(layer, experts) for layer, experts in taken)

    def _send_ack(self, connection: Connection) -> None:
        """Ack everything that was told; the caller holds the forward lock."""
        asks = self.asked
        version = max(self._told_by_request, self._told_by_answer)
        routing = self._take_routing()
        connection.send(
            messages.Ack(session=self.number, version=version, sequence=self._sequence, routing=routing)
        )
        self.acked = asks

    # -- the control thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        poller.register(self._line.fileno(), zmq.POLLIN)
        poller.register(self._woken.fileno(), zmq.POLLIN)
        forwards = 0
        try:
            while True:
                ready = dict(poller.poll(round(IDLE_FLUSH_S * 1000)))
                if self._woken.fileno() in ready:
                    return
                if self._line.fileno() in ready and not self._line.recv(64):
                    raise DaemonLost(f"the daemon of {self._home.root} has ended; load the model again")
                if self._control.socket in ready:
                    self._listen()
                elif not ready:
                    forwards = self._flush_idle(forwards)
        except (ExpertdError, OSError) as error:
            if self._closed is None:
                code = error.code if isinstance(error, ExpertdError) else DaemonLost.code
                self._closed = from_code(code, f"{error}")
                log.warning("%s", error)
            self._hang_up()
        finally:
            if self._abandoned:
                with self._forward:  # somebody may still compute with one of the model's layers
                    self._closed = self._closed or SessionClosed("the model is gone; keep it while its layers are used")
                    if self._settled:
                        self._sockets.close()

    def _listen(self) -> None:
        match self._control.receive(0):
            case messages.AckRequest(version=version):
                self._told_by_request = version
                self.asked += 1
                if self._forward.acquire(blocking=False):
                    try:
                        if self.asked != self.acked and self._settled:
                            self._send_ack(self._control)
                    finally:
                        self._forward.release()
            case messages.Complete(segment=segment):
                for pool in self.pools:
                    if pool.segment == segment:
                        pool.complete = True
                        self.completions += 1
            case messages.Error() as error:
                raise error.exception()
            case _:
                pass

    def _flush_idle(self, forwards_before: int) -> int:
        """Send the routing log if no forward ran since there were ``forwards_before``; returns how many there are."""
        if self.routing and self._forwards == forwards_before and self._forward.acquire(blocking=False):
            try:
                self._control.send(messages.RoutingLog(session=self.number, routing=self._take_routing()))
            finally:
                self._forward.release()
        return self._forwards

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that opened the session."""
        return self._process != os.getpid()

    @property
    def frames(self) -> int:
        """Frames that passed between this session and the daemon, both ways, since it was opened."""
        return sum(c.frames_sent + c.frames_received for c in (self._control, self._data))

    def close(self) -> None:
        """Detach.  Waits for a forward that is under way; later ones raise SessionClosed.

        Unmapping the pages is for whoever has arrays over them (``expertd.worker.alias``).
        """
        if self.forked:
            return
        with self._forward:
            if self._closed is None:
                self._closed = SessionClosed("the model was closed; load it again")
            if not self._settled:
                return  # a graph may still read the pool: the daemon has to keep it until this process ends
        if self._wake.fileno() >= 0:
            self._wake.send(b"x")
            self._thread.join()
            self._sockets.close()
            self.pools.clear()

    def abandon(self) -> None:
        """Close a session whose model was garbage-collected.

        The collector runs on any thread and at any place, so this takes no lock and waits for nobody.
        """
        if not self.forked and self._wake.fileno() >= 0:
            self._abandoned = True
            self._wake.send(b"x")

    def _hang_up(self) -> None:
        """Let the daemon know that nobody answers here any more, once nothing is computed out of its pools."""
        with self._forward:
            if self._settled and self._line.fileno() >= 0:
                with contextlib.suppress(OSError):  # it may have hung up itself
                    self._line.shutdown(socket.SHUT_RDWR)


def _void_after_fork() -> None:
    """In a forked child sessions are the parent's: hang up nothing, send nothing, refuse to compute."""
    for session in _sessions:
        session._closed = SessionClosed(_FORKED)
        session._forward = threading.Lock()  # the parent's may be held by a thread that does not exist here
        # The parent's death must reach the daemon as an end of file, so the child may not hold the line open.
        for end in (session._line, session._wake, session._woken):
            end.close()


def close_all() -> None:
    """Close every session of this process (at exit)."""
    for session in list(_sessions):
        session.close()


os.register_at_fork(after_in_child=_void_after_fork)
