"""The command line on good input, as installed.

Bad input: ``test_bad_input``; what fills a terminal: ``test_status``, ``test_top`` and ``test_chat_command``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import mlx_lm
import pytest
from click.testing import CliRunner

from expertd.clients.cli import main
from expertd.clients.cli.status import as_object
from expertd.clients.terminal.figures import table
from expertd.daemon.policy import POLICIES, Forecast
from expertd.protocol import PROTOCOL
from expertd.protocol.config import POLICY_NAMES
from expertd.protocol.connection import package_version
from expertd.protocol.messages import (
    DaemonStatus,
    DeviceStatus,
    FetchToRead,
    LayerStatus,
    ModelStatus,
    SessionStatus,
    Status,
)
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for


def test_the_policies_that_can_be_chosen_are_those_that_there_are() -> None:
    assert tuple(POLICIES) == POLICY_NAMES
    assert POLICIES[POLICY_NAMES[0]] is Forecast, "the default"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A row of a slab fills a page: so a budget gives just the slots that it should.
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "model", "qwen3_moe", hidden=128, expert_width=256)


def expertd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_status_as_json_has_the_promised_shape(model_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    budget = budget_for(load_lazily(model_path).manifest, 12)
    daemon = start_daemon(str(budget))
    assert expertd("generate", str(model_path), "hello", "--max-tokens", "4").returncode == 0
    found = json.loads(expertd("status", "--json").stdout)
    assert found["protocol"] == PROTOCOL
    assert found["home"] == str(home.root)
    assert found["daemon"]["pid"] == daemon.pid
    assert found["daemon"]["version"] == package_version()
    assert found["daemon"]["uptime_s"] > 0
    assert found["daemon"]["rss_bytes"] > 1_000_000
    assert found["budget_bytes"] == found["used_bytes"] == budget
    assert found["pressure"] == "normal"
    (model,) = found["models"]
    assert len(model["id"]) == 16
    assert model["path"] == str(model_path)
    assert (model["moe_layers"], model["experts"], model["top_k"]) == (3, 16, 4)
    assert model["block_bytes"] == 3 * (128 * 256 // 2 + 128 * 256 // 32)  # 4 bits each, and a scale for 32 of them
    assert model["resident_blocks"] == model["slots"] == 12
    assert 0 < model["misses"] <= model["evictions"] + model["resident_blocks"]  # some were read ahead
    assert model["bytes_read"] == model["block_bytes"] * (model["evictions"] + model["resident_blocks"])
    assert model["hits"] > 0
    assert model["sessions"] == []
    assert len(model["layers"]) == 3
    for layer in model["layers"]:
        assert (layer["pool"], layer["pool_slots"]) == (0, 12)
        assert layer["misses"] <= layer["evictions"] + layer["resident_blocks"]
        assert layer["bytes_read"] == model["block_bytes"] * (layer["evictions"] + layer["resident_blocks"])
    for name in ("hits", "misses", "bytes_read", "evictions", "resident_blocks"):
        assert sum(layer[name] for layer in model["layers"]) == model[name]


def test_status_names_the_sessions_and_their_mode(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon()
    command = [sys.executable, "-m", "tools.hold", str(model_path), "2", "copy"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (session,) = json.loads(expertd("status", "--json").stdout)["models"][0]["sessions"]
        assert (session["pid"], session["mode"], session["waiting"]) == (holder.pid, "copy", False)
        assert f"process {holder.pid}, mode copy" in expertd("status", "--verbose").stdout
        holder.communicate(timeout=DEADLINE_S)


def test_status_of_an_empty_daemon_reads_well(home: Home, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("64MB")
    lines = expertd("status", "--verbose").stdout.splitlines()
    assert lines[0].startswith(f"daemon    process {daemon.pid}, up 0 min ")
    assert lines[1:] == ["budget    64.0 MB, in use 0 B, pressure normal", "models    none yet"]


def test_status_shows_each_layer_if_it_is_asked_to(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(load_lazily(model_path).manifest, 12)))
    assert expertd("generate", str(model_path), "hello", "--max-tokens", "4").returncode == 0
    head, *rows = expertd("status", "--layers").stdout.splitlines()[-4:]
    assert head.startswith("  layer  pool  pool slots  resident ")
    assert [row.split()[:3] for row in rows] == [["0", "0", "12"], ["1", "0", "12"], ["2", "0", "12"]]
    assert "pool slots" not in expertd("status", "--verbose").stdout


def status_of(sessions: list[SessionStatus], layers: list[LayerStatus], bytes_read: int = 1) -> Status:
    """What a daemon with one model says, all other numbers 1."""
    counts = dict.fromkeys(
        ("moe_layers", "experts", "top_k", "block_bytes", "blocks", "slots", "resident_blocks", "hits", "misses",
         "evictions", "pool_bytes"), 1,
    )  # fmt: skip
    model = ModelStatus(
        id="m", path="/m", family="f", sessions=sessions, layers=layers, bytes_read=bytes_read, **counts
    )
    return Status(
        protocol=PROTOCOL, home="/h", budget_bytes=1, used_bytes=1, pressure="normal", tracing="", frames_dropped=0,
        limit_bytes=1, pressure_figure="", journal=[],
        daemon=DaemonStatus(pid=1, version="1", uptime_s=1.0, rss_bytes=1), models=[model],
    )  # fmt: skip


def test_status_lines_the_layers_up_and_tells_their_share_of_what_was_read() -> None:
    layers = [
        LayerStatus(pool=0, pool_slots=96, resident_blocks=61, hits=1200, misses=90, bytes_read=900, evictions=29),
        LayerStatus(pool=0, pool_slots=96, resident_blocks=35, hits=12345, misses=36, bytes_read=300, evictions=1),
        LayerStatus(pool=1, pool_slots=128, resident_blocks=0, hits=0, misses=0, bytes_read=0, evictions=0),
    ]
    lines = table(status_of([], layers, bytes_read=1200), layers=True)
    assert lines[-5:] == [
        "  session   none",
        "  layer  pool  pool slots  resident   hits  misses  evictions  bytes read",
        "      0     0          96        61   1200      90         29      75.0 %",
        "      1     0          96        35  12345      36          1      25.0 %",
        "      2     1         128         0      0       0          0       0.0 %",
    ]


def test_status_of_layers_that_read_nothing_has_no_share_to_tell() -> None:
    layers = [LayerStatus(pool=0, pool_slots=8, resident_blocks=0, hits=0, misses=0, bytes_read=0, evictions=0)]
    assert table(status_of([], layers, bytes_read=0), layers=True)[-1].endswith("  0.0 %")


def test_status_says_that_an_older_daemon_does_not_tell_of_layers() -> None:
    assert table(status_of([], []), layers=True)[-1] == (
        "  layers    unknown to this daemon, which is older than this command"
    )


def test_status_tells_of_each_device_and_how_soon_a_fetch_reads() -> None:
    found = status_of([], [])
    assert not any(line.startswith(("reads", "fetches")) for line in table(found)), "an older daemon does not tell"
    found.devices = [
        DeviceStatus(
            name="nvme0n1", reads=12, bytes=31_850_496, p50_us=870, p95_us=1500, p99_us=2345,
            depth_mean=3.42, depth_max=5,
        )
    ]
    found.fetch_to_read_us = FetchToRead(p50=85, p99=1200)
    assert table(found)[2:4] == [
        "reads     nvme0n1: 12 reads, 31.9 MB, half of them within 870 us, 99 % within 2.3 ms, 3.4 at once",
        "fetches   begin to read after 85 us, 99 % within 1.2 ms",
    ]
    assert json.loads(json.dumps(as_object(found)))["devices"][0]["depth_max"] == 5


def test_a_daemon_tells_what_it_has_read(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(load_lazily(model_path).manifest, 12)))
    assert expertd("generate", str(model_path), "hello", "--max-tokens", "4").returncode == 0
    found = json.loads(expertd("status", "--json").stdout)
    (device,) = found["devices"]
    assert device["bytes"] >= found["models"][0]["bytes_read"] > 0
    assert 1 <= device["depth_mean"] <= device["depth_max"]
    assert found["fetch_to_read_us"]["p99"] >= found["fetch_to_read_us"]["p50"] > 0


def test_status_says_what_to_do_about_a_session_that_was_left_behind() -> None:
    sessions = [
        SessionStatus(id=1, pid=123, mode="shm", waiting=False, fetches=7, left_behind=True, held_bytes=1_200_000_000),
        SessionStatus(id=2, pid=124, mode="shm", waiting=True, fetches=8, left_behind=False, held_bytes=0),
    ]
    assert table(status_of(sessions, []))[-2:] == [
        "  session   process 123 does not answer and holds 1.2 GB; continue it (kill -CONT 123) or end it",
        "  session   process 124, mode shm, 8 fetches, waits for a read",
    ]


def test_budget_shows_and_changes_what_a_running_daemon_may_take(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    assert expertd("budget").stdout == "the budget is 64.0 MB; 0 B in use\n"
    assert expertd("budget", "1.5GB").stdout == "the budget is 1.5 GB now; it was 64.0 MB\n"
    assert ask_status(home).budget_bytes == 1_500_000_000


def test_budget_without_a_daemon_says_how_to_start_one(home: Home) -> None:
    for arguments in (["budget"], ["budget", "1GB"]):
        done = expertd(*arguments)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == (
            f"expertd: no daemon runs in {home.root}; start one with: expertd daemon run [daemon_not_running]\n"
        )


def test_budget_refuses_what_is_no_size(home: Home) -> None:
    forgotten = expertd("budget", "8")
    assert (forgotten.returncode, forgotten.stdout) == (2, "")
    assert "did you mean 8GB?" in forgotten.stderr
    done = expertd("budget", "much")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(" [size_invalid]\n")


def test_generate_prints_the_text_of_plain_mlx_lm(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(load_lazily(model_path).manifest, 12)))
    plain, tokenizer = mlx_lm.load(str(model_path))[:2]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    for options, prompt in (([], chat), (["--raw"], "hello")):
        expected = mlx_lm.generate(plain, tokenizer, prompt, max_tokens=24)
        done = expertd("generate", str(model_path), "hello", "--max-tokens", "24", *options)
        assert done.stdout == expected + "\n"


def test_bytes_that_are_not_utf_8_are_refused_as_that(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon()
    sentence = b"expertd: the text has bytes that are not UTF-8, so it cannot be read; convert it (iconv -t UTF-8 does)"
    program = [sys.executable, "-m", "expertd.clients.cli"]
    for words in (["generate", str(model_path), b"caf\xe9"], ["generate", str(model_path), "-", "--raw"],
                  ["chat", str(model_path)]):  # fmt: skip
        done = subprocess.run([*program, *words], input=b"caf\xe9\n", capture_output=True, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (1, b"", sentence + b" [request_invalid]\n")


def test_generate_starts_a_daemon_and_says_so(model_path: Path, home: Home) -> None:
    done = expertd("generate", str(model_path), "hello", "--max-tokens", "2", "--budget", "3MB")
    pid = ask_status(home).daemon.pid
    assert done.stderr == (
        f"expertd: started a daemon (process {pid}); it ends after 15 idle minutes, or with: expertd daemon stop\n"
    )
    assert ask_status(home).budget_bytes == 3_000_000
    assert expertd("daemon", "stop").stdout == f"stopped the daemon (process {pid})\n"
    assert expertd("status").returncode == 3


@pytest.mark.parametrize("options", [[], ["--by-layer"]], ids=["whole", "by-layer"])
def test_verify_says_that_there_is_no_difference(
    options: list[str], model_path: Path, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(load_lazily(model_path).manifest, 12)))
    done = expertd("verify", str(model_path), "--tokens", "8", *options)
    assert done.returncode == 0
    assert "mode shm, 12 slots for 48 blocks" in done.stdout
    assert done.stdout.count("no difference") == (1 if options else 3)
    if options:
        found = json.loads(expertd("verify", str(model_path), "--tokens", "8", "--by-layer", "--json").stdout)
        assert (found["mode"], found["slots"], found["blocks"]) == ("shm", 12, 48)
        assert (found["exact"], found["by_layer"], found["differences"]) == (True, True, [])


def test_a_budget_for_a_daemon_that_runs_is_said_to_change_nothing(home: Home, start_daemon: StartDaemon) -> None:
    started = ["serve", "nowhere", "--budget"], ["trace", "record", "nowhere", "--prompts", "x", "-o", "y", "--budget"]
    assert all("changes nothing" not in expertd(*command, "1MB").stderr for command in started)
    start_daemon("64MB")
    for command in (["generate", "nowhere", "hello", "--budget"], *started):
        first, *_ = expertd(*command, "1MB").stderr.splitlines()
        assert first == (
            "expertd: --budget 1MB changes nothing: a daemon runs already, with 64.0 MB; "
            "change it with: expertd budget 1MB"
        )
        assert "changes nothing" not in expertd(*command, "64MB").stderr
    assert ask_status(home).budget_bytes == 64_000_000


@pytest.mark.parametrize("name", ["", "a b", "what?", "=b", "a\n"])
def test_an_alias_has_to_be_a_name(name: str) -> None:
    refused = CliRunner().invoke(main, ["serve", "nowhere", "--alias", name])
    assert refused.exit_code == 2
    assert "is no name of a model" in refused.output


def test_daemon_run_serves_until_it_is_stopped(home: Home) -> None:
    command = [sys.executable, "-m", "expertd.clients.cli", "daemon", "run", "--budget", "1MiB"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        deadline = time.monotonic() + DEADLINE_S
        while not home.daemon_socket.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert ask_status(home).budget_bytes == 1 << 20
        assert expertd("daemon", "stop").returncode == 0
        assert daemon.wait(DEADLINE_S) == 0
    assert [path.name for path in home.run.iterdir()] == ["daemon.lock"]


def test_every_command_explains_itself() -> None:
    listed = expertd("--help").stdout
    commands = "serve", "generate", "chat", "status", "top", "budget", "config", "pack", "daemon", "verify", "worker"
    for command in commands:
        assert f"\n  {command} " in listed
        done = expertd(command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: ")


def test_the_journal_tells_what_pressure_changed_and_why(home: Home, start_daemon: StartDaemon, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("0 critical played by a test\n")
    start_daemon("64MB", "--simulate-pressure", str(script))
    wait_for(lambda: "limit     0 B because of memory pressure" in expertd("status", "--verbose").stdout)
    lines = expertd("status", "--journal").stdout.splitlines()
    assert lines[1] == "budget    64.0 MB, in use 0 B, pressure critical"
    assert lines[3] == "journal   changes of the limit, the newest last"
    assert "critical  64.0 MB -> 0 B: " in lines[4] and "played by a test" in lines[4]
    assert "of which memory pressure leaves 0 B" in expertd("budget").stdout
    (entry,) = json.loads(expertd("status", "--json").stdout)["journal"]
    assert (entry["before_bytes"], entry["after_bytes"]) == (64_000_000, 0)


def test_an_empty_journal_says_so(start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    assert "journal   nothing has changed" in expertd("status", "--journal").stdout


def test_unload_says_what_it_gave_back_or_what_there_is(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    refused = expertd("unload", "nothing")
    assert refused.returncode == 1
    assert refused.stderr.startswith("expertd: the daemon holds nothing of 'nothing'; what it holds: none")
    assert expertd("generate", str(model_path), "hello", "--max-tokens", "2").returncode == 0
    assert expertd("unload", model_path.name).stdout.startswith(f"unloaded {model_path}: ")
    assert json.loads(expertd("status", "--json").stdout)["models"] == []


def test_a_script_of_pressure_that_cannot_be_read_keeps_the_daemon_from_starting(home: Home, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("0 normal\nsoon critical\n")
    refused = expertd("daemon", "run", "--simulate-pressure", str(script))
    assert refused.returncode == 3
    assert "line 2" in refused.stderr and str(script) in refused.stderr
