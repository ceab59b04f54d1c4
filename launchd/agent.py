"""What a service manager keeps alive, in words of neither launchd nor systemd.

How it is written down is in ``launchd.launchd`` and ``launchd.systemd``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from expertd.protocol.model_names import hub_cache
from expertd.protocol.paths import Home
from expertd.protocol.service import Gateway

END_S: Final = 90
"""So long an agent has to end before it is killed: a gateway drains for 10 s and then waits for its worker's step."""
OPEN_FILES: Final = (10_240, 65_536)
"""Soft and hard limit of open files.  10240 is what macOS takes as a soft limit at most without being asked further."""


@dataclass(frozen=True)
class Agent:
    """One process that is to be there.

    Attributes:
        name: ``daemon`` or ``gateway``.
        key: empty for the default home, else what tells the agents of this home from those of others.
        description: for people.
        arguments: the program, as an absolute path, and its arguments.
        environment: all that it gets beside what the manager itself sets.
        log: what it says is appended to this file.
    """

    name: str
    key: str
    description: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path


def daemon_agent(home: Home, python: str, environment: Mapping[str, str]) -> Agent:
    """The home's daemon.

    Args:
        python: the interpreter that has expertd (see ``protocol.paths.lasting``).
        environment: of the process that installs.
    """
    return Agent(
        name="daemon",
        key=home_key(home, environment),
        description="expertd: cache of Mixture-of-Experts weights",
        arguments=(python, "-m", "expertd.daemon", "--service"),
        environment=_kept(home, environment),
        log=home.daemon_log,
    )


def gateway_agent(home: Home, python: str, environment: Mapping[str, str], gateway: Gateway) -> Agent:
    """The home's gateway (arguments as of ``daemon_agent``)."""
    options = ["--host", gateway.host, "--port", str(gateway.port), "--service"]
    for flag, values in ("--alias", gateway.aliases), ("--pin", gateway.pins):
        options += [word for value in values for word in (flag, value)]
    return Agent(
        name="gateway",
        key=home_key(home, environment),
        description=f"expertd: OpenAI API over {', '.join(Path(model).name for model in gateway.models)}",
        arguments=(python, "-m", "expertd.clients.cli", "serve", *gateway.models, *options),
        environment=_kept(home, environment),
        log=home.service_gateway_log,
    )


def home_key(home: Home, environment: Mapping[str, str]) -> str:
    """Empty for ``~/.expertd``; eight digits that name any other home."""
    if home.root == Path(environment.get("HOME") or Path.home()) / ".expertd":
        return ""
    return hashlib.sha256(str(home.root).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _kept(home: Home, environment: Mapping[str, str]) -> dict[str, str]:
    """What a shell says of the home and of the hub's cache, because a service manager knows nothing of shells."""
    kept = {}
    if environment.get("EXPERTD_HOME"):
        kept["EXPERTD_HOME"] = str(home.root)
    user = Path(environment.get("HOME") or Path.home())
    cache, _ = hub_cache(environment, user)
    if cache != hub_cache({}, user)[0]:
        kept["HF_HUB_CACHE"] = str(cache)
    return kept
