"""What processes write down: the form of a line, files of bounded size whatever happens, and ``expertd logs``."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expertd.clients.cli.logs import Event, Tails, events, last
from expertd.protocol import logs
from expertd.protocol.config import KEYS, merge, variable
from expertd.protocol.errors import DaemonStartFailed
from expertd.protocol.logs import KEEP_DEAD, KEEP_S, Found, JsonLines, Log, LogFile, Sparsely, TextLines, stale
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect_or_start
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tests.gateway_stage import ENDLESS, say, serving
from tests.test_homes import expertd
from tools.stage import ask_status
from tools.terminal import Terminal

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) \w+\[\d+\] .+")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(variable(key), raising=False)


@pytest.fixture
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    """A logger of this test alone; its handlers are closed."""
    found = Log(f"expertd.tests.{request.node.name}")
    found.logger.propagate = False
    found.logger.setLevel(logging.DEBUG)
    yield found
    for handler in list(found.logger.handlers):
        found.logger.removeHandler(handler)
        handler.close()


def to_file(log: Log, path: Path, size: int = 64 << 10, count: int = 3) -> None:
    handler = LogFile(path, size, count)
    handler.setFormatter(TextLines("test"))
    log.logger.addHandler(handler)


# -- lines -------------------------------------------------------------------------------------------------------------


def test_facts_follow_the_words_of_a_line(log: Log, tmp_path: Path) -> None:
    to_file(log, tmp_path / "log")
    log.info("session opened", session=3, model="Qwen3 30B", share=0.123456789, why=None)
    log.warning("read of %s failed", "a%20b", left="50 %", said='"no"')
    log.info("100 % done")
    first, second, third = (tmp_path / "log").read_text().splitlines()
    assert first.endswith(f'INFO test[{os.getpid()}] session opened: session=3 model="Qwen3 30B" share=0.123457')
    assert second.endswith(r'''] read of a%20b failed: left="50 %" said="\"no\""''')
    assert third.endswith("] 100 % done")
    assert all(LINE.fullmatch(line) for line in (first, second, third))


def test_an_event_is_one_line_whatever_is_in_it(log: Log, tmp_path: Path) -> None:
    to_file(log, tmp_path / "log")
    log.info("a folder\nwith %s", "a \x1b[31m name\u2028", path=Path("/a\nb"))
    assert (
        (tmp_path / "log").read_text().splitlines()[0].endswith(r'] a folder\nwith a \x1b[31m name\u2028: path="/a\nb"')
    )


def test_a_traceback_is_indented_below_its_event(log: Log, tmp_path: Path) -> None:
    to_file(log, tmp_path / "log")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        log.exception("it failed", request=7)
    first, *rest = (tmp_path / "log").read_text().splitlines()
    assert first.endswith("] it failed: request=7")
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-2:] == ["    ValueError: two", "    lines"]


def test_a_line_has_an_end_and_so_has_its_traceback(log: Log, tmp_path: Path) -> None:
    to_file(log, tmp_path / "log")
    log.info("x" * 100_000)
    assert len((tmp_path / "log").read_text()) == logs.LONGEST + 1


def test_the_same_as_json(log: Log, tmp_path: Path) -> None:
    handler = LogFile(tmp_path / "log", 1 << 20, 2)
    handler.setFormatter(JsonLines("test"))
    log.logger.addHandler(handler)
    log.info("session %s", "opened", session=3, pid=5, folder=Path("/a b"))
    found = json.loads((tmp_path / "log").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", found.pop("time"))
    assert found == {
        "level": "INFO", "process": "test", "pid": os.getpid(), "event": "session opened",
        "facts": {"session": 3, "pid": 5, "folder": "/a b"},
    }  # fmt: skip


def test_what_comes_often_is_told_now_and_then_with_how_often_it_came() -> None:
    now = [0.0]
    often = Sparsely(1.0, clock=lambda: now[0])
    told = []
    for step in range(25):
        now[0] = step / 10
        if often.add():
            told.append((step, often.new, often.total))
    assert told == [(0, 1, 1), (10, 10, 11), (20, 10, 21)]


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_log_takes_no_more_than_its_size_and_count_allow(log: Log, tmp_path: Path) -> None:
    to_file(log, tmp_path / "log", size=64 << 10, count=3)
    for number in range(5000):
        log.info("something of some length has happened here", number=number)
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["log", "log.1", "log.2"]
    assert all(path.stat().st_size <= 64 << 10 for path in files)
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)
    assert (tmp_path / "log").read_text().endswith("number=4999\n")


def test_a_log_whose_folder_is_removed_goes_on_in_a_new_one(log: Log, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    to_file(log, folder / "a.log")
    log.info("before")
    shutil.rmtree(folder)
    log.info("after")
    assert (folder / "a.log").read_text().endswith("] after\n")
    (folder / "a.log").rename(folder / "moved")
    log.info("last")
    assert (folder / "a.log").read_text().endswith("] last\n")


def test_lines_that_cannot_be_written_are_counted_and_told_later(
    log: Log, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "log"
    place.mkdir()
    (place / "a.log").mkdir()  # something is in its place
    to_file(log, place / "a.log")
    for _ in range(3):
        log.info("lost")
    (place / "a.log").rmdir()
    log.info("kept")
    told, kept = (place / "a.log").read_text().splitlines()
    assert " WARNING " in told and told.endswith("] 3 lines of this log could not be written (Is a directory)")
    assert kept.endswith("] kept")
    assert capsys.readouterr().err == ""


FULL = """
import logging, resource, sys
from pathlib import Path
from expertd.protocol.logs import Log, LogFile, TextLines

path = Path(sys.argv[1])
handler = LogFile(path, 1 << 20, 2)
handler.setFormatter(TextLines("test"))
log = Log("expertd.full")
log.logger.addHandler(handler)
log.logger.setLevel(logging.INFO)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
for number in range(100):
    log.info("fills the disk", number=number)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.info("there is room again")
"""
"""No file may be longer than 4096 bytes for a while: what a full disk looks like."""


def test_a_full_disk_loses_lines_and_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path / "log")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "log").read_text().splitlines()
    written = sum("fills the disk: number=" in line and line[-1].isdecimal() for line in lines)
    assert 30 < written < 90
    assert lines[-1].endswith("] there is room again")
    told = re.search(r"(\d+) lines of this log could not be written \(File too large\)", lines[-2])
    assert told is not None
    assert written - 1 <= 100 - int(told[1]) <= written, "one may have been cut off"


DYING = """
import os, sys
from expertd.protocol import logs
from expertd.protocol.config import read_config
from expertd.protocol.paths import Home

home = Home.current()
logs.set_up("daemon", home.daemon_log, home, read_config(home, log_size="64KiB", log_count=2))
log = logs.Log("expertd.daemon")
for number in range(2000):
    log.info("something of some length has happened here", number=number)
print("said without a log", file=sys.stderr, flush=True)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("death", "words"),
    [
        ("raise ValueError('the end')", "ended by an error in itself\n    Traceback (most recent call last):"),
        ("os.abort()", "Fatal Python error: Aborted"),
        ("import ctypes; ctypes.string_at(0)", "Fatal Python error: Segmentation fault"),
        (
            "import threading; threading.Thread(target=lambda: 1 / 0, name='reader').start()",
            "a thread ended by an error in itself: thread=reader\n    Traceback",
        ),
    ],
    ids=["exception", "abort", "segfault", "thread"],
)
def test_what_a_dying_interpreter_says_is_at_the_end_of_the_log_after_it_was_rotated(
    home: Home, death: str, words: str
) -> None:
    with home.daemon_log.open("ab") as theirs:
        subprocess.run([sys.executable, "-c", DYING, death], stdout=theirs, stderr=theirs, timeout=60)
    said = home.daemon_log.read_text()
    assert "number=1999\nsaid without a log\n" in said
    assert words in said
    assert said.count("number=1999") == 1, "stderr is the log, so it gets no copy"
    assert sorted(path.name for path in home.log.iterdir()) == ["daemon.log", "daemon.log.1"]


SAYS = """
import sys
from expertd.protocol import logs
from expertd.protocol.config import read_config
from expertd.protocol.paths import Home

home = Home.current()
logs.set_up(sys.argv[1], home.log / "said.log", home, read_config(home))
log = logs.Log("expertd.clients.gateway")
log.debug("a detail")
log.info("an event")
log.warning("a warning")
"""


@pytest.mark.parametrize(
    ("process", "environment", "console", "file"),
    [
        ("gateway", {}, ["expertd: a warning"], ["an event", "a warning"]),
        ("gateway", {"EXPERTD_LOG": "info"}, ["expertd: an event", "expertd: a warning"], ["an event", "a warning"]),
        ("gateway", {"EXPERTD_LOG": "error"}, [], []),
        ("daemon", {}, ["an event", "a warning"], ["an event", "a warning"]),
        ("daemon", {"EXPERTD_LOG": "debug"}, ["a detail"] * 0 + ["a detail", "an event", "a warning"],
         ["a detail", "an event", "a warning"]),
    ],
)  # fmt: skip
def test_a_gateway_s_terminal_has_warnings_and_its_file_events(
    home: Home, process: str, environment: dict[str, str], console: list[str], file: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAYS, process], env={**os.environ, **environment}, capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if line]
    assert [line if process == "gateway" else line.partition("] ")[2] for line in said] == console
    path = home.log / "said.log"
    lines = path.read_text().splitlines() if path.exists() else []
    assert [line.partition("] ")[2] for line in lines] == file


def test_a_format_that_is_asked_for_is_that_of_the_terminal_too(home: Home) -> None:
    home.config.write_text('[log]\nformat = "json"\n')
    done = subprocess.run([sys.executable, "-c", SAYS, "gateway"], capture_output=True, text=True)
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["a warning"]
    assert [json.loads(line)["event"] for line in (home.log / "said.log").read_text().splitlines()] == [
        "an event", "a warning"
    ]  # fmt: skip


def test_what_a_gateway_starts_logs_as_its_flags_say_and_else_finds_the_settings_itself() -> None:
    config = merge({"log_level": "debug", "log_size": "1MB"}, {"EXPERTD_LOG_COUNT": "7"}, {}, Path("/c"))
    assert logs.environment(config) == {"EXPERTD_LOG": "debug", "EXPERTD_LOG_SIZE": "1000000"}
    again = merge({}, logs.environment(config), {}, Path("/c"))
    assert (again.log_level.value, again.log_size.value) == ("debug", 1_000_000)


# -- logs of the dead --------------------------------------------------------------------------------------------------


def test_logs_of_the_dead_go_when_they_are_old_or_many() -> None:
    now = 1e9

    def file(kind: str, pid: int, age_s: float, suffix: str = "") -> Found:
        return Found(Path(f"{kind}-{pid}.log{suffix}"), kind, pid, now - age_s)

    alive = file("worker", 1, 10 * KEEP_S)
    old = [file("worker", 2, KEEP_S + 1), file("worker", 2, KEEP_S + 9, ".1")]
    written_lately = [file("worker", 3, 5), file("worker", 3, KEEP_S + 9, ".1")]
    many = [file("gateway", 100 + number, number) for number in range(KEEP_DEAD + 2)]
    gone = stale([alive, *old, *written_lately, *many], lambda pid: pid == 1, now)
    assert sorted(map(str, gone)) == ["gateway-110.log", "gateway-111.log", "worker-2.log", "worker-2.log.1"]


def test_whoever_starts_removes_them(home: Home) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    long_ago = time.time() - KEEP_S - 60
    for name in (f"worker-{ended.pid}.log", f"worker-{os.getpid()}.log", "worker-notes.log", "mine.txt"):
        (home.log / name).write_text("x")
        os.utime(home.log / name, (long_ago, long_ago))
    logs.remove_stale(home)
    assert sorted(path.name for path in home.log.iterdir()) == sorted(
        [f"worker-{os.getpid()}.log", "worker-notes.log", "mine.txt"]
    )


# -- daemons and gateways ----------------------------------------------------------------------------------------------


def said_by(home: Home, process: str) -> list[str]:
    """The words and facts of all that ``process`` has written, without numbers that differ from run to run."""
    found = []
    for path in sorted(home.log.glob(f"{process}*.log")):
        for line in path.read_text().splitlines():
            assert LINE.fullmatch(line), line
            words = line.partition("] ")[2]
            found.append(re.sub(r"(session|pid|worker|seconds|up_s)=[\d.]+", r"\1=N", words))
    return found


def test_a_daemon_writes_what_a_user_would_want_to_know(
    home: Home, start_daemon: StartDaemon, checkpoints: dict[str, Path]
) -> None:
    model = checkpoints["stacked"]
    start_daemon("64MiB")
    assert expertd("generate", str(model), "hello", "--max-tokens", "2").returncode == 0
    assert expertd("budget", "32MB").returncode == 0
    assert expertd("unload", "stacked").returncode == 0
    assert expertd("daemon", "stop").returncode == 0
    said = said_by(home, "daemon")
    assert re.fullmatch(r'the daemon is ready: version=\S+ budget="67.1 MB" home=\S+', said[0])
    assert re.fullmatch(r'base weights are shared: model=stacked size="\d+ kB" seconds=N', said[1])
    assert re.fullmatch(
        rf"model opened: model=stacked folder={model} size=\S+ \S+ pools=\d slots=\d+ blocks=\d+", said[2]
    )
    assert said[3:] == [
        "session opened: session=N pid=N model=stacked mode=shm",
        "session ended: session=N pid=N model=stacked seconds=N",
        'budget changed: before="67.1 MB" now="32.0 MB"',
        "model closed, its memory is free: model=stacked",
        'the daemon has ended: why="it was told to" up_s=N',
    ]


def test_a_daemon_whose_logs_are_removed_and_whose_settings_are_spoilt_works_on(
    home: Home, start_daemon: StartDaemon, checkpoints: dict[str, Path]
) -> None:
    start_daemon("64MiB")
    shutil.rmtree(home.log)
    home.config.write_text("nonsense")
    ask_status(home)
    assert expertd("budget", "32MB").returncode == 0
    assert said_by(home, "daemon") == ['budget changed: before="67.1 MB" now="32.0 MB"']


def test_the_last_words_of_a_daemon_that_fails_are_found_although_a_new_log_has_begun(home: Home) -> None:
    home.daemon_log.write_text("x" * 100_000 + "\n")
    (home.root / "run" / "lifeline.sock").mkdir()  # so it cannot come up
    (home.root / "run" / "lifeline.sock" / "in the way").touch()
    home.config.write_text('[log]\nsize = "64KiB"\n')
    with pytest.raises(DaemonStartFailed) as caught:
        connect_or_start(home, "test", budget="1MiB")
    assert "lifeline.sock" in caught.value.message
    assert home.daemon_log.with_name("daemon.log.1").exists()


SECRET = "xylophone"


def test_a_gateway_writes_each_request_and_never_a_word_of_it(own_home: Home, checkpoints: dict[str, Path]) -> None:
    with serving(own_home, checkpoints["stacked"], "--log-level", "debug") as served:
        own_home.config.write_text("nonsense")  # from here on nothing may depend on it
        ask = {"model": served.model, "max_tokens": 3, "messages": [{"role": "user", "content": SECRET}]}
        for body in (ask, ask | {"model": SECRET}, ask | {"max_tokens": SECRET}):
            served.request("POST", "/v1/chat/completions", json.dumps(body).encode())
        with served.client() as client:
            assert list(say(client, served, messages=ask["messages"], max_tokens=3, stream=True))
        with served.raw_chat(stream=True, max_tokens=ENDLESS) as leaves:
            assert leaves.recv(100)
        wait_for(lambda: 'ended="the client left"' in own_home.gateway_log(served.process.pid).read_text())
        served.request("GET", "/health/ready")
        worker = served.worker.pid
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: "is ready again" in served.errors())
        served.process.terminate()
        served.process.wait(DEADLINE_S)
    said = said_by(own_home, "gateway")
    requests = [line for line in said if line.startswith("request finished")]
    assert [re.sub(r"(prompt_tokens)=\d+", r"\1=N", line) for line in requests[:1]] == [
        "request finished: status=200 seconds=N model=stacked prompt_tokens=N tokens=3 reason=length"
    ]
    assert [line.split(":")[1].split()[0] for line in requests] == [
        "status=200", "status=404", "status=400", "status=200", "seconds=N"
    ]  # fmt: skip
    assert requests[1].endswith(" error=model_not_found")
    assert requests[3].endswith(" tokens=3 reason=length")
    assert requests[4].endswith(' ended="the client left"')
    assert "worker ended: model=stacked worker=N status=-9" in said
    assert said[-1] == "the gateway has ended"
    workers = said_by(own_home, "worker")
    assert sum(line.startswith("the worker is ready: model=stacked mode=shm") for line in workers) == 2
    assert any("the settings cannot be used" in line for line in workers)
    for path in own_home.log.iterdir():
        assert SECRET not in path.read_text()


# -- expertd logs ------------------------------------------------------------------------------------------------------


def line(second: int, words: str, process: str = "daemon") -> str:
    return f"2026-11-29 14:03:{second:02d}.000 INFO {process}[5] {words}"


def test_events_of_several_logs_are_shown_in_their_order(home: Home) -> None:
    home.daemon_log.with_name("daemon.log.1").write_text(f"{line(1, 'one')}\n    indented\n{line(3, 'three')}\n")
    home.daemon_log.write_text(f"said without a log\n{line(5, 'five')}\n")
    home.worker_log(7).write_text(f"{line(2, 'two', 'worker')}\n{line(6, 'six', 'worker')}\n")
    home.gateway_log(8).write_text(
        '{"time": "2026-11-29T14:03:04.000+00:00", "level": "INFO", "process": "gateway", "pid": 8, "event": "four"}\n'
    )
    shown = expertd("logs").stdout.splitlines()
    assert [text.split()[-1].rstrip('}').strip('"') for text in shown] == [
        "one", "indented", "two", "three", "log", "four", "five", "six"
    ]  # fmt: skip
    assert [text.split()[-1] for text in expertd("logs", "-n", "2", "--daemon").stdout.splitlines()] == [
        "three", "log", "five"
    ]  # fmt: skip
    assert expertd("logs", "--worker", "7", "-n", "1").stdout == f"{line(6, 'six', 'worker')}\n"
    assert len(expertd("logs", "--gateway", "--worker", "7").stdout.splitlines()) == 3
    found = [json.loads(text) for text in expertd("logs", "--json").stdout.splitlines()]
    assert [event["event"] for event in found] == ["one", "two", "three", "four", "five", "six"]
    assert found[0] == {
        "time": "2026-11-29T14:03:01.000", "level": "INFO", "process": "daemon", "pid": 5, "event": "one",
        "traceback": "indented",
    }  # fmt: skip


def test_facts_of_a_line_are_fields_again(home: Home) -> None:
    log = 'session opened: session=3 model=org/name part=0.25 ok=True why="two: \\"words\\"" empty="" version=0.1.0'
    home.daemon_log.write_text(f"{line(1, log)}\n{line(2, 'no facts: only words')}\n{line(3, 'why: not=')}\n")
    found = [json.loads(text) for text in expertd("logs", "--json").stdout.splitlines()]
    assert [(event["event"], event.get("facts")) for event in found] == [
        ("session opened", {"session": 3, "model": "org/name", "part": 0.25, "ok": True,
                            "why": 'two: "words"', "empty": "", "version": "0.1.0"}),
        ("no facts: only words", None),
        ("why: not=", None),
    ]  # fmt: skip


def test_a_line_fits_the_terminal_and_stays_whole_in_a_pipe(home: Home) -> None:
    long = line(1, "what happened: " + " ".join(f"fact{n}={n}" for n in range(30)))
    home.daemon_log.write_text(f"{long}\n    a traceback stays as it is: {'x' * 90}\n")
    assert expertd("logs").stdout.splitlines()[0] == long
    with Terminal("logs", columns=80) as terminal:
        assert terminal.ended() == 0
        *shown, last = terminal.text.splitlines()
    assert all(len(text) <= 80 for text in shown) and len(shown) > 3
    assert " ".join(text.strip() for text in shown) == long and last.endswith("x" * 90)


def test_where_nothing_is_written_logs_says_so(home: Home) -> None:
    done = expertd("logs", "--worker", "7")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"expertd: nothing is written in {home.log} of worker-7.log [internal]\n"


def test_what_has_no_time_belongs_to_the_event_before() -> None:
    found = list(events(["lost", line(1, "one"), "    a", "b", line(2, "two")]))
    assert found == [Event("", "lost"), Event("2026-11-29 14:03:01.000", ""), Event("2026-11-29 14:03:02.000", "")]
    assert [event.text for event in found] == ["lost", f"{line(1, 'one')}\n    a\nb", line(2, "two")]
    assert last([], 5) == [] == last([found], 0)


def test_following_goes_on_across_new_files_and_new_processes(home: Home) -> None:
    home.daemon_log.write_text(f"{line(1, 'one')}\n")
    with Tails(home.log, ["daemon.log", "worker-*.log"]) as tails:
        assert [event.text for event in last(tails.history(), 9)] == [line(1, "one")]
        assert tails.news() == []
        with home.daemon_log.open("a") as file:
            file.write(f"{line(2, 'two')}\n{line(3, 'thr')[:-3]}")
            file.flush()
            assert [event.text for event in tails.news()] == [line(2, "two")], "a line that is not whole has to wait"
            file.write("three\n")
        home.daemon_log.rename(home.daemon_log.with_name("daemon.log.1"))
        home.worker_log(7).write_text(f"{line(4, 'four', 'worker')}\n")
        home.daemon_log.write_text(f"{line(5, 'five')}\n")
        assert [event.text for event in tails.news()] == [line(3, "three"), line(4, "four", "worker"), line(5, "five")]


@contextmanager
def following(*options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "expertd.clients.cli", "logs", "-f", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_logs_f_shows_what_happens_until_ctrl_c(home: Home, start_daemon: StartDaemon) -> None:
    with following("-n", "0") as process:
        start_daemon("64MB")
        assert process.stdout is not None
        assert "the daemon is ready" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
