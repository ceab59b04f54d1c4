"""``expertd top``: rates from two answers, strips, frames, and the command in a real terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from expertd.clients.terminal.heat import LEVELS, PLAIN_LEVELS, fit, levels
from expertd.clients.terminal.live import frame
from expertd.clients.terminal.rates import Rates, Window, rates
from expertd.daemon.tokens import TokenCounts, Tokens
from expertd.protocol.messages import DaemonStatus, LayerStatus, Status
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tests.programs import Program
from tests.test_status import model, session, status
from tools.stage import ask_status, budget_for
from tools.terminal import CONTROL, CTRL_C, Terminal

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
NAMES = {41: "expertd serve", 42: "notes.py"}


def layer(hits: int, misses: int, bytes_read: int) -> LayerStatus:
    return LayerStatus(
        pool=0, pool_slots=8, resident_blocks=4, hits=hits, misses=misses, bytes_read=bytes_read, evictions=0
    )


def at(uptime_s: float, *models: object, pid: int = 1, **changes: object) -> Status:
    daemon = DaemonStatus(pid=pid, version="1", uptime_s=uptime_s, rss_bytes=1)
    return status(*models, daemon=daemon, **changes)  # type: ignore[arg-type]


def two_looks() -> tuple[Status, Status]:
    """Ten seconds apart: 900 hits, 100 misses, 20 MB, 300 tokens, a prompt of 50, 4 s of waiting."""
    before = at(
        100.0,
        model(
            hits=100, misses=50, bytes_read=1_000_000, layers=[layer(60, 40, 700_000), layer(40, 10, 300_000)],
            sessions=[session(41, decode_tokens=10, prompt_tokens=5, fetches=7, waited_s=1.0)],
        ),
    )  # fmt: skip
    after = at(
        110.0,
        model(
            hits=1000, misses=150, bytes_read=21_000_000,
            layers=[layer(360, 140, 20_700_000), layer(640, 10, 300_000)],
            sessions=[
                session(41, decode_tokens=310, prompt_tokens=5, fetches=107, waited_s=5.0, waiting=True),
                session(42, decode_tokens=0, prompt_tokens=50, fetches=0),
            ],
        ),
    )  # fmt: skip
    return before, after


def found_rates(before: Status, after: Status) -> Rates:
    found = rates(before, after)
    assert found is not None
    return found


def test_rates_are_what_happened_between_two_looks() -> None:
    found = found_rates(*two_looks())
    assert (found.seconds, found.tokens_per_s, found.prompt_tokens_per_s) == (10.0, 30.0, 5.0)
    assert (found.hits, found.misses, found.hit_rate) == (900, 100, 0.9)
    assert found.read_bytes_per_s == 2_000_000
    (one,) = found.models
    assert one.name == "Qwen3-30B-A3B-4bit"
    assert [(row.hits, row.misses, row.read_bytes_per_s) for row in one.layers] == [(300, 100, 2e6), (600, 0, 0.0)]
    first, second = one.sessions
    assert (first.tokens_per_s, first.fetches_per_s, first.waited, first.waiting) == (30.0, 10.0, 0.4, True)
    assert (second.pid, second.tokens_per_s, second.prompt_tokens_per_s) == (42, 0.0, 5.0)


def test_two_daemons_or_no_time_have_no_rates() -> None:
    before, _ = two_looks()
    assert rates(before, before) is None
    assert rates(before, at(200.0, *before.models, pid=2)) is None
    assert rates(before, at(50.0, *before.models)) is None


def test_a_model_that_came_again_began_at_nothing() -> None:
    before, _ = two_looks()
    found = found_rates(before, at(110.0, model(hits=30, misses=20, bytes_read=100, layers=[], sessions=[])))
    assert (found.hits, found.misses, found.read_bytes_per_s, found.models[0].layers) == (30, 20, 10.0, [])


def test_without_lookups_there_is_no_hit_rate() -> None:
    before, _ = two_looks()
    assert found_rates(before, at(101.0, *before.models)).hit_rate is None


def test_a_window_looks_back_so_many_seconds_and_forgets_another_daemon() -> None:
    window = Window(5.0)
    seconds = [found.seconds if (found := window.add(at(float(now)))) is not None else None for now in range(9)]
    assert seconds == [None, 1, 2, 3, 4, 5, 5, 5, 5]
    assert window.add(at(1.0, pid=2)) is None
    again = window.add(at(2.0, pid=2))
    assert again is not None and again.seconds == 1.0


def test_a_window_looks_back_one_look_at_least() -> None:
    window = Window(5.0)
    assert [found and found.seconds for found in (window.add(at(now)) for now in (0.0, 20.0, 40.0))] == [None, 20, 20]


def test_a_strip_repeats_few_layers_and_shows_the_hottest_of_many() -> None:
    assert fit([1, 2, 3], 7) == [1, 1, 2, 2, 3, 3]
    assert fit([1, 2], 100) == [1] * 16 + [2] * 16
    assert fit([1, 9, 2, 3], 2) == [9, 3]
    assert [len(fit([1.0] * layers, 46)) for layers in (46, 47, 94, 1000)] == [46] * 4
    assert fit([], 10) == fit([1], 0) == []


def test_a_level_is_nothing_only_for_nothing() -> None:
    assert levels([0, 0.001, 0.5, 1, 2], 1) == " ▁▄██"
    assert levels([0, 1], 0) == "  "
    assert len(LEVELS) == len(PLAIN_LEVELS)
    assert PLAIN_LEVELS.isascii()


def drawn(found: Status, shown: Rates | None, width: int, marks: str = LEVELS) -> list[str]:
    console = Console(width=width, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(frame(found, shown, NAMES, width, marks))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_a_frame_in_80_columns() -> None:
    before, after = two_looks()
    strip = "█" * 16 + " " * 16
    assert drawn(after, rates(before, after), 80) == [
        "expertd top   process 1, up 1 min 50 s                             the last 10 s",
        "",
        "tokens/s  prompt tokens/s  hits      disk      memory             pressure",
        "30.0      5                90.0 %    2.0 MB/s  6.5 GB of 12.0 GB  normal",
        "",
        "Qwen3-30B-A3B-4bit   40.0 % of its experts in memory, 6.5 GB",
        f"  misses  {strip}  most 25 %, layer 0",
        f"  reads   {strip}  most 2.0 MB/s, layer 0",
        "  layer   0                              1",
        "  program         process  tokens/s  prompt tokens/s  waiting",
        "  expertd serve        41      30.0                0     40 %",
        "  notes.py             42       0.0                5      0 %",
    ]


@pytest.mark.parametrize("width", [80, 200])
def test_a_frame_of_a_large_model_and_of_long_names_fits(width: int) -> None:
    before, after = (
        at(
            now,
            model(
                "/m/" + "long-" * 50, layers=[layer(int(now) * n, n, 10**7 * n) for n in range(94)],
                sessions=[session(pid, decode_tokens=10**7 * int(now), left_behind=True) for pid in range(41, 51)],
            ),
            pressure="critical", used_bytes=999_900_000_000, limit_bytes=999_900_000_000, budget_bytes=10**13,
        )
        for now in (1.0, 2.0)
    )  # fmt: skip
    lines = drawn(after, rates(before, after), width)
    assert [line for line in lines if len(line) > width] == []
    assert "critical" in lines[3]
    assert lines[10].endswith("does not answer")


def test_frames_of_nothing() -> None:
    found = at(2.0)
    assert drawn(found, None, 80)[-1] == "waiting for a second look ..."
    assert drawn(found, rates(at(1.0), found), 80)[-1] == "No model has been used yet."
    idle = at(2.0, model(sessions=[]))
    assert drawn(idle, rates(at(1.0, *idle.models), idle), 80)[-2:] == ["  idle", "  no program uses it now"]


def test_plain_strips_are_ascii() -> None:
    before, after = two_looks()
    assert "".join(drawn(after, rates(before, after), 80, PLAIN_LEVELS)).isascii()


# -- what sessions tell ------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_fetch_that_is_repeated_count_once() -> None:
    counts = TokenCounts()
    for sequence in (1, 1, 2, 1):
        counts.reported(1, 5, 0, sequence)
    counts.reported(1, 1, 0)
    counts.reported(2, 5, 0, 1)
    assert counts.all() == {1: Tokens(11, 0), 2: Tokens(5, 0)}


def test_tokens_add_up_until_their_session_ends() -> None:
    counts = TokenCounts()
    counts.reported(1, 5, 30)
    counts.reported(1, 2, 0)
    counts.reported(2, 1, 0)
    assert counts.all() == {1: Tokens(7, 30), 2: Tokens(1, 0)}
    counts.ended(1)
    counts.ended(3)
    assert counts.all() == {2: Tokens(1, 0)}


@pytest.mark.parametrize("share", [1.0, 0.25], ids=["complete", "partial"])
def test_a_session_reports_every_token_that_it_computes(share: float, home: Home, start_daemon: StartDaemon) -> None:
    manifest = load_lazily(DEMO).manifest
    blocks = sum(layer.experts for layer in manifest.layers)
    start_daemon(str(budget_for(manifest, round(share * blocks))))
    with Program(DEMO) as user:
        user.run(130)  # a prompt of 17: 16, and 1 + 130 one at a time, of which the last is for nothing

        def counted() -> tuple[int, int]:
            (one,) = ask_status(home).models[0].sessions
            return one.decode_tokens, one.prompt_tokens

        wait_for(lambda: counted() == (131, 16))


# -- the command -------------------------------------------------------------------------------------------------------


def top(*arguments: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "expertd.clients.cli", "top", *arguments], capture_output=True, text=True, timeout=60,
        env={**os.environ, "COLUMNS": str(columns)},
    )  # fmt: skip


@contextmanager
def decoding() -> Iterator[subprocess.Popen[str]]:
    """A process that decodes as long as the block lasts."""
    command = [sys.executable, "-m", "benchmarks._decoder", str(DEMO)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.communicate()


def test_one_object_tells_what_a_daemon_under_load_does(start_daemon: StartDaemon) -> None:
    manifest = load_lazily(DEMO).manifest
    daemon = start_daemon(str(budget_for(manifest, 48)))
    with decoding() as user:
        done = top("--once", "--json", "--interval", "2")
    found = json.loads(done.stdout)
    assert (found["daemon"], found["pressure"]) == (daemon.pid, "normal")
    assert found["tokens_per_s"] > 0 and found["hits"] > 0 and found["misses"] > 0
    assert found["hit_rate"] == found["hits"] / (found["hits"] + found["misses"])
    (one,) = found["models"]
    assert (one["name"], len(one["layers"])) == ("demo", 6)
    assert sum(row["misses"] for row in one["layers"]) == one["misses"] == found["misses"]
    (who,) = one["sessions"]
    assert (who["pid"], who["program"]) == (user.pid, "benchmarks._decoder")


@pytest.mark.parametrize("columns", [80, 200])
def test_one_frame_fits_the_terminal(columns: int, start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    with Program(DEMO) as user:
        user.run(4)
        done = top("--once", "--interval", "0.2", columns=columns)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, lines[0][:22]) == (0, "", "expertd top   process ")
    assert max(map(len, lines)) <= columns
    assert any("tests.programs" in line for line in lines)


def test_without_a_daemon_or_a_terminal_one_frame_is_an_error(home: Home) -> None:
    done = top("--once")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith(" [daemon_not_running]\n")
    done = top("--once", "--json")
    assert (done.returncode, done.stdout) == (3, "")
    assert json.loads(done.stderr)["error"]["code"] == "daemon_not_running"
    done = top()
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard output is no terminal; use --once or --json" in done.stderr


def test_objects_a_line_go_on_when_a_daemon_goes_and_comes(home: Home, start_daemon: StartDaemon) -> None:
    first = start_daemon("64MB")
    command = [sys.executable, "-m", "expertd.clients.cli", "top", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None and watcher.stderr is not None
        try:
            assert json.loads(watcher.stdout.readline())["daemon"] == first.pid
            first.kill()
            first.wait(DEADLINE_S)
            lost = next(found for line in watcher.stdout if not (found := json.loads(line))["daemon"])
            assert lost["error"]["code"] in ("daemon_lost", "daemon_not_running")
            second = start_daemon("64MB")
            again = next(found for line in watcher.stdout if (found := json.loads(line))["daemon"])
            assert again["daemon"] == second.pid
            watcher.send_signal(signal.SIGINT)
            assert watcher.wait(DEADLINE_S) == 0
            assert watcher.stderr.read() == ""
        finally:
            watcher.kill()


@pytest.mark.parametrize(("columns", "keys"), [(80, "q"), (200, CTRL_C)])
def test_live_it_shows_what_happens_until_a_key_ends_it(columns: int, keys: str, start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    with Program(DEMO) as user, Terminal("top", "--interval", "0.1", columns=columns) as terminal:
        terminal.expect("tokens/s")
        user.run(12)
        terminal.expect("tests.programs")
        terminal.send(keys)
        assert terminal.ended() == 0
        assert terminal.modes_now() == terminal.modes
        assert terminal.raw.endswith("\x1b[?25h\x1b[?1049l"), "the cursor and the screen of before are back"
        lines = [CONTROL.sub("", line) for line in re.split(r"\r\n|\x1b\[H", terminal.raw)]
        assert max(map(len, lines)) == columns


def test_live_it_waits_for_a_daemon_that_goes_and_comes(home: Home, start_daemon: StartDaemon) -> None:
    with Terminal("top", "--interval", "0.1") as terminal:
        terminal.expect("no daemon runs in")
        first = start_daemon("64MB")
        terminal.expect(f"process {first.pid}")
        terminal.expect("No model has been used yet.")
        since = len(terminal.text)
        first.kill()
        first.wait(DEADLINE_S)
        terminal.expect("asking again every 0.1 s; q ends", since)
        second = start_daemon("64MB")
        terminal.expect(f"process {second.pid}", since)
        terminal.send("q")
        assert terminal.ended() == 0


def test_sigterm_leaves_the_terminal_as_it_was(start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    with Terminal("top", "--interval", "0.1") as terminal:
        terminal.expect("No model has been used yet.")
        assert terminal.modes_now() != terminal.modes
        os.kill(terminal.pid, signal.SIGTERM)
        assert terminal.ended() == 128 + signal.SIGTERM
        assert terminal.modes_now() == terminal.modes
        assert terminal.raw.endswith("\x1b[?25h\x1b[?1049l")
