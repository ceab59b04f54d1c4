"""A gateway under load: 64 clients at once for two minutes, over the demo model.

They come by all four APIs; some stream, some hang up, some read slowly; whoever is done is replaced at once.  Every
stream has to end as its API says, and nobody may be refused but with 429 or 503.

The overhead per token is the time from the moment at which the worker hands a token to its socket to the one at which a
client has it, both by the system's monotonic clock; so it has in it ZeroMQ's way, the gateway, and TCP's.  It is taken
with one stream alone, where nothing waits for its turn, and less the time that the same bytes take by ZeroMQ and TCP
with nothing between but a loop that passes them on: that and a stream take turns, and the figure is the median of the
rounds' differences.  ``overhead_loaded_us`` is the same under all 64 clients, with
their waits for a processor; ``gateway_cpu_us_alone`` is what the gateway's process computes for a token of one stream,
which other programs on the machine hardly change, and ``gateway_cpu_us_per_token`` under load, all else that it does
there included.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import zmq
import zmq.asyncio

from benchmarks._clients import Behaviour, Outcomes, ask, behaviours, median_us
from tools.stage import temporary_home

DEMO = Path(__file__).parents[1] / "models" / "demo"
CLIENTS = 64
WARM_SHARE = 0.25
"""Of the time, before the memory is looked at: pools of buffers and the prompt cache are filled then."""
PROBES = 400
ROUNDS = 11
"""Of probes and a stream alone."""


@contextmanager
def _gateway(model: Path, cancels: Path) -> Iterator[tuple[psutil.Process, int]]:
    """A gateway whose worker stamps what it sends, and its port."""
    interpreter = cancels.with_name("python")
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} -m benchmarks._stamping "$@"\n')
    interpreter.chmod(0o700)
    program = f"import sys; sys.executable = {str(interpreter)!r}; from expertd.clients.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model), "--port", "0"]
    environment = {**os.environ, "EXPERTD_CANCELS": str(cancels), "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            yield psutil.Process(process.pid), int(url.split(":")[2].removesuffix("/v1"))
        finally:
            process.terminate()
            process.wait()
            stop = [sys.executable, "-m", "expertd.clients.cli", "daemon", "stop"]
            subprocess.run(stop, stdout=subprocess.DEVNULL, check=False)


async def _transport_us(folder: Path) -> float:
    """How long a frame of a token's size takes by ZeroMQ and TCP, with a bare loop between."""
    context = zmq.asyncio.Context()
    near, far = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    address = f"ipc://{folder}/probe.sock"
    near.bind(address)
    far.connect(address)

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(PROBES):
            writer.write(await near.recv())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    lags = []
    for _ in range(PROBES):
        await far.send(f"{time.monotonic_ns():020} ".encode() + b"x" * 180)
        lags.append(-int((await reader.readexactly(201))[:20]) + time.monotonic_ns())
    writer.close()
    server.close()
    near.close(linger=0)
    far.close(linger=0)
    context.term()
    return median_us(lags)


async def _alone(port: int, model: str, seed: int, out: Outcomes) -> float:
    """One stream with nothing beside it; returns the median time from the worker's send to the client's receive."""
    before = len(out.lags_ns)
    await ask(port, model, Behaviour("chat/completions", True, 200, endless=True), seed, out)
    return median_us(out.lags_ns[before:])


class _Memory:
    """What processes hold, looked at once a second after the warm-up."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._seen: dict[str, list[int]] = {name: [] for name in processes}

    async def watch(self, begin_s: float) -> None:
        await asyncio.sleep(begin_s)
        while True:
            for name, process in self._processes.items():
                self._seen[name].append(process.memory_info().rss)
            await asyncio.sleep(1.0)

    def growth_mb(self, name: str) -> float:
        """From the first tenth of what was seen to the last, by medians."""
        seen = self._seen[name]
        part = max(1, len(seen) // 10)
        return round((statistics.median(seen[-part:]) - statistics.median(seen[:part])) / 1e6, 1)


async def _load(port: int, model: str, clients: int, seconds: float, out: Outcomes) -> None:
    """``clients`` at a time until the time is up, and those to their end."""
    chance = random.Random(0)
    until = time.monotonic() + seconds
    seeds = iter(range(1000, 1 << 30))

    async def client() -> None:
        while time.monotonic() < until:
            await ask(port, model, behaviours(chance), next(seeds), out)

    await asyncio.gather(*(client() for _ in range(clients)))


def _cancels_ms(out: Outcomes, file: Path) -> list[float]:
    """From each hang-up to the moment at which the worker had let the request go; one that had ended has none."""
    done = dict(line.split() for line in file.read_text().splitlines()) if file.exists() else {}
    return [(int(done[str(seed)]) - at) / 1e6 for seed, at in out.hang_ups.items() if str(seed) in done]


def run(quick: bool = False, minutes: float = 2.0) -> dict[str, Any]:
    """See the module; ``quick``: 16 clients for ten seconds."""
    clients, seconds = (16, 10.0) if quick else (CLIENTS, 60.0 * minutes)
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as folder, temporary_home():
        cancels = Path(folder) / "cancels"
        with _gateway(DEMO, cancels) as (gateway, port):
            return asyncio.run(_measure(gateway, port, cancels, clients, seconds))


async def _measure(gateway: psutil.Process, port: int, cancels: Path, clients: int, seconds: float) -> dict[str, Any]:
    await _alone(port, DEMO.name, 0, Outcomes())  # what the first request alone loads and compiles
    alone, rounds, cpu_alone_s = Outcomes(), [], 0.0
    for seed in range(ROUNDS):
        transport = await _transport_us(cancels.parent)
        before = sum(gateway.cpu_times()[:2])
        rounds.append((await _alone(port, DEMO.name, seed, alone), transport))
        cpu_alone_s += sum(gateway.cpu_times()[:2]) - before
    cancel_alone = Outcomes()
    for seed in range(100, 110):
        await ask(port, DEMO.name, Behaviour("chat/completions", True, 400, False, True, True), seed, cancel_alone)
        await asyncio.sleep(0.3)
    (worker,) = [child for child in gateway.children() if "worker" in child.cmdline()]
    memory = _Memory({"gateway": gateway, "worker": worker})
    watch = asyncio.create_task(memory.watch(WARM_SHARE * seconds))
    out = Outcomes()
    before = sum(gateway.cpu_times()[:2])
    await _load(port, DEMO.name, clients, seconds, out)
    cpu_s = sum(gateway.cpu_times()[:2]) - before
    watch.cancel()
    await asyncio.sleep(1.0)  # the last cancels
    errors = alone.errors + cancel_alone.errors + out.errors
    for words in errors[:10]:
        print(words)
    loaded = _cancels_ms(out, cancels)
    return {
        "clients": clients,
        "seconds": seconds,
        "requests": out.requests,
        "streams": out.streams,
        "hang_ups": len(out.hang_ups),
        "refused": out.refused,
        "errors": len(errors),
        "tokens": len(out.lags_ns),
        "overhead_us_per_token": round(statistics.median(stream - probe for stream, probe in rounds), 1),
        "overhead_us_rounds": [round(stream - probe) for stream, probe in rounds],
        "send_to_receive_us": median_us(alone.lags_ns),
        "transport_us": statistics.median(probe for _, probe in rounds),
        "gateway_cpu_us_alone": round(1e6 * cpu_alone_s / max(1, len(alone.lags_ns)), 1),
        "overhead_loaded_us": median_us(out.lags_ns),
        "gateway_cpu_us_per_token": round(1e6 * cpu_s / max(1, len(out.lags_ns)), 1),  # whatever else it did, too
        "cancel_ms_max": round(max(_cancels_ms(cancel_alone, cancels), default=0.0), 1),
        "cancels_measured": len(_cancels_ms(cancel_alone, cancels)),
        "cancel_loaded_ms_median": round(statistics.median(loaded or [0.0]), 1),
        "cancel_loaded_ms_max": round(max(loaded, default=0.0), 1),
        "rss_growth_mb": memory.growth_mb("gateway"),
        "worker_rss_growth_mb": memory.growth_mb("worker"),
        "load_average": round(os.getloadavg()[0], 1),
    }
