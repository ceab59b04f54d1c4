"""Checks of the service: whether it is as it should be, what the system denies it, and what it does not see.

Whether its processes run is asked of the service manager by ``expertd service status``.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path

from expertd.clients.doctor.findings import Finding, note, ok, problem
from expertd.clients.doctor.models import known_models
from expertd.clients.doctor.surroundings import Surroundings
from expertd.protocol.config import read_config
from expertd.protocol.connection import package_version
from expertd.protocol.errors import ExpertdError
from expertd.protocol.model_names import hub_cache, shown_path
from expertd.protocol.quick_deaths import why_refused
from expertd.protocol.service import read_service

PROTECTED = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents")
"""Folders of the user that macOS lets an agent read only if the user has allowed it."""
OUR_OWN = ("EXPERTD_HOME",)
"""Variables that an installation takes over."""


def check_service(at: Surroundings) -> Finding:
    """Whether the service is installed, completely and by this version, and is neither stopped nor given up."""
    record, agents = read_service(at.home), at.agents()
    there = [agent.path for agent in agents if agent.path.exists()]
    if record is None and there:
        return note(
            f"{', '.join(map(str, there))}: there, but the home knows of no service",
            "expertd service install, or expertd service uninstall",
        )
    if record is None:
        return ok("not installed; daemons start on demand and end when idle")
    for agent in agents:
        if agent.name == "gateway" and record.gateway is None:
            continue
        if agent.path not in there:
            return problem(f"it is not installed completely: {agent.path} is not there", "expertd service install")
        if not os.access(agent.path, os.R_OK):
            return problem(f"{agent.path} cannot be read", f"chmod u+r {shlex.quote(str(agent.path))}")
        if why := why_refused(at.home, agent.name):
            sentence, _, todo = why.rpartition("; start it again with: ")
            return problem(sentence, todo)
    if record.stopped:
        return note("installed and stopped; daemons start on demand", "expertd service start")
    if record.version != package_version():
        return note(
            f"installed by expertd {record.version or 'that did not complete it'}, and this is {package_version()}",
            "expertd service install",
        )
    models = ", ".join(map(shown_path, record.gateway.models)) if record.gateway is not None else ""
    return ok(f"{record.manager} keeps the daemon" + (f", and a gateway for {models}" if models else ""))


def check_denied(at: Surroundings) -> Finding:
    """Folders that macOS denies an agent: it shows no dialogue, so reads simply fail."""
    if not at.mac:
        return ok("this system denies services none of the user's folders")
    user = at.user.resolve()
    found = [path for path in dict.fromkeys(place.resolve() for place in _places(at)) if denied(path, user)]
    if not found:
        return ok("no model is where macOS denies an agent to read")
    text = f"macOS may deny a launchd agent {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    todo = (
        "move it, for example to ~/models; or allow it: System Settings, Privacy & Security, "
        "Full Disk Access, for the Python that runs expertd"
    )
    if read_service(at.home) is None:
        return note(f"{text}, should you install the service", todo)
    return problem(text, todo)


def _places(at: Surroundings) -> list[Path]:
    """What a service reads, or may be asked to: those in use first."""
    record = read_service(at.home)
    served = record.gateway.models if record is not None and record.gateway is not None else ()
    places = [at.home.root, *map(Path, filter(os.path.isabs, served)), *known_models(at)]
    with contextlib.suppress(ExpertdError):  # what is wrong with the settings another check tells
        places += [folder for folder in read_config(at.home).model_folders.value if folder.is_dir()]
    return [*places, hub_cache(at.environ, at.user)[0], *at.home.packed.glob("*.packed")]


def denied(path: Path, user: Path) -> bool:
    """Whether macOS guards ``path`` against processes that were not allowed to read there."""
    if path.is_relative_to("/Volumes"):
        return True
    return any(path.is_relative_to(user / folder) for folder in PROTECTED)


def check_environment(at: Surroundings) -> Finding:
    """Variables of the shell that a service does not have, so that it looks elsewhere."""
    if _installed_otherwise(at):
        return note(
            "this shell has another home, or another folder of the hub's models, than the service was installed with",
            "expertd service install, which takes it over",
        )
    names = sorted(name for name in at.environ if at.environ[name] and name.startswith("EXPERTD_"))
    names = [name for name in names if name not in OUR_OWN]
    if not names:
        return ok("no variable is set that a service would miss")
    missing = [name for name in names if at.service_variable(name) == ""]
    unknown = [name for name in names if at.service_variable(name) is None]
    if not missing:
        return ok(f"set: {', '.join(names)}" + ("; nobody knows what a service sees" if unknown else ""))
    return note(
        f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} set in this shell, and a service does not see it",
        f"if you use the service: write it into {at.home.config}",
    )


def _installed_otherwise(at: Surroundings) -> bool:
    """Whether an agent's definition lacks a variable that an installation would write into it now."""
    if read_service(at.home) is None:
        return False
    there = [agent for agent in at.agents() if agent.path.exists()]
    return any(not agent.variables <= set(agent.path.read_bytes().splitlines()) for agent in there)
