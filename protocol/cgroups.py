"""What the memory cgroups of this process leave it: in a container the machine's memory says little (Linux only).

What counts as left is what is left when the kernel has dropped all page cache that it can drop.  Shared memory is no
such cache, though it is counted with it in places: the experts' pools are shared memory.  Both versions of cgroups are
read, as far as this process sees them.  Reference: the kernel's ``admin-guide/cgroup-v2.rst`` and
``cgroup-v1/memory.rst``.

Nothing here raises: what cannot be read, on another system or for want of a descriptor, is as if it were not there.
Every file is opened for each reading, some microseconds: nothing goes stale when the process is moved to another
cgroup.  What is short of memory is not judged here (``daemon.pressure.linux``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Cgroup",
    "Events",
    "Room",
    "cgroup_room",
    "memory_cgroups",
    "memory_folders",
    "parse_counts",
    "parse_limit",
    "text_of",
]

UNLIMITED = 1 << 60
"""No limit in bytes is that high; v1 says about 1 << 63 where there is none."""


@dataclass(frozen=True)
class Room:
    """What a cgroup may use in all and has left, droppable page cache not counted as used; bytes."""

    limit: int
    left: int


@dataclass(frozen=True)
class Events:
    """Counters of a cgroup: hits of its limit, of ``memory.high``, and calls of the out-of-memory killer."""

    hits: int = 0
    high: int = 0
    kills: int = 0


def parse_counts(text: str) -> dict[str, int]:
    """Lines ``name value`` (memory.stat, memory.events, memory.oom_control); others are skipped."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {name: int(value) for name, _, value in pairs if value.isdecimal()}


def parse_limit(text: str) -> int | None:
    """Bytes of a limit, None if there is none (v1: a huge number, v2: ``max``)."""
    word = text.strip()
    return int(word) if word.isdecimal() and int(word) < UNLIMITED else None


def memory_folders(cgroup: str, mountinfo: str, exists: Callable[[str], bool]) -> list[tuple[int, list[str]]]:
    """Folders of this process's memory cgroup and of all above it that it sees: ``(version, [own, ..., root])``.

    ``cgroup`` and ``mountinfo`` are the contents of these files of /proc/self.  A path that the mount does not show (a
    container with the host's path, a namespace that the process is outside of) becomes the mount's root.
    """
    mounts: list[tuple[int, str, str]] = []
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        words, kind = fields.split(), rest.split()
        if len(words) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        if kind[0] == "cgroup2" or "memory" in kind[2].split(","):
            mounts.append((2 if kind[0] == "cgroup2" else 1, _unescaped(words[3]), _unescaped(words[4])))
    found: list[tuple[int, list[str]]] = []
    for line in cgroup.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 1 if "memory" in controllers.split(",") else 2
        if version == 2 and controllers:
            continue
        folders = [_folders(path, root, point) for kind, root, point in mounts if kind == version]
        seen = [way for way in folders if exists(way[0])] or [way[-1:] for way in folders if exists(way[-1])]
        if seen:
            found.append((version, max(seen, key=len)))
    return found


def _folders(path: str, root: str, point: str) -> list[str]:
    """From the folder of the cgroup ``path`` up to ``point``, where a mount shows the cgroup ``root``."""
    inside = path if root == "/" else path[len(root) :] if (path + "/").startswith(root + "/") else ""
    names = [name for name in inside.split("/") if name]
    if ".." in names:
        names = []
    return ["/".join([point.rstrip("/"), *names[:count]]) for count in range(len(names), -1, -1)]


def _unescaped(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), word)


def text_of(path: Path | str) -> str | None:
    """The content of a file of the kernel's, None if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    except OSError:  # PSI that is switched off (EOPNOTSUPP), a cgroup that was removed (ENODEV)
        return None
    finally:
        os.close(descriptor)
    return b"".join(parts).decode("utf-8", "surrogateescape")


def _exists(path: str) -> bool:
    try:
        return os.access(path, os.F_OK)
    except ValueError:  # no path that a system knows
        return False


@dataclass(frozen=True)
class Cgroup:
    """One memory cgroup of version 1 or 2 in ``folder``; ``own``: this process is in it, not only below it.

    ``name`` is for people.
    """

    version: int
    folder: str
    name: str
    own: bool

    def room(self) -> Room | None:
        """What is left; None without a limit, or if its files cannot be read."""
        if self.version == 1:
            limits, usage, prefix = [self._limit("memory.limit_in_bytes")], "memory.usage_in_bytes", "total_"
        else:
            limits, usage, prefix = [self._limit("memory.max"), self._limit("memory.high")], "memory.current", ""
        if limits.count(None) == len(limits) and not (self.version == 1 and self.own):
            return None
        stat = parse_counts(self.text("memory.stat") or "")
        if self.own:  # v1 knows the lowest limit above, even of cgroups that a container does not see
            limits.append(stat.get("hierarchical_memory_limit"))
        limit = min((limit for limit in limits if limit is not None), default=UNLIMITED)
        used = (self.text(usage) or "").strip()
        if limit >= UNLIMITED or not used.isdecimal():
            return None
        cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        return Room(limit, limit - max(0, int(used) - cache))

    def events(self) -> Events | None:
        """What has happened to it so far; None if its files cannot be read."""
        if self.version == 1:
            hits, control = self.text("memory.failcnt"), self.text("memory.oom_control")
            if hits is None and control is None:
                return None
            count = int(hits) if hits is not None and hits.strip().isdecimal() else 0
            return Events(hits=count, kills=parse_counts(control or "").get("oom_kill", 0))
        # Without .local (Linux before 5.2) a parent counts what happens to its other children at their own limits.
        text = self.text("memory.events.local") or self.text("memory.events")
        if text is None:
            return None
        counts = parse_counts(text)
        return Events(counts.get("max", 0), counts.get("high", 0), counts.get("oom", 0) + counts.get("oom_kill", 0))

    def text(self, name: str) -> str | None:
        """The content of one of its files, None if it cannot be read."""
        return text_of(f"{self.folder}/{name}")

    def _limit(self, name: str) -> int | None:
        return parse_limit(self.text(name) or "")


def memory_cgroups(cgroup: str, mountinfo: str, root: Path = Path("/")) -> list[Cgroup]:
    """This process's memory cgroups, its own first, then those above; ``root`` holds the mounts.

    ``cgroup`` and ``mountinfo`` are the contents of these files of /proc/self.
    """
    base = str(root).rstrip("/")
    found: list[Cgroup] = []
    for version, folders in memory_folders(cgroup, mountinfo, lambda folder: _exists(base + folder)):
        for folder in folders:
            if version == 2 and not _exists(f"{base}{folder}/memory.current"):
                continue  # the root cgroup, or the memory controller is not switched on (both may be bound by v1)
            own = folder == folders[0]
            name = "the cgroup" if own else f"the cgroup {folder.removeprefix(folders[-1]) or '/'}"
            found.append(Cgroup(version, base + folder, name, own))
    return found


def cgroup_room(root: Path = Path("/")) -> Room | None:
    """The lowest limit of this process's memory cgroups, and the least that one of them has left; None without one.

    ``root`` holds proc and the mounts.
    """
    membership, mountinfo = text_of(root / "proc/self/cgroup"), text_of(root / "proc/self/mountinfo")
    if membership is None or mountinfo is None:
        return None
    rooms = [room for cgroup in memory_cgroups(membership, mountinfo, root) if (room := cgroup.room()) is not None]
    return Room(min(room.limit for room in rooms), min(room.left for room in rooms)) if rooms else None
