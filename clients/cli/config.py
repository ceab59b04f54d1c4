"""``expertd config show | path | check``: the settings, and where each comes from.

Flags are left out: they belong to the command that they are given to.  What a daemon does that runs is ``status``.
What settings there are is the table in ``expertd.protocol.config``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from expertd.clients.cli.group import Group
from expertd.clients.cli.parameters import json_option
from expertd.clients.cli.wrap import note
from expertd.clients.terminal.fit import beside, folded, width_of
from expertd.protocol.config import KEYS, Config, Key, Setting, Source, near, read_config
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import IDLE_EXIT_S

OTHER_VARIABLES = ("EXPERTD_HOME",)
"""Variables that are no settings."""


@click.group(cls=Group)
def config() -> None:
    """Show the settings, and where each comes from.

    A flag of a command comes before a variable of the environment, that before the file, and that before the default.
    The file is config.toml in the home (EXPERTD_HOME); 'expertd config show' names it, and lists all settings.
    """


@config.command()
@json_option("Print one JSON object; null: auto, or no limit.")
def show(as_json: bool) -> None:
    """Show each setting and where it comes from.

    That is the environment, the file or a default.  A daemon that runs already keeps what it was started with.  Exits
    with 2 if a setting cannot be used.
    """
    home = Home.current()
    found = read_config(home)
    if as_json:
        click.echo(json.dumps(as_object(home, found), indent=2))
        return
    for line in table(home, found, width_of(sys.stdout)):
        click.echo(line)


@config.command()
@json_option()
def path(as_json: bool) -> None:
    """Print where config.toml is.

    It need not be there: $EDITOR "$(expertd config path)" begins one.
    """
    home = Home.current()
    home.check()
    found = {"file": str(home.config), "exists": home.config.exists()}
    click.echo(json.dumps(found, indent=2) if as_json else home.config)


@config.command()
@json_option()
def check(as_json: bool) -> None:
    """Say whether all settings can be used.

    So a mistake is found before something is started with it.  A variable that looks like a setting but is none is
    noted on stderr.  Exits with 2 if one cannot be used, and says which, and what can be written there.
    """
    home = Home.current()
    found = read_config(home)
    near_misses, exists = misspelt(os.environ), home.config.exists()
    said = sum(setting.source is Source.FILE for _, setting in _settings(found))
    if as_json:
        names = [{"variable": name, "meant": meant} for name, meant in near_misses]
        shown = {"file": str(home.config), "exists": exists, "settings_in_file": said, "misspelt": names}
        click.echo(json.dumps(shown, indent=2))
        return
    for name, meant in near_misses:
        note(f"the variable {name} is not a setting; did you mean {meant}?")
    words = (
        f"can be used ({said} {'setting' if said == 1 else 'settings'})"
        if exists
        else "is not there, and need not be: all else can be used"
    )
    for line in folded(f"{home.config} {words}", width_of(sys.stdout)):
        click.echo(line)


def misspelt(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Variables that look like settings and are none, each with the one that may have been meant."""
    known = [*(key.variable for key in KEYS.values()), *OTHER_VARIABLES]
    lower = {name.lower(): name for name in known}
    found = []
    for name in environment:
        if name.startswith("EXPERTD_") and name not in known and (meant := near(name, list(lower), 0.85)):
            found.append((name, lower[meant]))
    return found


def as_object(home: Home, found: Config) -> dict[str, object]:
    """The object that ``--json`` prints: settings by their names, those of a section as ``serve.port``."""
    settings = {
        key.dotted: {
            "value": _as_json(setting.value),
            "source": setting.source,
        }
        for key, setting in _settings(found)
    }
    return {"file": str(home.config), "settings": settings}


def _as_json(value: Any) -> object:
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def table(home: Home, found: Config, columns: int | None = None) -> list[str]:
    """The settings as lines for a person, as wide as ``columns`` (None: a line each)."""
    there = "" if home.config.exists() else ", which is not there"
    width = max(len(key.dotted) for key in KEYS.values())
    lines = beside(f"{'file':{width}}  ", f"{home.config}{there}", columns)
    for key, setting in _settings(found):
        origin = {Source.ENVIRONMENT: key.variable, Source.FILE: "config.toml"}.get(setting.source, setting.source)
        shown = key.shown(setting.value)
        if key.name == "idle_exit" and setting.source is Source.DEFAULT:
            shown += f"; a daemon that is started on demand: {IDLE_EXIT_S} s"
        lines += beside(f"{key.dotted:{width}}  ", f"{shown}  ({origin})", columns)
    return lines


def _settings(found: Config) -> list[tuple[Key, Setting[Any]]]:
    return [(key, getattr(found, name)) for name, key in KEYS.items()]
