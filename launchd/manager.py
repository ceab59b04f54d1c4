"""The seam between launchd and systemd: what is asked of either."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from expertd.launchd.agent import Agent
from expertd.launchd.steps import Step
from expertd.protocol.errors import ServiceManagerMissing


@dataclass(frozen=True)
class Found:
    """What a manager and the disk tell of one agent.

    Attributes:
        loaded: the manager knows it and starts it at login.
        active: it runs, is about to, or is ending.
        pid: its process.
        last_status: how its last process ended; a negative number is a signal; None: none has, or it is not known.
        definition: what is in its file; None: there is none.
    """

    loaded: bool = False
    active: bool = False
    pid: int | None = None
    last_status: int | None = None
    definition: bytes | None = None

    @property
    def runs(self) -> bool:
        return self.active or self.pid is not None


class Manager(Protocol):
    """launchd or systemd.  Nothing here does anything: it names files, commands and steps."""

    @property
    def name(self) -> str: ...

    def label(self, agent: Agent) -> str: ...

    def file(self, agent: Agent) -> Path:
        """Where the agent's definition has to be."""

    def render(self, agent: Agent) -> bytes:
        """The agent's definition."""

    def probe(self) -> tuple[str, ...]:
        """A command that fails where this manager does not answer."""

    def ask(self, agent: Agent) -> tuple[str, ...]:
        """The command that tells an agent's state."""

    def understand(self, status: int, said: str) -> Found:
        """The state from exit status and output of ``ask``; without ``definition``."""

    def load(self, agent: Agent) -> list[Step]: ...

    def unload(self, agent: Agent) -> list[Step]: ...

    def files_changed(self) -> list[Step]:
        """What follows when definitions were written or removed."""

    def start_command(self, agent: Agent) -> tuple[str, ...]:
        """Starts an agent that is loaded, or leaves it alone if it runs."""

    def start(self, agent: Agent, found: Found) -> list[Step]: ...

    def stop(self, agent: Agent) -> list[Step]: ...

    def restart(self, agent: Agent, found: Found) -> list[Step]: ...


def system_manager(environment: Mapping[str, str] = os.environ) -> Manager:
    """The manager of this machine.

    Raises:
        ServiceManagerMissing: there is none that we know.
    """
    from expertd.launchd.launchd import Launchd
    from expertd.launchd.systemd import Systemd

    if sys.platform == "darwin":
        return Launchd(os.getuid(), Path.home() / "Library" / "LaunchAgents")
    if shutil.which("systemctl") is None:
        raise ServiceManagerMissing(
            "this system has neither launchd nor systemd; without a service, daemons start on demand, or run "
            "'expertd daemon run' from what starts your programs"
        )
    folder = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Systemd(folder / "systemd" / "user")
