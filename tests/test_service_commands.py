"""``expertd service``, run as a user runs it, against stand-ins for launchctl and systemctl that start real daemons."""

from __future__ import annotations

import json
import os
import plistlib
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from expertd.launchd.agent import home_key
from expertd.protocol.connection import package_version
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import MOST
from expertd.protocol.rendezvous import connect_or_start, lock_holder, stop_daemon
from expertd.protocol.service import read_service
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tests.programs import Program
from tests.service_stage import Stage, stage
from tests.service_stand_in import runs

TOOLS = ["launchctl", "systemctl"]


@pytest.fixture(params=TOOLS)
def service(request: pytest.FixtureRequest, home: Home) -> Iterator[Stage]:
    with stage(home, request.param) as made:
        yield made


@pytest.fixture
def launchctl(home: Home) -> Iterator[Stage]:
    with stage(home, "launchctl") as made:
        yield made


@pytest.fixture
def systemctl(home: Home) -> Iterator[Stage]:
    with stage(home, "systemctl") as made:
        yield made


def names(service: Stage) -> tuple[str, str, str, str]:
    """Label and file of the daemon's and of the gateway's agent."""
    key = key_of(service)
    if service.tool == "launchctl":
        daemon, gateway = (f"expertd.{name}.{key}" for name in ("daemon", "gateway"))
        return daemon, f"{service.definitions}/{daemon}.plist", gateway, f"{service.definitions}/{gateway}.plist"
    daemon, gateway = (f"expertd-{name}-{key}.service" for name in ("daemon", "gateway"))
    return daemon, f"{service.definitions}/{daemon}", gateway, f"{service.definitions}/{gateway}"


def key_of(service: Stage) -> str:
    return home_key(service.home, {})


def status(service: Stage) -> Any:
    return json.loads(service.expertd("service", "status", "--json").stdout)


def everything(service: Stage) -> set[str]:
    """All files of the home and of the manager's folder."""
    return {str(path) for folder in (service.home.root, service.definitions) for path in folder.rglob("*")}


# -- install, upgrade, uninstall ---------------------------------------------------------------------------------------


def test_install_starts_a_daemon_with_launchctl(launchctl: Stage) -> None:
    daemon, file, _, _ = names(launchctl)
    done = launchctl.process("service", "install")
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said == [
        f"write   {launchctl.home.service}",
        f"write   {file}",
        f"run     launchctl bootstrap gui/501 {file}",
        f"write   {launchctl.home.service}",
        f"installed: launchd keeps the daemon (process {launchctl.pid()})",
    ]
    assert launchctl.calls() == [f"bootstrap gui/501 {file}"]
    assert lock_holder(launchctl.home) == launchctl.pid()
    record = read_service(launchctl.home)
    assert record is not None
    assert (record.manager, record.version) == ("launchd", package_version())
    assert record.start == ("launchctl", "kickstart", f"gui/501/{daemon}")


def test_install_starts_a_daemon_with_systemctl(systemctl: Stage) -> None:
    daemon, file, _, _ = names(systemctl)
    done = systemctl.process("service", "install")
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said == [
        f"write   {systemctl.home.service}",
        f"write   {file}",
        "run     systemctl --user daemon-reload",
        f"run     systemctl --user enable --now {daemon}",
        f"write   {systemctl.home.service}",
        f"installed: systemd keeps the daemon (process {systemctl.pid()})",
        "to keep it without a login too: loginctl enable-linger",
    ]
    assert systemctl.calls() == ["daemon-reload", f"enable --now {daemon}"]
    assert lock_holder(systemctl.home) == systemctl.pid()


def test_a_dry_run_prints_the_same_steps_and_does_none_of_them(service: Stage) -> None:
    before = everything(service)
    planned = service.done("service", "install", "--dry-run")
    assert everything(service) == before
    assert service.calls() == []
    done = service.done("service", "install")
    assert planned == done[: len(planned)]
    service.calls()
    planned = service.done("service", "uninstall", "--dry-run")
    assert service.calls() == []
    assert planned == service.done("service", "uninstall")


def test_a_second_install_leaves_the_daemon_alone(service: Stage) -> None:
    service.done("service", "install")
    pid = service.pid()
    service.calls()
    assert service.done("service", "install")[0] == "nothing to do"
    assert service.calls() == []
    assert service.pid() == pid


def test_what_is_described_otherwise_is_replaced_in_its_place(launchctl: Stage) -> None:
    daemon, file, _, _ = names(launchctl)
    launchctl.done("service", "install")
    pid = launchctl.pid()
    launchctl.calls()
    launchctl.done("service", "install", HF_HOME="/models/hub")
    assert launchctl.calls() == [f"bootout gui/501/{daemon}", f"bootstrap gui/501 {file}"]
    assert launchctl.pid() != pid
    assert not runs(pid)
    assert plistlib.loads(Path(file).read_bytes())["EnvironmentVariables"] == {
        "EXPERTD_HOME": str(launchctl.home.root), "HF_HUB_CACHE": "/models/hub/hub",
    }  # fmt: skip


def test_an_upgraded_package_restarts_what_runs(service: Stage) -> None:
    service.done("service", "install")
    pid = service.pid()
    older = service.home.service.read_text().replace(f'"{package_version()}"', '"0.0.1"')
    service.home.service.write_text(older)
    note = "note      installed by another version or from another place; renew it: expertd service install"
    assert service.expertd("service", "status").stdout.splitlines()[-1] == note
    service.calls()
    service.done("service", "install")
    verbs = [call.split()[0] for call in service.calls()]
    assert verbs == (["bootout", "bootstrap"] if service.tool == "launchctl" else ["restart"])
    assert service.pid() != pid
    assert status(service)["version"] == package_version()


def test_uninstall_leaves_nothing_but_the_log(service: Stage) -> None:
    before = everything(service)
    service.done("service", "install")
    pid = service.pid()
    service.done("service", "uninstall")
    assert not runs(pid)
    stays = {str(service.home.daemon_log), str(service.home.daemon_lock), str(service.definitions)}
    assert everything(service) - before - stays <= {str(service.home.start_lock)}
    assert service.done("service", "uninstall") == ["nothing to do: no service is installed"]


# -- the gateway -------------------------------------------------------------------------------------------------------


def test_a_gateway_comes_and_goes_with_its_flag(service: Stage, checkpoints: dict[str, Path]) -> None:
    model = checkpoints["stacked"]
    named = ("--gateway", str(model), "--port", "18089", "--host", "localhost", "--alias", "gpt-4o")
    said = service.done("service", "install", *named)
    assert "the gateway answers at http://localhost:18089/v1 as soon as it has loaded stacked" in said
    log = service.home.service_gateway_log
    wait_for(lambda: "expertd: serving stacked at http://localhost:18089/v1" in log.read_text())
    assert "started a daemon" not in log.read_text(), "it uses the service's"
    with urllib.request.urlopen("http://localhost:18089/v1/models") as answer:
        assert [one["id"] for one in json.load(answer)["data"]] == ["stacked", "gpt-4o"]
    assert status(service)["gateway"] == {"models": [str(model)], "url": "http://localhost:18089/v1"}
    daemon, gateway = service.pid(), service.pid("gateway")

    service.calls()
    assert service.done("service", "install")[0] == "nothing to do", "what is not named stays"
    service.done("service", "install", "--no-gateway")
    assert not runs(gateway)
    assert service.pid() == daemon
    assert status(service)["gateway"] is None
    assert [agent["name"] for agent in status(service)["agents"]] == ["daemon"]
    assert not log.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gateway"], "--gateway needs the model that it should serve: --gateway MODEL"),
        (["/some/model"], "name the models of a gateway after --gateway"),
        (["--port", "9000"], "--port, --host, --alias and --pin are a gateway's: use them with --gateway MODEL"),
        (["--gateway", "models/demo", "--alias", "a=/other"], "--alias: /other is none of the models"),
        (["--gateway", "/nowhere"], "/nowhere does not exist; give the folder of an mlx-lm checkpoint"),
    ],
)
def test_a_gateway_that_cannot_be_is_told_before_anything_is_done(
    launchctl: Stage, words: list[str], said: str
) -> None:
    done = launchctl.expertd("service", "install", *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert launchctl.calls() == []
    assert not launchctl.definitions.exists()


# -- failures ----------------------------------------------------------------------------------------------------------

AGAIN = "try again with the same command, or take all of it away with: expertd service uninstall"


@pytest.mark.parametrize("goes_on", [True, False], ids=["installed", "removed"])
@pytest.mark.parametrize(
    ("tool", "step", "status", "text", "sentence"),
    [
        ("launchctl", "bootstrap", 5, "Bootstrap failed: 5: Input/output error",
         "(status 5: Bootstrap failed: 5: Input/output error); if System Settings, General, Login Items has it turned "
         "off, turn it on; over ssh, first log in at the screen too; then "),
        ("systemctl", "daemon-reload", 1, "Failed to reload daemon: Access denied",
         "'systemctl --user daemon-reload' failed (status 1: Failed to reload daemon: Access denied); "),
        ("systemctl", "enable", 1, "Failed to start: Unit is masked.",
         "failed (status 1: Failed to start: Unit is masked.); "),
    ],
)  # fmt: skip
def test_an_order_that_fails_while_installing(
    home: Home, tool: str, step: str, status: int, text: str, sentence: str, goes_on: bool
) -> None:
    with stage(home, tool) as service:
        service.fail(step, status, text)
        done = service.expertd("service", "install")
        assert done.returncode == 1
        assert done.stderr.startswith("expertd: '")
        assert done.stderr.endswith(f"{sentence}{AGAIN} [service_failed]\n")
        assert len(done.stderr.splitlines()) == 1
        service.repair()
        if goes_on:
            service.done("service", "install")
            assert lock_holder(home) == service.pid()
        service.done("service", "uninstall")
        assert not list(service.definitions.iterdir())
        assert not home.service.exists()
        assert lock_holder(home) is None


@pytest.mark.parametrize(
    ("tool", "verb", "step", "undone"),
    [
        ("launchctl", "install", "bootout", True),
        ("launchctl", "uninstall", "bootout", True),
        ("launchctl", "restart", "bootout", True),
        ("launchctl", "restart", "bootstrap", False),
        ("launchctl", "stop", "bootout", True),
        ("systemctl", "install", "disable", True),
        ("systemctl", "uninstall", "disable", True),
        ("systemctl", "uninstall", "daemon-reload", False),
        ("systemctl", "restart", "restart", True),
        ("systemctl", "stop", "stop", True),
    ],
)
def test_an_order_that_fails_later(home: Home, tool: str, verb: str, step: str, undone: bool) -> None:
    with stage(home, tool) as service:
        service.done("service", "install")
        pid = service.pid()
        service.fail(step, 9, "out of luck")
        done = service.expertd("service", verb, HF_HOME="/another")
        assert done.returncode == 1
        assert "failed (status 9: out of luck); " in done.stderr
        assert "try again with the same command, or " in done.stderr
        assert runs(pid) == undone
        service.repair()
        service.done("service", "install", HF_HOME="/another")
        assert service.pid() == lock_holder(home)
        service.done("service", "uninstall", HF_HOME="/another")
        assert not list(service.definitions.iterdir())
        assert lock_holder(home) is None


def test_a_folder_that_cannot_be_written_is_named(service: Stage) -> None:
    service.definitions.write_text("in the way")
    done = service.expertd("service", "install")
    assert done.returncode == 1
    sentence = f"cannot be written (File exists); see to it that {service.definitions} is a folder that you own, and"
    assert sentence in done.stderr
    service.definitions.unlink()
    service.done("service", "install")


def test_without_a_manager_one_sentence_says_what_else_there_is(service: Stage) -> None:
    service.fail("print-disabled" if service.tool == "launchctl" else "show", 1, "Failed to connect to bus")
    done = service.expertd("service", "install")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "does not answer this user (status 1: Failed to connect to bus); without a service, daemons start on demand, "
        "or run 'expertd daemon run' from what starts your programs [service_manager_missing]\n"
    )


def test_a_mistake_in_the_settings_is_told_before_anything_is_done(service: Stage) -> None:
    service.home.config.write_text("budge = 1\n")
    done = service.expertd("service", "install")
    assert done.returncode == 2
    assert "did you mean 'budget'?" in done.stderr
    assert service.calls() == []


def test_a_variable_that_does_not_go_along_is_not_in_the_agent_either(
    launchctl: Stage, checkpoints: dict[str, Path]
) -> None:
    named = ("service", "install", "--gateway", str(checkpoints["stacked"]))
    launchctl.fail("bootstrap", 5, "not now")
    failed = launchctl.expertd(*named, EXPERTD_SERVE_PORT="9999", EXPERTD_SERVE_HOST="0.0.0.0")
    assert failed.stderr.startswith("expertd: EXPERTD_SERVE_HOST, EXPERTD_SERVE_PORT: set in this shell, not for the")
    record = read_service(launchctl.home)
    assert record is not None
    assert record.gateway is not None
    assert (record.gateway.host, record.gateway.port) == ("127.0.0.1", 8080)


def test_variables_that_do_not_go_along_are_named(service: Stage) -> None:
    done = service.expertd("service", "install", "--dry-run", EXPERTD_BUDGET="1GiB", EXPERTD_POLICY="lru")
    assert done.stderr == (
        "expertd: EXPERTD_BUDGET, EXPERTD_POLICY: set in this shell, not for the service; write it into config.toml\n"
    )


# -- start, stop, restart, status, logs --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
def test_what_is_not_installed_cannot_be_changed(service: Stage, verb: str) -> None:
    done = service.expertd("service", verb)
    assert done.returncode == 3
    assert done.stderr == (
        "expertd: no service is installed; install it with: expertd service install [service_not_installed]\n"
    )


def test_stop_start_and_restart(service: Stage) -> None:
    service.done("service", "install")
    first = service.pid()
    assert service.done("service", "start")[0] == "nothing to do"
    service.done("service", "stop")
    assert not runs(first)
    found = status(service)
    assert (found["stopped"], found["agents"][0]["pid"]) == (True, None)
    assert service.expertd("service", "status").returncode == 3
    service.done("service", "start")
    second = service.pid()
    service.done("service", "restart")
    assert service.pid() != second
    assert status(service)["agents"][0]["pid"] == service.pid()


def test_restart_gives_a_daemon_its_time_and_gets_past_one_that_hangs(launchctl: Stage) -> None:
    daemon, file, *_ = names(launchctl)
    launchctl.done("service", "install")
    launchctl.calls()
    launchctl.done("service", "restart")
    assert launchctl.calls() == [f"bootout gui/501/{daemon}", f"bootstrap gui/501 {file}"]
    assert "has ended" in launchctl.home.daemon_log.read_text()
    hung = launchctl.pid()
    os.kill(hung, signal.SIGSTOP)
    launchctl.kills_at_once()
    launchctl.done("service", "restart")
    assert not runs(hung)
    assert lock_holder(launchctl.home) == launchctl.pid()


def test_after_a_stop_the_next_login_has_clients_ask_the_manager_again(service: Stage) -> None:
    service.done("service", "install")
    service.done("service", "stop")
    record = read_service(service.home)
    assert record is not None
    assert record.stopped
    service.log_in()
    wait_for(lambda: read_service(service.home) == msgspec.structs.replace(record, stopped=False))
    wait_for(lambda: lock_holder(service.home) == service.pid())


def test_status_for_a_person(service: Stage) -> None:
    assert service.expertd("service", "status").stdout.splitlines() == [
        "no service is installed; daemons start on demand", "install it with: expertd service install",
    ]  # fmt: skip
    service.done("service", "install")
    _, file, _, _ = names(service)
    manager = "launchd" if service.tool == "launchctl" else "systemd"
    assert service.done("service", "status") == [
        f"service   {manager}, installed by expertd {package_version()}",
        f"daemon    runs (process {service.pid()})",
        f"  file    {file}",
        f"  log     {service.home.daemon_log}",
    ]


def test_status_as_json_has_the_promised_shape(service: Stage) -> None:
    service.done("service", "install")
    daemon, file, _, _ = names(service)
    assert status(service) == {
        "manager": "launchd" if service.tool == "launchctl" else "systemd",
        "installed": True,
        "version": package_version(),
        "stopped": False,
        "other_daemon": None,
        "gateway": None,
        "agents": [
            {
                "name": "daemon", "label": daemon, "file": file, "installed": True, "current": True, "loaded": True,
                "pid": service.pid(), "last_status": None, "given_up": None, "log": str(service.home.daemon_log),
            }
        ],
    }  # fmt: skip


def test_logs_shows_the_end_and_what_comes(launchctl: Stage) -> None:
    missing = launchctl.expertd("service", "logs", "--gateway")
    assert missing.returncode == 3
    assert "there is no log of a gateway yet" in missing.stderr
    launchctl.home.service_gateway_log.write_text("expertd: MODEL is gone [not_a_checkpoint]\n")
    launchctl.home.gateway_log(77).write_text("2026-11-29 14:03:01.000 INFO gateway[77] the gateway has ended\n")
    assert launchctl.done("service", "logs", "--gateway", "-n", "1") == ["expertd: MODEL is gone [not_a_checkpoint]"]
    both = [json.loads(text)["event"] for text in launchctl.done("service", "logs", "--gateway", "--json")]
    assert both == ["the gateway has ended", "expertd: MODEL is gone [not_a_checkpoint]"]
    log = launchctl.home.daemon_log
    log.write_text("".join(f"line {number}\n" for number in range(100)))
    assert launchctl.done("service", "logs", "-n", "2") == ["line 98", "line 99"]
    assert len(launchctl.done("service", "logs")) == 40
    log.write_text("2026-11-29 14:03:01.000 INFO daemon[5] session opened: session=3\nline 99\n")
    assert [json.loads(text) for text in launchctl.done("service", "logs", "--json")] == [
        {"time": "2026-11-29T14:03:01.000", "level": "INFO", "process": "daemon", "pid": 5, "event": "session opened",
         "facts": {"session": 3}, "traceback": "line 99"},
    ]  # fmt: skip
    command = [sys.executable, "-m", "expertd.clients.cli", "service", "logs", "-f", "-n", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=launchctl.environment) as following:
        try:
            assert following.stdout is not None
            assert following.stdout.readline() == log.read_text().splitlines(keepends=True)[0]
            assert following.stdout.readline() == "line 99\n"
            with log.open("a") as file:
                file.write("line 100\n")
            assert following.stdout.readline() == "line 100\n"
            log.rename(log.with_suffix(".1"))
            log.write_text("a new file\n")
            assert following.stdout.readline() == "a new file\n"
            following.send_signal(2)
            assert following.wait(DEADLINE_S) == 0
        finally:
            following.kill()


# -- daemons on demand give way ----------------------------------------------------------------------------------------


def test_a_daemon_on_demand_that_nobody_uses_gives_way(service: Stage, start_daemon: StartDaemon) -> None:
    stranger = start_daemon()
    said = service.done("service", "install")
    assert f"end     the daemon that runs without the service (process {stranger.pid}), if nobody uses it" in said
    assert stranger.wait(DEADLINE_S) == 0
    assert lock_holder(service.home) == service.pid()


def test_one_that_is_used_stays_and_is_named_and_the_service_takes_over(
    service: Stage, start_daemon: StartDaemon, checkpoints: dict[str, Path]
) -> None:
    stranger = start_daemon()
    with Program(checkpoints["stacked"]) as user:
        said = service.done("service", "install")
        stays = (
            f"        the daemon (process {stranger.pid}) stays for now: it is used by process {user.pid} (stacked); "
            "the service's daemon takes its place when it ends"
        )
        assert stays in said
        waits = f"(process {service.pid()}, which waits for process {stranger.pid} to end)"
        assert any(waits in line for line in said)
        assert status(service)["other_daemon"] == stranger.pid
        assert "is not the service's" in service.expertd("service", "status").stdout
    wait_for(lambda: service.done("service", "start") != [] and stranger.poll() == 0)
    wait_for(lambda: lock_holder(service.home) == service.pid())


def test_a_client_has_the_manager_start_the_daemon(service: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    service.done("service", "install")
    stop_daemon(service.home, "test")
    service.calls()
    monkeypatch.setenv("PATH", service.environment["PATH"])
    heard: list[str] = []
    connection, started = connect_or_start(service.home, "test", budget="1MiB", announce=heard.append)
    with connection:
        assert not started, "it is not ours to end"
        assert connection.daemon.pid == service.pid()
    manager = "launchd" if service.tool == "launchctl" else "systemd"
    assert heard == [f"{manager} started the service's daemon (process {service.pid()})"]
    verb = "kickstart" if service.tool == "launchctl" else "start"
    assert [call.split()[0] for call in service.calls()] == [verb]


def test_where_the_manager_does_not_obey_a_daemon_starts_on_demand(
    service: Stage, own_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.done("service", "install")
    stop_daemon(service.home, "test")
    service.fail("kickstart" if service.tool == "launchctl" else "start", 4, "not today")
    monkeypatch.setenv("PATH", service.environment["PATH"])
    heard: list[str] = []
    connection, started = connect_or_start(service.home, "test", budget="1MiB", announce=heard.append)
    connection.close()
    assert started
    assert heard[0].endswith("did not start the service's daemon (not today)")
    assert heard[1].startswith("started a daemon")


def test_a_stopped_service_lets_daemons_start_on_demand(
    service: Stage, own_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.done("service", "install")
    service.done("service", "stop")
    service.calls()
    monkeypatch.setenv("PATH", service.environment["PATH"])
    connection, started = connect_or_start(service.home, "test", budget="1MiB")
    with connection:
        assert started
        pid = connection.daemon.pid
    assert service.calls() == []
    assert any(f"process {pid}" in line for line in service.done("service", "start"))
    assert lock_holder(service.home) == service.pid()


# -- the breaker -------------------------------------------------------------------------------------------------------


def test_a_daemon_that_dies_at_once_is_given_up_and_told_and_start_resets_it(service: Stage) -> None:
    service.done("service", "install")
    stop_daemon(service.home, "test")
    service.home.config.write_text('policy = "none"\n')
    command = [sys.executable, "-m", "expertd.daemon", "--service"]
    tries = [subprocess.run(command, capture_output=True, text=True) for _ in range(MOST + 1)]
    assert [one.returncode for one in tries] == [2] * MOST + [0]
    sentence = (
        f"the service's daemon has died {MOST} times in a row, each time within 60 s, and is not started any more; "
        "'expertd service logs' says why; start it again with: expertd service start"
    )
    assert tries[-1].stderr == f"expertd: {sentence}\n"
    told = service.expertd("service", "status")
    assert told.returncode == 3
    assert sentence in told.stdout
    assert status(service)["agents"][0]["given_up"] == sentence
    service.home.config.unlink()
    client = service.expertd("generate", "/nowhere", "x")
    assert client.returncode == 2
    with pytest.raises(Exception, match="is not started any more"):
        connect_or_start(service.home, "test")
    service.done("service", "start")
    assert lock_holder(service.home) == service.pid()
    assert status(service)["agents"][0]["given_up"] is None
