"""What is handed to launchd and systemd: one description, written down in both their words.  Nothing runs here."""

from __future__ import annotations

import os
import plistlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.launchd.agent import Agent, daemon_agent, gateway_agent, home_key
from expertd.launchd.launchd import Launchd
from expertd.launchd.manager import Found
from expertd.launchd.systemd import Systemd
from expertd.protocol.errors import DaemonStartFailed
from expertd.protocol.model_names import hub_cache
from expertd.protocol.paths import Home, lasting
from expertd.protocol.quick_deaths import MOST, QUICK_S, REST_S, Starts
from expertd.protocol.rendezvous import connect_or_start
from expertd.protocol.service import Gateway

PYTHON = "/opt/expertd/bin/python"
PLAIN = Home(Path("/Users/me/.expertd"))
USER = {"HOME": "/Users/me", "SHELL": "/bin/zsh", "EXPERTD_BUDGET": "1GiB"}
LAUNCHD = Launchd(501, Path("/Users/me/Library/LaunchAgents"))
SYSTEMD = Systemd(Path("/home/me/.config/systemd/user"))


def test_the_daemon_s_property_list_has_these_keys_and_no_others() -> None:
    agent = daemon_agent(PLAIN, PYTHON, USER)
    assert LAUNCHD.file(agent) == Path("/Users/me/Library/LaunchAgents/expertd.daemon.plist")
    assert plistlib.loads(LAUNCHD.render(agent)) == {
        "Label": "expertd.daemon",
        "ProgramArguments": [PYTHON, "-m", "expertd.daemon", "--service"],
        "WorkingDirectory": "/",
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 10,
        "ExitTimeOut": 90,
        "ProcessType": "Interactive",
        "StandardOutPath": "/Users/me/.expertd/log/daemon.log",
        "StandardErrorPath": "/Users/me/.expertd/log/daemon.log",
        "SoftResourceLimits": {"NumberOfFiles": 10_240},
        "HardResourceLimits": {"NumberOfFiles": 65_536},
    }


def test_the_gateway_s_property_list_differs_in_what_it_runs() -> None:
    daemon = plistlib.loads(LAUNCHD.render(daemon_agent(PLAIN, PYTHON, USER)))
    agent = gateway_agent(PLAIN, PYTHON, USER, Gateway(("/models/Qwen",), "::1", 9000))
    gateway = plistlib.loads(LAUNCHD.render(agent))
    assert {key for key in gateway if gateway[key] != daemon[key]} == {
        "Label", "ProgramArguments", "StandardOutPath", "StandardErrorPath",
    }  # fmt: skip
    assert gateway["Label"] == "expertd.gateway"
    assert gateway["ProgramArguments"] == [
        PYTHON, "-m", "expertd.clients.cli", "serve", "/models/Qwen", "--host", "::1", "--port", "9000", "--service",
    ]  # fmt: skip
    assert gateway["StandardErrorPath"] == gateway["StandardOutPath"] == "/Users/me/.expertd/log/service-gateway.log"


@pytest.mark.parametrize("key", ["LowPriorityIO", "LowPriorityBackgroundIO", "Nice"])
def test_nothing_slows_its_reads_down(key: str) -> None:
    keys = plistlib.loads(LAUNCHD.render(daemon_agent(PLAIN, PYTHON, USER)))
    assert key not in keys
    assert keys["ProcessType"] not in ("Background", "Standard", "Adaptive")
    unit = SYSTEMD.render(daemon_agent(PLAIN, PYTHON, USER)).decode()
    assert not [word for word in ("Nice=", "IOScheduling", "CPUSchedulingPolicy", "IOWeight") if word in unit]


def test_the_unit_means_the_same() -> None:
    agent = daemon_agent(PLAIN, PYTHON, USER)
    assert SYSTEMD.file(agent) == Path("/home/me/.config/systemd/user/expertd-daemon.service")
    assert SYSTEMD.render(agent).decode() == """\
[Unit]
Description=expertd: cache of Mixture-of-Experts weights
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart="/opt/expertd/bin/python" "-m" "expertd.daemon" "--service"
WorkingDirectory=/
Restart=on-failure
RestartSec=2
TimeoutStopSec=90
KillMode=mixed
LimitNOFILE=10240:65536
StandardOutput=append:/Users/me/.expertd/log/daemon.log
StandardError=append:/Users/me/.expertd/log/daemon.log

[Install]
WantedBy=default.target
"""


def test_what_the_shell_says_of_the_home_and_the_hub_goes_along() -> None:
    home = Home(Path("/Volumes/fast/expertd"))
    shell = USER | {"EXPERTD_HOME": "/Volumes/fast/expertd", "HF_HOME": "~/hub", "HF_HUB_CACHE": ""}
    agent = daemon_agent(home, PYTHON, shell)
    expected = {"EXPERTD_HOME": "/Volumes/fast/expertd", "HF_HUB_CACHE": f"{USER['HOME']}/hub/hub"}
    assert plistlib.loads(LAUNCHD.render(agent))["EnvironmentVariables"] == expected
    lines = SYSTEMD.render(agent).decode().splitlines()
    assert [line for line in lines if line.startswith("Environment=")] == [
        f'Environment="{name}={value}"' for name, value in expected.items()
    ]


def test_where_the_hub_s_cache_is_in_its_place_nothing_is_written_of_it() -> None:
    shell = USER | {"XDG_CACHE_HOME": f"{USER['HOME']}/.cache"}
    assert daemon_agent(PLAIN, PYTHON, shell).environment == {}


def test_two_homes_have_agents_of_their_own() -> None:
    one, other = Home(Path("/tmp/one")), Home(Path("/tmp/other"))
    labels = {LAUNCHD.label(daemon_agent(home, PYTHON, USER)) for home in (PLAIN, one, other)}
    assert len(labels) == 3
    assert "expertd.daemon" in labels
    assert home_key(PLAIN, USER) == ""
    assert SYSTEMD.label(daemon_agent(one, PYTHON, USER)) == f"expertd-daemon-{home_key(one, USER)}.service"


@pytest.mark.parametrize("text", ["a b", 'a"b', "a\\b", "100%h", "$HOME and ${HOME}", "ä", "a'b"])
def test_any_path_survives_both_forms(text: str) -> None:
    home = Home(Path("/tmp") / text)
    shell = USER | {"EXPERTD_HOME": str(home.root)}
    agent = gateway_agent(home, f"/opt/{text}/python", shell, Gateway((f"/models/{text}",), "localhost", 1))
    keys = plistlib.loads(LAUNCHD.render(agent))
    assert keys["ProgramArguments"] == list(agent.arguments)
    assert keys["EnvironmentVariables"] == {"EXPERTD_HOME": str(home.root)}
    lines = dict(line.split("=", 1) for line in SYSTEMD.render(agent).decode().splitlines() if "=" in line)
    words = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(lines["ExecStart"])]
    assert words == list(agent.arguments)
    (variable,) = shlex.split(lines["Environment"])
    assert variable.replace("%%", "%") == f"EXPERTD_HOME={home.root}"
    assert lines["StandardError"].replace("%%", "%") == f"append:{home.service_gateway_log}"


@pytest.mark.parametrize(
    "shell",
    [{}, {"HF_HOME": "/big"}, {"HF_HUB_CACHE": "~/hub", "HF_HOME": "/big"}, {"XDG_CACHE_HOME": "/c"},
     {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/big"}, {"HF_HOME": "$DISK/hf", "DISK": "/d"}],
)  # fmt: skip
def test_the_hub_s_cache_is_where_its_library_finds_it(shell: dict[str, str], tmp_path: Path) -> None:
    program = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], **shell}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert str(hub_cache(shell, tmp_path)[0]) == done.stdout.strip()


def test_an_interpreter_of_homebrew_is_named_by_the_link_that_stays(tmp_path: Path) -> None:
    one = tmp_path / "Cellar/expertd/0.1.0/libexec/bin/python"
    assert lasting(str(one)) == str(one), "there is no such link"
    link = tmp_path / "opt/expertd/libexec/bin/python"
    link.parent.mkdir(parents=True)
    link.touch()
    assert lasting(str(one)) == str(link)
    assert lasting("/Users/me/venv/bin/python") == "/Users/me/venv/bin/python"


def test_a_program_whose_interpreter_is_gone_is_told_so(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/homebrew/Cellar/expertd/0.1.0/libexec/bin/python")
    with pytest.raises(DaemonStartFailed, match=r"/libexec/bin/python \(No such file or directory\); if expertd"):
        connect_or_start(home, "test")


# -- what the managers tell --------------------------------------------------------------------------------------------

PRINTED = """\
gui/501/expertd.daemon = {
	active count = 1
	path = /Users/me/Library/LaunchAgents/expertd.daemon.plist
	state = running

	program = /opt/expertd/bin/python
	default environment = {
		PATH => /usr/bin:/bin:/usr/sbin:/sbin
	}
	domain = gui/501 [100005]
	minimum runtime = 10
	exit timeout = 90
	runs = 2
	pid = 4711
	last exit code = 2
	endpoints = {
		"org.example" = {
			state = active
		}
	}
}
"""

AT_REST = PRINTED.replace("\tpid = 4711\n", "").replace("= running", "= not running")


@pytest.mark.parametrize(
    ("status", "said", "found"),
    [
        (0, PRINTED, Found(True, True, 4711, 2)),
        (0, AT_REST, Found(True, False, None, 2)),
        (0, AT_REST.replace("= not running", "= waiting"), Found(True, False, None, 2)),
        (0, AT_REST.replace("= not running", "= spawn scheduled"), Found(True, True, None, 2)),
        (0, PRINTED.replace("code = 2", "code = 78: EX_CONFIG"), Found(True, True, 4711, 78)),
        (0, PRINTED.replace("code = 2", "code = (never exited)"), Found(True, True, 4711)),
        (0, PRINTED.replace("exit code = 2", "terminating signal = Killed: 9"), Found(True, True, 4711, -9)),
        (113, "Could not find service", Found()),
    ],
)
def test_what_launchctl_prints_is_understood(status: int, said: str, found: Found) -> None:
    assert LAUNCHD.understand(status, said) == found


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("LoadState=loaded ActiveState=active MainPID=5 ExecMainCode=0 ExecMainStatus=0 UnitFileState=enabled",
         Found(True, True, 5)),
        ("LoadState=loaded ActiveState=activating MainPID=0 ExecMainCode=2 ExecMainStatus=9 UnitFileState=enabled",
         Found(True, True, None, -9)),
        ("LoadState=loaded ActiveState=failed MainPID=0 ExecMainCode=1 ExecMainStatus=2 UnitFileState=disabled",
         Found(False, False, None, 2)),
        ("LoadState=not-found ActiveState=inactive MainPID=0 ExecMainCode=0 ExecMainStatus=0 UnitFileState=", Found()),
        ("LoadState=not-found ActiveState=active MainPID=5 ExecMainCode=0 ExecMainStatus=0 UnitFileState=",
         Found(False, True, 5)),
    ],
)  # fmt: skip
def test_what_systemctl_shows_is_understood(said: str, found: Found) -> None:
    assert SYSTEMD.understand(0, said.replace(" ", "\n")) == found


# -- quick deaths ------------------------------------------------------------------------------------------------------


def after(starts: Starts, *times: float) -> Starts:
    for time in times:
        starts = starts.next(time)
    return starts


def test_after_so_many_quick_deaths_a_start_is_refused() -> None:
    times = [10.0 * number for number in range(MOST)]
    assert after(Starts(), *times) == Starts(tuple(times))
    assert after(Starts(), *times, 50.0) == after(Starts(), *times, 50.0, 60.0) == Starts(tuple(times), 50.0)
    assert after(Starts(), *times, 50.0).refused(50.0 + REST_S - 1)


def test_one_that_ran_for_long_begins_a_new_row() -> None:
    times = [10.0 * number for number in range(MOST)]
    late = times[-1] + QUICK_S
    assert after(Starts(), *times, late) == Starts((late,))


def test_after_a_rest_it_is_tried_again_as_often() -> None:
    refused = after(Starts(), *(10.0 * number for number in range(MOST)), 50.0)
    rested = 50.0 + REST_S
    assert refused.next(rested) == Starts((rested,))


def test_a_clock_that_is_set_back_keeps_nobody_from_starting() -> None:
    refused = after(Starts(), *(1000.0 + number for number in range(MOST)), 1010.0)
    assert refused.next(10.0) == Starts((10.0,))


def test_an_agent_is_the_same_whoever_writes_it_down() -> None:
    agent = Agent("daemon", "", "", ("/a",), {"B": "1", "A": "2"}, Path("/l"))
    other = Agent("daemon", "", "", ("/a",), {"A": "2", "B": "1"}, Path("/l"))
    assert LAUNCHD.render(agent) == LAUNCHD.render(other)
    assert SYSTEMD.render(agent) == SYSTEMD.render(other)
