"""Service managers for tests: stand-ins for ``launchctl`` and ``systemctl`` that record what they are told and really
start and end what they are given; and whether a real systemd user manager is there.

The stand-ins are executables on PATH, and do what the real ones do as far as ``expertd.launchd`` relies on it: exit
statuses, what they print, and that ``bootout`` may return before the process has ended.  Knobs: ``fail`` makes calls
fail that begin with given words.  They start nothing again that has ended.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from expertd.protocol.paths import Home

ROOT = Path(__file__).parents[1]
UID = 501

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
        module = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.service_stage import stand_in"
        script.write_text(f"#!{sys.executable}\n{module}\nstand_in({tool!r}, {str(self._state)!r})\n")
        script.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("EXPERTD_", "HF_"))}
        self.environment = kept | {"PATH": f"{bin}:{os.environ['PATH']}", "EXPERTD_HOME": str(home.root)}

    def expertd(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """One command, run to its end."""
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

    def repair(self) -> None:
        (self._state / "fail").unlink()

    def state(self) -> dict[str, Any]:
        return _read(self._state)

    def pid(self, name: str = "daemon") -> int:
        """Process of an agent that runs."""
        (found,) = [one["pid"] for label, one in self.state().items() if name in label]
        assert runs(found)
        return int(found)

    def end(self) -> None:
        """End whatever was started."""
        for one in self.state().values():
            for number in (signal.SIGTERM, signal.SIGKILL):
                _signal(one["pid"], number)
                _await_end(one["pid"], 10.0)


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


# -- the stand-ins -----------------------------------------------------------------------------------------------------


def stand_in(tool: str, folder: str) -> None:
    """What the executable does: record, fail if it should, else act."""
    state, words = Path(folder), sys.argv[1:]
    if tool == "systemctl":
        assert words.pop(0) == "--user"
    with (state / "calls").open("a") as calls:
        calls.write(shlex.join(words) + "\n")
    if (state / "fail").exists():
        begin, status, said = json.loads((state / "fail").read_text())
        if shlex.join(words).startswith(begin):
            print(said, file=sys.stderr)
            sys.exit(status)
    sys.exit({"launchctl": _launchctl, "systemctl": _systemctl}[tool](state, words))


def _launchctl(state: Path, words: list[str]) -> int:
    import plistlib

    agents, (verb, *rest) = _read(state), words
    if verb == "print-disabled":
        return 0
    if verb == "bootstrap":
        _, path = rest
        definition = plistlib.loads(Path(path).read_bytes())
        label = definition["Label"]
        if label in agents:
            print("Bootstrap failed: 5: Input/output error", file=sys.stderr)
            return 5
        agents[label] = {"path": path, "pid": 0}
        _start_plist(agents[label])
        return _write(state, agents)
    label = rest[-1].partition(f"gui/{UID}/")[2]
    if label not in agents:
        print(f'Could not find service "{label}" in domain for user gui: {UID}', file=sys.stderr)
        return 113 if verb == "print" else 3
    one = agents[label]
    running = runs(one["pid"])
    if verb == "print":
        if one.get("ending") and not running:
            del agents[label]
            _write(state, agents)
            return 113
        print(f"gui/{UID}/{label} = {{\n\tstate = {'running' if running else 'not running'}")
        print(f"\tpid = {one['pid']}\n}}" if running else "\tlast exit code = 0\n}")
    elif verb == "bootout":
        if running:
            _signal(one["pid"], signal.SIGTERM)
            one["ending"] = True
            _write(state, agents)
            print("Boot-out failed: 36: Operation now in progress", file=sys.stderr)
            return 36
        del agents[label]
    elif verb == "kill":
        _signal(one["pid"], signal.Signals[rest[0]])
    elif verb == "kickstart":
        if running and rest[0] == "-k":
            _signal(one["pid"], signal.SIGKILL)
            _await_end(one["pid"], 5.0)
            running = False
        if not running:
            _start_plist(one)
    else:
        print(f"Unrecognized subcommand: {verb}", file=sys.stderr)
        return 64
    return _write(state, agents)


def _start_plist(one: dict[str, Any]) -> None:
    import plistlib

    definition = plistlib.loads(Path(one["path"]).read_bytes())
    one["pid"] = run_agent(
        definition["ProgramArguments"], definition.get("EnvironmentVariables", {}), definition["StandardErrorPath"],
        definition["WorkingDirectory"],
    ).pid  # fmt: skip


def _systemctl(state: Path, words: list[str]) -> int:
    units, (verb, *rest) = _read(state), words
    options, names = [word for word in rest if word[0] == "-"], [word for word in rest if word[0] != "-"]
    if verb == "show" and not names:
        print("Version=252")
        return 0
    if verb == "daemon-reload":
        return 0
    (name,) = names
    path = state.parent / "definitions" / name
    one = units.setdefault(name, {"pid": 0, "enabled": False})
    running = runs(one["pid"])
    if verb == "show":
        print(f"LoadState={'loaded' if path.exists() else 'not-found'}")
        print(f"ActiveState={'active' if running else 'inactive'}\nMainPID={one['pid'] if running else 0}")
        print(f"ExecMainCode=0\nExecMainStatus=0\nUnitFileState={'enabled' if one['enabled'] else 'disabled'}")
        return 0
    if not path.exists() and not (verb == "stop" and running):
        print(f"Failed to {verb} unit: Unit file {name} does not exist.", file=sys.stderr)
        return 1
    if verb in ("enable", "disable"):
        one["enabled"] = verb == "enable"
    if verb in ("stop", "restart") or (verb == "disable" and "--now" in options):
        _signal(one["pid"], signal.SIGTERM)
        _await_end(one["pid"], 60.0)
        running = False
    if (verb in ("start", "restart") or (verb == "enable" and "--now" in options)) and not running:
        one["pid"] = run_unit(path).pid
    return _write(state, units)


def run_unit(path: Path) -> subprocess.Popen[bytes]:
    """Start what a unit's ExecStart says, with what the unit gives and nothing else."""
    lines = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(lines["ExecStart"])]
    given = [line.partition("=")[2] for line in path.read_text().splitlines() if line.startswith("Environment=")]
    environment = dict(word.replace("%%", "%").split("=", 1) for one in given for word in shlex.split(one))
    log = lines["StandardError"].removeprefix("append:").replace("%%", "%")
    return run_agent(words, environment, log, lines["WorkingDirectory"])


def run_agent(
    words: list[str], environment: dict[str, str], log: str, folder: str
) -> subprocess.Popen[bytes]:
    """Start an agent as launchd would: nothing of this process's environment but HOME and the system's PATH."""
    given = {"HOME": str(Path.home()), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **environment}
    with Path(log).open("ab") as file:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=given, cwd=folder, start_new_session=True
        )


def _read(state: Path) -> dict[str, Any]:
    path = state / "agents"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(state: Path, agents: dict[str, Any]) -> int:
    (state / "agents").write_text(json.dumps(agents))
    return 0


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return pid > 0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    if runs(pid):
        os.kill(pid, number)


def _await_end(pid: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)


# -- a real systemd ----------------------------------------------------------------------------------------------------


def user_manager_answers() -> bool:
    """Whether this user's own systemd answers.

    A test never starts one: as root it would take all processes of the machine into control groups of its own.
    """
    command = ["systemctl", "--user", "show", "--property=Version"]
    return shutil.which("systemctl") is not None and subprocess.run(command, capture_output=True).returncode == 0
