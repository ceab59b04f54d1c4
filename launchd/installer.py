"""The shell around the plans: finds what is there, and carries steps out.

What should be done is decided in ``launchd.plans``; what a user is told of it, in ``expertd.clients.cli.service``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from expertd.launchd.agent import END_S, Agent
from expertd.launchd.manager import Found, Manager
from expertd.launchd.plans import Situation
from expertd.launchd.steps import AwaitEnd, GiveWay, RemoveFile, Run, Step, WriteFile
from expertd.protocol.connection import ask_any_version
from expertd.protocol.errors import (
    DaemonBusy,
    DaemonNotRunning,
    ExpertdError,
    ProtocolMismatch,
    ServiceFailed,
    ServiceManagerMissing,
)
from expertd.protocol.messages import AskStatus, Status, Stop, Stopping
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect, lock_holder, stop_daemon
from expertd.protocol.service import read_service

COMMAND_S: Final = END_S + 30
"""A command of the service manager that takes longer has failed.  ``systemctl stop`` waits for the process to end."""
ASK_S: Final = 20
LOOK_S: Final = 0.2
STRANGER_S: Final = 10.0
"""So long a daemon that gives way has to end."""

Tell = Callable[[str], None]


class Installer:
    """One home and one service manager."""

    def __init__(self, home: Home, manager: Manager) -> None:
        self._home = home
        self._manager = manager

    def check(self) -> None:
        """Whether the manager answers.

        Raises:
            ServiceManagerMissing: it does not.
        """
        status, said = _run(self._manager.probe(), ASK_S)
        if status != 0:
            raise ServiceManagerMissing(
                f"{self._manager.name} does not answer this user ({_last(said, status)}); without a service, daemons "
                "start on demand, or run 'expertd daemon run' from what starts your programs"
            )

    def find(self, agent: Agent) -> Found:
        """The state of one agent."""
        status, said = _run(self._manager.ask(agent), ASK_S)
        found = self._manager.understand(status, said)
        with contextlib.suppress(OSError):  # what cannot be read has to be written, and that tells why it cannot
            found = replace(found, definition=self._manager.file(agent).read_bytes())
        return found

    def look(self, agents: Sequence[Agent]) -> Situation:
        """What is there."""
        found = {agent.name: self.find(agent) for agent in agents}
        owner = lock_holder(self._home)
        ours = {state.pid for state in found.values()}
        return Situation(
            found=found,
            record=read_service(self._home),
            counted=frozenset(name for name in found if self._home.service_starts(name).exists()),
            stranger=owner if owner and owner not in ours else None,
        )

    def carry_out(self, steps: Sequence[Step], tell: Tell) -> None:
        """Do the steps in their order, each told before; the first that fails is the last.

        Raises:
            ServiceFailed: a step failed.  What was done before it stays, and the next plan begins there.
        """
        for step in steps:
            tell(str(step))
            match step:
                case WriteFile(path, content):
                    _write(path, content)
                case RemoveFile(path):
                    _remove(path)
                case Run():
                    self._order(step)
                case AwaitEnd():
                    self._await_end(step)
                case GiveWay(pid):
                    self._give_way(pid, tell)

    def _order(self, step: Run) -> None:
        status, said = _run(step.command, COMMAND_S)
        if status == 0 or status in step.tolerated:
            return
        hint = f"{step.hint}; then " if step.hint else ""
        raise ServiceFailed(
            f"'{shlex.join(step.command)}' failed ({_last(said, status)}); {hint}{AGAIN}"
        )

    def _await_end(self, step: AwaitEnd) -> None:
        deadline = time.monotonic() + step.limit_s
        while True:
            found = self.find(step.agent)
            if not found.loaded:
                return
            if time.monotonic() > deadline:
                process = f" (process {found.pid})" if found.pid else ""
                raise ServiceFailed(f"the {step.agent.name}{process} did not end within {step.limit_s} s; {AGAIN}")
            time.sleep(LOOK_S)

    def _give_way(self, pid: int, tell: Tell) -> None:
        """End a daemon that is not the service's; where somebody uses it, say who, and that this is no failure."""
        try:
            stop_daemon(self._home, "cli", if_idle=True, timeout_s=STRANGER_S)
        except DaemonNotRunning as error:
            if lock_holder(self._home) == pid:
                raise ServiceFailed(
                    f"the daemon that runs without the service (process {pid}) does not end ({error.message}); end it "
                    "with 'expertd daemon stop', and try again"
                ) from error
        except DaemonBusy:
            tell(
                f"        the daemon (process {pid}) stays for now: it is used by {_users(self._home)}; the service's "
                "daemon takes its place when it ends"
            )
        except ProtocolMismatch as error:
            if not isinstance(ask_any_version(self._home.daemon_socket, Stop(if_idle=True)), Stopping):
                tell(f"        the daemon (process {pid}) stays for now: {error.message}")


AGAIN: Final = "try again with the same command, or take all of it away with: expertd service uninstall"


def _users(home: Home) -> str:
    try:
        with connect(home, "cli") as connection:
            status = connection.ask(AskStatus(), Status)
    except ExpertdError:
        return "a session"
    users = [f"process {one.pid} ({Path(model.path).name})" for model in status.models for one in model.sessions]
    return ", ".join(users) or "a session"


def _run(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Exit status and output of a command of the system; 127 with the reason if it cannot be run or does not end."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=timeout_s, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return done.returncode, done.stdout


def _last(said: str, status: int) -> str:
    lines = said.strip().splitlines()
    return f"status {status}: {lines[-1].strip()}" if lines else f"status {status}"


def _write(path: Path, content: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_bytes(content)
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise ServiceFailed(
            f"{path} cannot be written ({error.strerror}); see to it that {path.parent} is a folder that you own, and "
            f"{AGAIN}"
        ) from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ServiceFailed(f"{path} cannot be removed ({error.strerror}); remove it, and {AGAIN}") from error
