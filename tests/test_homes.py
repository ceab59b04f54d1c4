"""Who may use a home, and how its daemon is found, started and ended: real folders, locks and processes."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from expertd.daemon.__main__ import OPEN_FILES
from expertd.protocol.errors import DaemonNotRunning, DaemonStartFailed, HomeError
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect_or_start, stop_daemon
from tests.conftest import DEADLINE_S, StartDaemon

CONNECT = """
import json, sys, time
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect_or_start
print("waiting", flush=True)
sys.stdin.readline()
began = time.monotonic()
connection, started = connect_or_start(
    Home.current(), "test", budget="1MiB", announce=lambda line: print(line, file=sys.stderr)
)
took_s = time.monotonic() - began
print(json.dumps({"pid": connection.daemon.pid, "started": started, "took_s": took_s}), flush=True)
sys.stdin.readline()
"""
"""Connects or starts when told by a line on standard input, says what came of it, and stays for another line."""


@contextmanager
def python(code: str, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that runs ``code``, killed in the end, and before if it lasts so long that a test must be stuck."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        watchdog = threading.Timer(3 * DEADLINE_S, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def hear(process: subprocess.Popen[str]) -> str:
    """The next line that a process says."""
    assert process.stdout is not None
    return process.stdout.readline()


def tell(process: subprocess.Popen[str]) -> None:
    """Let a process go on that waits for a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def eventually(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {DEADLINE_S:.0f} s"
        time.sleep(0.02)


def expertd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


# -- who may use a home ------------------------------------------------------------------------------------------------

FOLDERS = ["", "run", "log"]


def everything(home: Home) -> list[tuple[str, int, int, int]]:
    """All that lies in a home, with modes, owners and times of change."""
    found = [home.root, *sorted(home.root.rglob("*"))]
    status = [path.lstat() for path in found]
    return [(str(path), s.st_mode, s.st_uid, s.st_ctime_ns) for path, s in zip(found, status, strict=True)]


@pytest.mark.parametrize("mode", [0o770, 0o720, 0o707, 0o1777])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_others_may_write_is_refused_and_left_alone(home: Home, name: str, mode: int) -> None:
    folder = home.root / name
    folder.chmod(mode)
    before = everything(home)
    with pytest.raises(HomeError) as caught:
        home.prepare()
    assert caught.value.message == (
        f"{folder} can be written by other users; change that with: chmod go-w {folder}, "
        "or set EXPERTD_HOME to another folder"
    )
    assert caught.value.code == "home_invalid"
    assert everything(home) == before


def test_what_the_sentence_says_helps(home: Home) -> None:
    home.root.chmod(0o777)
    with pytest.raises(HomeError) as caught:
        home.check()
    command = caught.value.message.partition("with: ")[2].partition(", or")[0]
    subprocess.run(command, shell=True, check=True)
    home.prepare()


def test_nothing_is_created_in_a_folder_that_others_may_write(home: Home) -> None:
    fresh = Home(home.root / "fresh")
    fresh.root.mkdir()
    fresh.root.chmod(0o777)
    with pytest.raises(HomeError):
        fresh.prepare()
    assert list(fresh.root.iterdir()) == []


def give_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``folder`` somebody else's; who may not do that becomes somebody else."""
    if os.geteuid() == 0:
        os.chown(folder, 65534, -1)
    else:
        other = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: other)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_somebody_else_is_refused_and_left_alone(
    home: Home, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_away(home.root / name, monkeypatch)
    before = everything(home)
    with pytest.raises(HomeError, match="belongs to another user; set EXPERTD_HOME to a folder of your own") as caught:
        home.prepare()
    assert caught.value.message.startswith(str(home.root / name) if os.geteuid() == 0 else str(home.root))
    assert everything(home) == before


def test_a_home_may_be_a_link_to_a_folder_of_ones_own(home: Home) -> None:
    link = Home(home.root / "link")
    link.root.symlink_to(home.root / "real")
    (home.root / "real").mkdir()
    link.prepare()
    assert stat.S_IMODE((home.root / "real" / "run").stat().st_mode) == 0o700


def test_a_run_folder_that_leads_to_somebody_else_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = home.root / "elsewhere"
    elsewhere.mkdir()
    give_away(elsewhere, monkeypatch)
    home.run.rmdir()
    home.run.symlink_to(elsewhere)
    with pytest.raises(HomeError, match="belongs to another user"):
        home.prepare()
    assert list(elsewhere.iterdir()) == []


def test_a_link_to_nowhere_is_refused(home: Home) -> None:
    home.run.rmdir()
    home.run.symlink_to(home.root / "nowhere")
    with pytest.raises(HomeError, match="cannot be used"):
        home.prepare()


@pytest.mark.parametrize("command", ["status", "budget", "daemon stop", "daemon run", "serve"])
def test_every_command_refuses_a_home_that_others_may_write(
    command: str, home: Home, checkpoints: dict[str, Path]
) -> None:
    home.run.chmod(0o777)
    before = everything(home)
    options = [str(checkpoints["stacked"]), "--port", "0"] if command == "serve" else []
    done = expertd(*command.split(), *options)
    assert (done.returncode, done.stdout) == (HomeError.exit_status, "")
    assert done.stderr.startswith(f"expertd: {home.run} can be written by other users; ")
    assert done.stderr.endswith(" [home_invalid]\n")
    assert everything(home) == before


def test_what_a_daemon_opens_is_private(home: Home, start_daemon: StartDaemon) -> None:
    before = os.umask(0)
    try:
        start_daemon()
    finally:
        os.umask(before)
    assert stat.S_IMODE(home.run.stat().st_mode) == 0o700
    sockets = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.run.glob("*.sock")}
    assert sockets == {"daemon.sock": 0o600, "lifeline.sock": 0o600}


# -- one daemon, however many ask --------------------------------------------------------------------------------------


def ready_daemons(home: Home) -> int:
    """How many daemons have ever come up."""
    return home.daemon_log.read_text(encoding="utf-8").count("is ready")


def test_when_a_daemon_dies_all_who_used_it_start_just_one(own_home: Home, start_daemon: StartDaemon) -> None:
    killed = start_daemon()
    killed.kill()
    killed.wait(DEADLINE_S)
    assert own_home.daemon_socket.exists()
    with ExitStack() as stack:
        askers = [stack.enter_context(python(CONNECT)) for _ in range(6)]
        for asker in askers:
            assert hear(asker) == "waiting\n"
        for asker in askers:
            tell(asker)
        answers = [json.loads(hear(asker)) for asker in askers]
    assert ready_daemons(own_home) == 2
    assert "already runs" not in own_home.daemon_log.read_text(encoding="utf-8")
    assert len({answer["pid"] for answer in answers}) == 1
    assert sorted(answer["started"] for answer in answers) == [False] * 5 + [True]
    print(f"six at once: the last was connected after {max(answer['took_s'] for answer in answers):.2f} s")


def test_a_start_announces_the_daemon_and_gives_up_its_turn(own_home: Home) -> None:
    with python(CONNECT) as asker:
        assert hear(asker) == "waiting\n"
        tell(asker)
        answer = json.loads(hear(asker))
        # Its turn is over although it lives, and the daemon has not inherited it.
        with own_home.start_lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        tell(asker)
        said = asker.communicate(timeout=DEADLINE_S)[1]
    assert answer["started"]
    assert said == (
        f"started a daemon (process {answer['pid']}); it ends after 15 idle minutes, or with: expertd daemon stop\n"
    )
    print(f"one: connected after {answer['took_s']:.2f} s")


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(sys.argv[2] if len(sys.argv) > 2 else str(os.getpid()))
file.flush()
print("held", flush=True)
time.sleep(600)
"""
"""Holds a lock, with a process id in it, until it is killed."""


def is_held(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_has_to_wait_for_another_starts_nothing(home: Home) -> None:
    with python(HOLD, str(home.start_lock)) as starter:
        assert hear(starter) == "held\n"
        with pytest.raises(DaemonStartFailed, match=r"another process started no daemon in .* try again"):
            connect_or_start(home, "test", start_s=0.5)
    assert not home.daemon_log.exists()


def test_when_the_starter_is_killed_the_next_one_starts(own_home: Home) -> None:
    with python(HOLD, str(own_home.start_lock)) as starter, python(CONNECT) as asker:
        assert hear(starter) == "held\n"
        assert hear(asker) == "waiting\n"
        tell(asker)
        starter.kill()
        assert json.loads(hear(asker))["started"]


def test_a_start_waits_for_a_daemon_that_is_on_its_way_out(own_home: Home) -> None:
    with python(HOLD, str(own_home.daemon_lock)) as ending, python(CONNECT) as asker:
        assert hear(ending) == "held\n"
        assert hear(asker) == "waiting\n"
        tell(asker)
        eventually(lambda: is_held(own_home.start_lock), "the start")
        ending.kill()
        assert json.loads(hear(asker))["started"]
    assert "already runs" not in own_home.daemon_log.read_text(encoding="utf-8")


def test_a_daemon_that_hangs_is_named(home: Home) -> None:
    with python(HOLD, str(home.daemon_lock)) as hanging:
        assert hear(hanging) == "held\n"
        with pytest.raises(DaemonStartFailed) as caught:
            connect_or_start(home, "test", start_s=0.5)
    assert caught.value.message == (
        f"the daemon in {home.root} (process {hanging.pid}) neither answers nor ends; end it with: expertd daemon stop"
    )


def test_a_daemon_that_cannot_start_says_why_and_blocks_nobody(own_home: Home) -> None:
    with pytest.raises(DaemonStartFailed, match=r"did not come up \(expertd: 'much' is not .*\[size_invalid\]\)"):
        connect_or_start(own_home, "test", budget="much")
    assert not is_held(own_home.start_lock)


# -- ending what does not answer ---------------------------------------------------------------------------------------


def test_stop_ends_a_daemon_that_does_not_answer(home: Home) -> None:
    with python(HOLD, str(home.daemon_lock)) as hanging:
        assert hear(hanging) == "held\n"
        done = expertd("daemon", "stop")
        assert (done.returncode, done.stdout) == (0, f"stopped the daemon (process {hanging.pid})\n")
        assert hanging.wait(DEADLINE_S) == -signal.SIGTERM


def test_stop_names_the_last_means_against_a_daemon_that_does_not_end(home: Home) -> None:
    with python("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + HOLD, str(home.daemon_lock)) as deaf:
        assert hear(deaf) == "held\n"
        done = expertd("daemon", "stop", "--timeout", "0.5")
        assert done.returncode == 3
        assert f"process {deaf.pid}" in done.stderr
        assert done.stderr.endswith(f"end it with: kill -KILL {deaf.pid} [daemon_lost]\n")


@pytest.mark.parametrize("held", [False, True])
def test_stop_never_ends_a_process_that_does_not_hold_the_lock(home: Home, held: bool) -> None:
    with python("input()") as stranger:
        if held:
            with python(HOLD, str(home.daemon_lock), str(stranger.pid)) as holder:
                assert hear(holder) == "held\n"
                with pytest.raises(DaemonNotRunning):
                    stop_daemon(home, "test")
                assert holder.poll() is None
        else:
            home.daemon_lock.write_text(str(stranger.pid))
            with pytest.raises(DaemonNotRunning):
                stop_daemon(home, "test")
        assert stranger.poll() is None


# -- what a daemon may open --------------------------------------------------------------------------------------------

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sys.argv = ["expertd.daemon", "--budget", "1MiB"]
runpy.run_module("expertd.daemon", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads another process's limits")
def test_a_daemon_raises_its_limit_of_open_files(own_home: Home) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    raised = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    with python(LIMITED) as daemon:
        eventually(own_home.daemon_socket.exists, "the start")
        assert psutil.Process(daemon.pid).rlimit(psutil.RLIMIT_NOFILE) == (raised, hard)
