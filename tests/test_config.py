"""Settings: which source wins, what is refused and how, and that daemons and commands go by them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tomllib
from dataclasses import astuple
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from expertd.clients.cli import main
from expertd.protocol.config import KEYS, Source, merge, read_config, variable
from expertd.protocol.errors import ConfigInvalid, SizeInvalid
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect_or_start
from tests.conftest import wait_for
from tests.test_homes import expertd
from tools.factory import write_checkpoint
from tools.stage import ask_status
from tools.terminal import Terminal

PATH = Path("/home/me/.expertd/config.toml")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(variable(key), raising=False)


# -- which source wins -------------------------------------------------------------------------------------------------


def merged(key: str, flag: object = None, variable_is: str | None = None, file: object = None, **options: Any) -> Any:
    environment = {} if variable_is is None else {variable(key): variable_is}
    found = merge({key: flag}, environment, {} if file is None else {key: file}, PATH, **options)
    return astuple(getattr(found, key))


FLAG, ENVIRONMENT, FILE, DEFAULT = Source


@pytest.mark.parametrize(
    ("key", "flag", "variable_is", "file", "expected"),
    [
        ("budget", "1GB", "2GB", "3GB", (10**9, FLAG)),
        ("budget", None, "2GB", "3GB", (2 * 10**9, ENVIRONMENT)),
        ("budget", None, None, "3GB", (3 * 10**9, FILE)),
        ("budget", None, None, 4096, (4096, FILE)),
        ("budget", None, "4096", None, (4096, ENVIRONMENT)),
        ("budget", None, None, None, (None, DEFAULT)),
        ("budget", "auto", "2GB", "3GB", (None, FLAG)),
        ("budget", None, "auto", "3GB", (None, ENVIRONMENT)),
        ("budget", None, None, "auto", (None, FILE)),
        ("budget", None, "", "3GB", (3 * 10**9, FILE)),
        ("keep_alive", 1.0, "2", 3, (1.0, FLAG)),
        ("keep_alive", 0.0, "2", 3, (0.0, FLAG)),
        ("keep_alive", None, "2.5", 3, (2.5, ENVIRONMENT)),
        ("keep_alive", None, None, 3, (3, FILE)),
        ("keep_alive", None, None, 0.5, (0.5, FILE)),
        ("keep_alive", None, None, None, (None, DEFAULT)),
        ("idle_exit", 1.0, "2", 3, (1.0, FLAG)),
        ("idle_exit", None, "2", 3, (2.0, ENVIRONMENT)),
        ("idle_exit", None, None, 3, (3, FILE)),
        ("idle_exit", None, None, 0, (0, FILE)),
        ("idle_exit", float("inf"), None, 3, (None, FLAG)),
        ("idle_exit", None, "inf", 3, (None, ENVIRONMENT)),
        ("idle_exit", None, None, float("inf"), (None, FILE)),
        ("idle_exit", None, None, 10**400, (None, FILE)),
        ("idle_exit", None, None, None, (None, DEFAULT)),
        ("policy", "lru", "lfu", "lcp", ("lru", FLAG)),
        ("policy", None, "lfu", "lcp", ("lfu", ENVIRONMENT)),
        ("policy", None, None, "lcp", ("lcp", FILE)),
        ("policy", None, None, None, ("forecast", DEFAULT)),
        ("background_rate", "200MB/s", "2GB", "3GB", (200 * 10**6, FLAG)),
        ("background_rate", None, "200MB", "3GB", (200 * 10**6, ENVIRONMENT)),
        ("background_rate", None, "1000000", None, (10**6, ENVIRONMENT)),
        ("background_rate", None, None, "1.5 GiB/s", (3 << 29, FILE)),
        ("background_rate", None, None, 10**6, (10**6, FILE)),
        ("background_rate", "inf", "2GB", None, (None, FLAG)),
        ("background_rate", None, "unlimited", "3GB", (None, ENVIRONMENT)),
        ("background_rate", None, None, float("inf"), (None, FILE)),
        ("background_rate", None, None, None, (None, DEFAULT)),
        ("read_ahead", False, "true", True, (False, FLAG)),
        ("read_ahead", None, "False", True, (False, ENVIRONMENT)),
        ("read_ahead", None, None, False, (False, FILE)),
        ("read_ahead", None, None, None, (True, DEFAULT)),
        ("model_folders", None, None, None, ((Path.home() / "models",), DEFAULT)),
        ("model_folders", None, None, [], ((), FILE)),
        ("model_folders", None, None, ["/a", "/b", "/a"], ((Path("/a"), Path("/b")), FILE)),
        ("model_folders", None, "/c:/d", ["/a"], ((Path("/c"), Path("/d")), ENVIRONMENT)),
        ("model_folders", ("/e",), "/c", ["/a"], ((Path("/e"),), FLAG)),
        ("model_folders", None, None, ["~/m"], ((Path.home() / "m",), FILE)),
    ],
)
def test_a_flag_wins_over_a_variable_and_that_over_the_file(
    key: str, flag: object, variable_is: str | None, file: object, expected: tuple[object, Source]
) -> None:
    assert merged(key, flag, variable_is, file) == expected


@pytest.mark.parametrize(
    ("name", "flag", "variable_is", "file", "expected"),
    [
        ("serve_port", 1, "2", {"serve": {"port": 3}}, (1, FLAG)),
        ("serve_port", None, "2", {"serve": {"port": 3}}, (2, ENVIRONMENT)),
        ("serve_port", None, None, {"serve": {"port": 3}}, (3, FILE)),
        ("serve_port", None, None, {"serve": {}}, (8080, DEFAULT)),
        ("serve_host", None, None, {"serve": {"host": "::1"}}, ("::1", FILE)),
        ("generate_max_tokens", None, "9", {}, (9, ENVIRONMENT)),
        ("generate_kv_bits", None, "8", {"generate": {"kv_bits": 4}}, (8, ENVIRONMENT)),
        ("serve_kv_bits", 16, "8", {"serve": {"kv_bits": 4}}, (None, FLAG)),
        ("generate_temperature", None, "0.5", {"generate": {"temperature": 1}}, (0.5, ENVIRONMENT)),
        ("log_level", None, "DEBUG", {"log": {"level": "error"}}, ("debug", ENVIRONMENT)),
        ("log_size", None, None, {"log": {"size": "1MiB"}}, (1 << 20, FILE)),
        ("log_count", None, "5", {}, (5, ENVIRONMENT)),
    ],
)
def test_a_section_s_settings_are_chosen_in_the_same_way(
    name: str, flag: object, variable_is: str | None, file: dict[str, object], expected: tuple[object, Source]
) -> None:
    environment = {} if variable_is is None else {variable(name): variable_is}
    assert astuple(getattr(merge({name: flag}, environment, file, PATH), name)) == expected


@pytest.mark.parametrize(
    ("flag", "variable_is", "file", "expected"),
    [
        (None, None, None, (900, DEFAULT)),
        (None, None, 60, (60, FILE)),
        (None, None, float("inf"), (None, FILE)),
        (None, "30", 60, (30.0, ENVIRONMENT)),
        (5.0, "30", 60, (5.0, FLAG)),
    ],
)
def test_what_a_user_has_set_wins_over_the_idle_exit_of_a_start_on_demand(
    flag: float | None, variable_is: str | None, file: object, expected: tuple[object, Source]
) -> None:
    assert merged("idle_exit", flag, variable_is, file, default_idle_exit_s=900) == expected


# -- what is refused ---------------------------------------------------------------------------------------------------

IN_FILE = f" in {PATH}: "


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"bugdet": "1GB"}, f"'bugdet' in {PATH} is not a setting; did you mean 'budget'? There are: budget, "),
        ({"idle-exit": 1}, "did you mean 'idle_exit'? "),
        ({"Policy": "lru"}, "did you mean 'policy'? "),
        ({"daemon": {"budget": 1}}, "'daemon' in"),
        ({"zzz": 1}, f"'zzz' in {PATH} is not a setting; there are: budget, keep_alive, idle_exit, policy, back"),
        ({"budget": "much"}, f"budget{IN_FILE}'much' is not a size; write for example 512MB"),
        ({"budget": 0}, f"budget{IN_FILE}'0' is no size"),
        ({"budget": -1}, f"budget{IN_FILE}'-1' is not a size"),
        ({"budget": 1.5}, f'budget{IN_FILE}1.5 is not a size; write text as "8GiB" or "auto", or a whole number'),
        ({"budget": True}, f"budget{IN_FILE}True is not a size"),
        ({"budget": ["1GB"]}, f"budget{IN_FILE}['1GB'] is not a size"),
        ({"keep_alive": "60"}, f"keep_alive{IN_FILE}'60' is not a number of seconds; write 0 or more, or inf"),
        ({"keep_alive": False}, f"keep_alive{IN_FILE}False is not"),
        ({"keep_alive": -1}, f"keep_alive{IN_FILE}-1 is not"),
        ({"idle_exit": float("nan")}, f"idle_exit{IN_FILE}nan is not"),
        ({"policy": "lruu"}, f"policy{IN_FILE}'lruu' is not a policy; did you mean 'lru'? There are: forecast, "),
        ({"background_rate": "fast"}, f"background_rate{IN_FILE}'fast' is not a rate in bytes a second; write for ex"),
        ({"background_rate": 0}, f"background_rate{IN_FILE}'0' is not a rate"),
        ({"background_rate": 2e8}, f"background_rate{IN_FILE}200000000.0 is not a rate; write text as \"200MB/s\""),
        ({"background_rate": True}, f"background_rate{IN_FILE}True is not a rate"),
        ({"background_rate": float("nan")}, f"background_rate{IN_FILE}nan is not a rate"),
        ({"read_ahead": 1}, f"read_ahead{IN_FILE}1 is neither true nor false"),
        ({"port": 1}, f"'port' in {PATH} belongs below a line [serve]"),
        ({"serv": {"port": 1}}, f"'serv' in {PATH} is not a setting; did you mean '[serve]'? There are: budget, "),
        ({"serve": 8080}, f"serve in {PATH} is a section; write its keys below a line [serve]"),
        ({"serve": {"prot": 1}}, f"'prot' in [serve] of {PATH} is not a setting; did you mean 'port'? There are: host"),
        ({"serve": {"port": 65536}}, f"port in [serve] of {PATH}: 65536 is not a port; write a whole number from 1"),
        ({"serve": {"port": True}}, "True is not a port"),
        ({"serve": {"port": "8080"}}, "'8080' is not a port"),
        ({"serve": {"host": ""}}, "'' is not an address to listen on"),
        ({"serve": {"api_key_file": 5}}, "5 is not a file; write its path as text"),
        ({"serve": {"api_key_file": "keys"}}, "'keys' is relative, but to what?"),
        ({"serve": {"allow_hosts": "a.local"}}, "'a.local' is not a list of host names"),
        ({"serve": {"allow_hosts": ["http://a.local"]}}, "'http://a.local' is not the name of a host"),
        ({"serve": {"allow_hosts": ["*"]}}, "'*' is not the name of a host"),
        ({"serve": {"allow_origins": ["*"]}}, "'*' would let every page that you visit use your models"),
        ({"serve": {"allow_origins": ["https://a.example/x"]}}, "'https://a.example/x' is not an origin"),
        ({"serve": {"allow_origins": ["a.example"]}}, "'a.example' is not an origin"),
        ({"generate": {"max_tokens": 0}}, "0 is not a number of tokens"),
        ({"generate": {"kv_bits": 3}}, "3 is not a number of bits; write 8 or 4, or 16 to quantize nothing"),
        ({"serve": {"kv_bits": True}}, "True is not a number of bits"),
        ({"generate": {"temperature": -0.1}}, "-0.1 is not a temperature"),
        ({"generate": {"temperature": float("nan")}}, "nan is not a temperature"),
        ({"log": {"level": "loud"}}, "'loud' is not a level; there are: debug, info, warning, error"),
        ({"log": {"format": "jsn"}}, "'jsn' is not a format; did you mean 'json'?"),
        ({"log": {"size": "1kB"}}, f"size in [log] of {PATH}: '1kB' is too small for a log; write at least 64KiB"),
        ({"log": {"count": 1}}, "1 is not a number of log files; write a whole number from 2 to 100"),
        ({"model_folders": "/a"}, f"model_folders{IN_FILE}'/a' is not a list of folders; write for example"),
        ({"model_folders": ["a"]}, f"model_folders{IN_FILE}'a' is relative, but to what?"),
        ({"model_folders": ["~nobody-here/m"]}, f"model_folders{IN_FILE}'~nobody-here/m': there is no user 'nobody-he"),
        ({"serve": {"api_key_file": "~nobody-here"}}, f"api_key_file in [serve] of {PATH}: '~nobody-here': there is "),
        ({"generate": {"temperature": 10**400}}, "is not a temperature; write 0 or more"),
        ({"generate": {"max_tokens": 10**400}}, "is not a number of tokens; write a whole number from 1 to 1000000000"),
        ({"policy": 3}, f"policy{IN_FILE}3 is not a policy; there are: forecast, "),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_key_and_the_way_out(file: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        merge({}, {}, file, PATH)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"EXPERTD_BUDGET": "much"}, "EXPERTD_BUDGET: 'much' is not a size; write for example 512MB"),
        ({"EXPERTD_KEEP_ALIVE": "long"}, "EXPERTD_KEEP_ALIVE: 'long' is not a number of seconds"),
        ({"EXPERTD_IDLE_EXIT": "-1"}, "EXPERTD_IDLE_EXIT: -1.0 is not a number of seconds"),
        ({"EXPERTD_POLICY": "LRU"}, "EXPERTD_POLICY: 'LRU' is not a policy; did you mean 'lru'?"),
    ],
)
def test_a_mistake_in_a_variable_is_told_with_its_name(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        merge({}, environment, {}, PATH)
    assert caught.value.message.startswith(words)


def test_a_mistake_is_told_even_where_something_else_wins() -> None:
    with pytest.raises(ConfigInvalid, match="'much'"):
        merge({"budget": "1GB"}, {"EXPERTD_BUDGET": "2GB"}, {"budget": "much"}, PATH)


def test_a_wrong_flag_is_told_by_its_name_and_a_wrong_size_as_anywhere_else() -> None:
    with pytest.raises(ConfigInvalid, match=r"^--idle-exit: -1 is not"):
        merge({"idle_exit": -1}, {}, {}, PATH)
    with pytest.raises(SizeInvalid, match=r"^'much' is not"):
        merge({"budget": "much"}, {}, {}, PATH)
    with pytest.raises(SizeInvalid, match=r"^'fast' is not a rate .* 200MB/s, or inf for no limit$"):
        merge({"background_rate": "fast"}, {}, {}, PATH)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_without_a_file_all_is_as_by_default(home: Home) -> None:
    found = read_config(home)
    assert {getattr(found, key).source for key in KEYS} == {Source.DEFAULT}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"budget = 8GiB\n", "is not TOML (Expected newline"),
        (b"budget = auto\n", "is not TOML (Invalid value"),
        (b"budget\n", "at line 1"),
        (b'budget = "1GB"\nbudget = "2GB"\n', "is not TOML (Cannot overwrite a value"),
        (b"policy = '\xff'\n", "is not TOML ('utf-8' codec"),
        (b"budget = " + b"9" * 5000, "is not TOML (Exceeds the limit"),
    ],
)
def test_what_is_no_toml_is_told_with_the_place_and_the_way_out(text: bytes, why: str, home: Home) -> None:
    home.config.write_bytes(text)
    with pytest.raises(ConfigInvalid) as caught:
        read_config(home)
    assert caught.value.message.startswith(f"{home.config} ")
    assert why in caught.value.message
    assert caught.value.message.endswith('(text needs quotes, as in budget = "8GiB"), or remove it')


def test_a_file_that_cannot_be_read_is_told(home: Home) -> None:
    home.config.mkdir()
    with pytest.raises(ConfigInvalid, match=r"config\.toml cannot be read \(Is a directory\)"):
        read_config(home)


# -- daemons -----------------------------------------------------------------------------------------------------------

RUN = """
import sys
import expertd.daemon.__main__ as daemon

class Server:
    def __init__(self, home, size, policy, *, idle_exit_s, keep_alive_s, background_rate, reads_ahead, **others):
        print(size, policy.__name__, idle_exit_s, keep_alive_s, background_rate, reads_ahead)

    async def run(self):
        pass

daemon.Server = Server
sys.exit(daemon.main())
"""
"""``python -m expertd.daemon`` with a server that only says what it was made with."""

SETTINGS = (
    'budget = "1MiB"\nkeep_alive = 60\nidle_exit = 30\npolicy = "lru"\nbackground_rate = "9MB/s"\nread_ahead = false\n'
)


def made_with(*flags: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", RUN, *flags], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_each_setting_reaches_the_daemon(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.config.write_text(SETTINGS)
    assert made_with() == "1048576 LRU 30.0 60.0 9000000 False\n"
    monkeypatch.setenv("EXPERTD_POLICY", "lfu")
    monkeypatch.setenv("EXPERTD_IDLE_EXIT", "inf")
    assert made_with("--keep-alive", "5") == "1048576 LFU None 5.0 9000000 False\n"
    flags = ("--budget", "2MiB", "--policy", "ewma", "--idle-exit", "7", "--background-rate", "1MB", "--read-ahead")
    assert made_with(*flags) == "2097152 EWMA 7.0 60.0 1000000 True\n"


def test_daemon_run_takes_the_file_and_ends_when_it_says(home: Home) -> None:
    home.config.write_text('budget = "1MiB"\nidle_exit = 0.5\n')
    assert expertd("daemon", "run").returncode == 0


def test_a_daemon_that_is_started_on_demand_takes_the_file(own_home: Home) -> None:
    own_home.config.write_text('budget = "1MiB"\nidle_exit = 3600\n')
    said: list[str] = []
    connection, started = connect_or_start(own_home, "test", announce=said.append)
    connection.close()
    assert started
    assert ask_status(own_home).budget_bytes == 1 << 20
    assert said == [
        f"started a daemon (process {connection.daemon.pid}); it ends after 60 idle minutes, "
        "or with: expertd daemon stop"
    ]


@pytest.mark.parametrize(
    ("idle_exit", "when"),
    [("90", "after 90 idle seconds, or with: "), ("inf", "with: "), ("", "after 15 idle minutes, or with: ")],
)
def test_a_start_on_demand_announces_when_the_daemon_ends(
    own_home: Home, monkeypatch: pytest.MonkeyPatch, idle_exit: str, when: str
) -> None:
    monkeypatch.setenv("EXPERTD_IDLE_EXIT", idle_exit)
    said: list[str] = []
    connect_or_start(own_home, "test", budget="1MiB", announce=said.append)[0].close()
    assert f"; it ends {when}" in said[0]


def test_a_daemon_that_is_started_on_demand_ends_when_the_file_says(own_home: Home) -> None:
    own_home.config.write_text("idle_exit = 0\n")
    connect_or_start(own_home, "test", budget="1MiB")[0].close()
    wait_for(lambda: not own_home.daemon_socket.exists())


def test_what_starts_a_daemon_on_demand_gets_the_mistake_and_starts_none(home: Home) -> None:
    home.config.write_text('bugdet = "1MiB"\n')
    with pytest.raises(ConfigInvalid, match="did you mean 'budget'"):
        connect_or_start(home, "test")
    assert not home.daemon_log.exists()


def test_a_daemon_that_runs_is_used_whatever_the_file_says(own_home: Home) -> None:
    connect_or_start(own_home, "test", budget="1MiB")[0].close()
    own_home.config.write_text("nonsense")
    connection, started = connect_or_start(own_home, "test")
    connection.close()
    assert not started


MISTAKE = "'long' is not a number of seconds; write 0 or more, or inf for no limit"


@pytest.mark.parametrize("command", ["daemon run", "config show", "config check", "generate", "serve"])
def test_a_command_tells_a_mistake_in_one_sentence(command: str, home: Home, checkpoints: dict[str, Path]) -> None:
    home.config.write_text("keep_alive = 'long'\n")
    more = {"generate": [str(checkpoints["stacked"]), "hello"], "serve": [str(checkpoints["stacked"]), "--port", "0"]}
    done = expertd(*command.split(), *more.get(command, []))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"expertd: keep_alive in {home.config}: {MISTAKE} [config_invalid]\n"


def test_a_mistake_is_an_object_where_json_is_asked_for(home: Home) -> None:
    home.config.write_text("keep_alive = 'long'\n")
    done = expertd("config", "show", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert json.loads(done.stderr)["error"] == {
        "code": "config_invalid", "message": f"keep_alive in {home.config}: {MISTAKE}", "exit_status": 2
    }  # fmt: skip


# -- what commands take from it ----------------------------------------------------------------------------------------


def test_each_setting_has_a_section_a_flag_and_a_variable_of_its_own() -> None:
    assert len({key.variable for key in KEYS.values()}) == len(KEYS)
    assert len({(key.section, key.word) for key in KEYS.values()}) == len(KEYS)
    assert {key.dotted: (key.flag, key.variable) for key in KEYS.values() if key.section} == {
        "serve.host": ("--host", "EXPERTD_SERVE_HOST"),
        "serve.port": ("--port", "EXPERTD_SERVE_PORT"),
        "serve.api_key_file": ("--api-key-file", "EXPERTD_SERVE_API_KEY_FILE"),
        "serve.allow_hosts": ("--allow-host", "EXPERTD_SERVE_ALLOW_HOSTS"),
        "serve.allow_origins": ("--allow-origin", "EXPERTD_SERVE_ALLOW_ORIGINS"),
        "serve.kv_bits": ("--kv-bits", "EXPERTD_SERVE_KV_BITS"),
        "serve.ttl": ("--ttl", "EXPERTD_SERVE_TTL"),
        "serve.deadline": ("--deadline", "EXPERTD_SERVE_DEADLINE"),
        "generate.max_tokens": ("--max-tokens", "EXPERTD_GENERATE_MAX_TOKENS"),
        "generate.temperature": ("--temperature", "EXPERTD_GENERATE_TEMPERATURE"),
        "generate.kv_bits": ("--kv-bits", "EXPERTD_GENERATE_KV_BITS"),
        "log.level": ("--log-level", "EXPERTD_LOG"),
        "log.format": ("--log-format", "EXPERTD_LOG_FORMAT"),
        "log.size": ("--log-size", "EXPERTD_LOG_SIZE"),
        "log.count": ("--log-count", "EXPERTD_LOG_COUNT"),
    }


def test_each_setting_has_its_flag_on_some_command() -> None:
    def flags(command: click.Command) -> set[str]:
        found = {flag for parameter in command.params for flag in parameter.opts}
        if isinstance(command, click.Group):
            context = click.Context(command)
            inner = filter(None, (command.get_command(context, name) for name in command.list_commands(context)))
            found |= {flag for one in inner for flag in flags(one)}
        return found

    assert {key.flag for key in KEYS.values()} <= flags(main)


def test_models_are_looked_for_in_the_folders_that_a_flag_names(home: Home, tmp_path: Path) -> None:
    home.config.write_text("model_folders = []\n")
    write_checkpoint(tmp_path / "one" / "Tiny-MoE", "qwen3_moe")
    here = ["models", "--model-folder", str(tmp_path / "one"), "--json"]
    found = json.loads(CliRunner().invoke(main, here).stdout)["models"]
    assert [model["name"] for model in found if str(tmp_path) in model["path"]] == ["Tiny-MoE"]
    assert "EXPERTD_MODEL_FOLDERS" not in os.environ, "it was for that command alone"
    refused = CliRunner().invoke(main, ["plan", "Tiny-MoE", "--model-folder", str(tmp_path / "two")])
    assert refused.exit_code == 2
    assert "two is no folder" in refused.output


@pytest.mark.parametrize("name", KEYS)
def test_the_example_of_a_setting_can_be_written_into_the_file(name: str) -> None:
    key = KEYS[name]
    head = f"[{key.section}]\n" if key.section else ""
    file = tomllib.loads(f"{head}{key.word} = {key.example}\n")
    assert getattr(merge({}, {}, file, PATH), name).source is Source.FILE
    assert key.default is None or key.check(key.default) is not None


def test_generate_answers_as_long_and_as_freely_as_the_file_says(own_home: Home, checkpoints: dict[str, Path]) -> None:
    own_home.config.write_text("[generate]\nmax_tokens = 3\n")
    model = str(checkpoints["stacked"])
    short = expertd("generate", model, "hello", "--budget", "64MiB").stdout
    longer = expertd("generate", model, "hello", "--max-tokens", "6").stdout
    assert longer.startswith(short.rstrip("\n")) and len(longer) > len(short)
    refused = expertd("generate", model, "hello", "--temperature", "-1")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "expertd: --temperature: -1.0 is not a temperature; write 0 or more (0 is greedy) " + (
        "[config_invalid]\n"
    )


def test_serve_listens_where_the_file_says(home: Home, checkpoints: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        home.config.write_text(f"[serve]\nport = {port}\n")
        done = expertd("serve", str(checkpoints["stacked"]))
        assert done.returncode == 5
        assert done.stderr.startswith(f"expertd: 127.0.0.1:{port} is taken")


# -- expertd config ----------------------------------------------------------------------------------------------------


def test_config_show_tells_each_setting_and_where_it_comes_from(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.config.write_text(
        'budget = "2GiB"\nidle_exit = 60\nbackground_rate = "200MB/s"\nmodel_folders = ["/a", "/b"]\n'
        '[serve]\nport = 0\nallow_hosts = ["A.local", "b.local"]\n[log]\nlevel = "debug"\n'
    )
    monkeypatch.setenv("EXPERTD_IDLE_EXIT", "120")
    monkeypatch.setenv("EXPERTD_LOG", "warning")
    monkeypatch.setenv("EXPERTD_SERVE_API_KEY_FILE", "/keys")
    assert expertd("config", "show").stdout.splitlines() == [
        f"file                  {home.config}",
        "budget                2.1 GB  (config.toml)",
        "keep_alive            when memory is needed  (default)",
        "idle_exit             120 s  (EXPERTD_IDLE_EXIT)",
        "policy                forecast  (default)",
        "background_rate       200 MB/s  (config.toml)",
        "read_ahead            where it pays  (default)",
        "remember              yes  (default)",
        "model_folders         /a, /b  (config.toml)",
        "serve.host            127.0.0.1  (default)",
        "serve.port            0  (config.toml)",
        "serve.api_key_file    /keys  (EXPERTD_SERVE_API_KEY_FILE)",
        "serve.allow_hosts     a.local, b.local  (config.toml)",
        "serve.allow_origins   none  (default)",
        "serve.kv_bits         16: not quantized  (default)",
        "serve.ttl             900 s  (default)",
        "serve.deadline        no limit  (default)",
        "generate.max_tokens   256  (default)",
        "generate.temperature  0  (default)",
        "generate.kv_bits      16: not quantized  (default)",
        "log.level             warning  (EXPERTD_LOG)",
        "log.format            text  (default)",
        "log.size              10.0 MB  (default)",
        "log.count             3  (default)",
    ]
    found = json.loads(expertd("config", "show", "--json").stdout)
    assert found["file"] == str(home.config)
    assert list(found["settings"]) == [key.dotted for key in KEYS.values()]
    assert found["settings"]["budget"] == {"value": 2 << 30, "source": "file"}
    assert found["settings"]["keep_alive"] == {"value": None, "source": "default"}
    assert found["settings"]["idle_exit"] == {"value": 120, "source": "environment"}
    assert found["settings"]["read_ahead"] == {"value": True, "source": "default"}
    assert found["settings"]["model_folders"] == {"value": ["/a", "/b"], "source": "file"}
    assert found["settings"]["serve.port"] == {"value": 0, "source": "file"}


def test_config_show_says_that_there_is_no_file_and_creates_nothing(home: Home) -> None:
    lines = expertd("config", "show").stdout.splitlines()
    assert lines[0] == f"file                  {home.config}, which is not there"
    assert lines[1] == "budget                auto: what the machine can spare  (default)"
    assert lines[3] == "idle_exit             never; a daemon that is started on demand: 900 s  (default)"
    assert all(line.endswith("  (default)") for line in lines[1:])
    assert not home.config.exists()


def test_config_path_names_the_file(home: Home) -> None:
    assert expertd("config", "path").stdout == f"{home.config}\n"
    assert json.loads(expertd("config", "path", "--json").stdout) == {"file": str(home.config), "exists": False}


def test_config_check_says_whether_all_can_be_used(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expertd("config", "check").stdout == f"{home.config} is not there, and need not be: all else can be used\n"
    home.config.write_text('budget = "1GB"\n[log]\ncount = 4\n')
    monkeypatch.setenv("EXPERTD_BUGDET", "1GB")
    monkeypatch.setenv("EXPERTD_OF_SOMEBODY_ELSE", "1")
    done = expertd("config", "check")
    assert (done.returncode, done.stdout) == (0, f"{home.config} can be used (2 settings)\n")
    assert done.stderr == "expertd: the variable EXPERTD_BUGDET is not a setting; did you mean EXPERTD_BUDGET?\n"
    done = expertd("config", "check", "--json")
    assert (json.loads(done.stdout), done.stderr) == ({
        "file": str(home.config), "exists": True, "settings_in_file": 2,
        "misspelt": [{"variable": "EXPERTD_BUGDET", "meant": "EXPERTD_BUDGET"}],
    }, "")  # fmt: skip


def test_config_show_fits_the_terminal(home: Home) -> None:
    home.config.write_text(f"model_folders = {[f'/a/folder/of/models/{n}' for n in range(8)]}\n")
    with Terminal("config", "show", columns=60) as terminal:
        assert terminal.ended() == 0
        shown = terminal.text.splitlines()
    assert max(map(len, shown)) <= 60
    assert shown[shown.index("model_folders         /a/folder/of/models/0,") + 1] == " " * 22 + "/a/folder/of/models/1,"


def test_an_error_fits_the_terminal_and_is_one_line_in_a_pipe(home: Home) -> None:
    home.config.write_text("budget = 'much'\n")
    for arguments in (["config", "check"], ["serve", "nowhere", "--port", "seventy", "--alias", "x" * 40]):
        whole = expertd(*arguments).stderr.splitlines()[-1]
        with Terminal(*arguments, columns=60) as terminal:
            assert terminal.ended() == 2
            shown = terminal.text.splitlines()
        assert len(whole) > 60 >= max(map(len, shown))
        assert " ".join(shown).endswith(whole)


def test_a_live_change_of_the_budget_is_not_written_down(own_home: Home) -> None:
    own_home.config.write_text(SETTINGS)
    connect_or_start(own_home, "test")[0].close()
    assert expertd("budget", "3MB").returncode == 0
    assert own_home.config.read_text() == SETTINGS
