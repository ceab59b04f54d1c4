"""A good neighbour: what the daemon gives back when another program eats the memory, while four clients stream.

Daemon, gateway and worker run in a memory cgroup with a hard limit, together with a program that takes 500 MB a second
until little is left.  Everything is seen from outside: the cgroup's shared memory, the kernel's kills, the clients;
only how long reads took is what the daemon says.  Before that, the governor alone goes through simulated hours of
noise.  Needs Linux and root.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.pressure.cgroup import Cgroup, limited
from benchmarks.pressure.noise import HOURS, QUICK_HOURS, noise_figures
from benchmarks.pressure.picture import draw
from benchmarks.pressure.stalls import stall_s
from benchmarks.pressure.streams import Stream
from benchmarks.pressure.watch import Watch
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.stage import budget_for, end, launch_daemon, temporary_home

MODEL = {"hidden": 256, "layers": 4, "n_experts": 128, "top_k": 4, "expert_width": 1024, "vocab": 2048}
LIMIT = 1_600_000_000
LEAVE = 40_000_000
"""Bytes of the limit that are left when the eater has had enough."""
SHARE = 0.9
"""Of the blocks that the budget holds."""
HOLD_S, QUICK_HOLD_S = 20.0, 5.0
"""So long the eater keeps what it has."""
WARM_ANSWERS, WARM_S, LOOK_S = 2, 120.0, 0.1
"""So many answers every client must have had before the eater comes, within so many seconds; looked at so often."""
CRITICAL_S = 30.0
"""Within so long of the eater's coming the daemon must have seen it."""
REGROW_S = 90.0
"""After so long without the eater nobody waits for the limit any more."""
AFTER_S = 10.0
"""When the limit is back, pools still move, and tokens become quick again: the figures and the picture show that."""
TOKENS = 48
QUESTIONS = ("What is a cache?", "Write a function.", "Tell me of the sea.", "Count to ten.")
SETTLE_S, IDLE_S = 2.0, 20.0
"""A daemon that has just started is left alone for a moment, then it is watched for so long how it idles."""


def run(quick: bool = False, picture: Path | None = None) -> dict[str, Any]:
    """``oom_kills``, ``wrong_tokens``, ``give_back_s``, ``regrow_s``, ``max_stall_s``, ``turns_per_minute_max``, ..."""
    figures = noise_figures(QUICK_HOURS if quick else HOURS) | _idle()
    with (
        tempfile.TemporaryDirectory(prefix="expertd-model-") as folder,
        temporary_home() as home,
        limited(LIMIT) as cgroup,
    ):
        model = write_checkpoint(Path(folder) / "model", "qwen3_moe", **MODEL)
        texts = _plain(model)
        manifest = load_lazily(model).manifest
        budget = budget_for(manifest, round(SHARE * sum(layer.experts for layer in manifest.layers)))
        print(f"budget {budget / 1e6:.0f} MB in a cgroup of {LIMIT / 1e6:.0f} MB", flush=True)
        daemon = launch_daemon(home, budget)
        cgroup.add(daemon.pid)
        try:
            figures |= _under_pressure(home, cgroup, model, texts, QUICK_HOLD_S if quick else HOLD_S, picture)
        finally:
            end(daemon)
    return figures


def _idle() -> dict[str, Any]:
    """What a daemon without a model costs."""
    with temporary_home() as home:
        daemon = launch_daemon(home, "auto")
        try:
            process = psutil.Process(daemon.pid)
            time.sleep(SETTLE_S)
            before, began = process.cpu_times(), time.monotonic()
            time.sleep(IDLE_S)
            after = process.cpu_times()
            busy = after.user + after.system - before.user - before.system
            return {
                "daemon_rss_mb": round(process.memory_info().rss / 1e6, 1),
                "idle_cpu_percent": round(100 * busy / (time.monotonic() - began), 2),
            }
        finally:
            end(daemon)


def _plain(model: Path) -> list[str]:
    """What plain mlx-lm answers, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.pressure.plain", str(model), str(TOKENS), json.dumps(QUESTIONS)]
    texts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert isinstance(texts, list)
    return texts


def _under_pressure(
    home: Home, cgroup: Cgroup, model: Path, texts: list[str], hold_s: float, picture: Path | None
) -> dict[str, Any]:
    command = [sys.executable, "-m", "expertd.clients.cli", "serve", str(model), "--port", "0"]
    gateway = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=cgroup.join)
    ending = threading.Event()
    threads: list[threading.Thread] = []
    try:
        address = _address(gateway)
        streams = [
            Stream(address, model.name, question, text, TOKENS) for question, text in zip(QUESTIONS, texts, strict=True)
        ]
        watch = Watch(home, cgroup)
        runs = [watch.run, *(stream.run for stream in streams)]
        threads = [threading.Thread(target=run, args=(ending,)) for run in runs]
        for thread in threads:
            thread.start()
        marks = _eat(cgroup, watch, streams, hold_s)
    finally:
        ending.set()
        for thread in threads:
            thread.join()
        gateway.terminate()
        gateway.wait()
    if picture is not None:
        draw(picture, watch.samples, streams, marks)
        print(f"wrote {picture}")
    return _figures(cgroup, watch, streams, marks)


def _address(gateway: subprocess.Popen[str]) -> tuple[str, int]:
    assert gateway.stdout is not None
    for line in gateway.stdout:
        print(f"  {line.rstrip()}", flush=True)
        if " at http://" in line:
            host, port = line.split(" at http://")[1].split("/")[0].split(":")
            return host, int(port)
    raise SystemExit(f"the gateway ended with status {gateway.wait()}")


def _eat(cgroup: Cgroup, watch: Watch, streams: list[Stream], hold_s: float) -> dict[str, float]:
    """Let the eater come and go; returns when what happened."""
    marks = {"began": time.monotonic()}
    while any(stream.answers < WARM_ANSWERS for stream in streams):
        if time.monotonic() > marks["began"] + WARM_S:
            failed = {failure for stream in streams for failure in stream.failed}
            raise SystemExit(
                f"after {WARM_S:g} s the clients have had {[stream.answers for stream in streams]} answers; "
                f"what failed: {', '.join(failed) or 'nothing'}"
            )
        time.sleep(LOOK_S)
    marks["before"] = watch.samples[-1].at
    print(f"  {watch.samples[-1].shmem / 1e6:.0f} MB shared; the eater comes", flush=True)
    command = [sys.executable, "-m", "benchmarks.pressure.eater", str(cgroup.folder), str(cgroup.version), str(LEAVE)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=cgroup.join
    ) as eater:
        marks["eater_came"] = time.monotonic()
        critical = watch.wait(lambda sample: sample.status.pressure == "critical", CRITICAL_S)
        if critical is not None:
            marks["critical"] = critical
        time.sleep(hold_s)
        eater.communicate()
    marks["eater_gone"] = time.monotonic()
    print(f"  {watch.samples[-1].shmem / 1e6:.0f} MB shared; the eater has gone", flush=True)
    watch.wait(lambda sample: sample.status.limit_bytes == sample.status.budget_bytes, REGROW_S)
    time.sleep(AFTER_S)
    marks["ended"] = time.monotonic()
    print(f"  {watch.samples[-1].shmem / 1e6:.0f} MB shared at the end", flush=True)
    return marks


def _figures(cgroup: Cgroup, watch: Watch, streams: list[Stream], marks: dict[str, float]) -> dict[str, Any]:
    before = [sample for sample in watch.samples if sample.at <= marks["before"]][-1]
    gone = marks["eater_gone"]
    final = watch.samples[-1].status
    wall = time.time() - time.monotonic()
    down = [entry for entry in final.journal if entry.after_bytes < entry.before_bytes]
    critical = next((entry.at - wall for entry in down if entry.pressure == "critical"), None)
    give_back = error = None
    if critical is not None:
        due = before.shmem - min(entry.after_bytes for entry in down)
        meanwhile = [sample for sample in watch.samples if down[0].at - wall <= sample.at <= gone]
        error = round(abs(before.shmem - min(sample.shmem for sample in meanwhile) - due) / due, 3)
        given = (sample.at for sample in meanwhile if sample.shmem <= before.shmem - 0.95 * due)
        give_back = next((round(max(0.0, at - critical), 2) for at in given), None)
    end_size = watch.samples[-1].shmem
    small = [sample.at for sample in watch.samples if sample.at > gone and sample.shmem < 0.95 * end_size]
    regrow = round(small[-1] - gone, 1) if small and final.limit_bytes == final.budget_bytes else None
    for entry in final.journal:
        print(f"  {entry.at - wall - marks['began']:6.1f} s  {entry.pressure:8}  "
              f"{entry.before_bytes / 1e6:.0f} -> {entry.after_bytes / 1e6:.0f} MB: {entry.why}")  # fmt: skip
    for failure in {failure for stream in streams for failure in stream.failed}:
        print(f"  failed: {failure}")
    return {
        "oom_kills": cgroup.oom_kills,
        "wrong_tokens": sum(stream.wrong for stream in streams),
        "answers": sum(stream.answers for stream in streams),
        "refused": sum(stream.refused for stream in streams),
        "failed": sum(len(stream.failed) for stream in streams),
        "give_back_s": give_back,
        "regrow_s": regrow,
        "regrown_share": round(end_size / before.shmem, 3),
        "shmem_error": error,
        **_stalls(watch, streams, marks),
    }


def _stalls(watch: Watch, streams: list[Stream], marks: dict[str, float]) -> dict[str, float]:
    """How long decode stopped at most, with reads and without."""
    sessions = watch.reads
    stalls = [(stall_s(gap, sessions), gap) for stream in streams for gap in stream.gaps]
    longest, where = max(stalls)
    print(f"  the longest stall: {longest:.2f} s of {where.seconds:.2f} s, at {where.ended - marks['began']:.1f} s")
    return {
        "max_gap_s": round(max(gap.seconds for _, gap in stalls), 2),
        "max_stall_s": round(longest, 2),
    }
