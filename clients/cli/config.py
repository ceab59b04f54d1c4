"""``expertd config show``: what a daemon would be started with, and where each setting comes from.

Flags are left out: they belong to the command that starts the daemon.  What a daemon does that runs is ``status``.
"""

from __future__ import annotations

import json
from typing import Any

import click

from expertd.protocol.config import KEYS, Config, Setting, Source, read_config, variable
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import IDLE_EXIT_S
from expertd.protocol.sizes import AUTO, show_size


@click.group()
def config() -> None:
    """Show the settings that daemons start with.

    \b
    They are the keys of config.toml in the home (EXPERTD_HOME):
      budget      as --budget ("8GiB"), or a number of bytes
      keep_alive  seconds until a model that nobody uses is given back
      idle_exit   seconds without a session until the daemon ends
      policy      how to choose the blocks that go
      background_rate
                  bytes a second that are read while nobody waits ("200MB/s")
      read_ahead  false: read only what somebody waits for
      model_folders
                  folders in which a model is found by its name (["~/models"])

    The variable of a key (EXPERTD_BUDGET and so on) comes before the file, and a flag before both.
    """


@config.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; null: auto, or no limit.")
def show(as_json: bool) -> None:
    """Show each setting, and where it comes from: environment, file or default.

    A daemon that runs already keeps what it was started with.
    """
    home = Home.current()
    found = read_config(home)
    if as_json:
        click.echo(json.dumps(as_object(home, found), indent=2))
        return
    for line in table(home, found):
        click.echo(line)


def as_object(home: Home, found: Config) -> dict[str, object]:
    """The object that ``--json`` prints."""
    settings = {key: {"value": setting.value, "source": setting.source} for key, setting in _settings(found)}
    return {"file": str(home.config), "settings": settings}


def table(home: Home, found: Config) -> list[str]:
    """The settings as lines for a person."""
    there = "" if home.config.exists() else ", which is not there"
    width = max(map(len, KEYS))
    lines = [f"{'file':{width}}  {home.config}{there}"]
    for key, setting in _settings(found):
        origin = {Source.ENVIRONMENT: variable(key), Source.FILE: str(home.config)}.get(setting.source, setting.source)
        lines.append(f"{key:{width}}  {_shown(key, setting)}  ({origin})")
    return lines


def _settings(found: Config) -> list[tuple[str, Setting[Any]]]:
    return [(key, getattr(found, key)) for key in KEYS]


def _shown(key: str, setting: Setting[Any]) -> str:
    match key, setting.value:
        case "budget", None:
            return f"{AUTO}: what the machine can spare"
        case "budget", size:
            return show_size(size)
        case "keep_alive", None:
            return "until memory is needed"
        case "background_rate", None:
            return "no limit"
        case "background_rate", rate:
            return f"{show_size(rate)}/s"
        case "idle_exit", None:
            on_demand = f"; a daemon that is started on demand: {IDLE_EXIT_S} s"
            return "never" + (on_demand if setting.source is Source.DEFAULT else "")
        case "keep_alive" | "idle_exit", seconds:
            return f"{seconds:.12g} s"
        case "read_ahead", yes:
            return "where it pays" if yes else "no"
        case "model_folders", folders:
            return ", ".join(folders) or "none"
    return str(setting.value)
