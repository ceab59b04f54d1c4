"""What daemons, gateways and workers write down: a line for each event that a user would want to know, and no more.

A line is ``2026-11-29 14:03:07.123 INFO daemon[123] session opened: session=3 pid=456 model=Qwen3``: when, how bad,
who, what happened, and facts; or the same as a JSON object.  Each process has a file of its own in the home's ``log``,
of bounded size.  What cannot be written (a full disk, a folder that is gone) is counted, told later, and ends nothing.
Prompts and answers are never written.  Reading logs is ``expertd logs``; the settings are ``[log]`` of ``config.toml``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from expertd.protocol.config import Config
    from expertd.protocol.paths import Home

LONGEST = 16_000
"""Characters of one event, its traceback included: so a file is never much larger than it should be."""
KEEP_S = 7 * 86400.0
KEEP_DEAD = 10
"""The log of a process that has ended stays for so long, if it is one of the so many newest of its kind."""

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_OWN_FILE = re.compile(r"(?P<kind>worker|gateway)-(?P<pid>\d+)\.log(\.\d+)?")


# -- saying something --------------------------------------------------------------------------------------------------


class Log(logging.LoggerAdapter[logging.Logger]):
    """A logger whose calls take facts: ``log.info("session opened", session=3, model=name)``.

    Facts that are None are left out.  Whoever has set logging up, the message has them, as ``name=value``.
    """

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), None)

    def log(self, level: int, msg: object, /, *args: object, **kwargs: Any) -> None:  # type: ignore[override]
        """As ``logging.Logger.log``; what that does not know is a fact."""
        if not self.isEnabledFor(level):
            return
        known = {name: kwargs.pop(name) for name in ("exc_info", "stack_info", "stacklevel") if name in kwargs}
        words = str(msg) % args if args else str(msg)
        facts = {name: value for name, value in kwargs.items() if value is not None}
        message = f"{words}: {' '.join(_fact(*fact) for fact in facts.items())}" if facts else words
        # No arguments are left, so a per cent sign in the message is just that.
        self.logger.log(level, message, **known, extra={"words": words, "facts": facts})


def _fact(name: str, value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    plain = text and not any(sign in text for sign in ' "=\n\t')
    return f"{name}={text if plain else json.dumps(text, ensure_ascii=False)}"


_ONE_FACT = r'[A-Za-z_]\w*=(?:"(?:[^"\\]|\\.)*"|[^ "=]+)'
_FACTS = re.compile(rf"(?P<words>.*?): (?P<facts>{_ONE_FACT}(?: {_ONE_FACT})*)")
_FACT = re.compile(_ONE_FACT)


def split_facts(text: str) -> tuple[str, dict[str, object]]:
    """The words of an event, and the facts that follow them in a line of text; what looks like a number becomes one."""
    found = _FACTS.fullmatch(text)
    if found is None:
        return text, {}
    pairs = (fact.partition("=") for fact in _FACT.findall(found["facts"]))
    return found["words"], {name: _value(value) for name, _, value in pairs}


def _value(text: str) -> object:
    if text in ("True", "False"):
        return text == "True"
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str | int | float) else text


class Sparsely:
    """Whether to tell of what may come a thousand times a second: at most once in ``every_s``."""

    def __init__(self, every_s: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        """How often it came."""
        self.new = 0
        """How often since it was told of before; valid when ``add`` is true."""
        self._every_s, self._clock = every_s, clock
        self._told_at = -float("inf")
        self._told = 0

    def add(self) -> bool:
        """It came once more; whether to tell of it now."""
        self.total += 1
        if self._clock() - self._told_at < self._every_s:
            return False
        self.new, self._told, self._told_at = self.total - self._told, self.total, self._clock()
        return True


# -- lines -------------------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    """``text`` without what would end the line, or mean something to a terminal."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


class TextLines(logging.Formatter):
    """Lines for people.  A traceback follows its event, indented, so that a line that is not is an event."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        head = f"{at}.{int(record.msecs):03d} {record.levelname} {self._process}[{record.process}] "
        text = head + _one_line(record.getMessage())
        if record.exc_info:
            text += "".join(f"\n    {line}" for line in self.formatException(record.exc_info).splitlines())
        return text[:LONGEST]


class JsonLines(logging.Formatter):
    """One object a line, for programs; ``event`` are the words, without the facts."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "process": self._process,
            "pid": record.process,
            "event": getattr(record, "words", None) or record.getMessage()[:LONGEST],
        }
        if facts := getattr(record, "facts", None):
            line["facts"] = facts
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-LONGEST:]
        return json.dumps(line, ensure_ascii=False, default=str)


# -- where they go -----------------------------------------------------------------------------------------------------


class LogFile(RotatingFileHandler):
    """A file of at most ``size`` bytes and ``count - 1`` older ones, for one process at a time.

    If the standard output or error was led to the file by whoever started this process, it is led to the new file when
    one begins: so what an interpreter says that dies is at the log's end.
    """

    def __init__(self, path: Path, size: int, count: int) -> None:
        super().__init__(
            path, maxBytes=size, backupCount=count - 1, encoding="utf-8", errors="backslashreplace", delay=True
        )
        self._lost = 0
        self._why = ""
        self._led_here = [descriptor for descriptor in (1, 2) if _is_same(descriptor, path)]

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, after one that says how many could not be written before."""
        if self.stream is not None and not _is_same(self.stream.fileno(), Path(self.baseFilename)):
            self._let_go()  # somebody has moved or removed it
        if self._lost:
            lost, self._lost = self._lost, 0
            super().emit(_made(record, f"{lost} lines of this log could not be written ({self._why})"))
            if self._lost:  # nor can they now
                self._lost += lost
                return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Count what could not be written; an error of another kind is told as logging does."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._lost += 1
        self._why = error.strerror or str(error)
        self._let_go()

    def _open(self) -> Any:
        path = Path(self.baseFilename)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        stream = open(path, "a", encoding=self.encoding, errors=self.errors, opener=_private)  # noqa: SIM115
        for descriptor in self._led_here:
            os.dup2(stream.fileno(), descriptor)
        return stream

    def _let_go(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):  # what it still held is lost
                stream.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether ``descriptor`` is an open file that is at ``path`` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _made(like: logging.LogRecord, message: str) -> logging.LogRecord:
    return logging.LogRecord(like.name, logging.WARNING, like.pathname, like.lineno, message, None, None)


# -- setting it up -----------------------------------------------------------------------------------------------------

CONSOLE = {"gateway": "expertd: %(message)s", "worker": "expertd worker %(process)d: %(message)s"}
"""What these say on a terminal has no time; a daemon's lines are the same there as in its log."""


def set_up(process: str, path: Path, home: Home, config: Config) -> None:
    """Have this process write its log to ``path``, and tell of an exception that ends it there.

    On stderr a daemon says the same; a gateway and a worker only warnings, unless a flag or a variable asked for more.
    A stderr that is a file in the home's folder of logs gets no copy: it is there for what dies without a log.

    Args:
        process: ``daemon``, ``gateway`` or ``worker``.
    """
    from expertd.protocol.config import Source

    level = logging.getLevelNamesMapping()[config.log_level.value.upper()]
    as_json = config.log_format.value == "json"
    lines = JsonLines(process) if as_json else TextLines(process)
    handlers: list[logging.Handler] = [LogFile(path, config.log_size.value, config.log_count.value)]
    handlers[0].setFormatter(lines)
    if sys.stderr is not None and not _lies_in(sys.stderr, home.log):
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter(CONSOLE[process]) if process in CONSOLE and not as_json else lines)
        if process in CONSOLE and config.log_level.source not in (Source.FLAG, Source.ENVIRONMENT):
            console.setLevel(max(level, logging.WARNING))
        handlers.append(console)
    # Libraries are asked for warnings only: their chatter is not what a user wants to know.
    logging.basicConfig(level=max(level, logging.WARNING), handlers=handlers, force=True)
    logging.getLogger("expertd").setLevel(level)
    _log_last_words(Log(f"expertd.{process}"))
    remove_stale(home)


def _lies_in(stream: TextIO, folder: Path) -> bool:
    try:
        found = os.fstat(stream.fileno())
        return any(os.path.samestat(found, path.stat()) for path in folder.glob("*.log"))
    except (OSError, ValueError):
        return False


def _log_last_words(log: Log) -> None:
    """Have exceptions that nobody catches, and what kills the interpreter, tell of themselves in the log."""
    import faulthandler

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, Exception):
            log.critical("ended by an error in itself", exc_info=(kind, error, trace))
        else:
            sys.__excepthook__(kind, error, trace)

    def uncaught_in_thread(about: threading.ExceptHookArgs) -> None:
        if about.exc_value is not None and issubclass(about.exc_type, Exception):
            known = (about.exc_type, about.exc_value, about.exc_traceback)
            log.critical(
                "a thread ended by an error in itself", thread=about.thread and about.thread.name, exc_info=known
            )

    sys.excepthook = uncaught
    threading.excepthook = uncaught_in_thread
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # there is no stderr to write to
        faulthandler.enable()


def environment(config: Config) -> dict[str, str]:
    """Variables with which a process that this one starts logs as this one's flags say."""
    from expertd.protocol.config import KEYS, Source

    found: dict[str, str] = {}
    for name in (name for name, key in KEYS.items() if key.section == "log"):
        setting = getattr(config, name)
        if setting.source is Source.FLAG:
            found[KEYS[name].variable] = str(setting.value)
    return found


# -- logs of the dead --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A file of a log: of a process of that kind and number, changed at ``at`` (seconds since 1970)."""

    path: Path
    kind: str
    pid: int
    at: float


def find(folder: Path) -> list[Found]:
    """The logs of gateways and workers in ``folder``, alive or not."""
    found = []
    for path in folder.glob("*.log*"):
        match = _OWN_FILE.fullmatch(path.name)
        if match is not None:
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                found.append(Found(path, match["kind"], int(match["pid"]), path.stat().st_mtime))
    return found


def stale(found: Iterable[Found], is_alive: Callable[[int], bool], now: float) -> list[Path]:
    """The files to remove: of ended processes, those that are old, and all but the newest of each kind."""
    processes: dict[tuple[str, int], list[Found]] = {}
    for file in found:
        processes.setdefault((file.kind, file.pid), []).append(file)
    ended = {key: max(file.at for file in files) for key, files in processes.items() if not is_alive(key[1])}
    removed: list[Path] = []
    kept: dict[str, int] = {}
    for key in sorted(ended, key=lambda key: -ended[key]):
        kept[key[0]] = kept.get(key[0], 0) + 1
        if now - ended[key] > KEEP_S or kept[key[0]] > KEEP_DEAD:
            removed += [file.path for file in processes[key]]
    return removed


def remove_stale(home: Home) -> None:
    """Remove logs of processes that ended long ago.  Never fails: they are tried again by the next process."""
    import psutil

    with contextlib.suppress(OSError):
        for path in stale(find(home.log), psutil.pid_exists, time.time()):
            path.unlink(missing_ok=True)
