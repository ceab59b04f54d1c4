"""systemd's words: an agent as a user unit of the same meaning as launchd's, the orders of systemctl, what it tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from expertd.launchd.agent import END_S, OPEN_FILES, Agent
from expertd.launchd.manager import Found
from expertd.launchd.steps import Run, Step

SYSTEMCTL: Final = ("systemctl", "--user")

ASKED: Final = ("LoadState", "ActiveState", "MainPID", "ExecMainCode", "ExecMainStatus", "UnitFileState")
RESTART_S: Final = 2
"""From a failure to the next start, however long it had run; sessions wait for that in the middle of a token."""
NOT_FAILED: Final = (1,)
"""``systemctl reset-failed`` of a unit that it has nothing to tell about."""
KILLED: Final = ("2", "3")
"""``ExecMainCode`` of a process that a signal ended (CLD_KILLED, CLD_DUMPED)."""


@dataclass(frozen=True)
class Systemd:
    """The user's systemd.

    Attributes:
        folder: where the user's units are, ``~/.config/systemd/user``.
    """

    folder: Path

    name = "systemd"

    def label(self, agent: Agent) -> str:
        """``expertd-daemon.service``, with the home's key in it if there is one."""
        return "-".join(part for part in ("expertd", agent.name, agent.key) if part) + ".service"

    def file(self, agent: Agent) -> Path:
        return self.folder / self.label(agent)

    def render(self, agent: Agent) -> bytes:
        """The unit.  ``StartLimitIntervalSec=0``: a row of failures is ended by ``protocol.quick_deaths``."""
        soft, hard = OPEN_FILES
        environment = [f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(agent.environment.items())]
        lines = [
            "[Unit]",
            f"Description={_plain(agent.description)}",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            "Type=exec",
            f"ExecStart={' '.join(_quoted(argument.replace('$', '$$')) for argument in agent.arguments)}",
            *environment,
            "WorkingDirectory=/",
            "Restart=on-failure",
            f"RestartSec={RESTART_S}",
            f"TimeoutStopSec={END_S}",
            # Its children are its own to end; what is left after that is killed.
            "KillMode=mixed",
            f"LimitNOFILE={soft}:{hard}",
            f"StandardOutput=append:{_plain(str(agent.log))}",
            f"StandardError=append:{_plain(str(agent.log))}",
            "",
            "[Install]",
            "WantedBy=default.target",
        ]
        return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")

    # -- asking --------------------------------------------------------------------------------------------------------

    def probe(self) -> tuple[str, ...]:
        """A command that fails where this user has no systemd."""
        return *SYSTEMCTL, "show", "--property=Version"

    def ask(self, agent: Agent) -> tuple[str, ...]:
        return *SYSTEMCTL, "show", self.label(agent), f"--property={','.join(ASKED)}"

    def understand(self, status: int, said: str) -> Found:
        """What ``ask`` has told: lines ``KEY=VALUE``."""
        told = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        if status != 0:
            return Found()
        pid, ended = int(told.get("MainPID") or 0), int(told.get("ExecMainStatus") or 0)
        code = told.get("ExecMainCode", "0")
        last = None if code == "0" else -ended if code in KILLED else ended
        active = told.get("ActiveState") not in ("inactive", "failed")
        enabled = told.get("UnitFileState") == "enabled"
        return Found(loaded=enabled, active=active, pid=pid or None, last_status=last)

    # -- ordering ------------------------------------------------------------------------------------------------------

    def load(self, agent: Agent) -> list[Step]:
        """Start the agent now, and at each login."""
        return [Run((*SYSTEMCTL, "enable", "--now", self.label(agent)))]

    def unload(self, agent: Agent) -> list[Step]:
        """End the agent, start it no more at login, and forget how it ended."""
        return [
            Run((*SYSTEMCTL, "disable", "--now", self.label(agent))),
            Run((*SYSTEMCTL, "reset-failed", self.label(agent)), NOT_FAILED),
        ]

    def files_changed(self) -> list[Step]:
        return [Run((*SYSTEMCTL, "daemon-reload"))]

    def start_command(self, agent: Agent) -> tuple[str, ...]:
        """Starts it; leaves alone what runs."""
        return *SYSTEMCTL, "start", self.label(agent)

    def start(self, agent: Agent, found: Found) -> list[Step]:
        return [Run(self.start_command(agent))] if found.loaded else self.load(agent)

    def stop(self, agent: Agent) -> list[Step]:
        """End it; the next login starts it again."""
        return [Run((*SYSTEMCTL, "stop", self.label(agent)))]

    def restart(self, agent: Agent, found: Found) -> list[Step]:
        return [Run((*SYSTEMCTL, "restart", self.label(agent)))]


def _plain(text: str) -> str:
    """``text`` with systemd's specifiers (%h and so on) taken for what they are."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """One word of a command line or of ``Environment=``."""
    return '"' + _plain(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
