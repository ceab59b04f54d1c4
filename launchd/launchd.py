"""launchd's words: an agent as a property list, the orders of launchctl, and what it tells.

The keys are those of launchd.plist(5).  ``ProcessType`` is Interactive and there is no ``LowPriorityIO``: as
Background, and somewhat as Standard, launchd slows down just the reads from the SSD that this is about.
"""

from __future__ import annotations

import plistlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from expertd.launchd.agent import END_S, OPEN_FILES, Agent
from expertd.launchd.manager import Found
from expertd.launchd.steps import AwaitEnd, Run, Step

THROTTLE_S: Final = 10
"""From one start to the next at least; one that ran for longer is started again at once."""
NO_SUCH_SERVICE: Final = 113
"""``launchctl print``: could not find the service."""
NO_SUCH_PROCESS: Final = 3
"""``launchctl bootout``: no such process, that is, no such service."""
IN_PROGRESS: Final = 36
"""``launchctl bootout``: the order was taken, and the process has not ended yet."""
AT_REST: Final = ("not running", "waiting", "exited")
"""States, as ``launchctl print`` calls them, in which nothing runs and nothing will without an order.  An agent between
two starts is in none of them (``spawn scheduled``)."""


@dataclass(frozen=True)
class Launchd:
    """launchd as the user ``uid`` sees it.

    Attributes:
        folder: where the user's agents are, ``~/Library/LaunchAgents``.
    """

    uid: int
    folder: Path

    name = "launchd"

    def label(self, agent: Agent) -> str:
        """``expertd.daemon``, with the home's key behind it if there is one."""
        return ".".join(part for part in ("expertd", agent.name, agent.key) if part)

    def file(self, agent: Agent) -> Path:
        return self.folder / f"{self.label(agent)}.plist"

    def render(self, agent: Agent) -> bytes:
        """The property list, in XML, always the same for the same agent."""
        soft, hard = OPEN_FILES
        keys: dict[str, Any] = {
            "Label": self.label(agent),
            "ProgramArguments": list(agent.arguments),
            "WorkingDirectory": "/",
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": THROTTLE_S,
            "ExitTimeOut": END_S,
            "ProcessType": "Interactive",
            "StandardOutPath": str(agent.log),
            "StandardErrorPath": str(agent.log),
            "SoftResourceLimits": {"NumberOfFiles": soft},
            "HardResourceLimits": {"NumberOfFiles": hard},
        }
        if agent.environment:
            keys["EnvironmentVariables"] = dict(agent.environment)
        return plistlib.dumps(keys)

    # -- asking --------------------------------------------------------------------------------------------------------

    def probe(self) -> tuple[str, ...]:
        """A command that fails where there is no launchd for this user."""
        return "launchctl", "print-disabled", self._domain

    def ask(self, agent: Agent) -> tuple[str, ...]:
        return "launchctl", "print", self._target(agent)

    def understand(self, status: int, said: str) -> Found:
        """What ``ask`` has told.  Its text is for people, so only four lines of it are looked for."""
        if status != 0:
            return Found()
        pid = re.search(r"^\s*pid = (\d+)$", said, re.MULTILINE)
        end = re.search(r"^\s*last exit code = (\d+)\b", said, re.MULTILINE)
        signal = re.search(r"^\s*last terminating signal = .*?(\d+)\s*$", said, re.MULTILINE)
        last = -int(signal[1]) if signal else int(end[1]) if end else None
        state = re.search(r"^\s*state = (.+?)\s*$", said, re.MULTILINE)  # the first one; below are those of sockets
        active = state is not None and state[1] not in AT_REST
        return Found(loaded=True, active=active, pid=int(pid[1]) if pid else None, last_status=last)

    # -- ordering ------------------------------------------------------------------------------------------------------

    def load(self, agent: Agent) -> list[Step]:
        """Make the agent known; it starts at once, and at each login."""
        hint = (
            "if System Settings, General, Login Items has it turned off, turn it on; over ssh, first log in at the "
            "screen too"
        )
        return [Run(("launchctl", "bootstrap", self._domain, str(self.file(agent))), hint=hint)]

    def unload(self, agent: Agent) -> list[Step]:
        """End the agent and forget it."""
        return [
            Run(("launchctl", "bootout", self._target(agent)), (NO_SUCH_PROCESS, NO_SUCH_SERVICE, IN_PROGRESS)),
            AwaitEnd(agent, END_S + 10),
        ]

    def files_changed(self) -> list[Step]:
        return []

    def start_command(self, agent: Agent) -> tuple[str, ...]:
        """Starts what is loaded; leaves alone what runs."""
        return "launchctl", "kickstart", self._target(agent)

    def start(self, agent: Agent, found: Found) -> list[Step]:
        return [Run(self.start_command(agent))] if found.loaded else self.load(agent)

    def stop(self, agent: Agent) -> list[Step]:
        """The same as ``unload``: what is loaded, launchd would start again when it fails."""
        return self.unload(agent)

    def restart(self, agent: Agent, found: Found) -> list[Step]:
        """End it in order, and make it known anew: only ``bootout`` gives it its time, and then kills what hangs."""
        return [*(self.unload(agent) if found.loaded else ()), *self.load(agent)]

    @property
    def _domain(self) -> str:
        return f"gui/{self.uid}"

    def _target(self, agent: Agent) -> str:
        return f"{self._domain}/{self.label(agent)}"
