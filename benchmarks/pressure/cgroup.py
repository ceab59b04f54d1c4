"""A memory cgroup with a hard limit, for the processes of a benchmark (Linux, as root; version 1 or 2)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path("/sys/fs/cgroup")
REMOVE_S, RETRY_S = 10.0, 0.1
"""So long, and so often, it is tried to remove a cgroup: processes that were killed leave it a moment later."""


@dataclass(frozen=True)
class Cgroup:
    """Processes and their memory, seen from outside."""

    folder: Path
    version: int

    def join(self) -> None:
        """Put the calling process into it: for ``preexec_fn``."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def add(self, pid: int) -> None:
        """Put a process into it; what it has allocated stays where it was."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    @property
    def shmem(self) -> int:
        """Bytes of shared memory in it."""
        return self._stat()["total_shmem" if self.version == 1 else "shmem"]

    @property
    def left(self) -> int:
        """Bytes until the limit, with the page cache that can be dropped."""
        stat, prefix = self._stat(), "total_" if self.version == 1 else ""
        droppable = stat[f"{prefix}inactive_file"] + stat[f"{prefix}active_file"]
        v1, v2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
        limit, used = (int((self.folder / name).read_text()) for name in (v1 if self.version == 1 else v2))
        return limit - used + droppable

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel has killed for want of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return _counts(self.folder / name).get("oom_kill", 0)

    def _stat(self) -> dict[str, int]:
        return _counts(self.folder / "memory.stat")


@contextmanager
def limited(limit: int) -> Iterator[Cgroup]:
    """A cgroup that may use ``limit`` bytes; its processes must have ended at the end.

    Raises:
        SystemExit: it cannot be made here.
        RuntimeError: it cannot be removed, because there are processes in it.
    """
    version = 1 if (ROOT / "memory" / "memory.limit_in_bytes").exists() else 2
    parent = ROOT / "memory" if version == 1 else ROOT
    folder = parent / f"expertd-benchmark-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        raise SystemExit(f"this needs a memory cgroup of its own, and {folder} cannot be made: {error}") from error
    try:
        (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit))
        yield Cgroup(folder, version)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a cgroup.

    Raises:
        RuntimeError: there are processes in it, and they stay.
    """
    deadline = time.monotonic() + REMOVE_S
    while True:
        try:
            folder.rmdir()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                there = _inside(folder)
                raise RuntimeError(f"{folder} cannot be removed ({error.strerror}); in it: {there}") from error
            time.sleep(RETRY_S)


def _inside(folder: Path) -> str:
    names = []
    for pid in map(int, (folder / "cgroup.procs").read_text().split()):
        with suppress(psutil.Error):
            names.append(f"process {pid} ({' '.join(psutil.Process(pid).cmdline())})")
    return ", ".join(names) or "no process"


def _counts(path: Path) -> dict[str, int]:
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) == 2}
