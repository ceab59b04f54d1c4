"""What a plan is made of.  Each step can be shown before it is done, and tells what to do if it fails.

Pure data; ``launchd.installer`` carries it out.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from expertd.launchd.agent import Agent


@dataclass(frozen=True)
class WriteFile:
    """Put ``content`` into ``path``, whole or not at all."""

    path: Path
    content: bytes

    def __str__(self) -> str:
        return f"write   {self.path}"


@dataclass(frozen=True)
class RemoveFile:
    """Remove ``path``, if it is there."""

    path: Path

    def __str__(self) -> str:
        return f"remove  {self.path}"


@dataclass(frozen=True)
class Run:
    """Run a command of the service manager.

    Attributes:
        tolerated: exit statuses that are as good as success.
        hint: what usually helps if it fails, as the beginning of a sentence's second half; or empty.
    """

    command: tuple[str, ...]
    tolerated: tuple[int, ...] = ()
    hint: str = ""

    def __str__(self) -> str:
        return f"run     {shlex.join(self.command)}"


@dataclass(frozen=True)
class AwaitEnd:
    """Wait until the agent's process has ended, and the manager has forgotten the agent."""

    agent: Agent
    limit_s: int

    def __str__(self) -> str:
        return f"wait    until the {self.agent.name} has ended (at most {self.limit_s} s)"


@dataclass(frozen=True)
class GiveWay:
    """End a daemon that is not the service's, unless somebody uses it."""

    pid: int

    def __str__(self) -> str:
        return f"end     the daemon that runs without the service (process {self.pid}), if nobody uses it"


Step = WriteFile | RemoveFile | Run | AwaitEnd | GiveWay
