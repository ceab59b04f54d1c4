"""How much memory the daemon may take if nobody says: the default budget, with its reasons.

What is in use later, and what to give back under pressure, is not decided here (``daemon.core``, ``daemon.pressure``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from expertd.protocol.cgroups import cgroup_room
from expertd.protocol.sizes import show_size

SHARE = 2
"""At most one part in so many of the memory: the base weights, the apps and the page cache need the rest."""
SYSTEM_SHARE = 10
SYSTEM_LEAST = 2_000_000_000
"""What is left to the system: one part in ``SYSTEM_SHARE`` of the memory, and at least this many bytes."""
PAGE_CACHE_SHARE = 8
"""One part in so many is left to the page cache: beyond a peak, a bigger cache makes tokens slower (mlx-lm#1438)."""
FLOOR = 256_000_000
"""No default is smaller, in bytes."""


@dataclass
class Machine:
    """Memory in bytes.  ``limit`` is what the process's memory cgroup may use in all, None if it has no limit.

    ``available`` counts memory that the system can free at once, and no more than the cgroup has left.
    """

    total: int
    available: int
    limit: int | None


@dataclass
class Budget:
    """A default budget in bytes, and the lines that explain it."""

    size: int
    why: list[str]


def reserves(memory: int) -> tuple[int, int]:
    """What is left to the system, and to the page cache, of so many bytes of memory."""
    return max(SYSTEM_LEAST, memory // SYSTEM_SHARE), memory // PAGE_CACHE_SHARE


def default_budget(machine: Machine, own: int = 0) -> Budget:
    """Half of the memory, or what is available less the reserves, whichever is less; never below ``FLOOR``.

    Args:
        own: bytes that a budget is there for and that are taken already, by this daemon or by sessions of one before.
    """
    memory = machine.total if machine.limit is None else min(machine.total, machine.limit)
    half = memory // SHARE
    system, page_cache = reserves(memory)
    left = max(0, machine.available + own - system - page_cache)
    why = [f"total: {show_size(machine.total)}"]
    if memory < machine.total:
        why.append(f"limit of the memory cgroup: {show_size(memory)}, which counts in place of the total")
    why += [
        f"available: {show_size(machine.available)}",
        *([f"held by the cache already, and so available to it: {show_size(own)}"] if own else []),
        f"reserve for the system: {show_size(system)} (the larger of {show_size(SYSTEM_LEAST)} and 10 %)",
        f"reserve for the page cache: {show_size(page_cache)} (1/8; without it a bigger cache is slower, mlx-lm#1438)",
        f"what remains: {show_size(left)}",
        f"base weights and apps: at least half stays theirs, so at most {show_size(half)} for experts",
    ]
    size = min(half, left)
    if size < FLOOR:
        why.append(f"budget: {show_size(FLOOR)}, the least that is of use, though only {show_size(size)} can be spared")
        return Budget(FLOOR, why)
    decided = "half of the memory" if half <= left else "what remains of the available memory"
    why.append(f"budget: {show_size(size)}, {decided}")
    return Budget(size, why)


def this_machine(root: Path = Path("/")) -> Machine:
    """The machine that this runs on; ``root`` is where /proc and the cgroups are (Linux; elsewhere it has none)."""
    memory = psutil.virtual_memory()
    room = cgroup_room(root)
    available = int(memory.available)
    if room is None:
        return Machine(int(memory.total), available, None)
    return Machine(int(memory.total), max(0, min(available, room.left)), room.limit)
