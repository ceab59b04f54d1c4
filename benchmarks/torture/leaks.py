"""What a daemon holds, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.torture.stage import Stage
from expertd.protocol.errors import ExpertdError
from tools.memory import memory_of
from tools.stage import ask_status

SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Held:
    """What a daemon holds at one moment: open descriptors, anonymous bytes, sessions, models."""

    pid: int
    descriptors: int
    anonymous: int
    sessions: int
    models: int

    def __str__(self) -> str:
        return (
            f"{self.descriptors} descriptors, {self.anonymous / 1e6:.1f} MB, {self.sessions} sessions, "
            f"{self.models} models"
        )

    @property
    def not_of_use(self) -> int:
        """All but those of sessions (a lifeline, two connections) and of models (a file, and two of a pool)."""
        return self.descriptors - 3 * self.sessions - 3 * self.models


def held_by(stage: Stage, pid: int) -> Held | None:
    """What daemon ``pid`` holds, or None if it does not answer."""
    try:
        status = ask_status(stage.home)
        sessions = sum(len(model.sessions) for model in status.models)
        return Held(pid, _steady_descriptors(pid), memory_of(pid).anonymous, sessions, len(status.models))
    except (ExpertdError, psutil.Error, OSError):
        return None


def _steady_descriptors(pid: int) -> int:
    """The fewest of a second: connections come and go (the one that asked for the status has just gone), leaks stay."""
    counts = []
    for _ in range(10):
        counts.append(psutil.Process(pid).num_fds())
        time.sleep(0.1)
    return min(counts)


def descriptors_by_kind(pid: int) -> dict[str, int]:
    """How many descriptors of what a process has open, for the story of a leak."""
    kinds: dict[str, int] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            kind = str(link.readlink()).split(":")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def processes(stage: Stage) -> list[str]:
    """Processes of this run that still live: children of the harness, and whoever has its home in the environment."""
    left = {child.pid: child for child in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("EXPERTD_HOME") == str(stage.home.root) and process.pid != psutil.Process().pid:
                left[process.pid] = process
    found = []
    for process in left.values():
        with contextlib.suppress(psutil.Error):
            found.append(f"{process.pid} ({process.status()}): {' '.join(process.cmdline())[:120]}")
    return found


def segments(stage: Stage) -> list[str]:
    """Shared memory that is left when all processes have ended: names, and in a private /dev/shm also bytes."""
    if not stage.private_shm:
        return [path.name for path in SHM.glob("expertd*")]
    found = [path.name for path in SHM.iterdir()]
    used = shutil.disk_usage(SHM).used
    return found if found or not used else [f"{used} bytes without a name"]
