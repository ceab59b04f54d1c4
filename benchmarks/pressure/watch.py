"""Looks from outside, many times a second: at what the cgroup uses, and at what the daemon says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from benchmarks.pressure.cgroup import Cgroup
from benchmarks.pressure.stalls import Reads
from expertd.protocol.connection import Connection
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.paths import Home

SAMPLE_S = 0.05
"""From one look to the next: 20 a second cost the daemon one or two percent of a core."""


@dataclass
class Sample:
    """One look: what was there at some moment between ``asked`` and ``at``."""

    asked: float
    at: float
    shmem: int
    left: int
    status: Status


@dataclass
class Watch:
    """Looks every SAMPLE_S, on a thread of its own; a daemon that is away has no samples meanwhile."""

    home: Home
    cgroup: Cgroup
    samples: list[Sample] = field(default_factory=list)

    def run(self, ending: threading.Event) -> None:
        """Until ``ending`` is set."""
        while not ending.wait(SAMPLE_S):
            with suppress(ExpertdError), Connection(self.home.daemon_socket, "benchmark") as connection:
                while not ending.wait(SAMPLE_S):
                    asked = time.monotonic()
                    status = connection.ask(AskStatus(), Status)
                    self.samples.append(
                        Sample(asked, time.monotonic(), self.cgroup.shmem, self.cgroup.left, status)
                    )

    def wait(self, condition: Callable[[Sample], bool], seconds: float) -> float | None:
        """When a sample fulfils ``condition``; None if none does in so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.samples and condition(self.samples[-1]):
                return self.samples[-1].at
            time.sleep(SAMPLE_S / 2)
        return None

    @property
    def reads(self) -> list[Reads]:
        """What each session has waited for reads; a worker that is started anew has another session."""
        found: dict[int, Reads] = {}
        for sample in self.samples:
            for session in (session for model in sample.status.models for session in model.sessions):
                found.setdefault(session.id, Reads()).add(sample.asked, sample.at, session.read_wait_s)
        return list(found.values())
