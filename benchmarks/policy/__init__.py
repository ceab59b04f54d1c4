"""How good eviction is, on recorded routing: hits of every policy, of the oracle, and the share of the gap between.

The gap of a policy is ``(its hits - LRU's) / (Belady's - LRU's)``, where LRU and Belady have one pool for all layers
with the same number of slots, whatever pools the policy has.  Everything starts cold; sequences follow each other.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.policy.fit import fit_weights
from benchmarks.policy.footprint import bytes_of_arrays
from benchmarks.policy.picture import draw
from benchmarks.policy.simulator import Replay, even_pools, replay
from benchmarks.policy.traffic import Pass, dealt, enlarged, in_turns, passes_of, select, together, without
from expertd.clients.traces.replay import belady, events_of
from expertd.daemon.policy import POLICIES, Forecast
from expertd.protocol.traces import Trace, read_trace

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75)
GAPS = (0.2, 0.3, 0.5)
"""Fractions at which widths of pools are compared."""
WIDTHS = 5
"""So many widths are compared at most."""
SHARED_FRACTION = 0.4
BATCH_FRACTION = 0.3
START_FRACTION, START_TOKENS = 0.3, 500
METAL_ASSIGNMENTS = 4
"""Metal computes a prompt's experts by its fast kernel if there are so many (token, expert) pairs for each slot."""
CHUNK = 512
"""Tokens of a piece of a prompt."""
TIMED = (48, 128, 8)
"""Layers, experts and experts a token of the model that decisions are timed for."""
TIMED_TOKENS = 200
TIMED_ROUNDS = 6
QUICK_TOKENS = 2000

Job = tuple[str, float, int]
"""A replay: the policy, the fraction of all blocks that is cached, the number of pools."""

_trace: Trace
_passes: list[Pass]
_others: list[Pass]


def run(
    quick: bool = False,
    trace: Path | None = None,
    sequences: str = "odd",
    picture: Path | None = None,
    fit: bool = False,
) -> dict[str, Any]:
    """``gap_20`` and so on in percent, ``sharing_2``, ``decision_us``, and ``{policy}_hits_20`` of each policy."""
    if trace is None:
        raise SystemExit("policy needs recorded routing: --trace FILE ('expertd trace record' makes one)")
    if fit:
        return fit_weights(select(read_trace(trace), "even"))
    tokens = QUICK_TOKENS if quick else None
    _load(trace, sequences, tokens)
    info = _trace.info
    title = f"{info.model or trace.stem}: {info.layers} layers x {info.experts} experts, {info.top_k} a token"
    print(f"{title}; {len(_trace.pos)} tokens of {sequences} sequences")
    figures: dict[str, Any] = {"tokens": len(_trace.pos)}
    with ProcessPoolExecutor(initializer=_load, initargs=(trace, sequences, tokens)) as workers:
        hits = _hits(workers, figures)
        _gaps(hits, figures)
        _widths(workers, hits, figures)
        _starts(workers, figures)
        _sharing(workers, figures)
        _batches(workers, figures)
    _decisions(figures)
    if picture is not None:
        draw(picture, FRACTIONS, hits, title)
        print(f"\nwrote {picture}")
    return figures


def _load(path: Path, sequences: str, tokens: int | None) -> None:
    global _trace, _passes, _others
    whole = read_trace(path)
    _trace = select(whole, sequences, tokens)
    _passes = passes_of(_trace)
    has_others = not np.isin(whole.seq_id, _trace.seq_id).all()
    _others = passes_of(without(whole, _trace.seq_id, tokens)) if has_others else []


def _slots(fraction: float) -> int:
    return round(fraction * _trace.info.layers * _trace.info.experts)


def _policy(name: str) -> Any:
    info = _trace.info
    return POLICIES[name](info.layers, info.experts, info.top_k)


def _hit_percent(job: Job) -> float:
    name, fraction, pools = job
    if name == "belady":
        flat = events_of(_trace)
        return 100 * belady(flat, _slots(fraction)) / sum(map(len, flat))
    return 100 * replay(_passes, _policy(name), even_pools(_trace.info.layers, pools, _slots(fraction))).hit_rate


def _with_quotas(job: Job) -> tuple[float, Replay]:
    name, fraction, pools = job
    info = _trace.info
    done = replay(_passes, _policy(name), even_pools(info.layers, pools, _slots(fraction)), experts=info.experts)
    return 100 * done.hit_rate, done


def _hits(workers: ProcessPoolExecutor, figures: dict[str, Any]) -> dict[str, list[float]]:
    """Hits in percent by policy, at each fraction, in one pool for all layers."""
    names = [*POLICIES, "belady"]
    rates = iter(workers.map(_hit_percent, [(name, fraction, 1) for fraction in FRACTIONS for name in names]))
    hits: dict[str, list[float]] = {name: [] for name in names}
    print("\none pool for all layers, hits in %")
    for fraction in _rows(names, FRACTIONS):
        for name in names:
            hits[name].append(next(rates))
            figures[f"{name}_hits_{_percent(fraction)}"] = round(hits[name][-1], 2)
        _line(fraction, [hits[name][-1] for name in names])
    return hits


def _gaps(hits: dict[str, list[float]], figures: dict[str, Any]) -> None:
    print("\nshare of the gap between LRU and Belady, in %")
    for fraction in _rows([*POLICIES], FRACTIONS):
        place = FRACTIONS.index(fraction)
        gaps = {name: _gap(hits[name][place], hits, fraction) for name in POLICIES}
        _line(fraction, gaps.values())
        figures[f"gap_{_percent(fraction)}"] = round(gaps["forecast"], 2)
        figures |= {f"{name}_gap_{_percent(fraction)}": round(gap, 2) for name, gap in gaps.items()}
        figures[f"belady_share_{_percent(fraction)}"] = round(100 * hits["forecast"][place] / hits["belady"][place], 2)


def _widths(workers: ProcessPoolExecutor, hits: dict[str, list[float]], figures: dict[str, Any]) -> None:
    """Pools of fewer neighbouring layers: with equal quotas, and with quotas that follow what is needed."""
    info = _trace.info
    counts = [count for count in range(1, info.layers + 1) if info.layers % count == 0]
    counts = sorted({counts[len(counts) * n // WIDTHS] for n in range(WIDTHS)} | {info.layers})
    jobs = [("forecast", fraction, count) for count in counts for fraction in GAPS]
    equal, moving = workers.map(_hit_percent, jobs), workers.map(_with_quotas, jobs)
    print(
        "\npools of neighbouring layers: the gap of forecast in % with equal quotas, with quotas that follow the need"
    )
    print("(how many steps that took, how many times all blocks were copied), and slots of a pool")
    print(f"(up to {CHUNK * info.top_k // METAL_ASSIGNMENTS} slots Metal computes {CHUNK} tokens by its fast kernel)")
    print(f"{'layers':>8}" + "".join(f"{100 * fraction:>32.0f} %" for fraction in GAPS))
    for count in counts:
        width, line = info.layers // count, ""
        for fraction in GAPS:
            name = f"gap_{_percent(fraction)}_width_{width}"
            gap = _gap(next(equal), hits, fraction)
            rate, done = next(moving)
            followed = _gap(rate, hits, fraction)
            figures |= {name: round(gap, 2), f"{name}_quotas": round(followed, 2), f"{name}_steps": done.steps}
            copied = f"({done.steps}, {done.copied / _slots(fraction):.1f})"
            line += f"{gap:>9.1f} {followed:>5.1f} {copied:>11} {_slots(fraction) // count:>6}"
        print(f"{width:>8}{line}", flush=True)


def _starts(workers: ProcessPoolExecutor, figures: dict[str, Any]) -> None:
    """The first tokens, from cold and after all other sequences."""
    jobs = [(name, warm) for warm in (False, True) for name in POLICIES]
    rates = iter(workers.map(_start_percent, jobs))
    print(f"\nthe first {START_TOKENS} passes, {100 * START_FRACTION:.0f} % of the blocks, hits in %")
    print(f"{'start':>8}" + "".join(f"{name:>10}" for name in POLICIES))
    for word in ("cold", "warm"):
        line = [next(rates) for _ in POLICIES]
        figures |= {f"{name}_hits_{word}": round(rate, 2) for name, rate in zip(POLICIES, line, strict=True)}
        print(f"{word:>8}" + "".join(f"{rate:>10.1f}" for rate in line), flush=True)


def _start_percent(job: tuple[str, bool]) -> float:
    name, warm = job
    pools = even_pools(_trace.info.layers, 1, _slots(START_FRACTION))
    return 100 * replay(_passes[:START_TOKENS], _policy(name), pools, before=_others if warm else ()).hit_rate


def _sharing(workers: ProcessPoolExecutor, figures: dict[str, Any]) -> None:
    """Misses of private pools against those of one shared pool of the same size."""
    print(f"\nsessions that take turns, {100 * SHARED_FRACTION:.0f} % of the blocks in all")
    for sessions, (private, shared) in zip((2, 4), workers.map(_shared_misses, (2, 4)), strict=True):
        figures[f"sharing_{sessions}"] = round(private / shared, 3)
        ratio = private / shared
        print(f"{sessions} sessions: {private} misses in private pools, {shared} in a shared one, {ratio:.2f} x fewer")


def _shared_misses(sessions: int) -> tuple[int, int]:
    layers, slots = _trace.info.layers, _slots(SHARED_FRACTION)
    of_each = dealt(_trace, sessions)
    private = [replay(passes, _policy("forecast"), even_pools(layers, 1, slots // sessions)) for passes in of_each]
    shared = replay(in_turns(of_each), _policy("forecast"), even_pools(layers, 1, slots))
    return sum(each.misses for each in private), shared.misses


def _batches(workers: ProcessPoolExecutor, figures: dict[str, Any]) -> None:
    """Several answers computed together, as a gateway does: each event has the experts of all."""
    jobs = [(name, answers) for answers in (2, 4) for name in POLICIES]
    rates = iter(workers.map(_batch_percent, jobs))
    print(f"\nanswers computed together, {100 * BATCH_FRACTION:.0f} % of the blocks, hits in %")
    print(f"{'answers':>8}" + "".join(f"{name:>10}" for name in POLICIES))
    for answers in (2, 4):
        line = [next(rates) for _ in POLICIES]
        figures |= {f"{name}_batch_{answers}": round(rate, 2) for name, rate in zip(POLICIES, line, strict=True)}
        print(f"{answers:>8}" + "".join(f"{rate:>10.1f}" for rate in line), flush=True)


def _batch_percent(job: tuple[str, int]) -> float:
    name, answers = job
    passes = together(dealt(_trace, answers))
    return 100 * replay(passes, _policy(name), even_pools(_trace.info.layers, 1, _slots(BATCH_FRACTION))).hit_rate


def _decisions(figures: dict[str, Any]) -> None:
    """What an event costs in the policy: taking it in, naming victims, taking in what came and went.

    The same replay several times, and of each event the shortest time: whatever else the machine does only adds.
    """
    layers, experts, top_k = TIMED
    passes = enlarged(_trace, *TIMED, TIMED_TOKENS)
    rounds = []
    for _ in range(TIMED_ROUNDS):
        policy = Forecast(*TIMED)
        done = replay(passes, policy, even_pools(layers, 1, round(0.3 * layers * experts)), timed=True)
        rounds.append(done.seconds[len(done.seconds) // 4 :])
    shortest = [min(times) for times in zip(*rounds, strict=True)]
    figures["decision_us"] = round(1e6 * statistics.median(shortest), 2)
    figures["decision_us_mean"] = round(1e6 * statistics.fmean(shortest), 2)
    figures["policy_bytes"] = bytes_of_arrays(policy)
    of_rounds = ", ".join(f"{1e6 * statistics.median(times):.1f}" for times in rounds)
    print(
        f"\n{layers} layers x {experts} experts, {top_k} a token, 30 % cached, {100 * done.hit_rate:.0f} % hits: "
        f"{figures['decision_us']} us an event (mean {figures['decision_us_mean']}; medians of the rounds: "
        f"{of_rounds}), {figures['policy_bytes'] / 1e6:.1f} MB"
    )


def _gap(hits: float, by_policy: dict[str, list[float]], fraction: float) -> float:
    place = FRACTIONS.index(fraction)
    low, high = by_policy["lru"][place], by_policy["belady"][place]
    return 100 * (hits - low) / (high - low) if high > low else 100.0


def _percent(fraction: float) -> str:
    return f"{round(100 * fraction):02}"


def _rows(names: list[str], fractions: Iterable[float]) -> Iterator[float]:
    """The head of a table, then each row's fraction."""
    print(f"{'cached':>8}" + "".join(f"{name:>10}" for name in names))
    yield from fractions


def _line(fraction: float, values: Iterable[float]) -> None:
    print(f"{100 * fraction:>6.0f} %" + "".join(f"{value:>10.1f}" for value in values), flush=True)
