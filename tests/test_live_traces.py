"""``expertd trace start | stop``: the traffic of living, new, stopped and dead processes, with real daemons."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

import expertd as package
from expertd.daemon.tracing import Tracing
from expertd.protocol.connection import Connection
from expertd.protocol.errors import MessageInvalid, TraceInvalid
from expertd.protocol.messages import (
    AskStatus,
    Record,
    Recorded,
    StartTrace,
    Status,
    StopTrace,
    TraceStarted,
    TraceStopped,
)
from expertd.protocol.paths import Home
from expertd.protocol.traces import part_of, read_trace
from expertd.worker.verify import greedy
from tests.conftest import StartDaemon, wait_for
from tests.programs import Program
from tools.factory import write_checkpoint
from tools.stage import ask_status

PROMPT = 17
"""Tokens of the prompt of ``tests.programs``."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("live") / "small", "qwen3_moe")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "traces"
    made.mkdir()
    return made


def expertd(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def begin(folder: Path, sessions: int) -> None:
    """``expertd trace start``, with so many sessions now; return when each of them records."""
    done = expertd("trace", "start", "-o", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"recording into {folder} of {sessions} sessions, and those that come" in done.stdout
    wait_for(lambda: len(list(folder.glob("*.part"))) == sessions)


def trace_of(folder: Path, pid: int) -> Path:
    return folder / f"small-{pid}.npz"


def readable(path: Path) -> int:
    """How many tokens of a trace can be read now."""
    try:
        return read_trace(path).info.tokens
    except TraceInvalid:
        return 0


def assert_one_answer(path: Path, tokens: int) -> None:
    """The finished trace holds one sequence of ``tokens`` tokens."""
    found = read_trace(path)
    assert found.finished
    assert found.pos.tolist() == list(range(tokens))
    assert found.info.sequences == 1
    assert found.info.model == "small"


def answer(model: Any, prompt: Any) -> list[int]:
    """Four tokens; unlike what ``greedy`` leaves behind, nothing of it is still to be computed."""
    return [int(token) for token, _ in generate_step(prompt, model, max_tokens=4)]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing in the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# -- processes ---------------------------------------------------------------------------------------------------------


def test_the_traffic_of_every_process_is_recorded(
    model_path: Path, home: Home, folder: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    with Program(model_path) as idle, Program(model_path) as busy:
        before = busy.run(8)
        assert json.loads(expertd("status", "--json").stdout)["tracing"] == ""
        begin(folder, 2)
        assert json.loads(expertd("status", "--json").stdout)["tracing"] == str(folder)
        assert busy.run(8) == before
        with Program(model_path) as new:
            wait_for(part_of(trace_of(folder, new.pid)).exists)
            assert new.run(5) == before[:5]
            done = expertd("trace", "stop")
            assert (done.returncode, done.stderr) == (0, "")
            assert sorted(done.stdout.splitlines()) == sorted(
                [
                    f"{trace_of(folder, idle.pid)}: no traffic, no file",
                    f"{trace_of(folder, busy.pid)}: {PROMPT + 8} tokens",
                    f"{trace_of(folder, new.pid)}: {PROMPT + 5} tokens",
                ]
            )
            assert_one_answer(trace_of(folder, busy.pid), PROMPT + 8)
            assert_one_answer(trace_of(folder, new.pid), PROMPT + 5)
            one, other = read_trace(trace_of(folder, busy.pid)), read_trace(trace_of(folder, new.pid))
            assert np.array_equal(one.experts[: PROMPT + 5], other.experts)
            assert ask_status(home).tracing == ""
            assert new.run(8) == busy.run(8) == idle.run(8) == before
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_a_process_that_is_idle_has_all_its_tokens_recorded(
    family: str, tmp_path: Path, folder: Path, start_daemon: StartDaemon
) -> None:
    """Families whose routers return their choice only, so that nobody else evaluates their scores."""
    path = write_checkpoint(tmp_path / "small", family)
    start_daemon()
    with Program(path) as program:
        begin(folder, 1)
        program.run(8)
        done = expertd("trace", "stop")
    assert done.stdout == f"{trace_of(folder, program.pid)}: {PROMPT + 8} tokens\n"
    assert_one_answer(trace_of(folder, program.pid), PROMPT + 8)


def test_what_a_killed_process_has_recorded_can_be_recovered(
    model_path: Path, folder: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    with Program(model_path) as program:
        path = trace_of(folder, program.pid)
        begin(folder, 1)
        program.run(8)
        wait_for(lambda: readable(path) == PROMPT + 8)  # it is idle now, and has written all of it
        program.process.kill()
        program.process.wait()
    done = expertd("trace", "stop")
    assert done.returncode == 1
    assert done.stdout == f"{path}: its process ended first; 'expertd trace recover {path}' makes a trace of the rest\n"
    again = expertd("trace", "recover", str(path))
    assert (again.returncode, again.stderr) == (0, "")
    assert again.stdout.startswith(f"{path}: {PROMPT + 8} tokens (9 decoded) of 1 sequences, ")
    assert_one_answer(path, PROMPT + 8)
    once_more = expertd("trace", "recover", str(path))
    assert (once_more.returncode, once_more.stdout) == (2, "")
    assert once_more.stderr.endswith(" [trace_invalid]\n")
    assert_one_answer(path, PROMPT + 8)


def test_a_process_that_does_not_answer_is_named_and_finishes_later(
    model_path: Path, folder: Path, start_daemon: StartDaemon
) -> None:
    """Takes as long as a daemon waits (``TRACE_END_S``)."""
    start_daemon()
    with Program(model_path) as lame, Program(model_path) as sound:
        begin(folder, 2)
        lame.run(8)
        sound.run(4)
        with stopped(lame.pid):
            done = expertd("trace", "stop")
            assert done.returncode == 1
            assert sorted(done.stdout.splitlines()) == sorted(
                [
                    f"{trace_of(folder, sound.pid)}: {PROMPT + 4} tokens",
                    f"{trace_of(folder, lame.pid)}: its process does not answer; the file is finished when it does",
                ]
            )
        wait_for(trace_of(folder, lame.pid).exists)
        assert_one_answer(trace_of(folder, lame.pid), PROMPT + 8)
        assert len(lame.run(8)) == 8


def test_tracing_that_begins_while_another_ends_is_refused_or_whole(
    model_path: Path, folder: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    other = folder.with_name("other")
    other.mkdir()
    with Program(model_path) as lame, Program(model_path) as sound:
        begin(folder, 2)
        with stopped(lame.pid):
            command = [sys.executable, "-m", "expertd.clients.cli", "trace", "stop"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ending:
                wait_for(lambda: not part_of(trace_of(folder, sound.pid)).exists())  # no traffic, so no file
                started = expertd("trace", "start", "-o", str(other))
                if started.returncode:
                    assert started.stderr.endswith(" [daemon_busy]\n")
                else:
                    wait_for(part_of(trace_of(other, sound.pid)).exists)
                    sound.run(4)
        if started.returncode == 0:
            done = expertd("trace", "stop")
            assert f"{trace_of(other, sound.pid)}: {PROMPT + 4} tokens\n" in done.stdout
            assert_one_answer(trace_of(other, sound.pid), PROMPT + 4)
        assert ending.returncode is not None


def test_a_model_that_is_unloaded_has_its_trace(model_path: Path, folder: Path, start_daemon: StartDaemon) -> None:
    """Two sessions of one process, too: files of their own."""
    start_daemon()
    path = trace_of(folder, os.getpid())
    prompt = np.arange(3, 20)[None]
    first, second = package.load(model_path)[0], package.load(model_path)[0]
    begin(folder, 2)
    for model in (first, second):
        greedy(model, prompt, 4)
    package.unload(first)
    assert len(list(folder.glob("*.npz"))) == 1
    greedy(second, prompt, 4)
    package.unload(second)
    done = expertd("trace", "stop")
    assert (done.returncode, done.stderr) == (0, "")
    paths = [path, path.with_name(f"small-{os.getpid()}-2.npz")]
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{one}: {tokens} tokens" for one, tokens in zip(paths, (PROMPT + 4, 2 * (PROMPT + 4)), strict=True)
    )
    assert [read_trace(one).info.sequences for one in paths] == [1, 2]


@pytest.mark.parametrize("returns", [False, True], ids=["for good", "and returns"])
def test_a_trace_outlives_the_daemon(
    returns: bool, model_path: Path, home: Home, folder: Path, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon()
    prompt, path = mx.arange(3, 20), trace_of(folder, os.getpid())
    model = package.load(model_path)[0]
    wait_for(lambda: ask_status(home).models[0].resident_blocks == ask_status(home).models[0].blocks)
    before = answer(model, prompt)
    begin(folder, 1)
    assert answer(model, prompt) == before
    daemon.kill()
    daemon.wait()
    assert answer(model, prompt) == before
    if returns:  # what the last daemon has asked for ends; the new one knows nothing of it
        start_daemon()
        wait_for(lambda: path.exists())
        assert ask_status(home).tracing == ""
        assert readable(path) == 2 * (PROMPT + 4)
        assert answer(model, prompt) == before
        done = expertd("trace", "stop")
        assert (done.returncode, done.stdout) == (0, "nothing was recorded\n")
    package.unload(model)
    found = read_trace(path)
    assert (found.finished, found.info.tokens, found.info.sequences) == (True, 2 * (PROMPT + 4), 2)


def test_a_model_that_is_forgotten_has_its_trace(model_path: Path, folder: Path, start_daemon: StartDaemon) -> None:
    start_daemon()
    model = package.load(model_path)[0]
    begin(folder, 1)
    for _ in range(20):
        greedy(model, np.arange(3, 20)[None], 4)
    del model
    gc.collect()
    wait_for(trace_of(folder, os.getpid()).exists)
    assert read_trace(trace_of(folder, os.getpid())).info.tokens > 10 * (PROMPT + 4)


def test_a_recording_of_ones_own_is_not_lost_to_tracing(
    model_path: Path, tmp_path: Path, folder: Path, start_daemon: StartDaemon
) -> None:
    """Refused with a sentence, or whole; but not empty without a word."""
    start_daemon()
    prompts, out = tmp_path / "prompts.txt", tmp_path / "own.npz"
    prompts.write_text("hello\nyou there\n")
    begin(folder, 0)
    done = expertd("trace", "record", str(model_path), "--prompts", str(prompts), "-o", str(out), "--max-tokens", "40")
    expertd("trace", "stop")
    if done.returncode:
        assert done.stderr.startswith("expertd: ")
        assert "]\n" in done.stderr
    else:
        assert read_trace(out).info.sequences == 2


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_two_starts_are_refused_and_an_idle_stop_is_not(folder: Path, home: Home, start_daemon: StartDaemon) -> None:
    daemon = start_daemon()
    done = expertd("trace", "stop")
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing was recorded\n", "")
    begin(folder, 0)
    other = folder.with_name("other")
    other.mkdir()
    done = expertd("trace", "start", "-o", str(other))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"expertd: traces are being recorded in {folder}; end that with 'expertd trace stop' [daemon_busy]\n"
    )
    assert ask_status(home).tracing == str(folder)
    done = expertd("trace", "stop")
    assert (done.returncode, done.stdout) == (0, "nothing was recorded\n")
    begin(other, 0)
    assert ask_status(home).tracing == str(other)
    assert daemon.poll() is None


def test_a_folder_that_is_none_is_refused(folder: Path, home: Home, start_daemon: StartDaemon) -> None:
    start_daemon()
    (folder / "file").write_text("")
    for wrong in (folder / "nowhere", folder / "file"):
        done = expertd("trace", "start", "-o", str(wrong))
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{wrong} is no folder; create it first" in done.stderr
    assert ask_status(home).tracing == ""


def test_without_a_daemon_there_is_nothing_to_trace(folder: Path, home: Home) -> None:
    for arguments in (["start", "-o", str(folder)], ["stop"]):
        done = expertd("trace", *arguments)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.endswith(" [daemon_not_running]\n")
        assert str(home.root) in done.stderr


def test_a_folder_that_goes_is_told_and_disturbs_nobody(
    model_path: Path, folder: Path, start_daemon: StartDaemon
) -> None:
    start_daemon()
    with Program(model_path) as program:
        path = trace_of(folder, program.pid)
        before = program.run(8)
        with stopped(program.pid):
            assert expertd("trace", "start", "-o", str(folder)).returncode == 0
            folder.rmdir()
        assert program.run(8) == before
        done = expertd("trace", "stop")
        assert done.returncode == 1
        assert done.stdout == f"{path}: there is no folder {folder} to write {path.name} into; create it first\n"
        folder.mkdir()
        begin(folder, 1)
        assert program.run(8) == before
        assert expertd("trace", "stop").stdout == f"{path}: {PROMPT + 8} tokens\n"


def test_an_earlier_trace_of_a_process_is_kept(model_path: Path, folder: Path, start_daemon: StartDaemon) -> None:
    """The next ones into the same folder get names of their own."""
    start_daemon()
    with Program(model_path) as program:
        path = trace_of(folder, program.pid)
        begin(folder, 1)
        before = program.run(8)
        assert expertd("trace", "stop").stdout == f"{path}: {PROMPT + 8} tokens\n"
        for number in (2, 3):
            assert expertd("trace", "start", "-o", str(folder)).returncode == 0
            assert program.run(8) == before
            another = path.with_name(f"{path.stem}-{number}.npz")
            assert expertd("trace", "stop").stdout == f"{another}: {PROMPT + 8} tokens\n"
            assert_one_answer(another, PROMPT + 8)
        assert_one_answer(path, PROMPT + 8)


@pytest.mark.parametrize("name", ["x" * 3000, "y" * 255])
def test_a_folder_that_cannot_be_disturbs_nobody(
    name: str, model_path: Path, folder: Path, home: Home, start_daemon: StartDaemon
) -> None:
    """Whatever a client asks for: the daemon and the process go on, and the answer says what is wrong."""
    daemon = start_daemon()
    with Program(model_path) as program, Connection(home.daemon_socket, "test") as connection:
        before = program.run(8)
        assert connection.ask(StartTrace(folder=f"{folder}/{name}"), TraceStarted).sessions == 1
        assert program.run(8) == before
        (ended,) = connection.ask(StopTrace(), TraceStopped).ended
        assert ended.error
    assert daemon.poll() is None


@pytest.mark.parametrize("name", ["", "relative/folder", "/with\0nothing"])
def test_a_path_that_is_no_folders_is_refused(name: str, home: Home, start_daemon: StartDaemon) -> None:
    start_daemon()
    with Connection(home.daemon_socket, "test") as connection:
        with pytest.raises(MessageInvalid, match="absolute path"):
            connection.ask(StartTrace(folder=name), TraceStarted)
        assert connection.ask(AskStatus(), Status).tracing == ""


# -- the books of the daemon -------------------------------------------------------------------------------------------


def test_nobody_is_recorded_before_tracing_starts() -> None:
    tracing = Tracing()
    assert tracing.begin(1, 7, "m") is None
    assert (tracing.folder, tracing.waiting, tracing.stop()) == (None, False, [])
    assert (tracing.report().ended, tracing.report().unfinished) == ([], [])


def test_each_session_gets_a_file_of_its_own() -> None:
    tracing = Tracing()
    tracing.start(Path("/t"))
    asked = [(1, 7, "m"), (2, 7, "m"), (3, 8, "m"), (4, 7, "n"), (5, 7, "m")]
    paths = ["/t/m-7.npz", "/t/m-7-2.npz", "/t/m-8.npz", "/t/n-7.npz", "/t/m-7-3.npz"]
    assert [tracing.begin(*each) for each in asked] == [
        Record(session=session, path=path) for (session, _, _), path in zip(asked, paths, strict=True)
    ]
    assert tracing.begin(3, 8, "m") is None  # it records already
    tracing.recorded(Recorded(session=1, path=paths[0], tokens=3))
    assert tracing.begin(6, 7, "m") == Record(session=6, path="/t/m-7-4.npz")  # no name is used twice
    assert tracing.stop() == [Record(session=session, path="") for session in (1, 2, 3, 4, 5, 6)]


def test_the_report_names_what_ended_and_what_did_not() -> None:
    tracing = Tracing()
    tracing.start(Path("/t"))
    for session in (1, 2, 3, 4):
        tracing.begin(session, session, "m")
    first = Recorded(session=1, path="/t/m-1.npz", tokens=5)
    tracing.recorded(first)
    tracing.recorded(first)  # once is enough
    tracing.recorded(Recorded(session=2, path="/t/other.npz", tokens=5))  # of an earlier recording
    tracing.recorded(Recorded(session=9, path="/t/m-9.npz", tokens=5))  # nobody has asked for it
    tracing.gone(3)
    tracing.gone(1)
    tracing.gone(9)
    waiting = [tracing.waiting]
    assert tracing.stop() == [Record(session=2, path=""), Record(session=4, path="")]
    waiting.append(tracing.waiting)
    second = Recorded(session=2, path="/t/m-2.npz", tokens=0)
    tracing.recorded(second)
    waiting.append(tracing.waiting)
    report = tracing.report()
    killed = Recorded(session=3, path="/t/m-3.npz", tokens=0, error="its process ended first")
    assert report.ended == [first, killed, second]
    assert report.unfinished == ["/t/m-4.npz"]
    assert [*waiting, tracing.waiting] == [False, True, True, False]
    tracing.recorded(Recorded(session=4, path="/t/m-4.npz", tokens=8))  # too late to be told
    assert tracing.report().ended == []


def test_a_new_start_begins_from_nothing() -> None:
    tracing = Tracing()
    for folder in ("/t", "/u"):
        tracing.start(Path(folder))
        assert tracing.begin(1, 7, "m") == Record(session=1, path=f"{folder}/m-7.npz")
        tracing.gone(1)
        assert tracing.stop() == []
        assert [ended.path for ended in tracing.report().ended] == [f"{folder}/m-7.npz"]
