"""Commands keep to what ``docs/cli.md`` says of all of them; that document and the one of errors are current."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from expertd.clients.cli import COMMANDS, TOPICS, main
from expertd.protocol.errors import EXIT_STATUSES, error_classes
from expertd.protocol.paths import Home
from tests.conftest import StartDaemon
from tests.test_homes import expertd
from tools import cli_docs

ROOT = Path(__file__).parents[1]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


def commands(group: click.Group = main, path: str = "expertd") -> Iterator[tuple[str, click.Command]]:
    """All commands by what a user types."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{path} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")


ALL = dict(commands())


# -- documents ---------------------------------------------------------------------------------------------------------


def test_the_document_is_what_the_commands_say() -> None:
    assert cli_docs.PATH.read_text(encoding="utf-8") == cli_docs.document(), "run: python -m tools.cli_docs"


def test_help_fits_eighty_columns() -> None:
    long = [
        line for name in COMMANDS for _, help in cli_docs.helps(name) for line in help.splitlines() if len(line) > 80
    ]
    assert not long


@pytest.mark.parametrize("code", sorted(error_classes()))
def test_each_error_has_an_entry_that_says_what_to_do(code: str) -> None:
    found = re.search(rf"(?m)^\* `{code}` +(.+(?:\n  .+)*)", TROUBLE)
    assert found is not None, f"add an entry '* `{code}` ...' to docs/troubleshooting.md"
    assert len(found[1].split()) >= 8


def test_there_is_no_entry_of_an_error_that_there_is_not() -> None:
    entries = re.findall(r"(?m)^\* `([a-z_]+)` ", TROUBLE)
    assert len(entries) == len(set(entries))
    assert not set(entries) - set(error_classes())


def test_the_commands_that_the_document_of_errors_names_are_there() -> None:
    for words in re.findall(r"`expertd ([a-z]+(?: [a-z]+)?)", TROUBLE):
        assert f"expertd {words}" in ALL or f"expertd {words.split()[0]}" in ALL, words


# -- exit statuses -----------------------------------------------------------------------------------------------------


def test_each_error_ends_a_command_with_a_status_of_the_table() -> None:
    assert {cls.exit_status for cls in error_classes().values()} <= set(EXIT_STATUSES) - {0, 130}


@pytest.mark.parametrize("name", ALL)
def test_a_command_explains_only_statuses_of_the_table(name: str) -> None:
    said = re.findall(r"[Ee]xits with (\d+)|, (?:or )?with (\d+) if", " ".join((ALL[name].help or "").split()))
    assert {int(one or other) for one, other in said} <= set(EXIT_STATUSES)


def test_commands_end_with_no_other_status_by_themselves() -> None:
    ends: set[object] = set()
    for path in (ROOT / "clients" / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute) and node.args:
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in ("exit", "SystemExit") and isinstance(node.args[0], ast.Constant):
                    ends.add(node.args[0].value)
    assert ends <= set(EXIT_STATUSES)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 0, "Usage: expertd [OPTIONS]"),
        (["config"], 0, "Usage: expertd config [OPTIONS]"),
        (["-h"], 0, "Usage: expertd [OPTIONS]"),
        (["statsu"], 2, "there is no command 'statsu'; did you mean 'status'?"),
        (["config", "shwo"], 2, "there is no command 'shwo'; did you mean 'show'?"),
        (["config", "zzz"], 2, "there is no command 'zzz'; there are: "),
        (["status", "--jsn"], 2, "No such option"),
        (["budget", "1GB", "2GB"], 2, "unexpected extra argument"),
    ],
)
def test_a_wrong_command_line_is_told_with_the_way_out(arguments: list[str], status: int, words: str) -> None:
    done = CliRunner().invoke(main, arguments, prog_name="expertd")
    assert done.exit_code == status
    assert words in (done.stderr if status else done.stdout)
    assert not (done.stdout if status else done.stderr)


def test_with_json_a_wrong_command_line_is_an_object() -> None:
    done = CliRunner().invoke(main, ["status", "--jsn", "--json"], prog_name="expertd")
    assert (done.exit_code, done.stdout) == (2, "")
    error = json.loads(done.stderr)["error"]
    assert (error["code"], error["exit_status"]) == ("usage", 2)
    assert "--jsn" in error["message"]


def test_with_json_an_error_is_an_object(home: Home) -> None:
    for command in (["status"], ["budget"]):
        done = expertd(*command, "--json")
        assert (done.returncode, done.stdout) == (3, "")
        assert json.loads(done.stderr)["error"] == {
            "code": "daemon_not_running",
            "message": f"no daemon runs in {home.root}; start one with: expertd daemon run",
            "exit_status": 3,
        }


def test_budget_as_json_has_bytes(home: Home, start_daemon: StartDaemon) -> None:
    start_daemon("64MB")
    assert json.loads(expertd("budget", "--json").stdout) == {
        "budget_bytes": 64_000_000, "limit_bytes": 64_000_000, "used_bytes": 0
    }  # fmt: skip
    assert json.loads(expertd("budget", "32MB", "--json").stdout) == {
        "budget_bytes": 32_000_000, "before_bytes": 64_000_000
    }  # fmt: skip


def test_ctrl_c_ends_a_command_as_shells_have_it(home: Home) -> None:
    interrupted = (
        "import signal\n"
        "import expertd.clients.cli.status as status\n"
        "status.ask_status = lambda home: signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from expertd.clients.cli import main\n"
        "main(['status'])\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


# -- what all commands have in common ----------------------------------------------------------------------------------

READING = ("status", "budget", "config show", "logs", "trace show")


@pytest.mark.parametrize("name", READING)
def test_a_command_that_reads_prints_json_if_it_is_asked_to(name: str) -> None:
    assert any("--json" in option.opts for option in ALL[f"expertd {name}"].params)


@pytest.mark.parametrize("name", ALL)
def test_a_command_and_each_of_its_options_explain_themselves(name: str) -> None:
    command = ALL[name]
    assert command.help and command.help.split("\n")[0].rstrip()[0].isupper()
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help and option.help.split("  [")[0].endswith("."), option.opts


def test_what_options_of_one_name_take_is_called_the_same_everywhere() -> None:
    called: dict[str, set[str]] = {}
    for command in ALL.values():
        for option in command.params:
            if isinstance(option, click.Option) and not option.is_flag and not option.hidden:
                metavar = option.make_metavar(click.Context(command))
                called.setdefault(max(option.opts, key=len), set()).add(metavar)
                assert metavar not in ("INTEGER RANGE", "FLOAT RANGE", "INTEGER", "FLOAT", "TEXT", "PATH"), option.opts
    # Where something goes is a folder for one command and a file for another.
    differ = {name: words for name, words in called.items() if len(words) > 1 and name not in ("--output", "--worker")}
    assert not differ


def test_the_list_of_commands_is_grouped() -> None:
    said = CliRunner().invoke(main, ["--help"], prog_name="expertd").stdout
    for topic in TOPICS:
        assert f"\n{topic}:\n" in said
    for name, about in COMMANDS.items():
        assert re.search(rf"\n  {name} +{re.escape(about)}\n", said)


# -- completion --------------------------------------------------------------------------------------------------------


def completed(*words: str, **environment: str) -> list[str]:
    """What a shell would offer for the last of ``words``, as click tells zsh: kind, value and help by lines."""
    asked = {"_EXPERTD_COMPLETE": "zsh_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    program = "from expertd.clients.cli import main\nmain(prog_name='expertd')"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **asked, **environment}, capture_output=True, text=True
    )
    assert done.stderr == ""
    lines = done.stdout.strip("\n").splitlines()
    return [f"{kind}:{value}" for kind, value in zip(lines[::3], lines[1::3], strict=True)]


def test_a_shell_completes_commands_and_options(home: Home) -> None:
    assert completed("expertd", "co") == ["plain:config", "plain:completion"]
    assert completed("expertd", "config", "s") == ["plain:show"]
    assert "plain:--max-tokens" in completed("expertd", "generate", "--max")


def test_a_shell_completes_models_in_the_folders_of_the_settings_and_any_other(home: Home, tmp_path: Path) -> None:
    for name in ("qwen", "gpt", "no-model"):
        (tmp_path / name).mkdir()
        if name != "no-model":
            (tmp_path / name / "config.json").write_text("{}")
    home.config.write_text(f"model_folders = [{str(tmp_path)!r}, '/nowhere']\n")
    assert completed("expertd", "serve", "q") == [f"plain:{tmp_path}/qwen", "dir:q"]
    assert completed("expertd", "generate", str(tmp_path) + "/") == [
        f"plain:{tmp_path}/gpt", f"plain:{tmp_path}/qwen", f"dir:{tmp_path}/"
    ]  # fmt: skip
    home.config.write_text("nonsense")
    assert completed("expertd", "serve", "q") == ["dir:q"]
    assert completed("expertd", "unload", "q") == [], "no daemon runs"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_of_a_shell(shell: str) -> None:
    done = CliRunner().invoke(main, ["completion", shell], prog_name="expertd")
    assert done.exit_code == 0
    assert f"_EXPERTD_COMPLETE={shell}_complete" in done.stdout
    assert done.stderr == ""


def test_bash_takes_the_script(home: Home, tmp_path: Path) -> None:
    script = CliRunner().invoke(main, ["completion", "bash"], prog_name="expertd").stdout
    (tmp_path / "script").write_text(script)
    done = subprocess.run(
        ["bash", "-c", f"source {tmp_path}/script && complete -p expertd"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "_expertd_completion expertd" in done.stdout
