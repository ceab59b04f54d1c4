"""Memory pressure on Linux: the worst of the machine, of the memory cgroups above this process, and of stalls (PSI).

What counts is what is left when the kernel has dropped all page cache that it can drop.  Shared memory is no such
cache, though it is counted with it in places: our own pools are shared memory.  Both versions of cgroups are read, as
far as this process sees them.  Reference: the kernel's ``admin-guide/cgroup-v2.rst``, ``cgroup-v1/memory.rst`` and
``accounting/psi.rst``.

Parsing and judging are pure functions; ``Cgroup`` and ``LinuxSource`` read files.  Every file is opened for each
reading, some microseconds: nothing goes stale when the process is moved to another cgroup.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.daemon.pressure import Level, Reading
from expertd.protocol.sizes import show_size


@dataclass(frozen=True)
class Thresholds:
    """Below which rest there is pressure: a share of all memory, but no more than so many bytes."""

    warning_share: float
    warning_most: int
    critical_share: float
    critical_most: int

    def warning(self, limit: int) -> int:
        """Bytes left below which it is a warning."""
        return min(int(limit * self.warning_share), self.warning_most)

    def critical(self, limit: int) -> int:
        """Bytes left below which it is critical."""
        return min(int(limit * self.critical_share), self.critical_most)

    def level(self, left: int, limit: int) -> Level:
        """The level when ``left`` bytes of ``limit`` are left."""
        if left < self.critical(limit):
            return Level.CRITICAL
        return Level.WARNING if left < self.warning(limit) else Level.NORMAL


LEFT = Thresholds(0.15, 2_000_000_000, 0.06, 768_000_000)
"""For the machine and for cgroups.  A warning leaves time to move pools, critical what one prompt may suddenly need;
the limits in bytes keep a big machine from holding back ten gigabytes."""
LEFT_AFTER_HIT = Thresholds(0.20, 2_500_000_000, 0.10, 1_250_000_000)
"""The same for some seconds after the cgroup hit its limit.  A hit alone says nothing: reading large files drives any
cgroup to its limit, where the kernel drops cache (v1 failcnt, v2 high and max all count that too)."""
RECENT_S = 5.0
"""So long a hit or a kill by the out-of-memory killer counts, in seconds."""

SOME_WARNING = 10.0
FULL_CRITICAL = 10.0
"""Percent of the last ten seconds in which some task, or all of them, waited for memory.  An idle or well-fed machine
shows under 1; systemd-oomd begins to kill at 60 for 30 s, so giving back has to begin far below."""
SWAP_S = 5.0
SWAP_GROWTH = 256_000_000
"""Swap that grows by so many bytes in so many seconds is a warning."""
PLENTY = 0.5
"""Where a larger share than this is left, stalls and swap do not count: they are those of a cgroup at its own limit."""

UNLIMITED = 1 << 60
"""No limit in bytes is that high; v1 says about 1 << 63 where there is none."""


@dataclass(frozen=True)
class Room:
    """What a cgroup may use in all and has left, droppable page cache not counted as used; bytes."""

    limit: int
    left: int


@dataclass(frozen=True)
class Meminfo:
    """The machine's memory in bytes."""

    total: int
    available: int
    swap_used: int


@dataclass(frozen=True)
class Stalls:
    """Percent of the last ten seconds lost waiting for memory, by some task or by all of them."""

    some: float
    full: float


@dataclass(frozen=True)
class Events:
    """Counters of a cgroup: hits of its limit, of ``memory.high``, and calls of the out-of-memory killer."""

    hits: int = 0
    high: int = 0
    kills: int = 0


@dataclass(frozen=True, order=True)
class Finding:
    """One judgement; they order by what is worse.  ``nearness`` is 1 at the threshold of a warning."""

    level: Level
    nearness: float
    figure: str

    @property
    def reading(self) -> Reading:
        """Without the nearness."""
        return Reading(self.level, self.figure)


_MEMINFO = re.compile(r"^(MemTotal|MemAvailable|SwapTotal|SwapFree): +(\d+) kB", re.MULTILINE)
_STALLS = re.compile(r"^(some|full) avg10=(\d+(?:\.\d+)?)", re.MULTILINE)


def parse_counts(text: str) -> dict[str, int]:
    """Lines ``name value`` (memory.stat, memory.events, memory.oom_control); others are skipped."""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {name: int(value) for name, _, value in pairs if value.isdecimal()}


def parse_limit(text: str) -> int | None:
    """Bytes of a limit, None if there is none (v1: a huge number, v2: ``max``)."""
    word = text.strip()
    return int(word) if word.isdecimal() and int(word) < UNLIMITED else None


def parse_meminfo(text: str) -> Meminfo | None:
    """/proc/meminfo; None if it lacks MemTotal or MemAvailable (Linux before 3.14)."""
    size = {name: int(kib) * 1024 for name, kib in _MEMINFO.findall(text)}
    if not size.get("MemTotal") or "MemAvailable" not in size:
        return None
    swap_used = max(0, size.get("SwapTotal", 0) - size.get("SwapFree", 0))
    return Meminfo(size["MemTotal"], size["MemAvailable"], swap_used)


def parse_stalls(text: str) -> Stalls | None:
    """/proc/pressure/memory or a cgroup's memory.pressure."""
    found = {kind: float(share) for kind, share in _STALLS.findall(text)}
    return Stalls(found.get("some", 0.0), found.get("full", 0.0)) if found else None


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


def judge_room(room: Room, name: str, hit: bool = False, high: bool = False) -> Finding:
    """What a cgroup has left; ``hit`` and ``high``: it was at its limit, or at its memory.high, a moment ago."""
    level = LEFT.level(room.left, room.limit)
    figure = f"{name} has {show_size(max(0, room.left))} left of its limit of {show_size(room.limit)}"
    after = LEFT_AFTER_HIT.level(room.left, room.limit)
    if high and not hit:
        after = min(after, Level.WARNING)
    if (hit or high) and after > level:
        level, figure = after, f"{figure} and has just hit it"
    return Finding(level, LEFT.warning(room.limit) / max(1, room.left), figure)


def judge_stalls(stalls: Stalls, room: Room | None, where: str = "") -> Finding | None:
    """Time lost; None where that much is left (``room``, if it is known) that the stalls are others'."""
    if room is not None and room.left > room.limit * PLENTY:
        return None
    if stalls.full >= FULL_CRITICAL:
        level, kind, share, threshold = Level.CRITICAL, "full", stalls.full, FULL_CRITICAL
    else:
        level = Level.WARNING if stalls.some >= SOME_WARNING else Level.NORMAL
        kind, share, threshold = "some", stalls.some, SOME_WARNING
    figure = f"{share:.1f} % of the last 10 s were lost waiting for memory{where} (PSI {kind} avg10)"
    return Finding(level, share / threshold, figure)


def judge_machine(memory: Meminfo, swap_growth: int) -> Finding:
    """What is available on the machine, and swap that grew by so many bytes in ``SWAP_S`` seconds."""
    level = LEFT.level(memory.available, memory.total)
    figure = f"{show_size(memory.available)} of the machine's {show_size(memory.total)} are available"
    left = Finding(level, LEFT.warning(memory.total) / max(1, memory.available), figure)
    if memory.available > memory.total * PLENTY:
        return left
    level = Level.WARNING if swap_growth >= SWAP_GROWTH else Level.NORMAL
    figure = f"swap grew by {show_size(swap_growth)} in {SWAP_S:g} s"
    return max(left, Finding(level, swap_growth / SWAP_GROWTH, figure))


def _text(path: Path | str) -> str | None:
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


class Cgroup:
    """One memory cgroup of version 1 or 2 in ``folder``; ``own``: this process is in it, not only below it."""

    def __init__(self, version: int, folder: str, name: str, own: bool) -> None:
        self._version = version
        self._folder = folder
        self._name = name
        self._own = own
        self._before: Events | None = None
        self._until = dict.fromkeys(("hits", "high", "kills"), float("-inf"))

    def room(self) -> Room | None:
        """What is left; None without a limit, or if its files cannot be read."""
        if self._version == 1:
            limits, usage, prefix = [self._limit("memory.limit_in_bytes")], "memory.usage_in_bytes", "total_"
        else:
            limits, usage, prefix = [self._limit("memory.max"), self._limit("memory.high")], "memory.current", ""
        if limits.count(None) == len(limits) and not (self._version == 1 and self._own):
            return None
        stat = parse_counts(_text(self._path("memory.stat")) or "")
        if self._own:  # v1 knows the lowest limit above, even of cgroups that a container does not see
            limits.append(stat.get("hierarchical_memory_limit"))
        limit = min((limit for limit in limits if limit is not None), default=UNLIMITED)
        used = (_text(self._path(usage)) or "").strip()
        if limit >= UNLIMITED or not used.isdecimal():
            return None
        cache = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
        return Room(limit, limit - max(0, int(used) - cache))

    def findings(self, now: float) -> list[Finding]:
        """What is left, what happened since the last call, and the time that was lost; ``now`` in seconds."""
        room = self.room()
        if room is not None or self._own:
            self._count(now)
        found: list[Finding] = []
        if now < self._until["kills"]:
            figure = f"the out-of-memory killer came to {self._name} less than {RECENT_S:g} s ago"
            found.append(Finding(Level.CRITICAL, float("inf"), figure))
        if room is not None:
            found.append(judge_room(room, self._name, now < self._until["hits"], now < self._until["high"]))
            stalls = parse_stalls(_text(self._path("memory.pressure")) or "") if self._version == 2 else None
            finding = judge_stalls(stalls, room, f" in {self._name}") if stalls is not None else None
            found += [] if finding is None else [finding]
        return found

    def _count(self, now: float) -> None:
        events = self._events()
        if events is not None and self._before is not None:
            for name in self._until:
                if getattr(events, name) > getattr(self._before, name):
                    self._until[name] = now + RECENT_S
        self._before = events or self._before

    def _events(self) -> Events | None:
        if self._version == 1:
            hits, control = _text(self._path("memory.failcnt")), _text(self._path("memory.oom_control"))
            if hits is None and control is None:
                return None
            count = int(hits) if hits is not None and hits.strip().isdecimal() else 0
            return Events(hits=count, kills=parse_counts(control or "").get("oom_kill", 0))
        # Without .local (Linux before 5.2) a parent counts what happens to its other children at their own limits.
        text = _text(self._path("memory.events.local")) or _text(self._path("memory.events"))
        if text is None:
            return None
        counts = parse_counts(text)
        return Events(counts.get("max", 0), counts.get("high", 0), counts.get("oom", 0) + counts.get("oom_kill", 0))

    def _limit(self, name: str) -> int | None:
        return parse_limit(_text(self._path(name)) or "")

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"


def memory_cgroups(root: Path = Path("/")) -> list[Cgroup]:
    """This process's memory cgroups, its own first, then those above.  ``root`` holds proc and the mounts."""
    return _cgroups(root, _text(root / "proc/self/cgroup") or "", _text(root / "proc/self/mountinfo") or "")


def _cgroups(root: Path, cgroup: str, mountinfo: str) -> list[Cgroup]:
    base = str(root).rstrip("/")
    found: list[Cgroup] = []
    for version, folders in memory_folders(cgroup, mountinfo, lambda folder: Path(base + folder).is_dir()):
        for folder in folders:
            if version == 2 and not Path(base + folder, "memory.current").exists():
                continue  # the root cgroup, or the memory controller is not switched on (both may be bound by v1)
            own = folder == folders[0]
            name = "the cgroup" if own else f"the cgroup {folder.removeprefix(folders[-1]) or '/'}"
            found.append(Cgroup(version, base + folder, name, own))
    return found


def cgroup_room(root: Path = Path("/")) -> Room | None:
    """The lowest limit of this process's memory cgroups, and the least that one of them has left; None without one."""
    rooms = [room for cgroup in memory_cgroups(root) if (room := cgroup.room()) is not None]
    return Room(min(room.limit for room in rooms), min(room.left for room in rooms)) if rooms else None


class LinuxSource:
    """Owned by one loop.  ``root`` holds proc and the cgroup mounts; ``clock`` gives seconds."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._membership: str | None = None
        self._cgroups: list[Cgroup] = []
        self._swap: deque[tuple[float, int]] = deque()
        self._known: set[str] = set()
        self.read()  # counters count from here

    def read(self) -> Reading:
        """The worst of all; some tenths of a millisecond."""
        now = self._clock()
        memory = parse_meminfo(self._proc("meminfo") or "")
        stalls = parse_stalls(self._proc("pressure/memory") or "")
        found: list[Finding] = []
        seen: set[str] = set()
        if memory is not None:
            found.append(judge_machine(memory, self._swap_growth(now, memory.swap_used)))
            seen.add("/proc/meminfo")
        if stalls is not None:
            room = Room(memory.total, memory.available) if memory is not None else None
            finding = judge_stalls(stalls, room)
            found += [] if finding is None else [finding]
            seen.add("/proc/pressure/memory")
        membership = self._proc("self/cgroup")
        if membership is not None and membership != self._membership:
            mountinfo = self._proc("self/mountinfo")
            if mountinfo is not None:  # else no descriptor is left: those that are known stay until there is one
                self._membership = membership
                self._cgroups = _cgroups(self._root, membership, mountinfo)
        for cgroup in self._cgroups:
            found += cgroup.findings(now)
        lost = sorted(self._known - seen)
        self._known |= seen
        worst = max(found, default=Finding(Level.NORMAL, 0.0, "this system reports no memory pressure")).reading
        if lost and worst.level is Level.NORMAL:
            gone = f"{' and '.join(lost)} can no longer be read"
            return Reading(worst.level, f"{worst.figure}; {gone}" if found else gone)
        return worst

    def _proc(self, name: str) -> str | None:
        return _text(self._root / "proc" / name)

    def _swap_growth(self, now: float, used: int) -> int:
        """Bytes by which swap has grown over the least of the last ``SWAP_S`` seconds."""
        while self._swap and self._swap[0][0] < now - SWAP_S:
            self._swap.popleft()
        self._swap.append((now, used))
        return used - min(before for _, before in self._swap)
