"""``expertd logs``: what daemon, gateways and workers have written down, in the order in which it happened.

What is written there, and how, is ``expertd.protocol.logs``.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import click

from expertd.clients.cli.parameters import json_option
from expertd.clients.terminal.fit import folded, width_of
from expertd.protocol.errors import ExpertdError
from expertd.protocol.logs import split_facts
from expertd.protocol.paths import Home

DAEMON = ("daemon.log",)
GATEWAYS = ("gateway-*.log", "service-gateway.log")
"""The second one has what a service's gateway said that died before it had a log of its own."""
FOLLOW_S = 0.25
"""How often ``-f`` looks for more."""

_TEXT = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) (?P<level>[A-Z]+) (?P<process>\w+)\[(?P<pid>\d+)\] (?P<event>.*)"
)
_JSON = re.compile(r'\{"time": "(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d\.\d{3})')


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on, until Ctrl-C.")
@click.option("-n", "--lines", "count", default=50, show_default=True, type=click.IntRange(min=0), metavar="N",
              help="Show the last N events.")  # fmt: skip
@click.option("--daemon", "daemon", is_flag=True, help="Of the daemon.")
@click.option("--gateway", "gateway", is_flag=True, help="Of the gateways.")
@click.option("--worker", "worker", type=int, metavar="PID", help="Of the worker with that process id.")
@json_option("Print one JSON object a line.")
def logs(follow: bool, count: int, daemon: bool, gateway: bool, worker: int | None, as_json: bool) -> None:
    """Show what daemon, gateways and workers have done, the newest last; of all of them, if none is chosen.

    Each has a file in the folder 'log' of the home: daemon.log, gateway-PID.log, worker-PID.log, and older ones
    that end in .1, .2 and so on; and service-gateway.log the last words of a gateway that the service keeps.  No daemon
    has to run.  Exits with 1 if there is nothing to show.
    """
    home = Home.current()
    home.check()
    patterns = [*(DAEMON if daemon else ()), *(GATEWAYS if gateway else ())]
    patterns += [] if worker is None else [f"worker-{worker}.log"]
    chosen = patterns or [*DAEMON, *GATEWAYS, "worker-*.log"]
    if not show_logs(home.log, chosen, count, follow, as_json) and count:
        raise ExpertdError(f"nothing is written in {home.log} of {', '.join(chosen)}")


def show_logs(folder: Path, patterns: Iterable[str], count: int, follow: bool, as_json: bool) -> bool:
    """Print the last ``count`` events of the files that fit ``patterns``, and with ``follow`` what comes, until Ctrl-C.

    Returns:
        Whether there was one, or one was waited for.
    """
    with contextlib.suppress(KeyboardInterrupt), Tails(folder, patterns) as tails:
        shown = last(tails.history(), count)
        _show(shown, as_json)
        while follow:
            time.sleep(FOLLOW_S)
            _show(tails.news(), as_json)
    return bool(shown) or follow


def _show(shown: Iterable[Event], as_json: bool) -> None:
    for event in shown:
        if as_json:
            click.echo(event.as_json())
            continue
        first, *rest = event.text.split("\n")
        for line in [*folded(first, width_of(sys.stdout), indent=4), *rest]:
            click.echo(line)


@dataclass(frozen=True, order=True)
class Event:
    """A line and what belongs to it: the traceback, or what a dying interpreter said."""

    at: str
    text: str = field(compare=False)

    def as_json(self) -> str:
        """As an object, whatever the format of the log is."""
        first, *rest = self.text.split("\n")
        if _JSON.match(first):
            return first
        match = _TEXT.fullmatch(first)
        found: dict[str, object] = {"event": first}
        if match is not None:
            words, facts = split_facts(match["event"])
            found = {**match.groupdict(), "pid": int(match["pid"]), "time": match["time"].replace(" ", "T")}
            found |= {"event": words, "facts": facts} if facts else {}
        if rest:
            found["traceback"] = "\n".join(line.strip() for line in rest)
        return json.dumps(found, ensure_ascii=False)


def events(lines: Iterable[str], at: str = "") -> Iterator[Event]:
    """Lines of one log as events; what has no time belongs to what came before, or if nothing did happened ``at``."""
    text: list[str] = []
    timed = False
    for line in lines:
        began = _began(line)
        if began is not None or not timed:
            if text:
                yield Event(at, "\n".join(text))
            at, text, timed = began or at, [], timed or began is not None
        text.append(line)
    if text:
        yield Event(at, "\n".join(text))


def _began(line: str) -> str | None:
    """When the event happened that begins with ``line``, as text that sorts; None if none does."""
    if (match := _TEXT.match(line)) is not None:
        return match["time"]
    if (match := _JSON.match(line)) is not None:
        return f"{match[1]} {match[2]}"
    return None


def last(histories: Iterable[Iterable[Event]], count: int) -> list[Event]:
    """The last ``count`` events of all, in their order."""
    tails = [deque(history, maxlen=count) for history in histories]
    return sorted(heapq.merge(*tails))[-count:] if count else []


class Tails:
    """The files that fit ``patterns`` in ``folder``, those that come later too, read to their ends and on."""

    def __init__(self, folder: Path, patterns: Iterable[str]) -> None:
        self._folder = folder
        self._patterns = tuple(patterns)
        self._open: dict[Path, _Tail] = {}

    def __enter__(self) -> Tails:
        return self

    def __exit__(self, *_: object) -> None:
        for tail in self._open.values():
            tail.close()

    def history(self) -> list[Iterator[Event]]:
        """For each file, its events until now, those of older files before it included."""
        found = []
        for path in self._paths():
            older = [line for old in _older(path) for line in _lines(old.read_bytes())]
            self._open[path] = tail = _Tail(path)
            lines = [*older, *tail.more()]
            timeless = lines and not any(map(_began, lines))
            found.append(events(lines, _written(path) if timeless else ""))
        return found

    def news(self) -> list[Event]:
        """What was written since the last call, in its order."""
        found: list[Event] = []
        for path in self._paths():
            if path not in self._open:
                self._open[path] = _Tail(path)
            tail = self._open[path]
            lines = tail.more()
            if not tail.is_current():  # a new file has begun: first the old one to its end
                tail.close()
                self._open[path] = tail = _Tail(path)
                lines += tail.more()
            found += events(lines)
        return sorted(found)

    def _paths(self) -> list[Path]:
        return sorted({path for pattern in self._patterns for path in self._folder.glob(pattern)})


def _written(path: Path) -> str:
    """When a file was written last, as ``_began`` tells times."""
    try:
        return datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "milliseconds")
    except FileNotFoundError:
        return ""


def _older(path: Path) -> list[Path]:
    """``daemon.log.2``, ``daemon.log.1`` of ``daemon.log``: the oldest first."""
    numbers = [int(old.suffix[1:]) for old in path.parent.glob(f"{path.name}.*") if old.suffix[1:].isdecimal()]
    return [path.with_name(f"{path.name}.{number}") for number in sorted(numbers, reverse=True)]


def _lines(data: bytes) -> list[str]:
    return data.decode("utf-8", errors="replace").rstrip("\n").split("\n") if data.strip() else []


class _Tail:
    """One file, read as far as whole lines go."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        with contextlib.suppress(FileNotFoundError):
            self._file = path.open("rb")
        self._rest = b""

    def more(self) -> list[str]:
        """The lines since the last call."""
        if self._file is None:
            return []
        whole, _, self._rest = (self._rest + self._file.read()).rpartition(b"\n")
        return _lines(whole)

    def is_current(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return self._file is not None and self._path.stat().st_ino == os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return True  # nothing newer is there yet

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
