"""``expertd top``: what happens in the daemon, live.

It asks for the status again and again, and shows what happened in between (``expertd.clients.terminal.rates``).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from expertd.clients.cli.signals import on_signals
from expertd.clients.terminal.heat import LEVELS, PLAIN_LEVELS
from expertd.clients.terminal.programs import programs
from expertd.clients.terminal.rates import Rates, Window
from expertd.protocol.connection import Connection
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import connect

WINDOW_S = 5.0
"""Live figures are of so many seconds, or of one interval if that is longer."""
ANSWER_S = 2.0
"""A daemon that answers later than that is told to be away; the next look asks again."""

Wait = Callable[[float], bool]
"""Waits for so many seconds, less if the user wants to end it, which it returns."""


@click.command()
@click.option("--once", is_flag=True, help="Print one frame, of the time of --interval, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, each of one interval.")
@click.option(
    "--interval", default=1.0, show_default=True, type=click.FloatRange(0.1, 3600), metavar="SECONDS",
    help="Time between two looks.",
)  # fmt: skip
def top(once: bool, as_json: bool, interval: float) -> None:
    """Show live what the daemon does: tokens a second, hits, reads, each layer, each program.

    'q' or Ctrl-C ends it.  It waits for a daemon that is not there, or goes away.  With --once it does not, and exits
    with 3 if no daemon runs in this home.
    """
    asked = _Asked(Home.current())
    try:
        if once:
            _once(asked, as_json, interval)
        elif as_json:
            _json_lines(asked, interval)
        elif sys.stdout.isatty():
            _live(asked, interval)
        else:
            raise click.UsageError("standard output is no terminal; use --once or --json")
    except (KeyboardInterrupt, BrokenPipeError):
        return  # whoever read it has seen enough
    finally:
        asked.close()


class _Asked:
    """A daemon to ask for its status; after a failure the next question looks for one anew."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._connection: Connection | None = None
        self._names: dict[int, str] = {}

    def ask(self) -> Status:
        """Its status.

        Raises:
            ExpertdError: there is none, or it does not answer.
        """
        try:
            if self._connection is None:
                self._connection = connect(self._home, "cli")
            return self._connection.ask(AskStatus(), Status, timeout_s=ANSWER_S)
        except ExpertdError:
            self.close()
            raise

    def programs(self, found: Status) -> dict[int, str]:
        """The names of the processes with a session; each is looked up once."""
        pids = {session.pid for model in found.models for session in model.sessions}
        self._names = {pid: name for pid, name in self._names.items() if pid in pids}
        self._names |= programs(pids - set(self._names))
        return self._names

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def as_object(found: Status, rates: Rates, names: dict[int, str]) -> dict[str, Any]:
    """The object that ``--json`` prints."""
    from dataclasses import asdict

    shown = {"daemon": found.daemon.pid, "uptime_s": found.daemon.uptime_s, **asdict(rates), "hit_rate": rates.hit_rate}
    for model in shown["models"]:
        for session in model["sessions"]:
            session["program"] = names.get(session["pid"], "")
    return shown


def _once(asked: _Asked, as_json: bool, interval: float) -> None:
    window = Window(interval)
    window.add(asked.ask())
    time.sleep(interval)
    found = asked.ask()
    rates = window.add(found)
    if as_json:
        _print_object(asked, found, rates)
        return
    from rich.console import Console

    from expertd.clients.terminal.live import frame

    console = Console(highlight=False)
    console.print(frame(found, rates, asked.programs(found), console.width, marks()))


def _json_lines(asked: _Asked, interval: float) -> None:
    import json

    window = Window(interval)
    while True:
        try:
            found = asked.ask()
        except ExpertdError as error:
            click.echo(json.dumps({"daemon": None, "error": {"code": error.code, "message": error.message}}))
        else:
            rates = window.add(found)
            if rates is not None:
                _print_object(asked, found, rates)
        sys.stdout.flush()
        time.sleep(interval)


def _print_object(asked: _Asked, found: Status, rates: Rates | None) -> None:
    import json

    if rates is None:  # another daemon has come between
        shown: dict[str, Any] = {"daemon": found.daemon.pid, "uptime_s": found.daemon.uptime_s, "models": []}
    else:
        shown = as_object(found, rates, asked.programs(found))
    click.echo(json.dumps(shown))


def _live(asked: _Asked, interval: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from expertd.clients.terminal.live import KEYS, frame, trouble

    console, window = Console(highlight=False), Window(max(interval, WINDOW_S))
    with keys() as wait, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                found = asked.ask()
            except ExpertdError as error:
                shown = trouble(f"{error.message} [{error.code}]", interval)
            else:
                rates = window.add(found)
                shown = frame(found, rates, asked.programs(found), console.width, marks(), KEYS)
            live.update(shown, refresh=True)
            if wait(interval):
                return


def marks() -> str:
    """The characters of strips that standard output can show."""
    try:
        LEVELS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_LEVELS
    return LEVELS


@contextmanager
def keys() -> Iterator[Wait]:
    """Take single keys from the terminal in the block, without showing them; afterwards it is as it was.

    SIGTERM ends the block in order too, so that no terminal is left in another state.
    """
    import select
    import signal
    import termios
    import tty

    def wait(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if not sys.stdin.isatty():
                time.sleep(left)
            elif select.select([sys.stdin], [], [], left)[0]:
                key = os.read(sys.stdin.fileno(), 1)
                if key in (b"q", b"Q", b"\x04", b""):
                    return True
        return False

    def ended(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = termios.tcgetattr(sys.stdin) if sys.stdin.isatty() else None
    with on_signals(ended, signal.SIGTERM):
        try:
            if before is not None:
                tty.setcbreak(sys.stdin)
            yield wait
        finally:
            if before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
