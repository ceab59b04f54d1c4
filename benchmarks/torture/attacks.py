"""What is done to the daemon, its workers and what they live on.  When, and how often, is ``schedule``.

Every attack that lasts says how it is undone; nothing here waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import zmq

from benchmarks._junk import Junk
from benchmarks.torture.damage import KINDS, Checkpoint, Undo
from benchmarks.torture.journal import Journal
from benchmarks.torture.stage import Stage, Supervisor
from benchmarks.torture.workers import Asker, Client, Program
from expertd.protocol import PROTOCOL
from expertd.protocol.connection import Connection
from expertd.protocol.errors import ExpertdError
from expertd.protocol.lifeline import GREETING
from expertd.protocol.messages import BudgetSet, SetBudget

SHM = Path("/dev/shm")
FRAMES = 40
"""Bad frames for each socket in one attack."""
FAULTS = (40, 128)
"""Shares of reads that fail, in 256ths."""


@dataclass
class Cast:
    """Everybody who is in it."""

    stage: Stage
    journal: Journal
    supervisor: Supervisor
    programs: list[Program]
    clients: list[Client]
    chance: random.Random
    zygote_pid: int

    @property
    def askers(self) -> list[Asker]:
        return [*self.programs, *self.clients]


@dataclass(frozen=True)
class Under:
    """An attack that lasts: undo it after so many seconds."""

    undo: Undo
    lasts_s: float


class Attacks:
    """Each method is one kind of attack: it returns False if it could not be carried out now."""

    def __init__(self, cast: Cast) -> None:
        self._cast = cast
        self._chance = cast.chance
        self._junk = Junk(cast.chance.randrange(2**32))
        self._checkpoint = Checkpoint(cast.stage.model / "model.safetensors", cast.stage.other / "model.safetensors")
        self._context = zmq.Context()
        self.stopped: set[int] = set()

    def close(self) -> None:
        self._context.destroy(linger=0)

    # -- kills ---------------------------------------------------------------------------------------------------------

    def kill_program(self) -> bool:
        return self._killed("kill_program", self._chance.choice(self._cast.programs))

    def kill_gateway_worker(self) -> bool:
        return self._killed("kill_gateway_worker", self._chance.choice(self._cast.clients))

    def kill_daemon(self) -> bool:
        return self._kill_daemon("kill_daemon", leave=False)

    def kill_daemon_left_to_workers(self) -> bool:
        return self._kill_daemon("kill_daemon_left_to_workers", leave=True)

    def restart_program(self) -> bool:
        program = self._chance.choice(self._cast.programs)
        program.restart()
        return self._did("restart_program", program.name)

    def _killed(self, kind: str, asker: Asker) -> bool:
        pid = asker.kill()
        if pid is None:
            return False
        self._cast.journal.kills += 1
        return self._did(kind, f"{asker.name}, process {pid}")

    def _kill_daemon(self, kind: str, *, leave: bool) -> bool:
        pid = self._cast.supervisor.kill(leave=leave)
        if pid is None:
            return False
        for program in self._cast.programs:
            program.daemon_died("by_workers" if leave else "supervised")
        self._cast.journal.kills += 1
        return self._did(kind, f"process {pid}")

    # -- stops ---------------------------------------------------------------------------------------------------------

    def stop_program(self) -> Under | None:
        asker = self._chance.choice(self._cast.programs)
        return self._stopped("stop_program", {asker.pid()}, [asker])

    def stop_gateway_worker(self) -> Under | None:
        asker = self._chance.choice(self._cast.clients)
        return self._stopped("stop_gateway_worker", {asker.pid()}, [asker])

    def stop_daemon(self) -> Under | None:
        return self._stopped("stop_daemon", {self._cast.supervisor.pid()}, self._cast.askers)

    def stop_everybody(self) -> Under | None:
        """The machine sleeps: nothing may fail by that alone."""
        cast = self._cast
        everybody = {asker.pid() for asker in cast.askers} | {client.gateway.pid for client in cast.clients}
        return self._stopped("stop_everybody", everybody | {cast.supervisor.pid(), cast.zygote_pid}, cast.askers)

    def _stopped(self, kind: str, who: Iterable[int | None], affected: list[Asker]) -> Under | None:
        pids = [pid for pid in who if pid is not None and pid not in self.stopped]
        if not pids:
            return None
        began = time.monotonic()
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        self.stopped.update(pids)

        def go_on() -> None:
            for pid in pids:
                _signal(pid, signal.SIGCONT)
            self.stopped.difference_update(pids)
            for asker in affected:
                asker.stopped_s += time.monotonic() - began

        self._cast.journal.stops += 1
        self._did(kind, f"processes {pids}")
        return Under(go_on, self._chance.uniform(2.5, 4.5))

    # -- what they live on ---------------------------------------------------------------------------------------------

    def checkpoint(self) -> Under:
        kind = self._chance.choice(KINDS)
        undo = self._checkpoint.damage(kind, self._chance)
        return self._began(f"checkpoint_{kind}", undo, self._chance.uniform(0.3, 2.0))

    def failing_reads(self) -> Under:
        self._cast.stage.set_faults(self._chance.choice(FAULTS))
        return self._began("failing_reads", lambda: self._cast.stage.set_faults(0), self._chance.uniform(0.5, 2.0))

    def shm_full(self) -> Under | None:
        if not self._cast.stage.private_shm:
            return None
        filler = SHM / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(SHM).free)
        return self._began("shm_full", lambda: filler.unlink(missing_ok=True), self._chance.uniform(1.0, 3.0))

    def descriptors_exhausted(self) -> Under | None:
        pid = self._cast.supervisor.pid()
        if pid is None:
            return None
        try:
            used = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()) + 1
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, before[1]))
        except OSError:
            return None
        visitors = [_dial(path) for path in (self._cast.stage.home.daemon_socket, self._lifeline) for _ in range(5)]

        def undo() -> None:
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            for visitor in visitors:
                visitor.close()

        return self._began("descriptors_exhausted", undo, self._chance.uniform(0.5, 2.0))

    def budget(self) -> Under | None:
        size = self._cast.stage.budget
        if not self._set_budget(self._chance.choice((size // 2, size * 2))):
            return None
        return self._began("budget", lambda: _ignore(self._set_budget(size)), self._chance.uniform(1.0, 4.0))

    def _set_budget(self, size: int) -> bool:
        try:
            with Connection(self._cast.stage.home.daemon_socket, "torture", handshake_s=0.5) as connection:
                connection.ask(SetBudget(budget=size), BudgetSet, timeout_s=0.5)
        except ExpertdError:
            return False
        return True

    # -- bad frames ----------------------------------------------------------------------------------------------------

    @property
    def _lifeline(self) -> Path:
        return self._cast.stage.home.lifeline_socket

    def frames(self) -> bool:
        home = self._cast.stage.home
        for client in self._cast.clients:
            self._bad_frames(home.gateway_socket(client.gateway.pid))
            self._bad_http(client.gateway.port)
        self._bad_frames(home.daemon_socket)
        self._bad_greetings()
        return self._did("frames")

    def _bad_frames(self, path: Path) -> None:
        """Messages that are none, to a ZeroMQ socket; and bytes that are not even ZeroMQ's."""
        with self._context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 100)
            dealer.setsockopt(zmq.SNDTIMEO, 100)
            dealer.connect(f"ipc://{path}")
            with contextlib.suppress(zmq.Again):
                for frame in self._junk.frames(FRAMES):
                    dealer.send(frame)
                dealer.send_multipart([b"two", b"frames"])
        with _dial(path) as raw, contextlib.suppress(OSError):
            raw.send(b"\xff\0\0\0\0\0\0\0\1\x7f\3" + secrets.token_bytes(self._chance.randrange(200)))

    def _bad_greetings(self) -> None:
        good = GREETING.pack(PROTOCOL, secrets.token_bytes(16))
        for said in (b"", good[:7], secrets.token_bytes(20), GREETING.pack(PROTOCOL + 1, bytes(16)), good + b"more"):
            with _dial(self._lifeline) as line, contextlib.suppress(OSError):
                line.send(said)

    def _bad_http(self, port: int) -> None:
        bodies = (b"{", b"[]", json.dumps({"model": "model", "messages": 7}).encode(), self._junk.frame())
        said = [
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            for body in bodies
        ]
        said += [b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
                 secrets.token_bytes(100)]  # fmt: skip
        for request in said:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.2) as connection:
                connection.sendall(request)

    # -- notes ---------------------------------------------------------------------------------------------------------

    def _did(self, kind: str, whom: str = "") -> bool:
        self._cast.journal.attack(kind, whom)
        return True

    def _began(self, kind: str, undo: Undo, lasts_s: float) -> Under:
        self._cast.journal.attack(kind, f"for {lasts_s:.1f} s")
        return Under(undo, lasts_s)


Attack = Callable[[], "Under | bool | None"]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _dial(path: Path) -> socket.socket:
    """A connection to a Unix socket, or one to nowhere if nobody listens there now."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    with contextlib.suppress(OSError):
        connection.connect(str(path))
    return connection


def _ignore(_: object) -> None:
    """An undo has no result."""

