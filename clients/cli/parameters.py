"""Parameters that several commands take: one help text, one check, one completion; and the model that may have to be
fetched first.

What a setting is called and what it may be is the table in ``expertd.protocol.config``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from expertd.protocol.config import KEYS
from expertd.protocol.errors import ExpertdError, ModelIncomplete, ModelNotHere
from expertd.protocol.model_names import find_model, hub_id
from expertd.protocol.paths import Home, expanded
from expertd.protocol.sizes import parse_budget, show_size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


def config_option(
    name: str, *, note: str = "", callback: Callable[..., Any] | None = None, expose: bool = True
) -> Callable[[F], F]:
    """The flag of a setting; what is not given is None, and ``read_config`` then looks elsewhere.

    Args:
        name: of ``KEYS``; the command's parameter has the same name.
        note: a few words before the help's full stop.
        expose: whether it is a parameter of the command; else the callback does all, before others are looked at.
    """
    key = KEYS[name]
    help = key.help[0].upper() + key.help[1:].removesuffix(".") + f"{note}.  [default: {key.default_shown}]"
    if key.default is True:
        return click.option(f"{key.flag}/--no-{key.flag[2:]}", name, default=None, help=help)
    kinds: dict[type, Any] = {int: int, float: float}
    kind = click.Choice(key.choices) if key.choices else kinds.get(type(key.read("1")), str)
    metavar = None if key.choices else key.form
    if key.form == "FILE":
        kind = click.Path(dir_okay=False, resolve_path=True)
    several = isinstance(key.default, tuple)
    if several:
        kind = str
        callback = callback or (lambda ctx, param, value: value or None)
    return click.option(
        key.flag, name, type=kind, metavar=metavar, multiple=several, callback=callback, help=help,
        expose_value=expose, is_eager=not expose,
    )  # fmt: skip


def log_options(command: F) -> F:
    """The flags of all settings of logs; the command passes them to ``read_config``."""
    for name in reversed([name for name, key in KEYS.items() if key.section == "log"]):
        command = config_option(name)(command)
    return command


def _checked(ctx: click.Context, param: click.Parameter, budget: str | None) -> str | None:
    """Refuse a wrong budget before the command does anything.  It is passed on as it was written."""
    if budget is not None:
        parse_budget(budget)
    return budget


def _checked_and_told(ctx: click.Context, param: click.Parameter, budget: str | None) -> str | None:
    """As ``_checked``; and say so where a daemon runs already, with another budget, because that one stays."""
    if _checked(ctx, param, budget) is None or ctx.resilient_parsing:
        return budget
    from expertd.clients.cli.wrap import note
    from expertd.protocol.quick import quick_status

    answer = quick_status(str(Home.current().root))
    if answer is not None and (has := json.loads(answer)["budget_bytes"]) != parse_budget(str(budget)):
        note(
            f"--budget {budget} changes nothing: a daemon runs already, with {show_size(has)}; "
            f"change it with: expertd budget {budget}"
        )
    return budget


def _look_there(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> None:
    """While the command runs, it and what it starts look for models by name in these folders instead of others."""
    if not given or ctx.resilient_parsing:
        return
    folders = [expanded(folder).absolute() for folder in given]
    for folder in folders:
        if not folder.is_dir():
            raise click.BadParameter(f"{folder} is no folder")
        if os.pathsep in str(folder):
            raise click.BadParameter(f"{folder} has a {os.pathsep!r} in its name; write it into config.toml")
    name = KEYS["model_folders"].variable
    before = os.environ.get(name)
    os.environ[name] = os.pathsep.join(map(str, folders))
    ctx.call_on_close(lambda: os.environ.pop(name) if before is None else os.environ.update({name: before}))


model_folder_option = config_option(
    "model_folders", note="; may be given several times", callback=_look_there, expose=False
)
"""Of commands that take a MODEL by its name."""

budget_option = config_option("budget", note="; if this starts a daemon", callback=_checked_and_told)
worker_budget_option = config_option("budget", note="; if this starts a daemon", callback=_checked)
"""The same for a gateway's worker, whose gateway has told it."""


def find_or_pull(model: str) -> Path:
    """The folder of MODEL; on a terminal the user may have a model of the hub that is not here downloaded first.

    Raises:
        ExpertdError: as ``find_model``; or the hub has no such model, or does not answer, or the download broke off.
    """
    try:
        return find_model(model)
    except (ModelNotHere, ModelIncomplete) as missing:
        wanted = hub_id(model)
        on_terminal = sys.stdin.isatty() and sys.stderr.isatty()
        if wanted is None or "/" not in wanted[0] or Path(model).parent.is_dir() or not on_terminal:
            raise
        click.echo(f"expertd: {missing.message.partition(';')[0]}", err=True)
        _offer(*wanted, missing)
    return find_model(model)


def _offer(id: str, revision: str | None, missing: ExpertdError) -> None:
    """Download a model if the user says so; else raise ``missing``."""
    # Late, because it imports what speaks HTTP.
    from expertd.clients.cli.pull import fetch
    from expertd.clients.hub.download import look_up

    found = look_up(id, revision)
    if not click.confirm(f"Download {show_size(found.missing_bytes)} now?", err=True):
        raise missing
    fetch(found)


def json_option(help: str = "Print one JSON object.") -> Callable[[F], F]:
    """``--json`` of a command that reads, as its parameter ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For the shell: models in ``model_folders`` by their paths, and any folder.  Asks no network and no daemon."""
    from click.shell_completion import CompletionItem

    from expertd.protocol.config import read_config
    from expertd.protocol.errors import ExpertdError
    from expertd.protocol.paths import Home

    try:
        folders = read_config(Home.current()).model_folders.value
    except ExpertdError:
        folders = ()  # whoever runs the command is told
    found = []
    for config in (path for folder in folders for path in sorted(folder.glob("*/config.json"))):
        model = config.parent
        if str(model).startswith(incomplete) or (incomplete and model.name.startswith(incomplete)):
            found.append(CompletionItem(str(model)))
    return [*found, CompletionItem(incomplete, type="dir")]


def complete_loaded(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: the models that the daemon holds, if one runs."""
    from pathlib import Path

    from expertd.protocol.errors import ExpertdError
    from expertd.protocol.messages import AskStatus, Status
    from expertd.protocol.paths import Home
    from expertd.protocol.rendezvous import connect

    try:
        with connect(Home.current(), "cli") as connection:
            names = [Path(model.path).name for model in connection.ask(AskStatus(), Status, timeout_s=1.0).models]
    except ExpertdError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def complete_profile(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For the shell: the names of profiles."""
    from expertd.protocol.paths import Home
    from expertd.protocol.profiles import profile_names

    try:
        return [name for name in profile_names(Home.current()) if name.startswith(incomplete)]
    except ExpertdError:
        return []
