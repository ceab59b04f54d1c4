"""What can be wrong on a machine, check by check: ``expertd doctor``.

A check looks at ``Surroundings`` and returns a ``Finding``; it changes nothing.  What the surroundings are is the
command's business (``expertd.clients.cli.doctor``), so that tests can make some up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertd.clients.doctor.findings import Finding, Verdict, note
from expertd.clients.doctor.home import check_daemon, check_home, check_leftovers, check_settings
from expertd.clients.doctor.models import check_hub, check_lm_studio
from expertd.clients.doctor.service import check_denied, check_environment, check_service
from expertd.clients.doctor.surroundings import Surroundings
from expertd.clients.doctor.system import (
    check_alias,
    check_budget,
    check_disk,
    check_files,
    check_mlx,
    check_platform,
    check_pressure,
    check_shm,
)

Check = Callable[[Surroundings], Finding]

CHECKS: tuple[tuple[str, Check], ...] = (
    ("platform", check_platform),
    ("mlx", check_mlx),
    ("alias", check_alias),
    ("budget", check_budget),
    ("pressure", check_pressure),
    ("shm", check_shm),
    ("disk", check_disk),
    ("open files", check_files),
    ("home", check_home),
    ("settings", check_settings),
    ("leftovers", check_leftovers),
    ("daemon", check_daemon),
    ("service", check_service),
    ("denied", check_denied),
    ("variables", check_environment),
    ("hub", check_hub),
    ("LM Studio", check_lm_studio),
)
"""All checks by name, in the order in which they are shown."""


def examine(
    surroundings: Surroundings, checks: Sequence[tuple[str, Check]] = CHECKS
) -> list[tuple[str, Finding]]:
    """What each check finds.  One that fails is a note: whoever is called when things are broken must not break."""
    found = []
    for name, check in checks:
        try:
            finding = check(surroundings)
        except Exception as error:
            finding = note(f"this could not be checked ({type(error).__name__}: {error})")
        found.append((name, finding))
    return found


__all__ = ["CHECKS", "Check", "Finding", "Surroundings", "Verdict", "examine"]
