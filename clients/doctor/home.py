"""Checks of expertd's home: whether it can be used, what is left in it, who runs there."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from expertd.clients.doctor.findings import Finding, note, ok, problem
from expertd.clients.doctor.surroundings import Surroundings
from expertd.protocol.connection import package_version
from expertd.protocol.errors import ExpertdError, HomeError
from expertd.protocol.paths import SOCKET_PATH_BYTES
from expertd.protocol.sizes import show_size

SHOWN = 3
"""So many leftovers are named."""


def check_home(at: Surroundings) -> Finding:
    """Whether the home can be used: its length, its owner, its permissions."""
    try:
        at.home.check()
    except HomeError as error:
        sentence, _, todo = error.message.partition("; ")
        return problem(sentence, todo or "set EXPERTD_HOME to a folder of your own")
    longest = len(os.fsencode(at.home.gateway_socket(4_194_304)))
    there = "" if at.home.root.exists() else ", which will be created"
    return ok(f"{at.home.root}{there}, sockets of at most {longest} of {SOCKET_PATH_BYTES} bytes")


def check_settings(at: Surroundings) -> Finding:
    """Whether all settings can be used, of the file and of the environment."""
    try:
        misspelt = at.settings()
    except HomeError:
        return note("they cannot be looked for, because the home cannot be used")
    except ExpertdError as error:
        sentence, _, todo = error.message.partition("; ")
        return problem(sentence, todo or "expertd config check")
    if misspelt:
        names = ", ".join(f"{name} (did you mean {meant}?)" for name, meant in misspelt)
        return note(f"not a setting: {names}", "correct the variable's name, or unset it")
    there = "can be used" if at.home.config.exists() else "is not there, and need not be"
    return ok(f"{at.home.config} {there}")


def check_leftovers(at: Surroundings) -> Finding:
    """Sockets and unfinished files whose processes are gone.  Logs of the dead stay on purpose (``protocol.logs``)."""
    found = leftovers(at)
    if not found:
        return ok("nothing is left behind in the home")
    size = sum(_size(path) for path in found)
    named = " ".join(shlex.quote(str(path)) for path in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more there" if len(found) > SHOWN else ""
    return note(
        f"{len(found)} file{'' if len(found) == 1 else 's'} of processes that are gone, {show_size(size)}; harmless",
        f"rm {named}{more}",
    )


def leftovers(at: Surroundings) -> list[Path]:
    """Files in the home that belonged to a process that lives no more."""
    home, found = at.home, []
    if at.owner() is None:
        found += [path for path in (home.daemon_socket, home.lifeline_socket) if path.exists()]
    for path in sorted(home.run.glob("gateway-*.sock")):
        named = re.fullmatch(r"gateway-(\d+)(-\d+)?\.sock", path.name)
        if named is not None and not at.alive(int(named[1])):
            found.append(path)
    return found + sorted(home.pace.glob("*.new"))


def check_daemon(at: Surroundings) -> Finding:
    """Whether the home's daemon answers, and is of this version."""
    try:
        status = at.status()
    except ExpertdError as error:
        return problem(f"the daemon cannot be asked: {error.message}", "end it with: expertd daemon stop")
    if status is None:
        owner = at.owner()
        if owner is None:
            return ok("none runs; the first command that needs one starts it")
        return problem(f"process {owner or 'unknown'} owns the home and does not answer", "expertd daemon stop")
    count = f"{len(status.models)} model{'' if len(status.models) == 1 else 's'}"
    text = f"process {status.daemon.pid}, {count}, {show_size(status.used_bytes)} in use"
    if status.daemon.version != package_version():
        return note(
            f"{text}, of version {status.daemon.version} where this command is {package_version()}",
            "expertd daemon stop, when nobody uses it",
        )
    return ok(text)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
