"""How long ``expertd status`` takes, from the shell's fork to its end, while the daemon reads for somebody.

A process decodes with a quarter of the blocks resident, so that the daemon is asked and reads all the time.  The
command is the one that ``pip install`` gives its users, in a virtual environment of its own; and the one of this
environment, where an editable install has each start look for the package's folders first.  Beside them, in turns, the
interpreter alone (``python -c pass``): what the machine does to all of them is not the command's.  Processor time is
told too: where others use the machine, it says more than the clock.
"""

from __future__ import annotations

import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.demo import budget_of  # asks another process: with mlx in this one, each fork would take longer
from tools.stage import ask_status, running_daemon, temporary_home

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
SHARE = 0.25
NOT_BUILT = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "docs", "models")


class Taken(NamedTuple):
    """Seconds that a command took, by the clock and of processors."""

    wall: float
    cpu: float


def _taken(arguments: Sequence[str]) -> Taken:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Taken(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def _installed(folder: Path) -> Path:
    """The environment's folder of programs: the package is installed there as users have it, alone."""
    shutil.copytree(ROOT, folder / "source", ignore=NOT_BUILT)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "user")], check=True)
    programs = folder / "user" / "bin"
    subprocess.run([*pip, "--python", str(programs / "python"), "install", "--no-deps", str(wheel)], check=True)
    return programs


def _measure(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Taken]]:
    for arguments in commands.values():
        _taken(arguments)  # compiled, and in the page cache
    taken: dict[str, list[Taken]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, arguments in commands.items():
            taken[name].append(_taken(arguments))
    return taken


def run(quick: bool = False, model: Path = DEMO) -> dict[str, Any]:
    """``busy_*`` and ``idle_*``: milliseconds, medians, of the command and of the interpreter alone.

    ``editable``: the command of this environment, however the package was installed here.
    """
    rounds = 15 if quick else 60
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        temporary_home() as home,
        running_daemon(home, budget_of(model, SHARE)),
    ):
        programs = _installed(Path(folder))
        commands = {
            "status": (str(programs / "expertd"), "status"),
            "interpreter": (str(programs / "python"), "-c", "pass"),
            "editable": (str(Path(sys.executable).with_name("expertd")), "status"),
        }
        command = [sys.executable, "-m", "benchmarks._decoder", str(model)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as decoder:
            try:
                assert decoder.stdout is not None
                assert decoder.stdout.readline() == "ready\n"
                before = ask_status(home).models[0].misses
                busy = _measure(commands, rounds)
                figures["busy_misses"] = ask_status(home).models[0].misses - before
                decoder.communicate()
            finally:
                decoder.kill()
        idle = _measure(commands, rounds)
    for state, taken in (("busy", busy), ("idle", idle)):
        for name, runs in taken.items():
            low, median, high = (1000 * value for value in statistics.quantiles([run.wall for run in runs], n=4))
            cpu = 1000 * statistics.median(run.cpu for run in runs)
            print(f"{state:5} {name:12} {median:.0f} ms (quartiles {low:.0f} and {high:.0f}), processors {cpu:.0f} ms")
            figures[f"{state}_{name}_ms"] = round(median, 1)
            figures[f"{state}_{name}_cpu_ms"] = round(cpu, 1)
    return figures
