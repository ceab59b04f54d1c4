"""``expertd plan MODEL``: how to split this machine's memory for a model, reckoned before it is loaded.

Here everything is gathered that the reckoning needs: the daemon's figures, traces, what workers have measured, a short
measurement of the disk.  The reckoning is ``expertd.clients.planning``; docs/planning.md explains it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expertd.clients.cli.parameters import complete_model, json_option, model_folder_option
from expertd.protocol.errors import (
    DaemonNotRunning,
    ExpertdError,
    ProtocolMismatch,
    ReadFailed,
    StoreInvalid,
    TraceInvalid,
)
from expertd.protocol.messages import ModelStatus, Status
from expertd.protocol.model_names import find_model
from expertd.protocol.pace import Pace, read_pace
from expertd.protocol.paths import Home
from expertd.protocol.sizes import parse_size, show_size

if TYPE_CHECKING:
    from expertd.clients.planning.hits import Curve
    from expertd.clients.planning.rows import Memory, Plan
    from expertd.clients.planning.shape import Shape
    from expertd.clients.planning.speed import Computing, Disk
    from expertd.protocol.traces import Trace

CONTEXT = 4096
TEXTS = ("The first thing to know about memory is", "def read(path):\n    ", "In the year 1820 the ship")
"""What a model goes on from while it is measured."""
MEASURED_TOKENS = 96
MEASURE_S = 600.0
COPIED = 64 << 20
"""Bytes that are copied to see how fast the memory is."""


@dataclass(frozen=True)
class Reckoned:
    """The plan, and all that it rests on."""

    shape: Shape
    memory: Memory
    auto: int
    context: int
    hits_source: str
    computing: Computing
    disk: Disk
    fetch_s: float
    plan: Plan


def _size(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    return None if text is None else parse_size(text)


def _sizes(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> tuple[int, ...]:
    return tuple(map(parse_size, texts))


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.option("--ram", metavar="SIZE", callback=_size, help="Plan for a machine as this one with so much memory.")
@click.option(
    "--budget", "sizes", metavar="SIZE", multiple=True, callback=_sizes,
    help="Look at this budget; may be given several times.  [default: shares of all experts]",
)  # fmt: skip
@click.option(
    "--context", default=CONTEXT, show_default=True, type=click.IntRange(min=1), metavar="TOKENS",
    help="Leave room for the KV cache of so many tokens.",
)  # fmt: skip
@click.option(
    "--trace", type=click.Path(path_type=Path), metavar="FILE",
    help="Recorded routing of this model ('expertd trace record').  [default: the newest in 'traces' in the home]",
)  # fmt: skip
@click.option("--measure", is_flag=True, help="Let the model generate a little first, to see how fast it computes.")
@model_folder_option
@json_option()
def plan(
    model: str, ram: int | None, sizes: tuple[int, ...], context: int, trace: Path | None, measure: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Show what budgets would give for MODEL (a folder, or a name that 'expertd models' lists), and which is the best.

    The model is not loaded (unless --measure is given): its headers are read, and some of its experts, to see how fast
    the disk is.  Hits and tokens a second are those of single answers; each figure's origin is told.

    Exits with 4 if not even the smallest budget fits.
    """
    folder = find_model(model)
    found = reckon(Home.current(), folder, ram=ram, sizes=sizes, context=context, trace=trace, measure=measure)
    if as_json:
        click.echo(json.dumps(as_object(found), indent=2))
    else:
        for line in table(found):
            click.echo(line)
    if found.plan.best is None:
        sys.exit(4)


def reckon(
    home: Home,
    model: Path,
    *,
    ram: int | None = None,
    sizes: Sequence[int] = (),
    context: int = CONTEXT,
    trace: Path | None = None,
    measure: bool = False,
) -> Reckoned:
    """The plan for the checkpoint in ``model`` on this machine, or on one with ``ram`` bytes.

    Raises:
        ExpertdError: the home, the checkpoint or the trace cannot be used; or the model cannot be measured.
    """
    from expertd.clients.cli.budget import cache_holds
    from expertd.clients.planning.rows import Memory, budgets, make_plan
    from expertd.clients.planning.shape import read_shape
    from expertd.clients.planning.speed import FETCH_S, fetch_seconds
    from expertd.daemon.core.plan import largest, plan_pools, smallest
    from expertd.daemon.machine import Machine, default_budget, reserves, this_machine

    home.check()
    folder = model.resolve()
    shape = read_shape(folder, home.packed)
    if measure:
        _generate(home, shape)
    status = _ask(home)
    held = [] if status is None else [*reversed(status.models)]
    known = next((one for one in held if one.path == str(folder)), None)
    machine, own = (this_machine(), cache_holds(home)) if ram is None else (Machine(ram, ram, None), 0)
    total = machine.total if machine.limit is None else min(machine.total, machine.limit)
    system, page_cache = reserves(total)
    memory = Memory(total, system, page_cache, shape.base_bytes, 0 if shape.kv is None else shape.kv.bytes(context))
    least, most = smallest(shape.manifest), largest(shape.manifest)
    base = shape.base_segment  # which the budget is for too, unless it is too small for that
    auto = max(least, min(most, default_budget(machine, own).size - base))
    curve, hits_source = _curve(home, shape, known, trace)
    disk = _disk(shape, status)
    computing = _computing(shape, read_pace(home, str(folder), shape.manifest.files))
    fetch_s = (known and fetch_seconds(known)) or FETCH_S
    wanted = sorted(max(least, min(most + base, size)) for size in sizes)
    wanted = wanted or [size + base for size in budgets(least, most, memory.room)]

    def slots_of(size: int) -> int:
        experts = size - base if size - base >= least else size
        return sum(pool.layout.slots for pool in plan_pools(shape.manifest, experts))

    points = {slots: curve(slots) for slots in _shown(list(dict.fromkeys(map(slots_of, wanted))))}
    made = make_plan(shape, wanted, slots_of, max(0, memory.left + base), points.__getitem__, computing, disk, fetch_s)
    return Reckoned(shape, memory, auto, context, hits_source, computing, disk, fetch_s, made)


def _shown(work: Sequence[int]) -> Iterator[int]:
    """``work``, with how far it is on a terminal: a large model's trace takes a while to replay for each budget."""
    if not sys.stderr.isatty():
        yield from work
        return
    with click.progressbar(work, label="budgets", file=sys.stderr) as bar:
        yield from bar


def _ask(home: Home) -> Status | None:
    """What the home's daemon says, if one answers that is of this version."""
    from expertd.clients.cli.status import ask_status

    try:
        return ask_status(home)
    except (DaemonNotRunning, ProtocolMismatch):
        return None


def _curve(home: Home, shape: Shape, known: ModelStatus | None, trace: Path | None) -> tuple[Curve, str]:
    """How hits follow from slots, and where that is known from."""
    from expertd.clients.planning.hits import anchored, fitted, measured, replayed
    from expertd.daemon.policy import POLICIES
    from expertd.protocol.config import read_config

    layers, experts = len(shape.manifest.layers), max(layer.experts for layer in shape.manifest.layers)
    found = _trace(home, shape, trace)
    if found is None:
        curve = fitted(shape.blocks, shape.top_k)
        source = "a curve fitted to other models' routing, may be off by ten points; better: expertd trace record"
    else:
        path, recorded = found
        policy = POLICIES[read_config(home).policy.value]
        curve = replayed(recorded, lambda: policy(layers, experts, shape.top_k))
        source = f"the trace {path} ({recorded.info.decode_tokens:,} tokens), replayed through the daemon's policy"
    missed = None if known is None else measured(known)
    if known is None or missed is None:
        return curve, source
    share = 100 * known.slots / known.blocks
    return (
        anchored(curve, known.slots, missed),
        f"the running daemon: {100 * (1 - missed):.1f} % with {share:.0f} % resident, prompts included; "
        f"for other budgets {source}",
    )


def _trace(home: Home, shape: Shape, given: Path | None) -> tuple[Path, Trace] | None:
    """The trace to use: the given one, which has to fit, or the newest of the home that does."""
    from expertd.clients.planning.hits import TOKENS
    from expertd.protocol.traces import read_trace

    layers = shape.manifest.layers
    wanted = (len(layers), max(layer.experts for layer in layers), shape.top_k)
    if given is not None:
        trace = read_trace(given)
        if (trace.info.layers, trace.info.experts, trace.info.top_k) != wanted:
            raise TraceInvalid(
                f"{given} is of a model with {trace.info.layers} layers of {trace.info.experts} experts, "
                f"{trace.info.top_k} a token, where {shape.manifest.folder} has {wanted[0]}, {wanted[1]}, {wanted[2]}"
            )
        if trace.info.decode_tokens < TOKENS:
            raise TraceInvalid(f"{given} has {trace.info.decode_tokens} decoded tokens; record at least {TOKENS}")
        return given, trace
    name = Path(shape.manifest.folder).name
    for path in sorted(home.traces.glob("*.npz"), key=_modified, reverse=True):
        try:
            trace = read_trace(path)
        except TraceInvalid:
            continue  # it was not asked for
        info = trace.info
        if info.model == name and (info.layers, info.experts, info.top_k) == wanted and info.decode_tokens >= TOKENS:
            return path, trace
    return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _disk(shape: Shape, status: Status | None) -> Disk:
    """How fast blocks are read: measured on the model's own files, slowed down if the running daemon is."""
    from expertd.clients.planning.speed import disk_of
    from expertd.daemon.probe import probe
    from expertd.daemon.simulated_ssd import SimulatedSsd, parse_ssd

    simulated = "" if status is None else status.simulated_ssd
    read = SimulatedSsd(parse_ssd(simulated)) if simulated else os.preadv
    counts, source = (1, shape.top_k), "measured on the model's files"
    try:
        times = probe(shape.manifest, shape.store, counts, read)
        if shape.store is not None:
            source = "measured on the model's packed store"
    except (StoreInvalid, ReadFailed):
        if shape.store is None or shape.manifest.derived_by:
            raise
        times = probe(shape.manifest, None, counts, read)  # as the daemon would
    return disk_of(times, f"{source}, slowed down to {simulated} as the daemon is" if simulated else source)


def _computing(shape: Shape, pace: Pace | None) -> Computing:
    """How long tokens are computed: as workers have measured it, else what the memory's speed allows."""
    from expertd.clients.planning.speed import Computing, estimated

    if pace is None or not (pace.complete_us or pace.partial_us):
        rate = memory_rate()
        source = f"at least that, for {show_size(shape.touched_bytes)} from memory of {show_size(rate)}/s"
        return estimated(shape.touched_bytes, rate, f"{source}; better: expertd plan --measure")
    complete, partial = pace.complete_us or pace.partial_us, pace.partial_us or pace.complete_us
    source = "measured when the model ran here"
    if not pace.complete_us:
        source += ", never with everything resident, which is faster"
    elif not pace.partial_us:
        source += ", always with everything resident; else it is slower"
    elif complete > partial:  # it does less; so the machine was busier, or hotter, when that was measured
        source += ", on a busier machine when everything was resident, so what was measured with less counts for both"
        complete = partial
    return Computing(complete / 1e6, partial / 1e6, pace.fetch_us / 1e6, source)


def memory_rate() -> float:
    """Bytes a second that this machine's memory gives to one thread (reading and writing both count)."""
    import numpy as np

    source, target = np.ones(COPIED, np.uint8), np.empty(COPIED, np.uint8)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - began)
    return 2 * COPIED / best


def _generate(home: Home, shape: Shape) -> None:
    """Have the model generate a little, in a process of its own, which keeps its pace in the home."""
    environment = {**os.environ, "EXPERTD_HOME": str(home.root)}
    for text in TEXTS:
        command = [
            sys.executable, "-m", "expertd.clients.cli", "generate", shape.manifest.folder, text, "--raw",
            "--max-tokens", str(MEASURED_TOKENS),
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=MEASURE_S
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("expertd: ")
            raise ExpertdError(f"the model could not be measured: {last}")
        for line in done.stderr.splitlines():
            if line.startswith("expertd: "):
                click.echo(line, err=True)  # such as that a daemon was started


def as_object(found: Reckoned) -> dict[str, object]:
    """The object that ``--json`` prints."""
    shape, memory, computing, disk = found.shape, found.memory, found.computing, found.disk
    layers = shape.manifest.layers
    return {
        "model": {
            "path": shape.manifest.folder,
            "family": shape.manifest.family,
            "moe_layers": len(layers),
            "experts": max(layer.experts for layer in layers),
            "top_k": shape.top_k,
            "blocks": shape.blocks,
            "block_bytes": max(layer.block_bytes for layer in layers),
            "expert_bytes": shape.expert_bytes,
            "base_bytes": shape.base_bytes,
            "touched_bytes": shape.touched_bytes,
        },
        "memory": {
            "total_bytes": memory.total,
            "system_bytes": memory.system,
            "page_cache_bytes": memory.page_cache,
            "kv_bytes": memory.kv if shape.kv is not None else None,
            "context": found.context,
            "room_bytes": memory.room,
            "auto_bytes": found.auto,
        },
        "hits": {"source": found.hits_source},
        "computing": {
            "complete_s": computing.complete_s,
            "partial_s": computing.partial_s,
            "fetch_s": computing.fetch_s,
            "estimated": computing.estimated,
            "source": computing.source,
        },
        "disk": {
            "fixed_s": disk.fixed_s,
            "block_s": disk.block_s,
            "fetch_s": found.fetch_s,
            "source": disk.source,
        },
        "rows": [
            {
                "budget_bytes": row.budget,
                "slots": row.slots,
                "resident": round(row.share, 4),
                "hits": round(row.hits, 4),
                "tokens_s": round(row.tokens_s, 3),
                "fits": row.fits,
                "best": number == found.plan.best,
            }
            for number, row in enumerate(found.plan.rows)
        ],
        "why": found.plan.why,
    }


def table(found: Reckoned) -> list[str]:
    """The plan as lines for a person."""
    from expertd.clients.cli.wrap import wrapped

    shape, memory = found.shape, found.memory
    layers = shape.manifest.layers
    experts, block = max(layer.experts for layer in layers), max(layer.block_bytes for layer in layers)
    kv = "the config does not tell" if shape.kv is None else f"{show_size(memory.kv)} for {found.context:,} tokens"
    disk = found.disk
    several = f", {shape.top_k} at once in {_time(disk.seconds(shape.top_k))}" if shape.top_k > 1 else ""
    computing = found.computing
    computed = f"{_time(computing.complete_s)} a token"
    if round(computing.partial_s, 4) != round(computing.complete_s, 4):
        computed += f", {_time(computing.partial_s)} with some experts absent"
    lines: list[str] = []
    for head, text in (
        ("model", f"{shape.manifest.folder} ({shape.manifest.family})"),
        (
            "  experts",
            f"{len(layers)} layers x {experts}, {shape.top_k} a token, {show_size(block)} each, "
            f"{show_size(shape.expert_bytes)} in all",
        ),
        ("memory", show_size(memory.total)),
        ("  system", f"{show_size(memory.system)}, and {show_size(memory.page_cache)} for the page cache"),
        ("  base", f"{show_size(memory.base)}, once for all processes; it is part of the budget"),
        ("  KV cache", kv),
        ("  left", f"{show_size(memory.room)} for experts; {show_size(found.auto)} of them by default"),
        ("hits", found.hits_source),
        ("computing", f"{computed}: {computing.source}"),
        ("disk", f"one block in {_time(disk.seconds(1))}{several}: {disk.source}"),
    ):
        lines += wrapped(f"{head:<11}", text)
    lines.append("")
    titles = ["budget", "resident", "hits", "tokens/s" + (" at most" if computing.estimated else ""), ""]
    rows = [
        [
            show_size(row.budget),
            f"{100 * row.share:.0f} %",
            f"{100 * row.hits:.1f} %",
            f"{row.tokens_s:.1f}",
            "best" if number == found.plan.best else "" if row.fits else "no room",
        ]
        for number, row in enumerate(found.plan.rows)
    ]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines += ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]).rstrip() for row in (titles, *rows)]
    if found.plan.best is None:
        return [*lines, "", *wrapped("", found.plan.why)]
    best = found.plan.rows[found.plan.best]
    return [
        *lines, "", *wrapped(f"best: {show_size(best.budget)}, ", found.plan.why),
        f"set it: expertd budget {_up(best.budget)}",
    ]  # fmt: skip


def _up(size: int) -> str:
    """A size as people would type it, and not less."""
    unit = next(power for power in (3, 2, 1, 0) if size >= 10 * 1000**power or not power)
    return f"{-(-size // 1000**unit)}{('', 'kB', 'MB', 'GB')[unit]}"


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"
