"""A disk that is slower than the real one: what it is called, when its reads are done, and a daemon that has it."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import expertd
from expertd.clients.terminal.figures import table
from expertd.daemon.simulated_ssd import SimulatedSsd, Ssd, parse_ssd
from expertd.protocol.errors import SizeInvalid
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for, running_daemon


@pytest.mark.parametrize(
    ("text", "rate", "latency_s", "shown"),
    [
        ("2GB", 2_000_000_000, 0.0, "2.0 GB/s, 0 us"),
        ("1.5GB/s,100us", 1_500_000_000, 100e-6, "1.5 GB/s, 100 us"),
        (" 512MiB , 0.25 ms ", 512 * 1024**2, 250e-6, "537 MB/s, 250 us"),
        ("1000,1s", 1000, 1.0, "1.0 kB/s, 1000000 us"),
        ("2GB,", 2_000_000_000, 0.0, "2.0 GB/s, 0 us"),
    ],
)
def test_an_ssd_as_people_write_it(text: str, rate: int, latency_s: float, shown: str) -> None:
    ssd = parse_ssd(text)
    assert (ssd.rate, ssd.latency_s) == (rate, pytest.approx(latency_s))
    assert str(ssd) == shown


@pytest.mark.parametrize("text", ["", "fast", "0", "2GB,100", "2GB,fast", "2GB,-1ms", "2GB,1ms,3"])
def test_what_is_none_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SizeInvalid, match="2GB,100us"):
        parse_ssd(text)


def test_reads_share_the_rate_and_each_has_the_latency() -> None:
    ssd = Ssd(1000, 0.5)
    assert ssd.done_at(10.0, 2000) == 12.5
    assert ssd.done_at(10.0, 1000) == 13.5, "the device was busy until 12"
    assert ssd.done_at(13.2, 1000) == 14.7, "it was free since 13"
    assert ssd.done_at(13.3, 0) == 14.7, "latency only, after what is under way"


def test_a_read_waits_for_the_rest_of_its_time_and_no_longer() -> None:
    now = [100.0]
    slept: list[float] = []

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        now[0] += 0.25
        return len(buffers[0])

    ssd = SimulatedSsd(Ssd(1000, 0.0), read, lambda: now[0], slept.append)
    assert ssd(0, [memoryview(bytearray(1000))], 0) == 1000
    assert slept == [0.75]
    now[0] = 200.0
    assert ssd(0, [memoryview(bytearray(100))], 0) == 100
    assert slept == [0.75], "the real disk took longer than the simulated one"


def test_many_threads_get_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    ssd = SimulatedSsd(Ssd(1 << 30, 0.0))
    found: dict[int, bytes] = {}

    def read(offset: int) -> None:
        buffer = bytearray(16)
        assert ssd(descriptor, [memoryview(buffer)], offset) == 16
        found[offset] = bytes(buffer)

    descriptor = os.open(path, os.O_RDONLY)
    try:
        threads = [threading.Thread(target=read, args=(offset,)) for offset in range(0, 256, 16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        os.close(descriptor)
    assert b"".join(found[offset] for offset in sorted(found)) == bytes(range(256))


def test_a_daemon_with_one_says_so_and_what_it_reads_is_right(home: Home, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe")

    def tokens(model: object) -> list[int]:
        return [int(token) for token, _ in generate_step(mx.array([3, 4, 5, 6]), model, max_tokens=12)]

    expected = tokens(load_model(path)[0])
    with running_daemon(home, budget_for(load_lazily(path).manifest, 8), "--simulate-ssd", "50MB,200us"):
        model, _ = expertd.load(path)
        assert tokens(model) == expected
        status = ask_status(home)
        assert status.models[0].misses > 0
        assert status.simulated_ssd == "50.0 MB/s, 200 us"
        assert any("50.0 MB/s, 200 us" in line for line in table(status))
        (session,) = status.models[0].sessions
        read_s = status.models[0].bytes_read / 50e6
        assert session.read_wait_s >= 0.9 * read_s, "one session, so it has waited for every byte that was read"
