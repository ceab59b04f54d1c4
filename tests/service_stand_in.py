"""What the stand-ins for ``launchctl`` and ``systemctl`` do that ``tests.service_stage`` puts on PATH.

A module of its own that imports little, because each call is a process.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UID = 501


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

    agents, (verb, *rest) = read_agents(state), words
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
        if one.get("ending") and running and (state / "impatient").exists():
            send(one["pid"], signal.SIGKILL)
            await_end(one["pid"], 5.0)
            running = False
        if one.get("ending") and not running:
            del agents[label]
            _write(state, agents)
            return 113
        print(f"gui/{UID}/{label} = {{\n\tstate = {'running' if running else 'not running'}")
        print(f"\tpid = {one['pid']}\n}}" if running else "\tlast exit code = 0\n}")
    elif verb == "bootout":
        if running:
            send(one["pid"], signal.SIGTERM)
            one["ending"] = True
            _write(state, agents)
            print("Boot-out failed: 36: Operation now in progress", file=sys.stderr)
            return 36
        del agents[label]
    elif verb == "kickstart":
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
    units, (verb, *rest) = read_agents(state), words
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
        send(one["pid"], signal.SIGTERM)
        await_end(one["pid"], 60.0)
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


def read_agents(state: Path) -> dict[str, Any]:
    path = state / "agents"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(state: Path, agents: dict[str, Any]) -> int:
    (state / "agents").write_text(json.dumps(agents))
    return 0


def runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    if pid <= 0:
        return False
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def send(pid: int, number: signal.Signals) -> None:
    if runs(pid):
        os.kill(pid, number)


def await_end(pid: int, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
