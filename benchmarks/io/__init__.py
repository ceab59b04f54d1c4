"""How near the daemon's reading is to what the device gives, and what it costs.

Fetches of 64 blocks that all miss, by a session without a model, from a packed store and from plain safetensors; and a
C program that reads the same records in the same order with O_DIRECT on four threads, once into a buffer of each thread
(as fio) and once into large pages (the most that the device gives).  All take turns in changing order, because a disk
that others use is twice as fast at one moment as at the next; figures are medians of ratios of neighbours
(docs/benchmarks.md).
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.io.stage import EXPERTS, FETCH, Read, Stored, reading, write_model
from benchmarks.io.yardstick import Yardstick
from expertd.protocol.messages import FetchToRead

PACKED, PLAIN = "packed", "unpacked"
EVENT, ABSENT, COMPUTING_S = 8, 2, 0.003
"""Blocks of a Fetch as decoding makes it, of which the way to the first read is measured; how many of them are absent,
and how long a model computes between two."""

Seconds = dict[bool, list[float]]
"""What the C program took, without and with large pages."""


def run(quick: bool = False) -> dict[str, Any]:
    """See the module; figures that this system cannot give are None, and it says why."""
    layers, stretches, rounds, small_fetches = (2, 2, 6, 50) if quick else (4, 6, 12, 400)
    chance = random.Random(0)
    beside = Path(os.environ.get("TMPDIR") or Path.cwd() / ".tmp")  # /tmp may be memory
    beside.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="expertd-io-", dir=beside) as folder:
        stored = write_model(Path(folder), layers)
        yardstick = _yardstick(Path(folder), stored)
        c_seconds: Seconds = {False: [], True: []}
        shares: list[float] = []
        reads: dict[str, list[Read]] = {PACKED: [], PLAIN: []}
        large = [_stretch(stored, yardstick, rounds, chance, c_seconds, reads, shares).p50 for _ in range(stretches)]
        with reading(stored, packed=True, slots=layers * EXPERTS // 2) as daemon:
            for number in range(small_fetches):
                daemon.fetch(number % layers, daemon.choose(chance, number % layers, EVENT, ABSENT))
                time.sleep(COMPUTING_S)
            small = daemon.fetch_to_read()
    needed = FETCH * stored.block_bytes
    print(_told(shares))
    figures: dict[str, Any] = {}
    for name, found in reads.items():
        figures |= _figures(name, found, c_seconds, needed)
    return figures | {
        "fetch_to_read_us": small.p50,
        "fetch_to_read_p99_us": small.p99,
        f"fetch_to_read_us_{FETCH}": round(statistics.median(large)),
        "c_mb_per_s": _rate(needed, c_seconds[False]),
        "c_large_mb_per_s": _rate(needed, c_seconds[True]),
        "pool_in_large_pages": round(statistics.median(shares), 3) if shares else None,
        "rounds": stretches * rounds,
    }


def _stretch(
    stored: Stored,
    yardstick: Yardstick | None,
    rounds: int,
    chance: random.Random,
    c_seconds: Seconds,
    reads: dict[str, list[Read]],
    shares: list[float],
) -> FetchToRead:
    """The same blocks by the C reader and both daemons, again and again, into ``c_seconds`` and ``reads``.

    The daemons are new ones, because how much of their memory lies in large pages is settled soon after they begin, and
    stays; that goes into ``shares``.  Returns how soon the packed one began to read.
    """
    with reading(stored, packed=True) as packed, reading(stored, packed=False) as plain:
        daemons = {PACKED: packed, PLAIN: plain}
        shares += [daemon.large_share for daemon in daemons.values() if daemon.large_share is not None]
        for number in range(rounds):
            layer, experts = number % len(stored.manifest.layers), chance.sample(range(EXPERTS), FETCH)
            turns: list[str | bool] = [*c_seconds, *daemons]
            chance.shuffle(turns)
            for turn in turns:
                if isinstance(turn, str):
                    reads[turn].append(daemons[turn].fetch(layer, experts))
                elif yardstick is not None:
                    offsets = [stored.layout.record(layer, expert) for expert in experts]
                    c_seconds[turn].append(yardstick.read(offsets, large=turn))
        return packed.fetch_to_read()


def _told(shares: Sequence[float]) -> str:
    if not shares:
        return "this system does not tell how much of a pool lies in large pages"
    middle, least, most = statistics.median(shares), min(shares), max(shares)
    return f"of a pool {middle:.0%} lay in large pages before it was read into ({least:.0%} to {most:.0%})"


def _yardstick(folder: Path, stored: Stored) -> Yardstick | None:
    packed = stored.layout.header.layers[0]
    try:
        found = Yardstick(folder, stored.store, packed.record_bytes, max(part.bytes for part in packed.parts))
        found.read([stored.layout.record(0, 0)])
    except RuntimeError as error:
        print(f"nothing to compare with: {error}")
        return None
    return found


def _rate(needed: int, seconds: Sequence[float]) -> int | None:
    return round(needed / statistics.median(seconds) / 1e6) if seconds else None


def _figures(name: str, reads: Sequence[Read], c_seconds: Seconds, needed: int) -> dict[str, Any]:
    """Of one way of reading.  A ratio of 1 is as fast as the C program, or no byte more than is needed."""
    rate = needed / statistics.median(read.seconds for read in reads)
    print(f"{name}: {rate / 1e6:.0f} MB/s")
    found: dict[bool, float | None] = dict.fromkeys(c_seconds)
    for large, seconds in c_seconds.items():
        if seconds:
            ratios = [c / read.seconds for c, read in zip(seconds, reads, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            where = "into large pages" if large else "into buffers of its threads"
            print(f"  of the C reader's speed {where}: {middle:.3f} (quartiles {low:.3f}, {high:.3f})")
            found[large] = round(middle, 3)
    return {
        f"{name}_ratio": found[False],
        f"{name}_ratio_large": found[True],
        f"{name}_bytes_ratio": _over([read.process_bytes for read in reads], needed, "process"),
        f"{name}_device_bytes_ratio": _over([read.device_bytes for read in reads], needed, "device"),
        f"{name}_mb_per_s": round(rate / 1e6),
        f"daemon_cpu_s_per_gb_{name}": round(sum(read.cpu_s for read in reads) / (len(reads) * needed / 1e9), 3),
    }


def _over(counted: Sequence[int | None], needed: int, whose: str) -> float | None:
    """Bytes that were read over bytes that were needed, the median: others may use the device too."""
    found = [size for size in counted if size is not None]
    if not found:
        print(f"this system does not count the bytes of the {whose}")
        return None
    return round(statistics.median(found) / needed, 4)
