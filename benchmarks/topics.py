"""A change of topic: misses of the first tokens after it, with and without what the daemon knows of topics.

The real core is driven with recorded routing: one session whose tokens come from each of some traces in turn.  Reads
are done at once, so this counts blocks and no times.  ``tells``: the policy is told; ``reads``: and blocks are read
ahead, if the gate finds that it pays; ``always``: without asking it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from expertd.daemon.core import Core, events, foresight, instructions
from expertd.daemon.core.state import Model
from expertd.daemon.core.topics import Topics
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.traces import DECODE, read_trace

FRACTIONS = (0.3, 0.5, 0.75)
STRETCH = 200
"""Tokens about one topic, before the next."""
ROUNDS = 7
FIRST = 50
SKIPPED = 2
"""Rounds that do not count: nobody can know a topic that was not there before, or what has just begun."""
FAR_APART = (4, 12, 64, 4)
"""Topics, layers, experts and experts of a token of a model where reading ahead pays."""
KINDS = ("without", "tells", "reads", "always")

Tokens = NDArray[np.intp]
"""``[tokens, layers, experts of a token]``."""


@dataclass
class Found:
    """Blocks missed in all stretches that count, in their first tokens, and read because of a topic."""

    missed: int = 0
    first: int = 0
    read: int = 0
    turns: int = 0


def stretches(topics: Sequence[Tokens], rounds: int, length: int = STRETCH) -> list[Tokens]:
    """Parts of each of ``topics`` in turn."""
    rounds = min(rounds, *(len(topic) // length for topic in topics))
    return [topic[number * length : (number + 1) * length] for number in range(rounds) for topic in topics]


def far_apart(topics: int, layers: int, experts: int, top_k: int, tokens: int) -> list[Tokens]:
    """Topics of a model that nobody has: each has a few experts of its own, and nine in ten uses are of these."""
    chance = np.random.default_rng(0)
    out = []
    for _ in range(topics):
        own = [chance.choice(experts, 3 * top_k, replace=False) for _ in range(layers)]
        weights = np.full((layers, experts), 0.1 / (experts - 3 * top_k))
        np.put_along_axis(weights, np.array(own), 0.9 / (3 * top_k), 1)
        chosen = [[chance.choice(experts, top_k, replace=False, p=row) for row in weights] for _ in range(tokens)]
        out.append(np.array(chosen, np.intp))
    return out


def profile(tokens: Tokens, experts: int) -> NDArray[np.float32]:
    """How often a token uses each block: ``[layers, experts]``."""
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in tokens.swapaxes(0, 1)])
    return (counts / len(tokens)).astype(np.float32)


def drive(
    parts: Sequence[Tokens],
    experts: int,
    top_k: int,
    fraction: float,
    kind: str,
    skipped: int,
    profiles: Sequence[NDArray[np.float32]] = (),
) -> Found:
    """One session runs ``parts`` with a part of the blocks resident; ``profiles`` are in the home."""
    layers = parts[0].shape[1]
    found = Found()
    with knowing(kind):
        core = Core((1 + round(fraction * layers * experts)) * PAGE)
        model = _attach(core, layers, experts, top_k)
        for each in profiles:
            model.topics.know(each)
        session = _Feed(core)
        for number, part in enumerate(parts):
            for place, token in enumerate(part.tolist()):
                missed = model.misses
                session.token(model, token)
                if number >= skipped:
                    found.missed += model.misses - missed
                    found.first += (model.misses - missed) * (place < FIRST)
    gate = model.foresight.gates[foresight.Kind.TOPIC]
    found.read = (gate.useful_bytes + gate.wasted_bytes) // PAGE
    found.turns = model.topics.turns
    return found


@contextmanager
def knowing(kind: str) -> Iterator[None]:
    """What the core does about topics."""
    changed: AbstractContextManager[Any]
    match kind:
        case "without":
            changed = mock.patch.object(Topics, "observe", return_value=None)
        case "tells":
            changed = mock.patch.object(foresight.Gate, "judge")
        case "always":
            changed = mock.patch.multiple(foresight, WORTH_LASTING=0.0, BETTER=0.0, EVIDENCE=1)
        case _:
            changed = nullcontext()
    with changed:
        yield


def _attach(core: Core, layers: int, experts: int, top_k: int) -> Model:
    parts = (Part("up_proj.weight", "U8", (PAGE,), ("tensor",), (0,)),)
    manifest = Manifest("/m", "family", (), tuple(Layer(f"layers.{n}", experts, top_k, parts) for n in range(layers)))
    out = core.handle(events.Attach(1, 1, "shm", manifest))
    for create in [each for each in out if isinstance(each, instructions.CreatePool)]:
        core.handle(events.PoolCreated(create.segment))
    return core.models[manifest.key]


class _Feed:
    """A session that looks up, fetches what is absent, and logs the rest; every read is done before the next event."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._sequence = 0
        self._log: list[tuple[int, list[int]]] = []

    def token(self, model: Model, token: list[list[int]]) -> None:
        for layer, chosen in enumerate(token):
            experts = list(dict.fromkeys(chosen))
            pool = model.pool_of_layer[layer]
            if all(pool.sealed_slot((layer, expert)) is not None for expert in experts):
                self._log.append((layer, experts))
                continue
            self._sequence += 1
            log, self._log = tuple(self._log), []
            self._feed(events.Fetch(1, self._sequence, pool.segment, layer, tuple(experts), log))
        version = model.version  # what was evicted meanwhile is not used any more
        self._feed(events.Ack(1, version, self._sequence, tuple(self._log)))
        self._log = []

    def _feed(self, event: events.Event) -> None:
        waiting = [event]
        while waiting:
            for each in self._core.handle(waiting.pop(0)):
                if isinstance(each, instructions.StartRead):
                    waiting.append(events.ReadDone(each.segment, each.slot, PAGE))
                elif isinstance(each, instructions.Cancel):
                    raise AssertionError("a read that is done at once was called off")


def run(quick: bool = False, trace: Path | None = None) -> dict[str, Any]:
    """Of each part of the blocks: ``first_{kind}_{percent}``, ``missed_...`` and ``read_...``.

    ``trace`` is a folder with a trace of each topic (``python -m tools.demo_traces`` makes one).
    """
    if trace is None or not trace.is_dir():
        raise SystemExit("topics needs a folder with a trace of each topic: --trace FOLDER (see tools.demo_traces)")
    traces = {path.stem: read_trace(path) for path in sorted(trace.glob("*.npz"))}
    info = next(iter(traces.values())).info
    decoded = [each.experts[each.phase == DECODE].astype(np.intp) for each in traces.values()]
    parts = stretches(decoded, 4 if quick else ROUNDS)
    skipped = SKIPPED * len(decoded)
    print(f"{', '.join(traces)} in turn, {STRETCH} tokens each; {len(parts) - skipped} changes count")
    figures: dict[str, Any] = {}
    _changes(parts, info.experts, info.top_k, skipped, "", figures)
    if len(decoded) > 1:
        _first_changes(decoded, info.experts, info.top_k, figures)
    topics, layers, experts, top_k = FAR_APART
    print(f"\n{topics} topics of a model of {layers} layers x {experts}, which have hardly an expert in common")
    parts = stretches(far_apart(topics, layers, experts, top_k, ROUNDS * STRETCH), 4 if quick else ROUNDS)
    _changes(parts, experts, top_k, SKIPPED * topics, "far_apart_", figures)
    return figures


def _changes(
    parts: Sequence[Tokens], experts: int, top_k: int, skipped: int, prefix: str, figures: dict[str, Any]
) -> None:
    print(f"{'cached':>8} {'':>10} {'missed':>8} {f'first {FIRST}':>9} {'read':>6} {'turns':>6}")
    for fraction in FRACTIONS:
        for kind in KINDS:
            found = drive(parts, experts, top_k, fraction, kind, skipped)
            name = f"{prefix}{kind}_{round(100 * fraction)}"
            figures |= {f"missed_{name}": found.missed, f"first_{name}": found.first, f"read_{name}": found.read}
            counts = f"{found.missed:>8} {found.first:>9} {found.read:>6} {found.turns:>6}"
            print(f"{100 * fraction:>6.0f} % {kind:>10} {counts}", flush=True)


def _first_changes(decoded: Sequence[Tokens], experts: int, top_k: int, figures: dict[str, Any]) -> None:
    """Changes to what was not there before, with profiles of the topics in the home and without."""
    profiles = [profile(tokens[len(tokens) // 2 :], experts) for tokens in decoded]
    parts = stretches([tokens[: len(tokens) // 2] for tokens in decoded], 1)
    print(f"\nthe first change to each, misses of {FIRST} tokens: without anything, and with profiles of all")
    for fraction in FRACTIONS:
        without = drive(parts, experts, top_k, fraction, "without", 1).first
        known = drive(parts, experts, top_k, fraction, "reads", 1, profiles).first
        percent = round(100 * fraction)
        figures |= {f"first_change_without_{percent}": without, f"first_change_profiles_{percent}": known}
        print(f"{percent:>6} % {without:>10} {known:>8}", flush=True)
