"""What checks look at: facts that are cheap to have, and functions for what takes time or asks the system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from expertd.protocol.messages import Status
from expertd.protocol.paths import Home


@dataclass(frozen=True)
class Budget:
    """Bytes that a daemon would be started with, the default in bytes, and the lines that explain that."""

    size: int
    default: int
    why: tuple[str, ...]


@dataclass(frozen=True)
class Space:
    """Of a file system, in bytes."""

    total: int
    free: int


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes a second, and the seconds of one read of a megabyte; ``path`` is what was read."""

    rate: float
    read_s: float
    path: Path


@dataclass(frozen=True)
class AgentFile:
    """The definition of one of the service's agents.

    Attributes:
        name: ``daemon`` or ``gateway``.
        path: where it is, or would be.
        variables: the lines that an installation would write into it now of what this shell says.
    """

    name: str
    path: Path
    variables: frozenset[bytes]


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """A machine and a user.

    Attributes:
        platform, system, processor: ``sys.platform``, the system's name and version, ``arm64`` and so on.
        python: its version.
        environ: variables by name.
        user: the user's own folder (``~``).
        home: expertd's.
        open_files: soft and hard limit.
        shm: where shared memory is a file system, None where it is none.
        requirement: what expertd takes of a package, for example ``>=1.2,<2``, and the version that is installed.
        alias: why MLX cannot compute out of shared pages; empty if it can.
        settings: variables that look like settings and are none, each with the one that may be meant; raises what is
            wrong with a setting.
        budget, pressure: see ``Budget``; the level in a word and the figure that decided it.
        space: of the file system of a path.
        speed: of the disk of the first of these files that can be measured, None if none can.
        alive: whether a process runs.
        status: what the home's daemon says, None if none runs.
        owner: process id of the daemon that owns the home, 0 if unknown, None if none lives.
        agents: of the home's service, installed or not; none where there is no service manager.
        service_variable: the value that a service sees of a variable, empty for none; None if nobody can tell.
    """

    platform: str
    system: str
    processor: str
    python: tuple[int, int, int]
    environ: Mapping[str, str]
    user: Path
    home: Home
    open_files: tuple[int, int]
    shm: Path | None
    requirement: Callable[[str], tuple[str, str | None]]
    alias: Callable[[], str]
    settings: Callable[[], list[tuple[str, str]]]
    budget: Callable[[], Budget]
    pressure: Callable[[], tuple[str, str]]
    space: Callable[[Path], Space]
    speed: Callable[[list[Path]], DiskSpeed | None]
    alive: Callable[[int], bool]
    status: Callable[[], Status | None]
    owner: Callable[[], int | None]
    agents: Callable[[], tuple[AgentFile, ...]]
    service_variable: Callable[[str], str | None]

    @property
    def mac(self) -> bool:
        """Whether it is macOS."""
        return self.platform == "darwin"
