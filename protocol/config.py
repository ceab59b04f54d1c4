"""The user's settings: flags, the environment, the home's ``config.toml``, defaults, in that order.

``Config`` is the one table of them: what each is called, how it is checked, what it is without anybody's say.  The help
of flags (``expertd.clients.cli.parameters``), ``expertd config show``, what is refused and the documentation come from
it.  ``merge`` judges and chooses and touches nothing; ``read_config`` gives it this process's environment and the
home's file.  Both whoever starts a daemon on demand and the daemon itself read, so a mistake is told by the one that
the user has called.  A running daemon keeps what it was started with; its budget changes by a message (``SetBudget``).
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar

from expertd.protocol.errors import ConfigInvalid, PathInvalid, SizeInvalid
from expertd.protocol.paths import Home, expanded
from expertd.protocol.sizes import AUTO, parse_budget, parse_rate, parse_size, show_size

POLICY_NAMES = ("forecast", "lru", "lfu", "lcp", "ewma")
"""Of ``expertd.daemon.policy.POLICIES``; the first is the default, the others are there to be compared with."""

KV_BITS = ("4", "8", "16")
NOT_QUANTIZED = "16"

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

FOREVER_S = 1e9
"""More seconds are as good as no limit: thirty years."""

MODEL_FOLDERS = ("~/models",)
"""Where models are looked for by the name of their folder, if nobody says otherwise."""

UNLIMITED = ("inf", "unlimited")
"""A rate that is none, as text."""

MOST_TOKENS = 1_000_000_000

SMALLEST_LOG = 64 << 10
MOST_LOGS = 100

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,39}")
_ORIGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?")

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


# -- what values may be ------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _budget(value: object) -> int | None:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return parse_budget(str(value))
    raise SizeInvalid(f'{value!r} is not a size; write text as "8GiB" or "auto", or a whole number of bytes')


def _seconds(value: object) -> float | None:
    if isinstance(value, int | float) and _is_number(value) and value >= 0:  # nan is not
        return None if value > FOREVER_S else float(value)
    raise ConfigInvalid(f"{value!r} is not a number of seconds; write 0 or more, or inf for no limit")


def _deadline(value: object) -> float | None:
    seconds = _seconds(value)
    if seconds == 0:
        raise ConfigInvalid("0 seconds are too few for any answer; write more, or inf for no limit")
    return seconds


def _rate(value: object) -> int | None:
    if value == float("inf") or (isinstance(value, str) and value.strip().lower() in UNLIMITED):
        return None
    if isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return parse_rate(str(value))
        except SizeInvalid as error:
            raise SizeInvalid(f"{error.message}, or inf for no limit") from None
    raise SizeInvalid(f'{value!r} is not a rate; write text as "200MB/s", a whole number of bytes, or inf for no limit')


def _choice(what: str, choices: Sequence[str]) -> Callable[[object], str]:
    def check(value: object) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise ConfigInvalid(f"{value!r} is not a {what}; {instead(str(value), choices)}")

    return check


def _yes(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise ConfigInvalid(f"{value!r} is neither true nor false")


def _port(value: object) -> int:
    if isinstance(value, int) and _is_whole(value) and 0 <= value <= 65535:
        return value
    raise ConfigInvalid(f"{value!r} is not a port; write a whole number from 1 to 65535, or 0 for any that is free")


def _host(value: object) -> str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    raise ConfigInvalid(f'{value!r} is not an address to listen on; write text as "127.0.0.1"')


def _file(value: object) -> Path:
    if isinstance(value, str | Path) and str(value).strip():
        path = expanded(value)
        if path.is_absolute():
            return path
        raise ConfigInvalid(f"'{path}' is relative, but to what?  Write the file's whole path, or ~/...")
    raise ConfigInvalid(f'{value!r} is not a file; write its path as text, for example "~/.expertd/keys"')


def _hosts(value: object) -> tuple[str, ...]:
    found = _texts(value, 'host names; write for example ["studio.local"]')
    for name in found:
        if not _HOST.fullmatch(name):
            raise ConfigInvalid(f"{name!r} is not the name of a host; write it without a scheme, a port or a path")
    return tuple(dict.fromkeys(name.lower() for name in found))


def _origins(value: object) -> tuple[str, ...]:
    found = _texts(value, 'origins; write for example ["https://chat.example.org"]')
    for origin in found:
        if origin == "*":
            raise ConfigInvalid("'*' would let every page that you visit use your models; name each origin")
        if origin != "null" and not _ORIGIN.fullmatch(origin):
            raise ConfigInvalid(
                f"{origin!r} is not an origin; write scheme and host as browsers do, https://chat.example.org, "
                "with a port if it is not the usual one, and without a path"
            )
    return tuple(dict.fromkeys(origin.lower() for origin in found))


def _texts(value: object, what: str) -> list[str]:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return [str(item).strip() for item in value]
    raise ConfigInvalid(f"{value!r} is not a list of {what}")


def _tokens(value: object) -> int:
    if isinstance(value, int) and _is_whole(value) and 1 <= value <= MOST_TOKENS:
        return value
    raise ConfigInvalid(f"{value!r} is not a number of tokens; write a whole number from 1 to {MOST_TOKENS}")


def _temperature(value: object) -> float:
    if isinstance(value, int | float) and _is_number(value) and 0 <= value <= sys.float_info.max:
        return float(value)
    raise ConfigInvalid(f"{value!r} is not a temperature; write 0 or more (0 is greedy)")


def _kv_bits(value: object) -> int | None:
    if _is_whole(value) and str(value) in KV_BITS:
        return None if str(value) == NOT_QUANTIZED else int(str(value))
    raise ConfigInvalid(f"{value!r} is not a number of bits; write 8 or 4, or 16 to quantize nothing")


def _log_size(value: object) -> int:
    if isinstance(value, str | int) and not isinstance(value, bool):
        size = parse_size(str(value))
        if size >= SMALLEST_LOG:
            return size
        raise SizeInvalid(f"{value!r} is too small for a log; write at least 64KiB")
    raise SizeInvalid(f'{value!r} is not a size; write text as "10MB", or a whole number of bytes')


def _log_count(value: object) -> int:
    if isinstance(value, int) and _is_whole(value) and 2 <= value <= MOST_LOGS:
        return value
    raise ConfigInvalid(f"{value!r} is not a number of log files; write a whole number from 2 to {MOST_LOGS}")


def _folders(value: object) -> tuple[Path, ...]:
    if isinstance(value, list | tuple) and all(isinstance(item, str | Path) and str(item) for item in value):
        found = tuple(map(expanded, value))
        for path in found:
            if not path.is_absolute():
                raise ConfigInvalid(f"'{path}' is relative, but to what?  Write the folder's whole path, or ~/...")
        return tuple(dict.fromkeys(found))
    raise ConfigInvalid(f'{value!r} is not a list of folders; write for example ["~/models"]')


# -- how the text of a variable is read --------------------------------------------------------------------------------
# What cannot be read stays text, and is refused as what it is.


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _whole(text: str) -> object:
    return int(text) if text.strip().isascii() and text.strip().isdecimal() and len(text) < 20 else text


def _truth(text: str) -> object:
    return {"true": True, "false": False}.get(text.strip().lower(), text)


def _paths(text: str) -> object:
    return [part for part in text.split(os.pathsep) if part]


def _words(text: str) -> object:
    return text.replace(",", " ").split()


# -- how values are shown ----------------------------------------------------------------------------------------------


def _shown_budget(value: Any) -> str:
    return f"{AUTO}: what the machine can spare" if value is None else show_size(value)


def _shown_rate(value: Any) -> str:
    return "no limit" if value is None else f"{show_size(value)}/s"


def _shown_seconds(forever: str) -> Callable[[Any], str]:
    return lambda value: forever if value is None else f"{value:.12g} s"


def _shown_number(value: Any) -> str:
    return f"{value:.12g}"


def _shown_kv_bits(value: Any) -> str:
    return f"{NOT_QUANTIZED}: not quantized" if value is None else str(value)


def _shown_folders(value: Any) -> str:
    home = os.path.expanduser("~")  # noqa: PTH111
    shown = [f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path) for path in value]
    return ", ".join(shown) or "none"


def _shown_file(value: Any) -> str:
    return "none" if value is None else _shown_folders((value,))


def _shown_words(value: Any) -> str:
    return ", ".join(value) or "none"


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What is known of one setting.

    Attributes:
        name: of its field of ``Config``: ``serve_port``.
        section: of ``config.toml``; empty for what stands above all sections.
        check: turns what a flag, a variable or the file says into the value, or raises ConfigInvalid or SizeInvalid.
        read: turns the text of a variable into what the file would say.
        default: the value if nobody sets it.
        help: what it does, for a person; one sentence.
        form: what to write, for a person: ``SIZE``.
        example: a line's right-hand side in ``config.toml``.
        choices: all values that there are, if they are few words.
        shown: a value for a person.
        variable: in the environment.
    """

    name: str
    section: str
    check: Callable[[object], Any]
    read: Callable[[str], object]
    default: Any
    help: str
    form: str
    example: str
    choices: tuple[str, ...]
    shown: Callable[[Any], str]
    variable: str

    @property
    def word(self) -> str:
        """Its name in ``config.toml``, without the section."""
        return self.name.removeprefix(f"{self.section}_") if self.section else self.name

    @property
    def dotted(self) -> str:
        """Its name with the section: ``serve.port``."""
        return f"{self.section}.{self.word}" if self.section else self.name

    @property
    def flag(self) -> str:
        """``--idle-exit``; what a command is called after is left out (``--port`` of ``serve``), but for logs."""
        if isinstance(self.default, tuple):
            return "--" + self.word.removesuffix("s").replace("_", "-")  # one at a time
        return "--" + (self.name if self.section == "log" else self.word).replace("_", "-")

    @property
    def default_shown(self) -> str:
        return self.shown(self.default)

    def place(self, path: Path) -> str:
        """Where it stands in the file at ``path``, for a person."""
        return f"{self.word} in [{self.section}] of {path}" if self.section else f"{self.name} in {path}"


def _key(
    check: Callable[[object], Any],
    default: object,
    help: str,
    *,
    form: str,
    example: str,
    section: str = "",
    read: Callable[[str], object] = str,
    shown: Callable[[Any], str] = str,
    choices: tuple[str, ...] = (),
    variable: str | None = None,
) -> dict[str, Any]:
    """What is known of a field of ``Config``."""
    return {
        "check": check, "default": default, "help": help, "form": form, "example": example, "section": section,
        "read": read, "shown": shown, "choices": choices, "variable": variable,
    }  # fmt: skip


@dataclass(frozen=True)
class Config:
    """All settings: their types, and the table of what is known of each (``KEYS``)."""

    budget: Setting[int | None] = field(metadata=_key(
        _budget, None, "Memory for expert weights, of all models together: 512MB, 2GiB, bytes or auto.",
        form="SIZE", example='"8GiB"', shown=_shown_budget,
    ))  # fmt: skip
    keep_alive: Setting[float | None] = field(metadata=_key(
        _seconds, None, "Give a model's memory back when nobody has used it for so long.",
        form="SECONDS", example="600", read=_number, shown=_shown_seconds("when memory is needed"),
    ))  # fmt: skip
    idle_exit: Setting[float | None] = field(metadata=_key(
        _seconds, None, "End the daemon after so long without a session.",
        form="SECONDS", example="inf", read=_number, shown=_shown_seconds("never"),
    ))  # fmt: skip
    policy: Setting[str] = field(metadata=_key(
        _choice("policy", POLICY_NAMES), POLICY_NAMES[0], "How to choose the blocks that go.",
        form="NAME", example='"forecast"', choices=POLICY_NAMES,
    ))  # fmt: skip
    background_rate: Setting[int | None] = field(metadata=_key(
        _rate, None, "Read at most so much a second while nobody waits for it, for example 200MB/s.",
        form="RATE", example='"200MB/s"', shown=_shown_rate,
    ))  # fmt: skip
    read_ahead: Setting[bool] = field(metadata=_key(
        _yes, True, "Read what sessions will soon need before they ask for it, where that pays.",
        form="true|false", example="true", read=_truth, shown=lambda yes: "where it pays" if yes else "no",
    ))  # fmt: skip
    remember: Setting[bool] = field(metadata=_key(
        _yes, True, "Record which experts are worth keeping, and bring them in again after a restart.",
        form="true|false", example="true", read=_truth, shown=lambda yes: "yes" if yes else "no",
    ))  # fmt: skip
    model_folders: Setting[tuple[Path, ...]] = field(metadata=_key(
        _folders, (Path("~/models"),), "Folder whose subfolders are models, found by their names.",
        form="FOLDER", example='["~/models", "/Volumes/big/models"]', read=_paths, shown=_shown_folders,
    ))  # fmt: skip
    serve_host: Setting[str] = field(metadata=_key(
        _host, "127.0.0.1", "Address to listen on.", section="serve", form="ADDRESS", example='"127.0.0.1"',
    ))  # fmt: skip
    serve_port: Setting[int] = field(metadata=_key(
        _port, 8080, "Port to listen on; 0 takes any free one.",
        section="serve", form="PORT", example="8080", read=_whole,
    ))  # fmt: skip
    serve_api_key_file: Setting[Path | None] = field(metadata=_key(
        _file, None, "File of the API keys that requests need, one a line.",
        section="serve", form="FILE", example='"~/.expertd/keys"', shown=_shown_file,
    ))  # fmt: skip
    serve_allow_hosts: Setting[tuple[str, ...]] = field(metadata=_key(
        _hosts, (), "Another name that the gateway is called by, for example studio.local.",
        section="serve", form="NAME", example='["studio.local"]', read=_words, shown=_shown_words,
    ))  # fmt: skip
    serve_allow_origins: Setting[tuple[str, ...]] = field(metadata=_key(
        _origins, (), "Site whose pages may use the gateway, for example https://chat.example.org.",
        section="serve", form="URL", example='["https://chat.example.org"]', read=_words, shown=_shown_words,
    ))  # fmt: skip
    serve_kv_bits: Setting[int | None] = field(metadata=_key(
        _kv_bits, None, "Bits of the KV cache's numbers; 8 and 4 take less memory, but tokens are no longer exact.",
        section="serve", form="BITS", example="8", read=_whole, shown=_shown_kv_bits,
    ))  # fmt: skip
    serve_ttl: Setting[float | None] = field(metadata=_key(
        _seconds, 900.0, "End the worker of one of several models when nobody has asked it for so long.",
        section="serve", form="SECONDS", example="900", read=_number, shown=_shown_seconds("never"),
    ))  # fmt: skip
    serve_deadline: Setting[float | None] = field(metadata=_key(
        _deadline, None, "End a request that takes longer than this, its wait for its turn included.",
        section="serve", form="SECONDS", example="600", read=_number, shown=_shown_seconds("no limit"),
    ))  # fmt: skip
    generate_max_tokens: Setting[int] = field(metadata=_key(
        _tokens, 256, "Longest answer.", section="generate", form="TOKENS", example="256", read=_whole,
    ))  # fmt: skip
    generate_temperature: Setting[float] = field(metadata=_key(
        _temperature, 0.0, "How freely tokens are chosen; 0 is greedy.",
        section="generate", form="NUMBER", example="0.7", read=_number, shown=_shown_number,
    ))  # fmt: skip
    generate_kv_bits: Setting[int | None] = field(metadata=_key(
        _kv_bits, None, "Bits of the KV cache's numbers; 8 and 4 take less memory, but tokens are no longer exact.",
        section="generate", form="BITS", example="8", read=_whole, shown=_shown_kv_bits,
    ))  # fmt: skip
    log_level: Setting[str] = field(metadata=_key(
        _choice("level", LOG_LEVELS), "info", "What is written into the logs, and all that is worse.",
        section="log", form="LEVEL", example='"info"', read=str.lower, choices=LOG_LEVELS, variable="EXPERTD_LOG",
    ))  # fmt: skip
    log_format: Setting[str] = field(metadata=_key(
        _choice("format", LOG_FORMATS), "text", "How a line of the logs is written.",
        section="log", form="FORMAT", example='"text"', choices=LOG_FORMATS,
    ))  # fmt: skip
    log_size: Setting[int] = field(metadata=_key(
        _log_size, 10_000_000, "Begin a new log file when one has so many bytes.",
        section="log", form="SIZE", example='"10MB"', shown=show_size,
    ))  # fmt: skip
    log_count: Setting[int] = field(metadata=_key(
        _log_count, 3, "Keep so many files of a log, the one that is written included.",
        section="log", form="NUMBER", example="3", read=_whole,
    ))  # fmt: skip


def _known(name: str, about: Mapping[str, Any]) -> Key:
    variable = about["variable"] or f"EXPERTD_{name.upper()}"
    return Key(name=name, **{**about, "variable": variable})


KEYS: dict[str, Key] = {entry.name: _known(entry.name, entry.metadata) for entry in fields(Config)}
SECTIONS = tuple(dict.fromkeys(key.section for key in KEYS.values() if key.section))


def variable(key: str) -> str:
    """The environment variable of a key: ``EXPERTD_IDLE_EXIT``."""
    return KEYS[key].variable


def config_without_file() -> Config:
    """The settings of the environment, or the defaults if those cannot be used either: for what has to go on."""
    try:
        return merge({}, os.environ, {}, Path())
    except ConfigInvalid:
        return merge({}, {}, {}, Path())


def read_config(
    home: Home,
    *,
    default_idle_exit_s: float | None = None,
    environment: Mapping[str, str] = os.environ,
    **flags: object,
) -> Config:
    """The settings in ``home`` (see ``merge``).

    Raises:
        HomeError: the home cannot be used.
        ConfigInvalid, SizeInvalid: see ``merge``; or the file cannot be read, or is not TOML.
    """
    home.check()
    return merge(flags, environment, _read(home.config), home.config, default_idle_exit_s=default_idle_exit_s)


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
        SizeInvalid: a flag that is a size or a rate is none.
    """
    said = _by_key(file, path)
    chosen: dict[str, Setting[Any]] = {}
    for name, key in KEYS.items():
        text = environment.get(key.variable)
        sources = (
            (Source.FLAG, flags.get(name), key.flag),
            (Source.ENVIRONMENT, key.read(text) if text else None, key.variable),
            (Source.FILE, said.get(name), key.place(path)),
        )
        found = [
            Setting(_checked(key.check, value, source, where), source)
            for source, value, where in sources
            if value is not None
        ]
        default = default_idle_exit_s if name == "idle_exit" else key.default
        if name == "model_folders":
            default = key.check(default)  # "~" is who calls
        chosen[name] = found[0] if found else Setting(default, Source.DEFAULT)
    return Config(**chosen)


def _by_key(file: Mapping[str, object], path: Path) -> dict[str, object]:
    """What the file says, by the names of ``KEYS``.

    Raises:
        ConfigInvalid: it says something that is none of them.
    """
    above = tuple(key.name for key in KEYS.values() if not key.section)
    found: dict[str, object] = {}
    for word, value in file.items():
        if word in SECTIONS:
            if not isinstance(value, Mapping):
                raise ConfigInvalid(f"{word} in {path} is a section; write its keys below a line [{word}]")
            words = tuple(key.word for key in KEYS.values() if key.section == word)
            for inner, inner_value in value.items():
                if inner not in words:
                    raise ConfigInvalid(f"{inner!r} in [{word}] of {path} is not a setting; {instead(inner, words)}")
                found[f"{word}_{inner}"] = inner_value
        elif word in above:
            found[word] = value
        else:
            homes = [key.section for key in KEYS.values() if key.section and key.word == word]
            if homes:
                raise ConfigInvalid(f"{word!r} in {path} belongs below a line [{homes[0]}]")
            choices = above + tuple(f"[{section}]" for section in SECTIONS)
            raise ConfigInvalid(f"{word!r} in {path} is not a setting; {instead(word, choices)}")
    return found


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
    except (SizeInvalid, ConfigInvalid, PathInvalid) as error:
        if source is Source.FLAG and isinstance(error, SizeInvalid):
            raise  # as wherever else a size is given
        raise ConfigInvalid(f"{where}: {error.message}") from error


def near(word: str, choices: Sequence[str], likeness: float = 0.6) -> str | None:
    """The one of ``choices`` that whoever wrote ``word`` may have meant, if one is as like it (0 to 1)."""
    import difflib

    found = difflib.get_close_matches(word.lower(), choices, n=1, cutoff=likeness)
    return found[0] if found else None


def instead(word: str, choices: Sequence[str]) -> str:
    """What there is where ``word`` is not, for a person."""
    meant = near(word, choices)
    return (f"did you mean {meant!r}? There are: " if meant else "there are: ") + ", ".join(choices)
