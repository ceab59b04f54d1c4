"""How long ``expertd status`` takes, from the shell's fork to its end, while the daemon reads for somebody.

A process decodes with a quarter of the blocks resident, so that the daemon is asked and reads all the time.  Beside the
command, in turns, the interpreter alone (``python -c pass``): what the machine does to both is not the command's.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expertd.worker.manifest import load_lazily
from tools.stage import ask_status, budget_for, running_daemon, temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
SHARE = 0.25
COMMANDS: dict[str, Sequence[str]] = {
    "status": ("-m", "expertd.clients.cli", "status"),
    "interpreter": ("-c", "pass"),
}


def _seconds(arguments: Sequence[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _measure(rounds: int) -> dict[str, list[float]]:
    for arguments in COMMANDS.values():
        _seconds(arguments)  # compiled, and in the page cache
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            taken[name].append(_seconds(arguments))
    return taken


def run(quick: bool = False, model: Path = DEMO) -> dict[str, Any]:
    """``busy_*`` and ``idle_*``: milliseconds, medians, of the command and of the interpreter alone."""
    rounds = 15 if quick else 60
    manifest = load_lazily(model).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    figures: dict[str, Any] = {}
    with temporary_home() as home, running_daemon(home, budget_for(manifest, round(SHARE * blocks))):
        command = [sys.executable, "-m", "benchmarks._decoder", str(model)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as decoder:
            try:
                assert decoder.stdout is not None
                assert decoder.stdout.readline() == "ready\n"
                before = ask_status(home).models[0].misses
                busy = _measure(rounds)
                figures["busy_misses"] = ask_status(home).models[0].misses - before
                decoder.communicate()
            finally:
                decoder.kill()
        idle = _measure(rounds)
    for state, taken in (("busy", busy), ("idle", idle)):
        for name, seconds in taken.items():
            low, median, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
            print(f"{state:5} {name:12} {median:.0f} ms (quartiles {low:.0f} and {high:.0f})")
            figures[f"{state}_{name}_ms"] = round(median, 1)
    return figures
