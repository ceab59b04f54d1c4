"""Nothing lost: four workers on one daemon under constant eviction, while everything that can go wrong does.

Every token is compared with plain mlx-lm's.  The parts:

    prepare     the checkpoints, and what plain mlx-lm says to the prompts (a process of its own)
    zygote      a process that has mlx-lm imported and forks program workers (a process of its own)
    faulty      a daemon whose reads fail on demand (a process of its own)
    stage       the daemon's supervisor, the gateways, and where everything is
    workers     the threads that ask the workers and compare
    attacks     what is done to them; schedule decides what and when
    leaks       what is left afterwards
    harness     the whole run, in a process and, where allowed, a mount namespace of its own

The seed of the schedule is printed; EXPERTD_SEED sets it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

QUICK_MINUTES = 0.35
MINUTES = 3.0
SHM_MB = 256
AFTERWARDS_S = 240.0
"""How long the preparation and the end may take beside the attacks."""

_PRIVATE = f'mount -t tmpfs -o size={SHM_MB}m,mode=1777 tmpfs /dev/shm && exec "$@"'


def run(quick: bool = False, minutes: float | None = None, seed: int | None = None) -> dict[str, Any]:
    """Attack for ``minutes`` and return the figures; see docs/benchmarks.md for what they mean."""
    wanted_s = 60 * (minutes if minutes is not None else QUICK_MINUTES if quick else MINUTES)
    seed = int(os.environ.get("EXPERTD_SEED", time.time_ns() % 10**6)) if seed is None else seed
    private = _can_have_its_own_shm()
    with tempfile.TemporaryDirectory(prefix="expertd-torture-") as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "benchmarks.torture.harness", str(figures), str(wanted_s), str(seed)]
        if private:
            command = ["unshare", "-m", "sh", "-c", _PRIVATE, "sh", *command, "--private-shm"]
        subprocess.run(command, check=True, timeout=wanted_s + AFTERWARDS_S)
        read: dict[str, Any] = json.loads(figures.read_text())
    return read


def _can_have_its_own_shm() -> bool:
    """Whether this process may mount: the machine's own /dev/shm is never filled."""
    command = ["unshare", "-m", "sh", "-c", _PRIVATE, "sh", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
