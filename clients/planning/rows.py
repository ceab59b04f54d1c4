"""The plan itself: what the memory is needed for, budgets with what they would give, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertd.clients.planning.hits import Curve
from expertd.clients.planning.shape import Shape
from expertd.clients.planning.speed import FETCH_S, Computing, Disk, token_seconds
from expertd.protocol.sizes import show_size

SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
"""Budgets that are looked at: so much of what all experts take."""
ENOUGH = 0.95
"""The best budget is the smallest that gives so much of the speed of the fastest that fits."""


@dataclass(frozen=True)
class Memory:
    """What the memory of a machine goes to beside experts, in bytes; ``kv`` is 0 where the config does not tell it."""

    total: int
    system: int
    page_cache: int
    base: int
    kv: int

    @property
    def left(self) -> int:
        """What is left beside all else; below zero if that is too much already."""
        return self.total - self.system - self.page_cache - self.base - self.kv

    @property
    def room(self) -> int:
        """What is left for experts."""
        return max(0, self.left)


@dataclass(frozen=True)
class Row:
    """One budget: the slots that it gives, hits of single tokens (0-1), tokens a second, and whether there is room."""

    budget: int
    slots: int
    share: float
    hits: float
    tokens_s: float
    fits: bool


@dataclass(frozen=True)
class Plan:
    """``best``: the number of the row that is recommended, None if no budget fits; ``why``: in words."""

    rows: list[Row]
    best: int | None
    why: str


def budgets(smallest: int, largest: int, room: int) -> list[int]:
    """The budgets to look at: shares of ``largest``, which holds all experts, itself, and all the room there is."""
    found = {largest, *(round(share * largest) for share in SHARES)}
    if smallest <= room < largest:
        found = {size for size in found if abs(size - room) > largest / 50} | {room}
    return sorted(max(smallest, size) for size in found)


def make_plan(
    shape: Shape,
    sizes: Sequence[int],
    slots_of: Callable[[int], int],
    room: int,
    curve: Curve,
    computing: Computing,
    disk: Disk,
    fetch_s: float = FETCH_S,
) -> Plan:
    """What each budget in ``sizes`` would give.

    Args:
        fetch_s: see ``token_seconds``.
        slots_of: how many blocks a budget holds.
        room: bytes that there are for experts and base weights.
    """
    rows = []
    layers = len(shape.manifest.layers)
    for size in dict.fromkeys(sizes):
        slots = slots_of(size)
        misses = curve(slots)
        seconds = token_seconds(misses, layers, shape.top_k, computing, disk, fetch_s)
        rows.append(Row(size, slots, slots / shape.blocks, 1 - misses.lookups, 1 / seconds, size <= room))
    return _judged(rows, shape, room)


def _judged(rows: list[Row], shape: Shape, room: int) -> Plan:
    fitting = [number for number, row in enumerate(rows) if row.fits]
    if not fitting:
        least, left = show_size(rows[0].budget), show_size(room)
        return Plan(rows, None, f"nothing fits: base weights and experts need {least}, and {left} are left")
    fastest = max(fitting, key=lambda number: rows[number].tokens_s)
    best = next(number for number in fitting if rows[number].tokens_s >= ENOUGH * rows[fastest].tokens_s)
    if rows[best].slots >= shape.blocks:
        why = "all experts fit, so nothing is read any more"
    elif best != fastest:
        gain = 100 * (rows[fastest].tokens_s / rows[best].tokens_s - 1)
        why = f"{show_size(rows[fastest].budget - rows[best].budget)} more would make it {gain:.0f} % faster only"
    elif fitting[-1] == len(rows) - 1:
        why = "the fastest of these"
    else:
        why = "the fastest that leaves the system, base weights and KV cache what they need"
    return Plan(rows, best, why)
