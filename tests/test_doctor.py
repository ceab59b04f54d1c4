"""``expertd doctor``: each check in surroundings that are made up, and the command on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from expertd.clients.cli.doctor import agents, requirement, settings, surroundings, table
from expertd.clients.doctor import CHECKS, Finding, Surroundings, Verdict, examine
from expertd.clients.doctor.findings import note, ok, problem
from expertd.clients.doctor.home import (
    check_daemon,
    check_home,
    check_leftovers,
    check_settings,
    leftovers,
)
from expertd.clients.doctor.models import check_hub, check_lm_studio, lm_studio_folder, weights
from expertd.clients.doctor.service import check_denied, check_environment, check_service, denied
from expertd.clients.doctor.surroundings import Budget, DiskSpeed, Space
from expertd.clients.doctor.system import (
    check_alias,
    check_budget,
    check_disk,
    check_files,
    check_mlx,
    check_platform,
    check_pressure,
    check_shm,
    satisfies,
)
from expertd.launchd.agent import daemon_agent, gateway_agent
from expertd.launchd.launchd import Launchd
from expertd.launchd.manager import Manager
from expertd.launchd.systemd import Systemd
from expertd.protocol.connection import package_version
from expertd.protocol.errors import ProtocolMismatch
from expertd.protocol.messages import DaemonStatus, ModelStatus, Status
from expertd.protocol.model_names import hub_cache
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import MOST, Starts
from expertd.protocol.service import FORMAT, Gateway, Service, encode_service
from tests.conftest import StartDaemon

GB = 1_000_000_000


def _status(version: str = "", models: list[Path] | None = None, used: int = 0) -> Status:
    numbers = dict.fromkeys(
        ("moe_layers", "experts", "top_k", "block_bytes", "blocks", "slots", "resident_blocks", "hits", "misses",
         "bytes_read", "evictions", "pool_bytes"), 1,
    )  # fmt: skip
    found = [ModelStatus(id="m", path=str(path), family="f", sessions=[], **numbers) for path in models or []]
    daemon = DaemonStatus(pid=7, version=version or package_version(), uptime_s=1, rss_bytes=1)
    return Status(
        protocol=1, home="/h", daemon=daemon,
        budget_bytes=1, used_bytes=used, pressure="normal", tracing="", frames_dropped=0, models=found, limit_bytes=1,
        pressure_figure="", journal=[],
    )  # fmt: skip


@pytest.fixture
def mac(tmp_path: Path) -> Surroundings:
    """A Mac on which all is well; nothing of it is there yet but the user's folder."""
    return Surroundings(
        platform="darwin", system="macOS 15.5", processor="arm64", python=(3, 12, 1), environ={}, user=tmp_path,
        home=Home(tmp_path / ".expertd"), open_files=(256, 1 << 63), shm=None,
        requirement=lambda package: (">=0.32.4,<0.33", "0.32.5"), alias=lambda: "",
        settings=list, budget=lambda: Budget(8 * GB, 8 * GB, ("total: 16 GB",)), pressure=lambda: ("normal", "level 1"),
        space=lambda path: Space(10 * GB, 9 * GB), speed=lambda paths: None, alive=lambda pid: False,
        status=lambda: None, owner=lambda: None, agents=lambda: (), service_variable=lambda name: "",
    )  # fmt: skip


@pytest.fixture
def linux(mac: Surroundings) -> Surroundings:
    """A Linux machine on which all is well."""
    return replace(mac, platform="linux", system="Linux 6.8", processor="x86_64", shm=Path("/dev/shm"))


def test_a_machine_on_which_all_is_well_has_no_problem(mac: Surroundings, linux: Surroundings) -> None:
    nowhere = Home(Path("/tmp/expertd-nowhere"))
    for at in (replace(mac, home=nowhere), replace(linux, home=nowhere)):
        verdicts = {name: finding.verdict for name, finding in examine(at)}
        assert list(verdicts) == [name for name, _ in CHECKS]
        assert verdicts.pop("disk") is Verdict.NOTE, "there is nothing to measure"
        assert set(verdicts.values()) == {Verdict.OK}


def test_a_check_that_fails_is_a_note(mac: Surroundings) -> None:
    def broken(at: Surroundings) -> Finding:
        raise OSError("the disk is on fire")

    (found,) = examine(mac, [("fire", broken)])
    assert found == ("fire", note("this could not be checked (OSError: the disk is on fire)"))


def test_everything_that_is_asked_of_the_system_may_fail(mac: Surroundings) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no")

    names = ("requirement", "alias", "settings", "budget", "pressure", "space", "speed", "alive", "status", "owner",
             "agents", "service_variable")  # fmt: skip
    nowhere = Home(Path("/tmp/expertd-nowhere"))
    changes: dict[str, Any] = dict.fromkeys(names, fails)
    at = replace(mac, home=nowhere, shm=Path("/dev/shm"), environ={"EXPERTD_BUDGET": "1GB"}, **changes)
    assert all(finding.verdict is Verdict.OK or "could not be checked" in finding.text for _, finding in examine(at))


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({}, Verdict.OK, "macOS 15.5 on arm64, Python 3.12.1"),
        ({"python": (3, 10, 9)}, Verdict.PROBLEM, "too old"),
        ({"processor": "x86_64"}, Verdict.PROBLEM, "Apple silicon"),
        ({"platform": "win32"}, Verdict.PROBLEM, "does not run"),
    ],
)
def test_platform(mac: Surroundings, changes: dict[str, Any], verdict: Verdict, said: str) -> None:
    found = check_platform(replace(mac, **changes))
    assert found.verdict is verdict and said in found.text
    assert bool(found.todo) == (verdict is not Verdict.OK)


@pytest.mark.parametrize(
    ("version", "wanted", "right"),
    [
        ("0.32.4", ">=0.32.4,<0.33", True),
        ("0.32.10", ">=0.32.4,<0.33", True),
        ("0.32.3", ">=0.32.4,<0.33", False),
        ("0.33", ">=0.32.4,<0.33", False),
        ("0.32.5.dev20250101", ">=0.32.4,<0.33", True),
        ("1", "==1.0.0", True),
        ("1.1", "<=1,>0", False),
        ("anything", "", True),
    ],
)
def test_versions_are_compared_by_numbers(version: str, wanted: str, right: bool) -> None:
    assert satisfies(version, wanted) is right


def test_mlx(mac: Surroundings) -> None:
    assert check_mlx(mac).text == "mlx 0.32.5 and mlx-lm 0.32.5"
    old = check_mlx(replace(mac, requirement=lambda package: (">=0.32.4,<0.33", "0.30.0")))
    assert old.verdict is Verdict.PROBLEM and old.todo == "pip install 'mlx>=0.32.4,<0.33'"
    none = check_mlx(replace(mac, requirement=lambda package: (">=0.32.4", None)))
    assert none.verdict is Verdict.PROBLEM and none.text == "mlx is not installed"


def test_what_expertd_takes_is_read_off_its_package() -> None:
    wanted, version = requirement("mlx")
    assert wanted.startswith((">=0.32", "<0.33")), wanted
    assert version is not None and satisfies(version, wanted)
    wanted, version = requirement("mlx-lm")
    assert "0.32" in wanted and version is not None and satisfies(version, wanted)
    assert requirement("no-such-package") == ("", None)


def test_alias(mac: Surroundings) -> None:
    assert check_alias(mac).verdict is Verdict.OK
    copies = check_alias(replace(mac, alias=lambda: "MLX copied the pages"))
    assert copies.verdict is Verdict.NOTE and "MLX copied the pages" in copies.text


def test_budget_is_explained(mac: Surroundings) -> None:
    assert check_budget(mac) == ok("8.0 GB for experts, by default", ("total: 16 GB",))
    much = check_budget(replace(mac, budget=lambda: Budget(20 * GB, 8 * GB, ())))
    assert much.verdict is Verdict.NOTE and much.text.startswith("20.0 GB for experts as set; the default")


def test_pressure(mac: Surroundings) -> None:
    assert check_pressure(mac).verdict is Verdict.OK
    short = check_pressure(replace(mac, pressure=lambda: ("critical", "level 4")))
    assert (short.verdict, short.text) == (Verdict.NOTE, "memory pressure is critical: level 4")


def test_shared_memory_has_to_hold_the_budget(mac: Surroundings, linux: Surroundings) -> None:
    assert "no limit" in check_shm(mac).text
    assert check_shm(linux).verdict is Verdict.OK
    small = replace(linux, space=lambda path: Space(64_000_000, 60_000_000))
    found = check_shm(small)
    assert found.verdict is Verdict.PROBLEM
    assert found.text == "/dev/shm has 64.0 MB, 60.0 MB of it free, and the budget is 8.0 GB"
    assert "--shm-size 9g" in found.todo
    assert check_shm(replace(small, status=lambda: _status(used=8 * GB))).verdict is Verdict.OK, "it holds it already"


def test_disk(mac: Surroundings) -> None:
    quick = check_disk(replace(mac, speed=lambda paths: DiskSpeed(5 * GB, 0.0002, Path("/m"))))
    assert quick == ok("5.0 GB/s, a megabyte in 0.2 ms (/m)")
    slow = check_disk(replace(mac, speed=lambda paths: DiskSpeed(GB / 5, 0.005, Path("/m"))))
    assert slow.verdict is Verdict.NOTE and "expertd pack" in slow.todo


def test_open_files(mac: Surroundings) -> None:
    assert check_files(mac).text == "256 at once, for the daemon any number"
    assert check_files(replace(mac, open_files=(256, 4096))).verdict is Verdict.OK
    assert check_files(replace(mac, open_files=(256, 512))).verdict is Verdict.NOTE
    assert check_files(replace(mac, open_files=(64, 64))).verdict is Verdict.PROBLEM


# -- the home ----------------------------------------------------------------------------------------------------------


def test_a_home_that_does_not_exist_is_in_order(mac: Surroundings) -> None:
    found = check_home(replace(mac, home=Home(Path("/tmp/expertd-nowhere"))))
    assert found == ok("/tmp/expertd-nowhere, which will be created, sockets of at most 45 of 103 bytes")


def test_a_home_that_others_can_write_is_a_problem(mac: Surroundings) -> None:
    home = Home(Path("/tmp") / f"xh{os.getpid()}")
    try:
        home.prepare()
        home.root.chmod(0o777)
        found = check_home(replace(mac, home=home))
        assert found.verdict is Verdict.PROBLEM
        assert found.text == f"{home.root} can be written by other users"
        assert f"chmod go-w {home.root}" in found.todo
    finally:
        for folder in (home.run, home.log, home.root):
            folder.rmdir()


def test_a_home_whose_path_is_too_long_is_a_problem(mac: Surroundings) -> None:
    found = check_home(replace(mac, home=Home(Path("/tmp") / ("x" * 100))))
    assert found.verdict is Verdict.PROBLEM
    assert "too long for a socket" in found.text and "at most 75 bytes" in found.todo


def test_leftovers_are_named_and_what_lives_is_not(mac: Surroundings) -> None:
    home = mac.home
    for folder in (home.run, home.log, home.pace):
        folder.mkdir(parents=True)
    dead = [home.daemon_socket, home.lifeline_socket, home.gateway_socket(10, 3), home.gateway_socket(10)]
    alive = [home.gateway_socket(11), home.gateway_socket(11, 2), home.daemon_log, home.start_lock]
    for path in [*dead, *alive, home.worker_log(10), home.gateway_log(10)]:
        path.write_text("x")
    at = replace(mac, alive=lambda pid: pid == 11)
    assert leftovers(at) == dead
    found = check_leftovers(at)
    assert found.verdict is Verdict.NOTE and found.text == "4 files of processes that are gone, 4 B; harmless"
    assert found.todo.startswith("rm ") and found.todo.endswith(" and 1 more there")
    assert leftovers(replace(at, owner=lambda: 5)) == dead[2:], "a daemon lives, so the sockets are its"


def test_daemon(mac: Surroundings) -> None:
    assert check_daemon(mac).text.startswith("none runs")
    runs = check_daemon(replace(mac, status=lambda: _status(models=[Path("/m")], used=GB)))
    assert runs == ok("process 7, 1 model, 1.0 GB in use")
    other = check_daemon(replace(mac, status=lambda: _status("0.0.1")))
    assert other.verdict is Verdict.NOTE and "version 0.0.1" in other.text
    silent = check_daemon(replace(mac, owner=lambda: 9))
    assert silent.verdict is Verdict.PROBLEM and "process 9 owns the home" in silent.text

    def mismatch() -> Status | None:
        raise ProtocolMismatch("it speaks another version")

    assert check_daemon(replace(mac, status=mismatch)).verdict is Verdict.PROBLEM


def _manager(at: Surroundings) -> Manager:
    return Launchd(501, at.user / "Library" / "LaunchAgents") if at.mac else Systemd(at.user / "units")


def _asked(at: Surroundings) -> Surroundings:
    """The same, with its agents found as the command finds them."""
    return replace(at, agents=lambda: agents(at.home, {"HOME": str(at.user), **at.environ}, _manager(at)))


def _install(at: Surroundings, gateway: Gateway | None = None, **more: Any) -> Service:
    """Leave what an installation leaves; its commands are of no matter here."""
    at.home.run.mkdir(parents=True, exist_ok=True)
    manager = _manager(at)
    record = Service(FORMAT, manager.name, package_version(), ("x",), gateway=gateway, **more)
    at.home.service.write_bytes(encode_service(record))
    environment = {"HOME": str(at.user), **at.environ}
    agents = [daemon_agent(at.home, "/python", environment)]
    agents += [] if gateway is None else [gateway_agent(at.home, "/python", environment, gateway)]
    for agent in agents:
        manager.file(agent).parent.mkdir(parents=True, exist_ok=True)
        manager.file(agent).write_bytes(manager.render(agent))
    return record


def test_a_service_that_is_as_it_should_be(mac: Surroundings, linux: Surroundings) -> None:
    mac, linux = _asked(mac), _asked(linux)
    assert check_service(mac).text.startswith("not installed")
    _install(mac)
    assert check_service(mac) == ok("launchd keeps the daemon")
    mac.home.service.unlink()
    _install(linux, Gateway(("/m/a", "org/b"), "127.0.0.1", 8080))
    assert check_service(linux) == ok("systemd keeps the daemon, and a gateway for /m/a, org/b")


def test_what_is_wrong_with_a_service_is_told_with_the_way_out(mac: Surroundings) -> None:
    mac = _asked(mac)
    record = _install(mac, Gateway(("/m/a",), "127.0.0.1", 8080))
    files = {agent.name: agent.path for agent in mac.agents()}

    def told(**changes: Any) -> Finding:
        mac.home.service.write_bytes(encode_service(msgspec.structs.replace(record, **changes)))
        return check_service(mac)

    assert told(stopped=True) == note("installed and stopped; daemons start on demand", "expertd service start")
    assert told(version="0.0.1").text == f"installed by expertd 0.0.1, and this is {package_version()}"
    assert told(version="").todo == "expertd service install"
    starts = Starts((time.time() - 3,) * MOST, time.time())
    mac.home.service_starts("gateway").write_bytes(msgspec.json.encode(starts))
    refused = told()
    assert refused.verdict is Verdict.PROBLEM
    assert refused.text.startswith(f"the service's gateway has died {MOST} times in a row")
    assert refused.todo == "expertd service start"
    files["gateway"].unlink()
    missing = f"it is not installed completely: {files['gateway']} is not there"
    assert told() == problem(missing, "expertd service install")
    mac.home.service.unlink()
    assert check_service(mac).text == f"{files['daemon']}: there, but the home knows of no service"


@pytest.mark.parametrize(
    ("path", "guarded"),
    [("~/Documents/m", True), ("~/Desktop", True), ("~/Downloads/a/b", True), ("~/models", False),
     ("~/DocumentsOld", False), ("/Volumes/USB/m", True), ("/opt/models", False)],
)  # fmt: skip
def test_what_macos_guards(path: str, guarded: bool) -> None:
    user = Path("/Users/u")
    assert denied(Path(path.replace("~", str(user))), user) is guarded


def test_a_model_that_an_agent_cannot_read_is_told(mac: Surroundings, linux: Surroundings, home: Home) -> None:
    assert check_denied(mac).verdict is Verdict.OK
    at = replace(mac, status=lambda: _status(models=[mac.user / "Documents" / "m"]))
    found = check_denied(at)
    assert found.verdict is Verdict.NOTE and found.text.endswith("m, should you install the service")
    folder = mac.user / "Desktop" / "many"
    folder.mkdir(parents=True)
    home.config.write_text(f"model_folders = [{str(folder)!r}]\n")
    found = check_denied(replace(mac, home=home))
    assert found.verdict is Verdict.NOTE and str(folder) in found.text
    _install(mac, Gateway((str(mac.user / "Documents" / "served"), "org/name"), "127.0.0.1", 8080))
    assert str(mac.user / "Documents" / "served") in check_denied(mac).text
    assert check_denied(at).verdict is Verdict.PROBLEM and "Full Disk Access" in check_denied(at).todo
    assert check_denied(replace(linux, status=at.status)).verdict is Verdict.OK


def test_a_packed_store_on_another_volume_is_told(mac: Surroundings) -> None:
    home = mac.home
    home.packed.mkdir(parents=True)
    (home.packed / "k.packed").symlink_to("/Volumes/USB/k.packed")
    assert "/Volumes/USB/k.packed" in check_denied(mac).text


def test_variables_that_a_service_misses(mac: Surroundings, linux: Surroundings) -> None:
    assert check_environment(mac).verdict is Verdict.OK
    at = replace(mac, environ={"HF_HOME": "/big/hf", "EXPERTD_BUDGET": "1GB", "EXPERTD_LOG": "", "PATH": "/bin"})
    found = check_environment(at)
    assert found.verdict is Verdict.NOTE and found.text.startswith("EXPERTD_BUDGET is set in this shell")
    assert found.todo == f"if you use the service: write it into {mac.home.config}"
    assert check_environment(replace(at, service_variable=lambda name: "1GB")).verdict is Verdict.OK
    assert "nobody knows" in check_environment(replace(at, service_variable=lambda name: None)).text
    other = replace(linux, environ={"EXPERTD_HOME": "/h h", "EXPERTD_BUDGET": "1GB", "EXPERTD_POLICY": "lru"})
    assert check_environment(other).text.startswith("EXPERTD_BUDGET, EXPERTD_POLICY are set")


def test_a_shell_that_looks_elsewhere_than_the_service_is_told(mac: Surroundings, linux: Surroundings) -> None:
    for at in (mac, linux):
        at = _asked(replace(at, environ={"HF_HOME": "/big & wide/hf"}))
        _install(at)
        assert check_environment(at).verdict is Verdict.OK
        moved = check_environment(_asked(replace(at, environ={"HF_HOME": "/elsewhere"})))
        assert moved.verdict is Verdict.NOTE and moved.todo.startswith("expertd service install")


# -- folders of models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"HF_HOME": "/big"}, "/big/hub"),
        ({"HF_HUB_CACHE": "/hub", "HF_HOME": "/big"}, "/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
    ],
)
def test_where_the_hub_s_cache_is(mac: Surroundings, environ: dict[str, str], folder: str) -> None:
    where = f"the hub's cache is not there: {folder.replace('~', str(mac.user))}"
    assert check_hub(replace(mac, environ=environ)).text.startswith(where)


def test_the_hub_s_cache_is_counted(mac: Surroundings) -> None:
    folder = hub_cache({}, mac.user)[0]
    assert check_hub(mac).text == f"the hub's cache is not there: {folder}"
    for name in ("models--a--b", "models--c--d", "datasets--x"):
        (folder / name).mkdir(parents=True)
    assert check_hub(mac) == ok(f"2 models in {folder}")


def test_a_hub_s_cache_that_is_a_file_is_told(mac: Surroundings) -> None:
    folder = hub_cache({}, mac.user)[0]
    folder.parent.mkdir(parents=True)
    folder.write_text("")
    assert check_hub(mac).verdict is Verdict.NOTE


def test_lm_studio_s_folder(mac: Surroundings) -> None:
    assert lm_studio_folder(mac) == mac.user / ".lmstudio" / "models"
    (mac.user / ".cache" / "lm-studio" / "models" / "a" / "b").mkdir(parents=True)
    assert check_lm_studio(mac) == ok(f"1 model in {mac.user}/.cache/lm-studio/models")
    moved = mac.user / "elsewhere" / "models"
    (mac.user / ".lmstudio-home-pointer").write_text(f"{moved.parent}\n")
    moved.mkdir(parents=True)
    assert lm_studio_folder(mac) == moved


def test_large_files_of_models_are_found_to_be_measured(mac: Surroundings) -> None:
    snapshot = hub_cache({}, mac.user)[0] / "models--a--b" / "snapshots" / "r"
    snapshot.mkdir(parents=True)
    with (snapshot / "model.safetensors").open("wb") as file:
        file.truncate(40 << 20)
    (snapshot / "small.safetensors").write_text("")
    assert weights(mac) == [snapshot / "model.safetensors"]


# -- the command -------------------------------------------------------------------------------------------------------


def expertd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})


def test_the_command_on_this_machine(home: Home, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("64MB")
    done = expertd("doctor", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert list(found) == [name for name, _ in CHECKS]
    assert not [check for check in found.values() if "could not be checked" in check["text"]]
    assert found["daemon"]["text"] == f"process {daemon.pid}, 0 models, 0 B in use"
    assert found["home"]["text"].startswith(str(home.root))
    assert found["budget"]["why"][0].startswith("total: ")
    assert found["budget"]["why"][-1].startswith("budget: ")
    assert found["pressure"]["text"].startswith("memory pressure is ")
    problems = [check for check in found.values() if check["verdict"] == "problem"]
    assert done.returncode == bool(problems)
    assert sorted(path.name for path in home.root.iterdir()) == ["log", "run"], "nothing is left behind"


def test_settings_that_cannot_be_used_are_a_problem(
    mac: Surroundings, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = replace(mac, home=home, settings=lambda: settings(home))

    def found() -> Finding:
        return check_settings(mac)

    assert found() == ok(f"{mac.home.config} is not there, and need not be")
    mac.home.config.write_text("budget = '2GiB'\n")
    assert found() == ok(f"{mac.home.config} can be used")
    monkeypatch.setenv("EXPERTD_BUGDET", "1GB")
    assert found() == note(
        "not a setting: EXPERTD_BUGDET (did you mean EXPERTD_BUDGET?)", "correct the variable's name, or unset it"
    )
    mac.home.config.write_text("budget 2GiB\n")
    assert found().verdict is Verdict.PROBLEM and found().text.startswith(f"{mac.home.config} is not TOML")
    mac.home.root.chmod(0o777)
    assert found() == note("they cannot be looked for, because the home cannot be used")


def test_a_problem_is_exit_status_1_and_no_traceback(home: Home) -> None:
    home.config.write_text("budget = 'much'\n")
    done = expertd("doctor", COLUMNS="80", EXPERTD_HOME="/tmp/" + "x" * 120)
    assert done.returncode == 1
    assert "problem  home" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("1 problem")
    broken = expertd("doctor", COLUMNS="80")
    assert broken.returncode == 1 and "could not be checked" not in broken.stdout
    told = " ".join(broken.stdout.split())
    assert f"problem settings budget in {home.config}: 'much' is not a size -> write for example 512MB" in told
    assert broken.stdout.splitlines()[-1].startswith("1 problem")


def test_lines_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = [("one", ok("short")), ("another", problem("many words " * 12, "do this and that " * 6))]
    lines = table(found)
    assert lines[0] == "ok       one     short"
    assert all(len(line) <= 60 for line in lines)
    assert lines[1].startswith("problem  another many words") and lines[-1] == "1 problem"
    assert sum("-> do this" in line for line in lines) == 1


def test_what_the_doctor_looks_at_is_this_machine(home: Home) -> None:
    at = surroundings()
    assert at.home == home and at.platform == sys.platform and at.python >= (3, 11)
    assert at.alive(os.getpid()) and not at.alive(2**22 - 1)
    asks: list[Callable[[], object]] = [at.budget, at.pressure, at.status, at.owner]
    assert all(ask() is not Ellipsis for ask in asks)
