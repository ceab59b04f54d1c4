"""What a daemon is started with: flags, the environment, the home's ``config.toml``, defaults, in that order.

``merge`` judges and chooses and touches nothing; ``read_config`` gives it this process's environment and the home's
file.  Both whoever starts a daemon on demand and the daemon itself read, so a mistake is told by the one that the user
has called.  A running daemon keeps what it was started with; its budget changes by a message (``SetBudget``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeVar

from expertd.protocol.errors import ConfigInvalid, SizeInvalid
from expertd.protocol.paths import Home
from expertd.protocol.sizes import parse_budget, parse_rate

POLICY_NAMES = ("forecast", "lru", "lfu", "lcp", "ewma")
"""Of ``expertd.daemon.policy.POLICIES``; the first is the default, the others are there to be compared with."""

FOREVER_S = 1e9
"""More seconds are as good as no limit: thirty years."""

MODEL_FOLDERS = ("~/models",)
"""Where models are looked for by the name of their folder, if nobody says otherwise."""

UNLIMITED = ("inf", "unlimited")
"""A rate that is none, as text."""

T = TypeVar("T")


class Source(StrEnum):
    """Where a setting comes from.  An earlier one wins over a later one."""

    FLAG = "flag"
    ENVIRONMENT = "environment"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True)
class Setting(Generic[T]):
    """A value that can be used as it is, and where it comes from."""

    value: T
    source: Source


@dataclass(frozen=True)
class Config:
    """All settings; the names are the keys of ``config.toml``.  All but ``model_folders`` are a daemon's.

    Attributes:
        budget: bytes for expert weights; None: what the machine can spare.
        keep_alive: seconds after which a model that nobody uses is given back; None: when memory is needed.
        idle_exit: seconds without a session after which the daemon ends; None: never.
        policy: one of ``POLICY_NAMES``.
        background_rate: bytes a second that are read at most while nobody waits for them; None: no limit.
        read_ahead: whether what sessions will soon need is read before they ask for it, where that pays.
        model_folders: absolute paths of folders in which a model is found by its name (``protocol.model_names``).
    """

    budget: Setting[int | None]
    keep_alive: Setting[float | None]
    idle_exit: Setting[float | None]
    policy: Setting[str]
    background_rate: Setting[int | None]
    read_ahead: Setting[bool]
    model_folders: Setting[tuple[str, ...]]


KEYS = tuple(field.name for field in fields(Config))


def variable(key: str) -> str:
    """The environment variable of a key: ``EXPERTD_IDLE_EXIT``."""
    return f"EXPERTD_{key.upper()}"


def read_config(home: Home, *, default_idle_exit_s: float | None = None, **flags: object) -> Config:
    """The settings for a daemon in ``home`` (see ``merge``).

    Raises:
        HomeError: the home cannot be used.
        ConfigInvalid, SizeInvalid: see ``merge``; or the file cannot be read, or is not TOML.
    """
    home.check()
    return merge(flags, os.environ, _read(home.config), home.config, default_idle_exit_s=default_idle_exit_s)


def merge(
    flags: Mapping[str, object],
    environment: Mapping[str, str],
    file: Mapping[str, object],
    path: Path,
    *,
    default_idle_exit_s: float | None = None,
) -> Config:
    """Choose each setting from what is given.  What is not chosen is checked too: a mistake never lies in wait.

    Args:
        flags: by key; None is not given.
        environment: variables by name; an empty one is not given.
        file: what the file at ``path`` says.
        default_idle_exit_s: the idle exit where nobody has set one.

    Raises:
        ConfigInvalid: the file has a key that there is not, or a value cannot be used; says which, where, what can.
        SizeInvalid: the flag ``budget`` or ``background_rate`` is none.
    """

    def choose(key: str, check: Callable[[object], T], default: T, read: Callable[[str], object] = str) -> Setting[T]:
        text = environment.get(variable(key))
        sources = (
            (Source.FLAG, flags.get(key), "--" + key.replace("_", "-")),
            (Source.ENVIRONMENT, read(text) if text else None, variable(key)),
            (Source.FILE, file.get(key), f"{key} in {path}"),
        )
        found = [
            Setting(_checked(check, value, source, where), source)
            for source, value, where in sources
            if value is not None
        ]
        return found[0] if found else Setting(default, Source.DEFAULT)

    for key in file:
        if key not in KEYS:
            raise ConfigInvalid(f"{key!r} in {path} is not a setting; {_instead(key, KEYS)}")
    return Config(
        budget=choose("budget", _budget, None),
        keep_alive=choose("keep_alive", _seconds, None, _number),
        idle_exit=choose("idle_exit", _seconds, default_idle_exit_s, _number),
        policy=choose("policy", _policy, POLICY_NAMES[0]),
        background_rate=choose("background_rate", _rate, None),
        read_ahead=choose("read_ahead", _yes, True, _truth),
        model_folders=choose("model_folders", _folders, _folders(list(MODEL_FOLDERS)), _paths),
    )


def _read(path: Path) -> Mapping[str, object]:
    import tomllib  # late, because a client whose daemon runs already needs none of it

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read ({error.strerror}); make it readable, or remove it") from error
    except ValueError as error:
        raise ConfigInvalid(
            f'{path} is not TOML ({error}); correct it (text needs quotes, as in budget = "8GiB"), or remove it'
        ) from error


def _checked(check: Callable[[object], T], value: object, source: Source, where: str) -> T:
    try:
        return check(value)
    except (SizeInvalid, ConfigInvalid) as error:
        if source is Source.FLAG and isinstance(error, SizeInvalid):
            raise  # as wherever else a size is given
        raise ConfigInvalid(f"{where}: {error.message}") from error


def _budget(value: object) -> int | None:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return parse_budget(str(value))
    raise SizeInvalid(f'{value!r} is not a size; write text as "8GiB" or "auto", or a whole number of bytes')


def _seconds(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:  # nan is not
        return None if value > FOREVER_S else float(value)
    raise ConfigInvalid(f"{value!r} is not a number of seconds; write 0 or more, or inf for no limit")


def _rate(value: object) -> int | None:
    if value == float("inf") or (isinstance(value, str) and value.strip().lower() in UNLIMITED):
        return None
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return parse_rate(str(value))
        except SizeInvalid as error:
            raise SizeInvalid(f"{error.message}, or inf for no limit") from None
    raise SizeInvalid(f'{value!r} is not a rate; write text as "200MB/s", a whole number of bytes, or inf for no limit')


def _policy(value: object) -> str:
    if isinstance(value, str) and value in POLICY_NAMES:
        return value
    raise ConfigInvalid(f"{value!r} is not a policy; {_instead(str(value), POLICY_NAMES)}")


def _yes(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigInvalid(f"{value!r} is neither true nor false")


def _folders(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(folder, str) for folder in value):
        raise ConfigInvalid(f'{value!r} is not a list of folders; write for example ["~/models"]')
    folders = [Path(folder).expanduser() for folder in value]
    for folder in folders:
        if not folder.is_absolute():
            raise ConfigInvalid(f"'{folder}' is a relative path; write the whole of it, or one that begins with ~")
    return tuple(map(str, folders))


def _paths(text: str) -> object:
    return text.split(os.pathsep)


def _truth(text: str) -> object:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text  # it is refused as what it is


def _instead(word: str, choices: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word.lower(), choices, n=1)
    return (f"did you mean {near[0]!r}? There are: " if near else "there are: ") + ", ".join(choices)
