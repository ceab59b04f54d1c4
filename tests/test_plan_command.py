"""``expertd plan`` as a user calls it: on the demo model, with and without a daemon, a trace, a measured pace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from expertd.clients.cli.plan import _computing, _curve, _up
from expertd.clients.planning.shape import read_shape
from expertd.protocol.pace import Pace, write_pace
from expertd.protocol.paths import Home
from expertd.protocol.sizes import parse_size
from expertd.worker.manifest import load_lazily
from tests.conftest import StartDaemon
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

DEMO = Path(__file__).parents[1] / "models" / "demo"


def expertd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def plan(*arguments: str) -> dict[str, Any]:
    done = expertd("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_everything_resident_is_never_slower_than_less() -> None:
    """Medians of different days: the machine was busier while everything was resident."""
    shape = read_shape(DEMO)
    pace = Pace(folder="/m", files=(), complete_us=9000, partial_us=7000, fetch_us=100)
    found = _computing(shape, pace)
    assert (found.complete_s, found.partial_s, found.fetch_s) == (0.007, 0.007, 0.0001)
    assert "on a busier machine when everything was resident" in found.source
    usual = _computing(shape, replace(pace, complete_us=5000))
    assert (usual.complete_s, usual.partial_s, usual.source) == (0.005, 0.007, "measured when the model ran here")


def test_a_plan_needs_no_daemon_and_leaves_no_trace(home: Home) -> None:
    before = sorted(home.root.rglob("*"))
    found = plan(str(DEMO), "--ram", "16GB")
    assert (found["model"]["blocks"], found["model"]["top_k"], found["model"]["family"]) == (192, 4, "qwen3_moe")
    assert found["memory"]["total_bytes"] == 16_000_000_000
    assert found["memory"]["room_bytes"] == 16_000_000_000 - sum(
        found[part][key]
        for part, key in (("memory", "system_bytes"), ("memory", "page_cache_bytes"), ("memory", "kv_bytes"),
                          ("model", "base_bytes"))
    )  # fmt: skip
    assert found["hits"]["source"].startswith("a curve fitted to other models' routing")
    assert found["computing"]["estimated"]
    rows = found["rows"]
    assert [row["hits"] for row in rows] == sorted(row["hits"] for row in rows)
    assert rows[-1]["slots"] == 192 and rows[-1]["hits"] == 1.0
    assert [row["best"] for row in rows].count(True) == 1
    assert sorted(home.root.rglob("*")) == before


def test_a_person_reads_a_table(home: Home) -> None:
    done = expertd("plan", str(DEMO), COLUMNS="80")
    lines = done.stdout.splitlines()
    assert lines[1] == "  experts  6 layers x 32, 4 a token, 52.2 kB each, 10.0 MB in all"
    head = next(line for line in lines if line.split()[:3] == ["budget", "resident", "hits"])
    assert head.endswith("tokens/s at most"), "nothing was measured yet"
    assert sum(line.endswith("  best") for line in lines) == 1
    assert lines[-2].startswith("best: ") and lines[-1].startswith("set it: expertd budget ")
    assert all(len(line) <= 80 for line in lines if "/" not in line), "paths stay whole"


def test_what_workers_measured_is_used(home: Home) -> None:
    manifest = load_lazily(DEMO).manifest
    write_pace(home, Pace(folder=str(DEMO.resolve()), files=manifest.files, complete_us=10_000, partial_us=20_000))
    found = plan(str(DEMO))
    assert found["computing"]["source"] == "measured when the model ran here"
    assert (found["computing"]["complete_s"], found["computing"]["partial_s"]) == (0.01, 0.02)
    assert found["rows"][-1]["tokens_s"] == 100.0
    assert all(row["tokens_s"] < 50 for row in found["rows"][:-1])


def test_measuring_makes_the_model_run(home: Home, own_home: Home) -> None:
    found = plan(str(DEMO), "--measure")
    assert not found["computing"]["estimated"]
    assert list(home.pace.iterdir()), "it is kept"


def test_measuring_what_cannot_run_says_why(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(write_checkpoint(tmp_path / "whole", "qwen3_moe"), folder)
    (folder / "tokenizer.json").unlink()
    done = expertd("plan", str(folder), "--measure")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("expertd: the model could not be measured: ")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tools.stage import running_daemon, temporary_home

    folder = tmp_path_factory.mktemp("trace")
    (folder / "prompts").write_text("def read(path):\nThe ship\nThe Congress of the United States\nimport os\n")
    with temporary_home() as home, running_daemon(home, "64MiB"):
        done = expertd(
            "trace", "record", str(DEMO), "--prompts", str(folder / "prompts"), "-o", str(folder / "demo.npz"),
            "--max-tokens", "64", "--raw",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder / "demo.npz"


def test_a_trace_of_the_home_is_replayed(home: Home, trace: Path) -> None:
    home.traces.mkdir()
    (home.traces / "older.npz").write_bytes(b"damaged")
    for name in ("demo.npz", "demo.json"):
        shutil.copy(trace.with_name(name), home.traces)
    found = plan(str(DEMO), "--budget", "5MB")
    assert found["hits"]["source"].startswith(f"the trace {home.traces / 'demo.npz'} (")
    assert [row["budget_bytes"] for row in found["rows"]] == [5_000_000]
    assert 0.5 < found["rows"][0]["hits"] < 1


def test_a_trace_of_another_model_is_refused(
    home: Home, trace: Path, checkpoints: dict[str, Path]
) -> None:
    done = expertd("plan", str(checkpoints["stacked"]), "--trace", str(trace))
    assert done.returncode == 2
    assert "is of a model with 6 layers of 32 experts, 4 a token" in done.stderr
    short = home.root / "short.npz"
    with np.load(trace) as arrays:
        np.savez(short, **{name: arrays[name][:100] for name in arrays})
    refused = expertd("plan", str(DEMO), "--trace", str(short))
    assert refused.returncode == 2 and "decoded tokens; record at least 128" in refused.stderr
    other = expertd("plan", str(DEMO), "--trace", str(trace.with_name("none.npz")))
    assert other.returncode == 2 and "[trace_invalid]" in other.stderr


def test_a_slowed_down_daemon_slows_the_plan_down(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon("64MB", "--simulate-ssd", "2MB,1ms")
    slow = plan(str(DEMO))["disk"]
    assert slow["source"] == "measured on the model's files, slowed down to 2.0 MB/s, 1000 us as the daemon is"
    assert slow["fixed_s"] + 4 * slow["block_s"] >= 4 * 52_224 / 2e6, "no read is quicker than the SSD"


def test_a_running_daemon_s_count_is_trusted_first(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(load_lazily(DEMO).manifest, 96)))
    done = expertd("generate", str(DEMO), "def read(path):", "--raw", "--max-tokens", "8")
    assert done.returncode == 0
    assert plan(str(DEMO))["hits"]["source"].startswith("a curve fitted"), "too few lookups yet"
    model = replace(ask_status(home).models[0], hits=90_000, misses=10_096)
    curve, source = _curve(home, read_shape(DEMO.resolve()), model, None)
    assert source.startswith("the running daemon: 90.0 % with 50 % resident, prompts included; for other")
    assert curve(96).lookups == pytest.approx(0.1)


def test_a_packed_store_is_what_is_measured_unless_it_is_damaged(home: Home) -> None:
    assert expertd("pack", str(DEMO)).returncode == 0
    assert plan(str(DEMO))["disk"]["source"] == "measured on the model's packed store"
    (store,) = home.packed.iterdir()
    with store.open("r+b") as file:
        file.seek(8192)
        file.write(bytes(store.stat().st_size - 8192))
    assert plan(str(DEMO))["disk"]["source"] == "measured on the model's files"


def test_no_room_is_exit_status_4(home: Home) -> None:
    done = expertd("plan", str(DEMO), "--ram", "1GB")
    assert done.returncode == 4
    assert done.stdout.splitlines()[-1].startswith("nothing fits: ")
    # A budget that is smaller than the base weights, which would have to be beside it then, is no way out.
    small = expertd("plan", str(DEMO), "--ram", "1GB", "--budget", "1MB", "--json")
    assert small.returncode == 4
    for found in (json.loads(expertd("plan", str(DEMO), "--ram", "1GB", "--json").stdout), json.loads(small.stdout)):
        assert not any(row["fits"] or row["best"] for row in found["rows"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere"], 2, "neither a folder nor a model"),
        ([str(DEMO), "--ram", "much"], 2, "'much' is not a size"),
        ([str(DEMO), "--budget", "-1"], 2, "'-1' is not a size"),
    ],
)
def test_bad_input_is_one_sentence(home: Home, arguments: list[str], status: int, said: str) -> None:
    done = expertd("plan", *arguments)
    assert done.returncode == status
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_plan_does_not_load_mlx(home: Home) -> None:
    code = (
        "import sys; from expertd.clients.cli.plan import reckon; from expertd.protocol.paths import Home;"
        f"from pathlib import Path; reckon(Home.current(), Path({str(DEMO)!r}));"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm', 'aiohttp', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("size", [1, 999, 10_036_224, 12_345_678_901, 9_999_999])
def test_a_size_to_type_is_never_less(size: int) -> None:
    typed = parse_size(_up(size))
    assert size <= typed <= 1.1 * size
