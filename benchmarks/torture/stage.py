"""Where everything is, and the processes that are attacked: the daemon and its supervisor, the gateways, the zygote."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.torture.journal import Journal
from expertd.protocol.paths import Home

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.03
LEFT_TO_WORKERS_S = 8.0
READY_S = 60.0
OUT_OF_DESCRIPTORS = "Too many open files (src/"
"""What libzmq says when it aborts because a connection could not be accepted."""


@dataclass(frozen=True)
class Stage:
    """One run: its folder, its home, the checkpoint that all use, the one that may take its place, the budget."""

    home: Home
    folder: Path
    budget: int
    private_shm: bool

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def other(self) -> Path:
        return self.folder / "other"

    @property
    def faults(self) -> Path:
        """One byte: the share of reads that fail, in 256ths (``faulty``)."""
        return self.folder / "faults"

    def set_faults(self, rate: int) -> None:
        """Let ``rate`` of 256 reads fail.  Daemons have the file mapped, so it may not be shorter for an instant."""
        with self.faults.open("r+b" if self.faults.exists() else "wb") as file:
            file.write(bytes([rate]))

    @property
    def workers_log(self) -> Path:
        return self.home.root / "log" / "torture-workers.log"

    def environment(self) -> dict[str, str]:
        return {**os.environ, "EXPERTD_HOME": str(self.home.root), "TOKENIZERS_PARALLELISM": "false"}

    def start(self, *module: str, stdin: int = subprocess.DEVNULL, stdout: int | None = None) -> subprocess.Popen[str]:
        """Start ``python -m module...`` from the repository's root; its complaints go to the workers' log."""
        command = [sys.executable, "-m", *module]
        with self.workers_log.open("a") as log:
            return subprocess.Popen(
                command, stdin=stdin, stdout=log if stdout is None else stdout, stderr=log, cwd=ROOT, text=True,
                env=self.environment(),
            )  # fmt: skip


class Supervisor(threading.Thread):
    """Keeps a daemon running, as launchd would; now and then it leaves that to the workers.

    The daemon is whoever is named in the home's lock file, whether this thread or a worker has started it.
    """

    def __init__(self, stage: Stage, journal: Journal) -> None:
        super().__init__(name="supervisor", daemon=True)
        self._stage = stage
        self._journal = journal
        self._own: subprocess.Popen[bytes] | None = None
        self._status: int | None = None
        self._ending = threading.Event()
        self._expected_dead: set[int] = set()
        self._leave_until = 0.0
        self.crashes = 0
        self.started_by_workers = 0
        self.out_of_descriptors = 0  # deaths

    def pid(self) -> int | None:
        """The daemon that runs now."""
        try:
            named = int(self._stage.home.daemon_lock.read_text())
            process = psutil.Process(named)
            alive = process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return named if alive and process.environ().get("EXPERTD_HOME") == str(self._stage.home.root) else None
        except (OSError, ValueError, psutil.Error):
            return None

    def kill(self, *, leave: bool) -> int | None:
        """Kill -9 the daemon; ``leave``: the next one is for the workers to start."""
        pid = self.pid()
        if pid is not None:
            self._expected_dead.add(pid)
            if leave:
                self._leave_until = time.monotonic() + LEFT_TO_WORKERS_S
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def run(self) -> None:
        known: int | None = None
        while not self._ending.wait(POLL_S):
            if self._own is not None and self._own.poll() is not None:
                self._status, self._own = self._own.returncode, None
            pid = self.pid()
            if pid is None:
                if known is not None and known not in self._expected_dead:
                    self._died_by_itself(known)
                known = None
                if self._own is None and time.monotonic() >= self._leave_until:
                    self._own = self._launch()
            elif pid != known:
                if known is not None and known not in self._expected_dead:
                    self._died_by_itself(known)
                by_worker = self._own is None or self._own.pid != pid
                self.started_by_workers += by_worker
                self._journal.note(f"daemon {pid}, started by {'a worker' if by_worker else 'the supervisor'}")
                known = pid

    def end(self) -> None:
        """Stop supervising, and end the daemon in order."""
        self._ending.set()
        self.join()
        deadline = time.monotonic() + 15
        if (pid := self.pid()) is not None:
            os.kill(pid, signal.SIGTERM)
        while self.pid() is not None and time.monotonic() < deadline:
            if self._own is not None:
                self._own.poll()
            time.sleep(POLL_S)
        if self._own is not None:
            self._own.wait(15)

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.torture.faulty", "--budget", str(self._stage.budget)]
        command += ["--faults", str(self._stage.faults)]
        with self._stage.home.daemon_log.open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=self._stage.environment()
            )

    def _died_by_itself(self, pid: int) -> None:
        """A daemon ended that nobody killed: a crash, unless a worker that had started it has told it to end."""
        log = self._stage.home.daemon_log.read_text(errors="replace")
        last = f" daemon[{pid}] the daemon has ended"
        if last in log and "has an error in itself" not in log[-20000:]:
            self._journal.note(f"daemon {pid} has ended in order")
            return
        if OUT_OF_DESCRIPTORS in log[-20000:]:
            self.out_of_descriptors += 1
            self._journal.note(f"libzmq has aborted daemon {pid}, which had no descriptors left")
            return
        self.crashes += 1
        status = f"status {self._status}" if self._status is not None else "a status that its starter knows"
        self._journal.tell(f"THE DAEMON {pid} DIED by itself, with {status}; its log ends with:\n{log[-3000:]}")


class Gateway:
    """One ``expertd serve`` on a free port.  Its worker is its child with ``--gateway`` on the command line."""

    def __init__(self, stage: Stage, name: str) -> None:
        self.name = name
        self._stage = stage
        budget = str(stage.budget)
        self.process = stage.start(
            "expertd.clients.cli", "serve", str(stage.model), "--port", "0", "--budget", budget, stdout=subprocess.PIPE
        )
        self.pid = self.process.pid
        self.port = 0

    def wait_ready(self) -> None:
        """Wait for the line that it prints when it takes requests."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if " at http://" not in line:
            raise RuntimeError(f"a gateway did not start: {self._stage.workers_log.read_text()[-2000:]}")
        self.port = int(line.rstrip().split(":")[-1].removesuffix("/v1"))

    def worker(self) -> int | None:
        """The process id of its worker, while it has one."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children():
                with contextlib.suppress(psutil.Error):
                    if "--gateway" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                        return int(child.pid)
        return None

    def end(self) -> None:
        """End it in order."""
        self.process.terminate()
        try:
            self.process.wait(45)
        finally:
            self.process.kill()
            self.process.wait()


class Zygote:
    """Starts program workers; knows how each ended."""

    def __init__(self, stage: Stage) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = stage.start(
                "benchmarks.torture.zygote", str(stage.model), str(stage.budget), stdin=theirs.fileno()
            )
        self.pid = self.process.pid
        self._changed = threading.Condition()
        self._starting = threading.Lock()
        self._started: list[int] = []
        self._statuses: dict[int, int] = {}
        self._ready = False
        self._thread = threading.Thread(target=self._listen, name="zygote", daemon=True)
        self._thread.start()

    def fork(self) -> tuple[int, socket.socket]:
        """A new program worker: its process id and the socket that it is asked over."""
        ours, theirs = socket.socketpair()
        with self._starting, theirs:
            socket.send_fds(self._socket, [b"w"], [theirs.fileno()])
            with self._changed:
                if not self._changed.wait_for(lambda: self._started, READY_S):
                    raise TimeoutError("the zygote forks no worker")
                return self._started.pop(), ours

    def status(self, pid: int, wait_s: float = 10.0) -> int | None:
        """How a worker ended (negative: by a signal), or None if it has not ended in time."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._statuses, wait_s)
            return self._statuses.get(pid)

    def wait_ready(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready, READY_S):
                raise TimeoutError("the zygote is not ready")

    def end(self) -> None:
        """Hang up; it ends its workers and itself."""
        self._socket.shutdown(socket.SHUT_WR)
        self.process.wait(20)

    def _listen(self) -> None:
        with self._socket.makefile() as lines:
            for line in lines:
                said = json.loads(line)
                with self._changed:
                    if "started" in said:
                        self._started.append(said["started"])
                    elif "ended" in said:
                        self._statuses[said["ended"]] = said["status"]
                    else:
                        self._ready = True
                    self._changed.notify_all()
