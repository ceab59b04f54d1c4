"""What a home knows of its service: that a service manager keeps its daemon, and which commands have it start one.

Whoever finds no daemon reads it (``rendezvous``); ``expertd service`` writes it (``expertd.launchd``).  So nothing here
knows launchd or systemd.  Whether a daemon that dies again and again is started once more: ``quick_deaths``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import msgspec

from expertd.protocol.paths import Home

FORMAT: Final = 1

START_S = 20.0
"""A service manager that takes longer to take an order is given up."""


class Gateway(msgspec.Struct, frozen=True):
    """The gateway that the service keeps: the arguments of ``expertd serve``."""

    models: tuple[str, ...]
    host: str
    port: int
    aliases: tuple[str, ...] = ()
    pins: tuple[str, ...] = ()


class Service(msgspec.Struct, frozen=True):
    """The record of a home whose daemon is kept by a service manager.

    Attributes:
        manager: its name, for people.
        version: of the expertd that has completed an installation last; empty before the first.
        start: the command that has it start the daemon; one that runs already is left alone.
        stopped: the user has stopped it: until its daemon runs again, daemons start on demand as if there were none.
        gateway: the gateway that it keeps too, if any.
    """

    format: int
    manager: str
    version: str
    start: tuple[str, ...]
    stopped: bool = False
    gateway: Gateway | None = None


def read_service(home: Home) -> Service | None:
    """The home's record; None where there is none that this version understands."""
    try:
        found = msgspec.json.decode(home.service.read_bytes(), type=Service)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if found.format == FORMAT and found.start else None


def encode_service(service: Service) -> bytes:
    """The record as it is written to ``Home.service``."""
    return msgspec.json.format(msgspec.json.encode(service)) + b"\n"


def write_service(home: Home, service: Service) -> None:
    """Write the home's record, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    new = home.service.with_name(f".{home.service.name}.{os.getpid()}")
    try:
        new.write_bytes(encode_service(service))
        new.replace(home.service)
    finally:
        new.unlink(missing_ok=True)


def ask_to_start(service: Service) -> str:
    """Have the service manager start the daemon; returns why it did not take the order, or nothing."""
    import subprocess  # late, because who asks a daemon that runs needs none of it

    try:
        done = subprocess.run(
            service.start, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=START_S,
            check=False, cwd=Path("/"),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else f"status {done.returncode}"
