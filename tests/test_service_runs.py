"""What was installed, really run: the daemon from its property list and its unit, and a systemd that keeps it."""

from __future__ import annotations

import json
import os
import plistlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from expertd.launchd.agent import daemon_agent, home_key
from expertd.launchd.launchd import Launchd
from expertd.launchd.systemd import Systemd
from expertd.protocol.paths import Home, lasting
from expertd.protocol.quick_deaths import MOST, read_starts
from expertd.protocol.rendezvous import lock_holder
from tests.conftest import DEADLINE_S, StartDaemon, answers, wait_for
from tests.service_stage import user_manager_answers
from tests.service_stand_in import run_agent, run_unit, runs


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """``process``, which has ended afterwards."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def from_plist(home: Home) -> subprocess.Popen[bytes]:
    agent = daemon_agent(home, lasting(sys.executable), os.environ)
    keys = plistlib.loads(Launchd(os.getuid(), home.root).render(agent))
    assert keys["StandardOutPath"] == keys["StandardErrorPath"]
    return run_agent(
        keys["ProgramArguments"], keys["EnvironmentVariables"], keys["StandardErrorPath"], keys["WorkingDirectory"]
    )


def from_unit(home: Home) -> subprocess.Popen[bytes]:
    agent = daemon_agent(home, lasting(sys.executable), os.environ)
    unit = home.root / "unit"
    unit.write_bytes(Systemd(home.root).render(agent))
    return run_unit(unit)


Start = Callable[[Home], subprocess.Popen[bytes]]


@pytest.mark.parametrize("start", [from_plist, from_unit])
def test_what_is_written_down_runs_and_ends_in_order(home: Home, start: Start) -> None:
    home.config.write_text('budget = "64MiB"\n')
    with ended(start(home)) as process:
        wait_for(lambda: answers(home))
        assert lock_holder(home) == process.pid
        if sys.platform == "linux":
            environment = psutil.Process(process.pid).environ()
            assert set(environment) - {"LC_CTYPE"} == {"HOME", "PATH", "EXPERTD_HOME"}
        assert len(read_starts(home, "daemon").times) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert 'the daemon is ready: version=0.1.0 budget="67.1 MB"' in home.daemon_log.read_text()
    assert not list(home.run.glob("*.sock"))
    assert read_starts(home, "daemon").times == ()


def test_the_service_s_daemon_waits_for_its_turn_and_can_be_ended_meanwhile(
    home: Home, start_daemon: StartDaemon
) -> None:
    stranger = start_daemon()
    sentence = f"expertd: the daemon (process {stranger.pid}) has {home.root}; the service's daemon begins when it ends"
    with ended(from_plist(home)) as process:
        wait_for(lambda: sentence in home.daemon_log.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    assert stranger.poll() is None
    with ended(from_plist(home)) as process:
        wait_for(lambda: home.daemon_log.read_text().count(sentence) == 2)
        stranger.terminate()
        wait_for(lambda: lock_holder(home) == process.pid)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_a_daemon_with_an_error_in_itself_ends_badly_so_that_it_is_started_again(home: Home) -> None:
    code = (
        "import sys; from expertd.daemon.server import Server\n"
        "async def broken(self): raise RuntimeError('broken')\n"
        "Server._watch_memory = broken\n"
        "from expertd.daemon.__main__ import main; sys.argv = ['x', '--budget', '1MiB']; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RuntimeError: broken" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "expertd: the daemon ended by an error in itself; the lines above say where [internal]"
    )
    assert not list(home.run.glob("*.sock"))


def test_a_gateway_that_cannot_start_is_given_up_too(home: Home) -> None:
    command = [sys.executable, "-m", "expertd.clients.cli", "serve", "/nowhere", "--service"]
    tries = [subprocess.run(command, capture_output=True, text=True) for _ in range(MOST + 1)]
    assert [one.returncode for one in tries] == [2] * MOST + [0]
    assert tries[-1].stderr == (
        f"expertd: the service's gateway has died {MOST} times in a row, each time within 60 s, and is not started any "
        "more; 'expertd service logs --gateway' says why; start it again with: expertd service start\n"
    )


# -- a real systemd ----------------------------------------------------------------------------------------------------


class Real:
    """``expertd`` and ``systemctl`` as the user of a real manager calls them."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.unit = f"expertd-daemon-{home_key(home, os.environ)}.service"

    def expertd(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "expertd.clients.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=90)

    def systemctl(self, *words: str) -> str:
        command = ["systemctl", "--user", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=90).stdout

    def pid(self) -> int:
        return int(json.loads(self.expertd("service", "status", "--json").stdout)["agents"][0]["pid"] or 0)


@pytest.fixture
def real(home: Home) -> Iterator[Real]:
    """The user's own manager, with a unit whose name is this home's alone; it is taken away afterwards."""
    if not user_manager_answers():
        pytest.skip("no systemd user manager answers here (systemctl --user)")
    home.config.write_text('budget = "64MiB"\n')
    made = Real(home)
    try:
        yield made
    finally:
        made.expertd("service", "uninstall")


def test_systemd_takes_the_unit_as_it_is_meant(real: Real) -> None:
    done = real.expertd("service", "install")
    assert done.returncode == 0, done.stderr
    wanted = ("Type", "Restart", "RestartUSec", "TimeoutStopUSec", "KillMode", "LimitNOFILESoft", "WorkingDirectory")
    shown = dict(line.split("=", 1) for line in real.systemctl("show", real.unit, "-p", ",".join(wanted)).splitlines())
    assert shown == {
        "Type": "exec", "Restart": "on-failure", "RestartUSec": "2s", "TimeoutStopUSec": "1min 30s",
        "KillMode": "mixed", "LimitNOFILESoft": "10240", "WorkingDirectory": "/",
    }  # fmt: skip
    assert lock_holder(real.home) == real.pid() == int(real.systemctl("show", real.unit, "-p", "MainPID", "--value"))
    warnings = [line for line in real.systemctl("status", real.unit).splitlines() if "ignoring" in line]
    assert warnings == []


def test_systemd_brings_a_killed_daemon_back_and_leaves_nothing_in_the_end(real: Real) -> None:
    assert real.expertd("service", "install").returncode == 0
    first = real.pid()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: lock_holder(real.home) not in (None, 0, first) and answers(real.home))
    second = real.pid()
    assert second not in (0, first)
    assert real.expertd("daemon", "stop").returncode == 0
    assert real.pid() == 0, "what ends in order is not started again"
    assert real.expertd("service", "start").returncode == 0
    third = real.pid()
    assert real.expertd("service", "uninstall").returncode == 0
    assert not runs(third)
    assert real.unit not in real.systemctl("list-units", "--all")
    assert real.unit not in real.systemctl("list-unit-files")
    assert sorted(path.name for path in real.home.root.rglob("*") if path.is_file()) == [
        "config.toml", "daemon.lock", "daemon.log",
    ]  # fmt: skip


def test_systemd_does_not_start_for_ever_what_dies_at_once(real: Real) -> None:
    assert real.expertd("service", "install").returncode == 0
    assert real.expertd("daemon", "stop").returncode == 0
    real.home.config.write_text("policy = 1\n")
    real.systemctl("start", real.unit)
    wait_for(lambda: read_starts(real.home, "daemon").refused_at is not None)
    wait_for(lambda: "ActiveState=inactive" in real.systemctl("show", real.unit, "-p", "ActiveState"))
    assert len(re.findall(r"1 is not a policy", real.home.daemon_log.read_text())) == MOST
    told = real.expertd("service", "status")
    assert told.returncode == 3
    assert f"has died {MOST} times in a row" in told.stdout
    real.home.config.unlink()
    assert real.expertd("service", "start").returncode == 0
    assert lock_holder(real.home) == real.pid()
