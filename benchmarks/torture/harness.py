"""``python -m benchmarks.torture.harness FIGURES SECONDS SEED [--private-shm]``: one whole run, figures to a file."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.torture import leaks
from benchmarks.torture.attacks import Attacks, Cast
from benchmarks.torture.journal import Journal
from benchmarks.torture.references import References
from benchmarks.torture.schedule import Schedule
from benchmarks.torture.stage import ROOT, Gateway, Stage, Supervisor, Zygote
from benchmarks.torture.workers import Client, Program
from expertd.protocol.paths import Home
from tools.stage import temporary_home

PAUSE_S = 1.1
"""Seconds from one attack to the next, on average."""
BARRAGE_S = 12.0
"""How long one and the same daemon is attacked, at the end, to see whether it grows."""
SHORT_S = 60.0
SETTLED_S = 15.0
"""What a daemon still holds for somebody who is gone has to be closed by then."""
_PR_SET_CHILD_SUBREAPER = 36


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("--private-shm", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if sys.platform == "linux":  # daemons whose starters were killed become children of this process
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryDirectory(prefix="expertd-torture-") as folder, temporary_home() as home:
        figures = torture(home, Path(folder), arguments.seconds, arguments.seed, arguments.private_shm)
    arguments.figures.write_text(json.dumps(figures))


def torture(home: Home, folder: Path, seconds: float, seed: int, private_shm: bool) -> dict[str, Any]:
    """Set everybody up, attack, calm down, look what is left."""
    short = seconds < SHORT_S
    print(f"seed {seed}; /dev/shm is {'private' if private_shm else 'the machine`s, and is not filled'}", flush=True)
    began = time.monotonic()
    prepare = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.torture.prepare", str(folder), *(("6", "12") if short else ("32", "20"))],
        stdout=subprocess.PIPE, cwd=ROOT, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert prepare.stdout is not None
    stage = Stage(home, folder, json.loads(prepare.stdout.readline())["budget"], private_shm)
    stage.set_faults(0)
    journal = Journal()
    supervisor = Supervisor(stage, journal)
    with ExitStack() as stack:
        supervisor.start()
        stack.callback(supervisor.end)
        zygote = Zygote(stage)
        stack.callback(zygote.end)
        # A gateway's worker takes seconds to start, so a short run has one of them and three programs.
        gateways = [Gateway(stage, f"gateway {letter}") for letter in ("A" if short else "AB")]
        for gateway in gateways:
            stack.callback(gateway.end)
        zygote.wait_ready()
        for gateway in gateways:
            gateway.wait_ready()
        if prepare.wait(180) != 0:
            raise RuntimeError("plain mlx-lm could not answer the prompts")
        references = References.read(folder)
        letters = "ABC" if short else "AB"
        programs = [Program(f"program {letter}", references, journal, seed, zygote) for letter in letters]
        clients = [Client(references, journal, seed, gateway) for gateway in gateways]
        cast = Cast(stage, journal, supervisor, programs, clients, random.Random(seed), zygote.pid)
        attacks = Attacks(cast)
        stack.callback(attacks.close)
        print(f"ready after {time.monotonic() - began:.0f} s; attacking for {seconds:.0f} s", flush=True)
        for asker in cast.askers:
            asker.start()
        schedule = Schedule(cast, attacks)
        try:
            schedule.everybody_answers()
            journal.began = time.monotonic()
            schedule.run(seconds, PAUSE_S)
            attacked_s = time.monotonic() - journal.began
            growth = _growth(cast, schedule, BARRAGE_S / 5 if short else BARRAGE_S)
        finally:
            schedule.calm()
            for asker in cast.askers:
                asker.ending.set()
            for asker in cast.askers:
                asker.join(90)
    # What a killed worker had started ends up here, and wants to be waited for.
    while _reaped():
        pass
    left, segments = leaks.processes(stage), leaks.segments(stage)
    for line in [*left, *segments]:
        print(f"LEFT BEHIND: {line}", flush=True)
    print("typed errors, with an example of each:")
    for code, count in journal.typed.most_common():
        print(f"  {count:>5} {code}: {journal.examples[code]}")
    print(f"attacks: {dict(journal.attacks.most_common())}")
    missed = sorted(name for name in schedule.names if not any(a.startswith(name) for a in journal.attacks))
    return {
        "requests": journal.requests,
        "right": journal.right,
        "kills": journal.kills,
        "stops": journal.stops,
        "wrong_tokens": journal.wrong,
        "typed_errors": journal.typed.total(),
        "untyped_failures": journal.failures,
        "stuck": journal.stuck,
        "failed_by_sleep": journal.asleep_failures,
        "unrecovered": schedule.unrecovered,
        "daemon_crashes": supervisor.crashes,
        "daemons_aborted_without_descriptors": supervisor.out_of_descriptors,
        "leaked_segments": len(segments),
        "leaked_processes": len(left),
        **growth,
        "recovery_s_median": _median(journal.recoveries["supervised"]),
        "recovery_by_workers_s_median": _median(journal.recoveries["by_workers"]),
        "recoveries": sum(map(len, journal.recoveries.values())),
        "missed_attacks": ", ".join(missed) or "none",
        "daemons_started_by_workers": supervisor.started_by_workers,
        "attacked_s": round(attacked_s),
        "seed": seed,
    }


def _median(times_s: list[float]) -> float | None:
    return round(statistics.median(times_s), 3) if times_s else None


def _growth(cast: Cast, schedule: Schedule, seconds: float) -> dict[str, Any]:
    """Descriptors and anonymous memory that one and the same daemon has more after being attacked for ``seconds``.

    First it is attacked as long, so that whatever it allocates once is there.
    """
    figures: dict[str, Any] = {"leaked_descriptors": None, "daemon_rss_growth_mb": None}
    schedule.everybody_answers()
    schedule.barrage(seconds)
    before = _held(cast, schedule)
    schedule.barrage(seconds)
    after = _held(cast, schedule)
    if before is None:
        return figures
    until = time.monotonic() + SETTLED_S
    while after is not None and after.not_of_use > before.not_of_use and time.monotonic() < until:
        after = leaks.held_by(cast.stage, after.pid)  # who was stopped hangs up when it gets to it; a leak stays
    print(f"the last daemon, before and after {seconds:.0f} s of attacks: {before}; {after}")
    if after is None or before.pid != after.pid:
        return figures
    figures["leaked_descriptors"] = max(0, after.not_of_use - before.not_of_use)
    figures["daemon_rss_growth_mb"] = round((after.anonymous - before.anonymous) / 1e6, 2)
    if figures["leaked_descriptors"]:
        print(f"descriptors of daemon {after.pid}: {leaks.descriptors_by_kind(after.pid)}")
    return figures


def _held(cast: Cast, schedule: Schedule) -> leaks.Held | None:
    """What the daemon holds when everybody has an answer and has been left alone for a second."""
    schedule.everybody_answers()
    pid = cast.supervisor.pid()
    schedule.wait(1.0)
    return None if pid is None else leaks.held_by(cast.stage, pid)


def _reaped() -> bool:
    """Whether a child that had ended was there to be waited for."""
    try:
        return os.waitpid(-1, os.WNOHANG)[0] > 0
    except ChildProcessError:
        return False


if __name__ == "__main__":
    main()
