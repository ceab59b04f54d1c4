"""``expertd status`` at a glance: what it says, how it fits a terminal, and what it does not import to say it.

All figures (``--verbose``, ``--layers``, ``--journal``, ``--json``) are in ``test_cli``.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from expertd.clients import quick_status as quick
from expertd.clients.cli.status import as_object
from expertd.clients.quick_status import show_status
from expertd.clients.terminal.figures import table
from expertd.clients.terminal.glance import PLAIN_BLOCKS, bar, duration, glance, percent
from expertd.clients.terminal.programs import program, programs
from expertd.protocol import PROTOCOL
from expertd.protocol.messages import (
    AheadStatus,
    DaemonStatus,
    DeviceStatus,
    JournalEntry,
    ModelStatus,
    SessionStatus,
    Status,
)
from expertd.protocol.paths import Home
from expertd.protocol.quick import STATUS_TOKEN, quick_status
from tests.conftest import StartDaemon, wait_for
from tests.programs import Program
from tools.stage import ask_status

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
NOT_IMPORTED = (
    "mlx", "mlx_lm", "numpy", "aiohttp", "asyncio", "rich", "psutil", "subprocess", "importlib.metadata", "hashlib",
    "logging", "shutil", "textwrap", "click", "zmq", "msgspec", "expertd.worker", "expertd.daemon",
    "expertd.clients.cli", "expertd.clients.gateway", "expertd.protocol.config", "expertd.protocol.errors",
    "expertd.protocol.messages", "expertd.protocol.paths",
)  # fmt: skip


def session(pid: int = 41, **changes: object) -> SessionStatus:
    given = {"waiting": False, "fetches": 7, "left_behind": False, "held_bytes": 0, "decode_tokens": 1204} | changes
    return SessionStatus(id=pid, pid=pid, mode="shm", **given)  # type: ignore[arg-type]


def model(path: str = "/models/Qwen3-30B-A3B-4bit", **changes: object) -> ModelStatus:
    given: dict[str, object] = {
        "id": path, "path": path, "family": "qwen3_moe", "moe_layers": 48, "experts": 128, "top_k": 8,
        "block_bytes": 2_650_000, "blocks": 6144, "slots": 2500, "resident_blocks": 2458, "hits": 9620, "misses": 380,
        "bytes_read": 7_500_000_000, "evictions": 1, "pool_bytes": 6_500_000_000, "sessions": [session()],
    }  # fmt: skip
    return ModelStatus(**given | changes)  # type: ignore[arg-type]


def status(*models: ModelStatus, **changes: object) -> Status:
    given: dict[str, object] = {
        "protocol": PROTOCOL, "home": "/h", "daemon": DaemonStatus(pid=1, version="1", uptime_s=8000.0, rss_bytes=1),
        "budget_bytes": 12_000_000_000, "used_bytes": 6_500_000_000, "limit_bytes": 12_000_000_000,
        "pressure": "normal", "pressure_figure": "", "journal": [], "tracing": "", "frames_dropped": 0,
        "models": list(models),
    }  # fmt: skip
    return Status(**given | changes)  # type: ignore[arg-type]


NAMES = {41: "expertd serve", 42: "notes.py"}


def test_a_healthy_daemon_in_80_columns() -> None:
    found = status(model(sessions=[session(41), session(42, decode_tokens=3, prompt_tokens=30)]))
    assert glance(found, NAMES, 80) == [
        "expertd has been running for 2 h 13 min; all is well.",
        "",
        "memory     █████████░░░░░░░  6.5 GB of 12.0 GB that it may take",
        "",
        "Qwen3-30B-A3B-4bit  /models/",
        "  held     ██████░░░░░░░░░░  40.0 % of its experts are in memory, 6.5 GB",
        "  found    ███████████████░  96.2 % were there when they were needed",
        "  disk     7.5 GB read so far",
        "  used by  expertd serve (process 41), 1,204 tokens",
        "           notes.py (process 42), 33 tokens",
        "",
        "More: expertd status --verbose    Live: expertd top",
    ]


def test_without_a_model_it_says_what_to_try() -> None:
    assert glance(status(used_bytes=0), {}, 80, PLAIN_BLOCKS) == [
        "expertd has been running for 2 h 13 min; all is well.",
        "",
        "memory     ................  0 B of 12.0 GB that it may take",
        "",
        "No model has been used yet.  Try: expertd chat MODEL",
        "",
        "More: expertd status --verbose    Live: expertd top",
    ]


def test_a_model_that_nobody_uses_says_so() -> None:
    lines = glance(status(model(sessions=[], hits=0, misses=0)), {}, 80)
    assert lines[6:9:2] == [
        "  found    ░░░░░░░░░░░░░░░░  not used yet",
        "  used by  no program now; it stays in memory until that is needed",
    ]


def test_what_is_wrong_comes_first_and_says_what_to_do() -> None:
    gone = session(42, left_behind=True, held_bytes=1_200_000_000)
    found = status(
        model(sessions=[session(), gone]), pressure="critical", pressure_figure="12 % of memory free",
        limit_bytes=3_000_000_000,
    )  # fmt: skip
    lines = glance(found, NAMES, 80)
    assert lines[:8] == [
        "expertd has been running for 2 h 13 min; it needs a look:",
        "! The machine is very short of memory, so expertd takes 3.0 GB at most for now",
        "  (12 % of memory free).  Answers are slower; closing other programs helps.",
        "! notes.py (process 42) does not answer and holds 1.2 GB: continue it (kill",
        "  -CONT 42) or end it.",
        "",
        "memory     █████████░░░░░░░  6.5 GB of 12.0 GB that it may take",
        "",
    ]
    assert "           notes.py (process 42), does not answer" in lines


def test_what_somebody_has_set_up_is_a_note() -> None:
    found = status(tracing="/traces", simulated_ssd="50.0 MB/s, 200 us", limit_bytes=3_000_000_000)
    assert glance(found, {}, 80)[3:7] == [
        "           3.0 GB for now: the machine was short of memory; expertd takes more",
        "           again step by step",
        "           the disk is slowed down to 50.0 MB/s, 200 us (--simulate-ssd)",
        "           routing is recorded into /traces; end that with: expertd trace stop",
    ]


@dataclass
class Extreme:
    name: str
    found: Status
    names: dict[int, str] = field(default_factory=lambda: dict(NAMES))


EXTREMES = [
    Extreme("plain", status(model(), model("/m/gpt-oss-20b"))),
    Extreme("many users", status(*(model(f"/m/{n}", sessions=[session(p) for p in range(41, 61)]) for n in range(2)))),
    Extreme("long names", status(model("/" + "long/" * 60 + "name"), model()), {41: "program" * 40}),
    Extreme("trouble", status(model(), model("/b"), pressure="warning", pressure_figure="some " * 9)),
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=lambda extreme: extreme.name)
@pytest.mark.parametrize("width", [80, 200])
def test_two_models_fill_one_screen(extreme: Extreme, width: int) -> None:
    lines = glance(extreme.found, extreme.names, width)
    assert len(lines) <= 22
    assert [line for line in lines if len(line) > width] == []


def test_a_wide_terminal_gets_longer_bars() -> None:
    narrow, wide = (glance(status(model()), NAMES, width)[2] for width in (80, 200))
    assert (narrow.count("█") + narrow.count("░"), wide.count("█") + wide.count("░")) == (16, 64)


def test_bars_numbers_and_times() -> None:
    assert [bar(p, 4, "#.") for p in (0, 0.1, 50, 99.9, 100)] == ["....", "#...", "##..", "####", "####"]
    assert [percent(a, b) for a, b in ((0, 9), (1, 9999), (1, 2), (9998, 9999), (9, 9), (0, 0))] == [
        "0 %", "less than 0.1 %", "50.0 %", "more than 99.9 %", "100 %", "0 %",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 61, 3600, 8000, 90061)] == ["0 s", "1 min 1 s", "1 h", "2 h 13 min", "1 d 1 h"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["/usr/bin/python3.11", "-m", "expertd.clients.cli", "worker", "/m", "--gateway", "x"], "expertd serve"),
        (["/venv/bin/python", "/venv/bin/expertd", "chat", "/m"], "expertd chat"),
        (["/opt/Python", "-X", "dev", "-u", "/home/me/notes.py", "--fast"], "notes.py"),
        (["python3", "-m", "tools.hold", "/m"], "tools.hold"),
        (["python3", "-c", "import expertd"], "python3 -c"),
        (["python3"], "python3"),
        (["/Applications/Chat"], "Chat"),
        ([], ""),
    ],
)
def test_a_program_is_called_as_people_know_it(arguments: list[str], name: str) -> None:
    assert program(arguments) == name


def test_the_programs_of_processes_are_found() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        found = programs([child.pid, 2**22 + 1])
        child.communicate(b"\n")
    assert list(found) == [child.pid]
    assert found[child.pid].endswith(" -c")


def test_the_programs_of_processes_are_found_as_on_macos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for ps, which tells what it was asked and answers as it does on macOS."""
    ps = tmp_path / "ps"
    ps.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho "   41 /opt/bin/python3 -m expertd.clients.cli chat /m"\n')
    ps.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert programs([42, 41]) == {41: "expertd chat"}
    assert (tmp_path / "ps.asked").read_text() == "-ww -o pid=,command= -p 41,42\n"
    ps.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs([41]) == {}


def imported_by(arguments: list[str]) -> set[str]:
    """What the shell's ``expertd`` has imported when it is done with ``arguments``, beyond a bare interpreter."""
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom expertd.clients.entry import main\n"
        f"sys.argv[1:] = {arguments!r}\nmain()\nprint('imported:', *sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    first, *names = done.stdout.splitlines()[-1].split()
    assert first == "imported:" and "expertd.clients.quick_status" in names
    return set(names)


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["status", "-v", "--layers", "--journal"]])
def test_status_imports_nothing_that_it_can_do_without(arguments: list[str], start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    assert sorted(set(NOT_IMPORTED) & imported_by(arguments)) == []


def both_ways(*arguments: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """``expertd`` as the shell has it, which may take the short way, and by the ordinary one."""
    installed = str(Path(sys.executable).with_name("expertd"))
    return [
        subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
        )
        for command in ([installed], [sys.executable, "-m", "expertd.clients.cli"])
    ]


def test_both_ways_show_the_same(home: Home, start_daemon: StartDaemon) -> None:
    def steady(text: str) -> str:  # without what has changed in the meantime
        text = re.sub(r"(up|for) (\d+ min )?\d+ s", r"\1 0 s", text)
        return re.sub(r'("(?:uptime_s|rss_bytes|pressure_figure)": ).+', r"\1", text)

    def tokens(home: Home) -> int:
        (session,) = ask_status(home).models[0].sessions
        return session.prompt_tokens + session.decode_tokens

    start_daemon("2MB")
    with Program(DEMO) as user:
        user.run(12)
        wait_for(lambda: tokens(home) == 17 + 12)  # an idle session reports what it has not told yet
        for options in ([], ["--json"], ["-v"], ["--verbose", "--layers", "--journal"], ["--journal", "--json"]):
            for width in ("80", ""):
                short, ordinary = both_ways("status", *options, COLUMNS=width)
                assert (short.returncode, short.stderr) == (ordinary.returncode, ordinary.stderr) == (0, "")
                assert steady(short.stdout) == steady(ordinary.stdout)
                assert short.stdout.count("tests.programs") == (0 if options else 1)


def test_every_figure_fits_the_terminal() -> None:
    devices = [DeviceStatus(name="nvme0n1", reads=123456, bytes=10**12, p50_us=181, p95_us=900, p99_us=5800,
                            depth_mean=1.6, depth_max=9)]  # fmt: skip
    why = "only 12 % of the memory of this machine is available, and what expertd holds is the most of it"
    entries = [JournalEntry(at=0.0, pressure="critical", why=why, before_bytes=10**10, after_bytes=0)]
    left = session(42, left_behind=True, held_bytes=1_200_000_000)
    found = status(model(sessions=[session(), left]), devices=devices, journal=entries, tracing="/a/folder " * 9)
    whole = table(found, layers=True, journal=True)
    assert max(map(len, whole)) > 80
    assert table(found, width=200, layers=True, journal=True) == whole
    lines = table(found, width=80, layers=True, journal=True)
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()) == " ".join(" ".join(whole).split()), "nothing is lost"
    assert all(line.startswith(" " * 10) for line in lines[3:4]), "what belongs to a line stands below it"


def test_both_ways_fail_alike(home: Home) -> None:
    for arguments, status in ((["status"], 3), (["status", "--nope"], 2), (["status", "--help"], 0), (["sttus"], 2)):
        short, ordinary = both_ways(*arguments)
        assert short.returncode == ordinary.returncode == status
        assert (short.stdout, short.stderr) == (ordinary.stdout, ordinary.stderr)
    home.root.chmod(0o777)  # somebody else may have put a daemon's socket there
    short, ordinary = both_ways("status")
    assert short.stderr == ordinary.stderr and short.stderr.endswith("[home_invalid]\n")


def test_an_older_daemon_s_state_is_shown_the_ordinary_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves out what it does not know, and a message's class knows what that means."""
    whole = as_object(status(model()))
    older = {name: value for name, value in whole.items() if name not in ("simulated_ssd", "devices")}
    for answer, shown in ((whole, True), (older, False)):
        monkeypatch.setattr(quick, "quick_status", lambda home, answer=answer: msgspec.json.encode(answer))
        for options in ([], ["-v"]):
            assert show_status(options) is shown
            assert bool(capsys.readouterr().out) is shown
        assert show_status(["--json"])
        assert json.loads(capsys.readouterr().out) == answer


@pytest.mark.parametrize("answer", [b"\x01", b"", b'{"protocol": 4, "daem', b'{"models": []}\n'])
def test_a_daemon_that_does_not_know_the_question_is_asked_the_ordinary_way(answer: bytes, home: Home) -> None:
    """It greets as it greets a session; one that hangs up in the middle of its answer has told nothing either."""
    said = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.lifeline_socket))
        listener.listen()

        def daemon() -> None:
            line, _ = listener.accept()
            with line:
                said.append(line.recv(64))
                line.sendall(answer)

        thread = threading.Thread(target=daemon)
        thread.start()
        found = quick_status(str(home.root))
        thread.join()
    assert said == [PROTOCOL.to_bytes(4, "little") + STATUS_TOKEN]
    assert found == (answer if answer.endswith(b"\n") else None)


def test_status_names_who_uses_the_model(start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    with Program(DEMO) as user:
        user.run(12)
        done = subprocess.run(
            [sys.executable, "-m", "expertd.clients.cli", "status"], capture_output=True, text=True, timeout=60,
            env={**os.environ, "COLUMNS": "80"},
        )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].endswith("; all is well.")
    assert lines[4].startswith("demo  /")
    assert lines[6] == "  shared   9.5 MB of other weights, once for all programs"
    assert [line for line in lines if line.startswith(f"  used by  tests.programs (process {user.pid})")]


def test_changes_of_topic_are_a_line_of_what_is_read_ahead() -> None:
    topic = AheadStatus(
        kind="topic", reading=False, announced=46, useful=0.62, shuffled=0.4, useful_bytes=0, wasted_bytes=0, turns=21
    )
    lines = table(status(model(ahead=[topic])))
    assert "  ahead     topic (21 changes): 62 % used (shuffled 40 %), off now" in lines
    unturned = msgspec.structs.replace(topic, announced=0, turns=0)
    assert not any("topic" in line for line in table(status(model(ahead=[unturned]))))


def test_an_output_that_has_no_blocks_gets_plain_bars(start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    done = subprocess.run(
        [sys.executable, "-m", "expertd.clients.cli", "status"], capture_output=True, timeout=60, check=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert b"memory     ................  0 B of 64.0 MB" in done.stdout


def test_the_shape_of_json_is_the_message_s() -> None:
    found = status(model())
    assert as_object(found) == {k: v for k, v in msgspec.to_builtins(found).items() if k != "type"}
