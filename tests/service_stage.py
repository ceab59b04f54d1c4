"""Service managers for tests: stand-ins for ``launchctl`` and ``systemctl`` that record what they are told and really
start and end what they are given; and whether a real systemd user manager is there.

The stand-ins are executables on PATH, and do what the real ones do as far as ``expertd.launchd`` relies on it: exit
statuses, what they print, and that ``bootout`` may return before the process has ended.  Knobs: ``fail`` makes calls
fail that begin with given words.  They start nothing again that has ended.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from expertd.clients.cli import main
from expertd.launchd import manager
from expertd.launchd.launchd import Launchd
from expertd.launchd.systemd import Systemd
from expertd.protocol.paths import Home
from tests.service_stand_in import UID, await_end, read_agents, runs, send

ROOT = Path(__file__).parents[1]

RUN = {
    "launchctl": "from expertd.launchd.launchd import Launchd; there = Launchd(501, folder)",
    "systemctl": "from expertd.launchd.systemd import Systemd; there = Systemd(folder)",
}
PROGRAM = """
import sys
from pathlib import Path
from expertd.launchd import manager
folder = Path(sys.argv.pop(1))
{run}
manager.system_manager = lambda: there
from expertd.clients.cli import main
main(prog_name="expertd")
"""
"""The command ``expertd`` with the manager that this test wants, whatever the machine has."""


class Stage:
    """One home, one stand-in, and ``expertd`` commands that meet both."""

    def __init__(self, home: Home, tool: str, folder: Path) -> None:
        self.home = home
        self.tool = tool
        self.definitions = folder / "definitions"
        self._state = folder / "state"
        self._state.mkdir()
        bin = folder / "bin"
        bin.mkdir()
        script = bin / tool
        module = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.service_stand_in import stand_in"
        bare = " -S" if sys.platform == "linux" else ""  # each call is a process, and on Linux none needs a package
        script.write_text(f"#!{sys.executable}{bare}\n{module}\nstand_in({tool!r}, {str(self._state)!r})\n")
        script.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EXPERTD_", "HF_"))}
        self.manager = Launchd(UID, self.definitions) if tool == "launchctl" else Systemd(self.definitions)
        self.environment = kept | {"PATH": f"{bin}:{os.environ['PATH']}", "EXPERTD_HOME": str(home.root)}

    def expertd(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One command, run to its end, in this process: that is quicker by far than ``process``."""
        theirs: dict[str, str | None] = dict.fromkeys(name for name in os.environ if name not in self.environment)
        before = manager.system_manager
        manager.system_manager = lambda: self.manager
        try:
            done = CliRunner(env=theirs | self.environment | environment).invoke(
                main, arguments, prog_name="expertd", catch_exceptions=False
            )
        finally:
            manager.system_manager = before
        return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)

    def process(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The same in a process of its own, as a user calls it."""
        program = PROGRAM.format(run=RUN[self.tool])
        return subprocess.run(
            [sys.executable, "-c", program, str(self.definitions), *arguments],
            capture_output=True, text=True, timeout=90, env=self.environment | environment,
        )  # fmt: skip

    def done(self, *arguments: str, **environment: str) -> list[str]:
        """The lines of a command that has to succeed."""
        done = self.expertd(*arguments, **environment)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout.splitlines()

    def calls(self) -> list[str]:
        """What the stand-in was told since the last ``calls``, without mere questions."""
        path = self._state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if line.split()[0] not in ("print", "print-disabled", "show")]

    def fail(self, begin: str, status: int, said: str) -> None:
        """Let calls that begin with ``begin`` fail, until ``repair``."""
        (self._state / "fail").write_text(json.dumps([begin, status, said]))

    def kills_at_once(self) -> None:
        """From now on an agent that is to end has no time for it (a plist's ExitTimeOut, which is long)."""
        (self._state / "impatient").touch()

    def log_in(self) -> None:
        """Start what is installed, as the manager does at a login."""
        for file in sorted(self.definitions.iterdir()):
            words = ["launchctl", "bootstrap", f"gui/{UID}", str(file)]
            if self.tool == "systemctl":
                words = ["systemctl", "--user", "start", file.name]
            subprocess.run(words, check=True, env=self.environment)

    def repair(self) -> None:
        (self._state / "fail").unlink()

    def state(self) -> dict[str, Any]:
        return read_agents(self._state)

    def pid(self, name: str = "daemon") -> int:
        """Process of an agent that runs."""
        (found,) = [one["pid"] for label, one in self.state().items() if name in label]
        assert runs(found)
        return int(found)

    def end(self) -> None:
        """End whatever was started."""
        for one in self.state().values():
            for number in (signal.SIGTERM, signal.SIGKILL):
                send(one["pid"], number)
                await_end(one["pid"], 10.0)


@contextmanager
def stage(home: Home, tool: str) -> Iterator[Stage]:
    """A stage whose processes have ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="expertd-", dir="/tmp"))
    try:
        made = Stage(home, tool, folder)
        try:
            yield made
        finally:
            made.end()
    finally:
        shutil.rmtree(folder)


# -- a real systemd ----------------------------------------------------------------------------------------------------


def user_manager_answers() -> bool:
    """Whether this user's own systemd answers.

    A test never starts one: as root it would take all processes of the machine into control groups of its own.
    """
    command = ["systemctl", "--user", "show", "--property=Version"]
    return shutil.which("systemctl") is not None and subprocess.run(command, capture_output=True).returncode == 0
