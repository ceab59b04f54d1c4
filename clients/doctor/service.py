"""Checks of what differs for a service: what the system denies it, and the variables that it does not see."""

from __future__ import annotations

from pathlib import Path

from expertd.clients.doctor.findings import Finding, note, ok, problem
from expertd.clients.doctor.home import service_files
from expertd.clients.doctor.models import hub_cache, known_models
from expertd.clients.doctor.surroundings import Surroundings

PROTECTED = ("Documents", "Desktop", "Downloads", "Library/Mobile Documents")
"""Folders of the user that macOS lets an agent read only if the user has allowed it."""
VARIABLES = ("HF_HOME", "HF_HUB_CACHE")


def check_denied(at: Surroundings) -> Finding:
    """Folders that macOS denies an agent: it shows no dialogue, so reads simply fail."""
    if not at.mac:
        return ok("this system denies services none of the user's folders")
    places = [at.home.root, *known_models(at), hub_cache(at)[0]]
    places += at.home.packed.glob("*.packed")
    user = at.user.resolve()
    found = [path for path in dict.fromkeys(place.resolve() for place in places) if denied(path, user)]
    if not found:
        return ok("no model is where macOS denies an agent to read")
    text = f"macOS may deny a launchd agent {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
    todo = (
        "move it, for example to ~/models; or allow it: System Settings, Privacy & Security, "
        "Full Disk Access, for the Python that runs expertd"
    )
    return problem(text, todo) if service_files(at) else note(f"{text}, should you install the service", todo)


def denied(path: Path, user: Path) -> bool:
    """Whether macOS guards ``path`` against processes that were not allowed to read there."""
    if path.is_relative_to("/Volumes"):
        return True
    return any(path.is_relative_to(user / folder) for folder in PROTECTED)


def check_environment(at: Surroundings) -> Finding:
    """Variables of the shell that a service does not have, so that it looks elsewhere."""
    names = [name for name in at.environ if at.environ[name] and (name in VARIABLES or name.startswith("EXPERTD_"))]
    missing = [name for name in sorted(names) if at.service_variable(name) == ""]
    unknown = [name for name in sorted(names) if at.service_variable(name) is None]
    if not names:
        return ok("no variable is set that a service would miss")
    if not missing:
        return ok(f"set: {', '.join(sorted(names))}" + ("; nobody knows what a service sees" if unknown else ""))
    name = missing[0]
    setting = f"{'launchctl setenv' if at.mac else 'systemctl --user set-environment'} " + (
        f"{name} '{at.environ[name]}'" if at.mac else f"'{name}={at.environ[name]}'"
    )
    return note(
        f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} set in this shell, and a service does not see it",
        f"if you use the service: {setting} (until the next login)",
    )
