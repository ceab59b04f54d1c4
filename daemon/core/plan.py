"""How a model's layers are divided into pools, and how many slots each gets for a given number of bytes.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertd.protocol.errors import BudgetTooSmall
from expertd.protocol.layout import PoolLayout, most_slots, pool_layout, slot_limit
from expertd.protocol.manifest import Layer, Manifest
from expertd.protocol.sizes import show_size

DEPTH_BIAS = 0.05
"""Where a model has several pools, the shallowest layers begin with so much more than their part of the slots, and the
deepest with so much less (docs/decisions.md)."""

GROWTH = 9 / 8
"""A pool moves to a larger generation if that is so much larger, holds all, or is its quota: moving costs copies."""


@dataclass(frozen=True)
class PoolPlan:
    """``layers``: indices of MoE layers that share a pool; ``layout``: of its segment."""

    layers: tuple[int, ...]
    layout: PoolLayout


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Layers that may share a pool: blocks of different shape never do."""
    groups: dict[object, list[int]] = {}
    for number, layer in enumerate(layers):
        groups.setdefault(layer.shape_key, []).append(number)
    return list(groups.values())


def _floor(layers: Sequence[Layer], group: Sequence[int]) -> int:
    """Slots that one event of one session needs: the most experts that one token uses in a layer of the group."""
    return min(max(layers[n].top_k for n in group), layers[group[0]].experts)


def _layout(layers: Sequence[Layer], group: Sequence[int], slots: int) -> PoolLayout:
    first = layers[group[0]]
    return pool_layout(len(group), first.experts, first.parts, slots)


def resized(manifest: Manifest, pool_layers: Sequence[int], size: int) -> PoolLayout:
    """The layout of a pool of these layers in ``size`` bytes: at least one event of one session, at most all blocks."""
    layers = manifest.layers
    first = layers[pool_layers[0]]
    most = min(len(pool_layers) * first.experts, slot_limit(first.parts))
    slots = most_slots(len(pool_layers), first.experts, first.parts, max(0, size))
    return _layout(layers, pool_layers, max(_floor(layers, pool_layers), min(slots, most)))


def floor_of(manifest: Manifest, pool_layers: Sequence[int], sessions: int) -> int:
    """Bytes of a pool of these layers that has slots for one event of each of so many sessions, or for every block."""
    layers = manifest.layers
    most = resized(manifest, pool_layers, largest(manifest)).slots
    return _layout(layers, pool_layers, min(most, max(1, sessions) * _floor(layers, pool_layers))).size


def largest_of(manifest: Manifest, pool_layers: Sequence[int]) -> int:
    """Bytes of a pool of these layers that holds as much as a pool can."""
    return resized(manifest, pool_layers, largest(manifest)).size


def divide(size: int, wants: Sequence[tuple[int, int, int]]) -> list[int]:
    """Bytes for each of several users of memory, together ``size`` (or the sum of what they need, if that is more).

    Args:
        wants: for each the fewest bytes it can live with, what it has, and the most that it could use.
    Returns:
        Its share.  Where memory is short, all give up the same part of what they have beyond the fewest; where some
        is left, it goes where room for it is, in proportion to that room.
    """
    spare = size - sum(has for _, has, _ in wants)
    if spare < 0:
        above = sum(has - fewest for fewest, has, _ in wants)
        keep = max(0, above + spare)
        return [fewest + (has - fewest) * keep // above if above else fewest for fewest, has, _ in wants]
    room = sum(most - has for _, has, most in wants)
    return [has + min(most - has, spare * (most - has) // room if room else 0) for _, has, most in wants]


def smallest(manifest: Manifest) -> int:
    """Bytes of the smallest budget that can serve ``manifest`` (one event of one session)."""
    layers = manifest.layers
    return sum(_layout(layers, group, _floor(layers, group)).size for group in _groups(layers))


def largest(manifest: Manifest) -> int:
    """Bytes of segments that hold every block of ``manifest``."""
    layers = manifest.layers
    return sum(_layout(layers, group, len(group) * layers[group[0]].experts).size for group in _groups(layers))


def plan_pools(manifest: Manifest, size: int) -> list[PoolPlan]:
    """Pools for ``manifest`` in at most ``size`` bytes.

    Each group of layers of one shape gets its floor and its part of the rest (``divide``), and shares one pool; a pool
    whose slabs would reach 2^31 elements is split into runs of neighbouring layers.  One wide pool lets slots follow
    the layers that need them (docs/decisions.md); several follow them by ``quotas``, and begin with DEPTH_BIAS.

    Raises:
        BudgetTooSmall: ``size`` is below ``smallest(manifest)``.
    """
    layers = manifest.layers
    needed = smallest(manifest)
    if size < needed:
        raise BudgetTooSmall(
            f"{manifest.folder} needs at least {needed} bytes ({show_size(needed)}) for one event of one session, "
            f"and {show_size(max(0, size))} can be had; start the daemon with --budget {needed} or more"
        )
    groups = _groups(layers)
    floors = [_layout(layers, group, _floor(layers, group)).size for group in groups]
    most = [_layout(layers, group, len(group) * layers[group[0]].experts).size for group in groups]
    shares = divide(size, list(zip(floors, floors, most, strict=True)))
    runs: list[tuple[int, ...]] = []
    wants: list[tuple[int, int, int]] = []
    for group, share in zip(groups, shares, strict=True):
        first = layers[group[0]]
        slots = most_slots(len(group), first.experts, first.parts, share)
        width = -(-len(group) // -(-slots // slot_limit(first.parts)))
        for start in range(0, len(group), width):
            run = tuple(group[start : start + width])
            runs.append(run)
            fewest, most_of_run = (resized(manifest, run, size).size for size in (0, largest(manifest)))
            wants.append((fewest, min(share * len(run) // len(group), most_of_run), most_of_run))
    sizes = divide(size, _shallow_first(runs, wants, len(layers)))
    return [PoolPlan(run, resized(manifest, run, size)) for run, size in zip(runs, sizes, strict=True)]


def beginning(manifest: Manifest, plans: Sequence[PoolPlan], size: int) -> list[tuple[PoolPlan, PoolLayout]]:
    """The layout that each pool of ``plans`` begins with if no more than ``size`` bytes can be had for all of them."""
    fewest = [resized(manifest, plan.layers, 0).size for plan in plans]
    wants = [(least, plan.layout.size, plan.layout.size) for plan, least in zip(plans, fewest, strict=True)]
    shares = divide(size, wants)
    return [(plan, resized(manifest, plan.layers, share)) for plan, share in zip(plans, shares, strict=True)]


def _shallow_first(
    runs: Sequence[Sequence[int]], wants: Sequence[tuple[int, int, int]], layers: int
) -> list[tuple[int, int, int]]:
    """What runs of layers should have, all together no more than before, with the bias for shallow layers."""
    bias = [1 + DEPTH_BIAS * (1 - 2 * sum(run) / len(run) / max(1, layers - 1)) for run in runs]
    above = [has - fewest for fewest, has, _ in wants]
    biased = sum(each * factor for each, factor in zip(above, bias, strict=True))
    scale = sum(above) / biased if biased else 1.0
    return [
        (fewest, min(most, fewest + int(each * factor * scale)), most)
        for (fewest, _, most), each, factor in zip(wants, above, bias, strict=True)
    ]
