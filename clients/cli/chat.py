"""``expertd chat MODEL``: a conversation in the terminal, through a worker in this process.

Answers go to standard output.  On a terminal a line of figures follows each; in a pipe they go to standard error.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import sys
import termios
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import click

from expertd.clients.cli.parameters import (
    budget_option,
    complete_model,
    config_option,
    find_or_pull,
    model_folder_option,
)
from expertd.clients.cli.signals import Stop
from expertd.clients.cli.wrap import take_any_bytes
from expertd.clients.terminal.conversation import (
    HELP,
    Command,
    Conversation,
    SaveFailed,
    parse,
    printable,
    read_message,
)
from expertd.clients.terminal.fit import columns, wrapped
from expertd.clients.terminal.glance import percent
from expertd.clients.terminal.rates import rates
from expertd.protocol.config import read_config
from expertd.protocol.errors import ExpertdError, PathInvalid
from expertd.protocol.messages import AskStatus, Status
from expertd.protocol.model_names import shown_name
from expertd.protocol.paths import Home, expanded
from expertd.protocol.rendezvous import connect
from expertd.protocol.sizes import show_size

ASK, MORE = ">>> ", "... "
STATUS_S = 2.0


@click.command()
@click.argument("model", shell_complete=complete_model)
@model_folder_option
@click.option("--system", default="", metavar="WORDS", help="What the model is told before all else.")
@click.option(
    "--max-tokens",
    default=1024,
    show_default=True,
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest answer.",
)
@config_option("generate_temperature")
@config_option("generate_kv_bits")
@budget_option
def chat(model: str, system: str, max_tokens: int, budget: str | None, **flags: Any) -> None:
    """Chat with MODEL, a checkpoint's folder, or the name of one ('expertd models' lists what is here).

    '/help' lists what can be typed besides messages.  Ctrl-C stops an answer, Ctrl-D leaves.  What was said stays
    computed, so an answer waits only for what is new.

    In a pipe each line of standard input is one turn, or several as they are typed in a terminal: between lines of
    \"\"\", or each but the last with \\ at its end.  The first answer that fails ends it.  Exits with 2 if a line was a
    command that there is not, with 1 if the chat could not be saved.
    """
    take_any_bytes()
    config = read_config(Home.current(), **flags)
    folder = find_or_pull(model)  # before mlx is imported, which takes a second
    import expertd
    from expertd.worker.turns import Turns

    loaded, tokenizer = expertd.load(folder, budget=budget)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    try:
        turns = Turns(loaded, tokenizer, kv_bits=config.generate_kv_bits.value)
        temperature = config.generate_temperature.value
        talk = _Talk(shown_name(folder), loaded, tokenizer, turns, system, max_tokens, temperature)
        if on_terminal:
            _at_terminal(talk)
        else:
            _in_pipe(talk)
    finally:
        expertd.unload(loaded)
    if talk.failed_commands and not on_terminal:
        sys.exit(talk.failed_commands[0])


class _Talk:
    """One chat: its messages, its cache, and what each answer has cost."""

    def __init__(
        self, name: str, model: Any, tokenizer: Any, turns: Any, system: str, max_tokens: int, temperature: float
    ) -> None:
        self.name = name
        self.said = Conversation(system)
        self.failed_commands: list[int] = []
        """The exit status that each command deserves which could not be obeyed."""
        self._model = model
        self._tokenizer = tokenizer
        self._turns = turns
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._status = _Figures(Home.current())

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Have ``text`` answered, showing the answer piece by piece, and return a line of figures.

        Ctrl-C stops the answer: what there is of it was said.

        Raises:
            ExpertdError: there is no answer, or none any more; then it is as if ``text`` had not been asked.
            KeyboardInterrupt: Ctrl-C came again before the answer stopped; likewise.
        """
        from expertd.worker.answers import check_text
        from expertd.worker.load import session_of
        from expertd.worker.template import encode_chat

        self.said.ask(text)
        stop, pieces, last = Stop(), [], None
        try:
            check_text(self.said.messages)
            prompt = encode_chat(self._tokenizer, self.said.messages)
            self._status.before()
            with stop.on(signal.SIGINT):
                for last in self._turns.answer(prompt, self._max_tokens, self._temperature, stop):
                    pieces.append(printable(last.text))
                    show(pieces[-1])
                session_of(self._model).report()
        except BaseException:
            self.said.take_back()
            raise
        if pieces or not stop.wanted:
            self.said.answered("".join(pieces))
        else:
            self.said.take_back()
        told = self._status.after()
        return "; ".join([*_ended(last, stop.wanted, self._max_tokens), *_speed(last), *told, self._length()])

    def _length(self) -> str:
        return f"chat {len(self._turns.cached):,} tokens ({self._turns.computed:,} new)"

    def reset(self) -> None:
        """Begin anew."""
        self.said.reset()
        self._turns.forget()


def _speed(last: Any) -> list[str]:
    if last is None:
        return []
    return [f"{last.generation_tokens:,} tokens, {last.generation_tps:.1f}/s"]


def _ended(last: Any, stopped: bool, most: int) -> list[str]:
    if stopped:
        return ["stopped" if last is not None else "stopped before an answer began"]
    if last is not None and last.finish_reason == "length":
        cut = last.generation_tokens >= most
        return ["cut off by --max-tokens" if cut else "cut off by the model's context: /reset begins anew"]
    return []


class _Figures:
    """What the daemon tells of this process's model during an answer; nothing while there is no daemon to ask."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._before: Status | None = None

    def before(self) -> None:
        """An answer begins."""
        self._before = self._ask()

    def after(self) -> list[str]:
        """An answer has ended: its hits, and the memory that the model's experts have."""
        found = self._ask()
        if found is None:
            return []
        between = rates(self._before, found) if self._before is not None else None
        own = [model.id for model in found.models if any(session.pid == os.getpid() for session in model.sessions)]
        told = []
        for model in between.models if between is not None else []:
            if model.id in own and model.hits + model.misses:
                told.append(f"{percent(model.hits, model.hits + model.misses)} hits")
        return told + [f"{show_size(model.pool_bytes)} of experts" for model in found.models if model.id in own]

    def _ask(self) -> Status | None:
        try:
            with connect(self._home, "cli") as connection:
                return connection.ask(AskStatus(), Status, timeout_s=STATUS_S)
        except ExpertdError:
            return None


def _in_pipe(talk: _Talk) -> None:
    lines = iter(sys.stdin.readline, "")

    def more() -> str:
        line: str | None = next(lines, None)
        if line is None:
            raise EOFError
        return line.removesuffix("\n")

    while True:
        try:
            first = more()
        except EOFError:
            return
        typed = parse(first)
        if isinstance(typed, Command):
            if not _obey(talk, typed):
                return
        elif typed := read_message(first, more).strip():
            figures = talk.answer(typed, _show)
            click.echo()
            click.echo(f"expertd: {figures}", err=True)


def _at_terminal(talk: _Talk) -> None:
    import readline  # input() edits lines with it

    readline.set_auto_history(True)
    click.secho(f"{talk.name}: type a message.  /help lists what else there is; Ctrl-D leaves.", dim=True)
    while True:
        try:
            if _left_already():
                raise EOFError
            first = input(ASK)
            typed = parse(first)
            if isinstance(typed, Command):
                if not _obey(talk, typed):
                    return
                continue
            typed = read_message(first, lambda: input(MORE)).strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if typed:
            _turn(talk, typed)


def _left_already() -> bool:
    """Whether Ctrl-D was typed before there was a prompt; it is taken then.

    What edits lines would not see it: the terminal has turned it into an end of what is read, and not into a key.
    """
    if not select.select([sys.stdin], [], [], 0)[0]:
        return False
    typed = fcntl.ioctl(sys.stdin, termios.FIONREAD, bytes(4))
    return not int.from_bytes(typed, sys.byteorder) and not os.read(sys.stdin.fileno(), 1)


def _turn(talk: _Talk, text: str) -> None:
    """One question and its answer on the terminal; whatever happens, the chat goes on."""
    heard = io.StringIO()  # what the worker tells on standard error would stand in the middle of the answer
    try:
        with redirect_stderr(heard):
            figures = talk.answer(text, _show)
    except ExpertdError as error:
        click.echo()
        click.echo(f"expertd: {error.message} [{error.code}]", err=True)
        click.secho("Your message was not answered; the chat is as it was before it.", dim=True)
        return
    except KeyboardInterrupt:
        click.echo()
        click.secho("Stopped; the chat is as it was before your message.", dim=True)
        return
    click.echo()
    for sentence in [*heard.getvalue().splitlines(), figures]:
        for line in wrapped(sentence, columns()):
            click.secho(line, dim=True)
    click.echo()


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _obey(talk: _Talk, command: Command) -> bool:
    """Do what a command says; False to leave."""
    match command.name:
        case "quit" | "exit" | "bye":
            return False
        case "help":
            click.echo(HELP)
        case "reset":
            talk.reset()
            click.echo("The chat begins anew.")
        case "system" if command.rest:
            talk.said.system = "" if command.rest == "-" else command.rest
            click.echo("The model is told so from now on." if talk.said.system else "The model is told nothing.")
        case "system":
            click.echo(talk.said.system or "The model is told nothing.")
        case "save" if command.rest:
            try:
                path = expanded(command.rest)
                talk.said.save(path, talk.name)
            except (SaveFailed, PathInvalid) as error:
                click.echo(f"expertd: {error}", err=True)
                talk.failed_commands.append(ExpertdError.exit_status)
            else:
                click.echo(f"saved {len(talk.said.messages)} messages to {path}")
        case "save":
            click.echo("expertd: /save needs a name: /save FILE", err=True)
            talk.failed_commands.append(click.UsageError.exit_code)
        case name:
            click.echo(f"expertd: there is no /{name}; /help lists what there is", err=True)
            talk.failed_commands.append(click.UsageError.exit_code)
    return True
