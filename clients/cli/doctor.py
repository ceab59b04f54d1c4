"""``expertd doctor``: what this machine has, what expertd makes of it, and what to do.

The checks are ``expertd.clients.doctor``; here they get their surroundings, and people their lines.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.clients.cli.parameters import json_option
from expertd.protocol.errors import ConfigInvalid, DaemonNotRunning, ExpertdError, HomeError, ServiceManagerMissing
from expertd.protocol.messages import Status
from expertd.protocol.paths import Home

if TYPE_CHECKING:
    from expertd.clients.doctor import Finding, Surroundings
    from expertd.clients.doctor.surroundings import AgentFile, Budget, DiskSpeed, Space
    from expertd.launchd.manager import Manager

ALIAS_S = 60.0
TRIED = 64 << 20
"""Bytes that are written to be read again, where there is no model to measure the disk with."""


@click.command()
@json_option()
def doctor(as_json: bool) -> None:
    """Check what matters on this machine, and say what to do.

    Each check is 'ok', a 'note' (good to know, nothing stops working) or a 'problem'.  It takes some seconds, in which
    a disk is read and MLX is tried; nothing is changed.

    Exits with 1 if there is a problem.
    """
    from expertd.clients.doctor import Verdict, examine

    found = examine(surroundings())
    if as_json:
        click.echo(json.dumps(as_object(found), indent=2))
    else:
        for line in table(found):
            click.echo(line)
    if any(finding.verdict is Verdict.PROBLEM for _, finding in found):
        sys.exit(1)


def as_object(found: list[tuple[str, Finding]]) -> dict[str, object]:
    """The object that ``--json`` prints."""
    return {
        "checks": [
            {"name": name, "verdict": one.verdict, "text": one.text, "todo": one.todo, "why": list(one.why)}
            for name, one in found
        ]
    }


def table(found: list[tuple[str, Finding]]) -> list[str]:
    """The findings as lines for a person."""
    from expertd.clients.cli.wrap import wrapped
    from expertd.clients.doctor import Verdict

    width = max(len(name) for name, _ in found)
    lines: list[str] = []
    for name, one in found:
        lines += wrapped(f"{one.verdict:<8} {name:<{width}} ", one.text)
        lines += [line for why in one.why for line in wrapped(" " * (width + 12), why)]
        if one.todo:
            lines += wrapped(f"{'':<8} {'':<{width}} -> ", one.todo)
    problems = sum(one.verdict is Verdict.PROBLEM for _, one in found)
    notes = sum(one.verdict is Verdict.NOTE for _, one in found)
    counts = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in ((problems, "problem"), (notes, "note")) if n]
    return [*lines, "", ", ".join(counts) or "all is well"]


def surroundings() -> Surroundings:
    """This machine and this user."""
    from expertd.clients.doctor import Surroundings

    home = Home.current()
    mac = sys.platform == "darwin"
    name = f"macOS {platform.mac_ver()[0]}" if mac else f"{platform.system()} {platform.release()}"
    return Surroundings(
        platform=sys.platform,
        system=name,
        processor=platform.machine(),
        python=sys.version_info[:3],
        environ=os.environ,
        user=Path.home(),
        home=home,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        shm=None if mac else Path("/dev/shm"),
        requirement=requirement,
        alias=alias,
        settings=lambda: settings(home),
        budget=functools.cache(lambda: budget(home)),
        pressure=pressure,
        space=space,
        speed=lambda paths: speed(home, paths),
        alive=alive,
        status=functools.cache(lambda: status(home)),
        owner=lambda: owner(home),
        agents=lambda: agents(home, os.environ),
        service_variable=service_variable,
    )


def requirement(package: str) -> tuple[str, str | None]:
    """The range of versions of ``package`` that expertd takes, and the version that is installed."""
    wanted = ""
    for line in metadata.requires("expertd") or ():
        name, _, marker = line.partition(";")
        system = {"darwin": "darwin", "linux": "linux"}.get(sys.platform, "")
        bare = name.split("[")[0].rstrip("<>=!~.,0123456789 ")
        if bare == package and ("sys_platform" not in marker or system in marker):
            wanted = name[len(bare) :].split("]")[-1].strip()
    try:
        return wanted, metadata.version(package)
    except metadata.PackageNotFoundError:
        return wanted, None


def alias() -> str:
    """Why MLX cannot compute out of shared pages, tried in a process of its own, because commands do not load MLX.

    Raises:
        ExpertdError: it could not be tried.
    """
    code = "from expertd.worker.alias import self_test; print(self_test() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=ALIAS_S)
    if done.returncode:
        raise ExpertdError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    return done.stdout.strip()


def settings(home: Home) -> list[tuple[str, str]]:
    """Variables that are no settings and look as if they were meant so.

    Raises:
        ConfigInvalid, HomeError: a setting cannot be used.
    """
    from expertd.clients.cli.config import misspelt
    from expertd.protocol.config import read_config

    read_config(home)
    return misspelt(os.environ)


def budget(home: Home) -> Budget:
    """What a daemon that starts would take; the default, where the setting cannot be used (another check tells)."""
    from expertd.clients.cli.budget import cache_holds
    from expertd.clients.doctor.surroundings import Budget
    from expertd.daemon.machine import default_budget, this_machine
    from expertd.protocol.config import read_config

    default = default_budget(this_machine(), cache_holds(home))
    try:
        setting = read_config(home).budget.value
    except (HomeError, ConfigInvalid):
        setting = None
    return Budget(setting or default.size, default.size, tuple(default.why))


def pressure() -> tuple[str, str]:
    """The level of memory pressure and its figure."""
    from expertd.daemon.pressure import system_source

    reading = system_source().read()
    return reading.level.word, reading.figure


def space(path: Path) -> Space:
    """Of the file system of ``path``."""
    from expertd.clients.doctor.surroundings import Space

    found = shutil.disk_usage(path)
    return Space(found.total, found.free)


def speed(home: Home, paths: list[Path]) -> DiskSpeed | None:
    """How fast the first of ``paths`` that can be read is; without any, a file that is written for it (on Linux).

    macOS reads what was just written from its page cache, which would tell nothing.
    """
    from expertd.clients.doctor.surroundings import DiskSpeed
    from expertd.daemon.probe import rate_of

    for path in paths:
        try:
            return DiskSpeed(*rate_of(path), path)
        except OSError:
            continue
    if sys.platform == "darwin":
        return None
    folder = next(one for one in (home.root, *home.root.parents) if one.is_dir())
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".expertd-doctor-") as file:
        piece = os.urandom(1 << 20)
        for _ in range(TRIED >> 20):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        return DiskSpeed(*rate_of(Path(file.name)), folder)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    import psutil

    return psutil.pid_exists(pid)


def status(home: Home) -> Status | None:
    """What the home's daemon says; None if there is none, or nothing that may be asked."""
    from expertd.clients.cli.status import ask_status

    try:
        return ask_status(home)
    except (DaemonNotRunning, HomeError):
        return None


def owner(home: Home) -> int | None:
    """The process that owns the home."""
    from expertd.protocol.rendezvous import lock_holder

    return lock_holder(home)


def agents(home: Home, environment: Mapping[str, str], manager: Manager | None = None) -> tuple[AgentFile, ...]:
    """The agents of the home's service, by ``manager`` or else the one of this machine; none if it has none."""
    from expertd.clients.doctor.surroundings import AgentFile
    from expertd.launchd.agent import daemon_agent, gateway_agent
    from expertd.launchd.manager import system_manager
    from expertd.protocol.service import Gateway

    try:
        manager = manager or system_manager()
    except ServiceManagerMissing:
        return ()
    found = []
    for agent in (daemon_agent(home, "", environment), gateway_agent(home, "", environment, Gateway((), "", 0))):
        lines = [manager.render(one).splitlines() for one in (agent, replace(agent, environment={}))]
        found.append(AgentFile(agent.name, manager.file(agent), frozenset(lines[0]) - frozenset(lines[1])))
    return tuple(found)


def service_variable(name: str) -> str | None:
    """What a service of this user sees of a variable."""
    mac = sys.platform == "darwin"
    command = ["launchctl", "getenv", name] if mac else ["systemctl", "--user", "show-environment"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if mac:
        return done.stdout.strip()
    if done.returncode:
        return None
    found = (line.partition("=") for line in done.stdout.splitlines())
    return next((value for variable, _, value in found if variable == name), "")
