"""Memory pressure on Linux: the worst of the machine, of the memory cgroups above this process, and of stalls (PSI).

This is about what is little and what is too little; what a cgroup has left is read in ``protocol.cgroups``.  Reference:
the kernel's ``accounting/psi.rst``.

Parsing and judging are pure functions; ``CgroupWatch`` and ``LinuxSource`` read files, each anew for every reading.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expertd.daemon.pressure import Level, Reading
from expertd.protocol.cgroups import Cgroup, Events, Room, memory_cgroups, text_of
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


class CgroupWatch:
    """One cgroup over time: what is short in it, and what has happened to it."""

    def __init__(self, cgroup: Cgroup) -> None:
        self._cgroup = cgroup
        self._before: Events | None = None
        self._until = dict.fromkeys(("hits", "high", "kills"), float("-inf"))

    def findings(self, now: float) -> list[Finding]:
        """What is left, what happened since the last call, and the time that was lost; ``now`` in seconds."""
        cgroup = self._cgroup
        room = cgroup.room()
        if room is not None or cgroup.own:
            self._count(now)
        found: list[Finding] = []
        if now < self._until["kills"]:
            figure = f"the out-of-memory killer came to {cgroup.name} less than {RECENT_S:g} s ago"
            found.append(Finding(Level.CRITICAL, float("inf"), figure))
        if room is not None:
            found.append(judge_room(room, cgroup.name, now < self._until["hits"], now < self._until["high"]))
            stalls = parse_stalls(cgroup.text("memory.pressure") or "") if cgroup.version == 2 else None
            finding = judge_stalls(stalls, room, f" in {cgroup.name}") if stalls is not None else None
            found += [] if finding is None else [finding]
        return found

    def _count(self, now: float) -> None:
        events = self._cgroup.events()
        if events is not None and self._before is not None:
            for name in self._until:
                if getattr(events, name) > getattr(self._before, name):
                    self._until[name] = now + RECENT_S
        self._before = events or self._before


class LinuxSource:
    """Owned by one loop.  ``root`` holds proc and the cgroup mounts; ``clock`` gives seconds."""

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._clock = clock
        self._membership: str | None = None
        self._cgroups: list[CgroupWatch] = []
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
                self._cgroups = [CgroupWatch(each) for each in memory_cgroups(membership, mountinfo, self._root)]
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
        return text_of(self._root / "proc" / name)

    def _swap_growth(self, now: float, used: int) -> int:
        """Bytes by which swap has grown over the least of the last ``SWAP_S`` seconds."""
        while self._swap and self._swap[0][0] < now - SWAP_S:
            self._swap.popleft()
        self._swap.append((now, used))
        return used - min(before for _, before in self._swap)
