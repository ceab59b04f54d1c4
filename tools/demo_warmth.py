"""``make demo-warmth``: what a warm cache is worth, as a chart that grows token by token.

A small model whose experts do not fit the budget, on a disk that is slowed down until reading is what takes the time.
One app starts cold and warms up; the topic changes and comes back; the daemon is killed and, later, ended in order with
all that used it; a second app comes.  Each row is one answer: its columns are tokens, and how high they are is how many
experts had to be waited for.  What the model says is compared with plain mlx-lm at the end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from expertd.clients.terminal.heat import LEVELS, PLAIN_LEVELS, levels
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon
from expertd.protocol.sizes import show_size
from tools.demo import DEMO_MODEL, budget_of, expert_bytes
from tools.stage import ask_status, temporary_home

SHARE = 0.6
"""Of the experts fits the budget."""
DISK = "6MB/s,1ms"
TOKENS = 34
PYTHON_DOCS = "What does os.path.join do?"
WRITING = "Write the function clamp: Limit x to the range from low to high."
TOP = 12.0
"""Misses of a token that fill a column."""
SETTLED_S = 60.0
WIDE = 110
"""Columns that the speed and the notes need, too."""


@dataclass
class Row:
    """One answer of an app."""

    label: str
    prompt: str
    note: str = ""
    misses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: int = 0
    text: str = ""

    def cells(self, plain: bool, wide: bool) -> list[str | Text]:
        """What its line in the table shows."""
        strip = levels(self.misses, TOP, PLAIN_LEVELS if plain else LEVELS)
        first, rest = self.seconds[:1], self.seconds[1:]
        cells: list[str | Text] = [
            self.label,
            Text(f"{strip:<{TOKENS}}", style="bold"),
            str(sum(self.misses)),
            show_size(self.bytes),
            f"{first[0]:.2f} s" if first else "",
        ]
        return cells if not wide else [*cells, f"{len(rest) / sum(rest):.0f}/s" if sum(rest) else "", self.note]


class Chart:
    """All rows, on a terminal while they grow; elsewhere each once, when it has ended."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._plain = not self._console.encoding.lower().startswith("utf")
        self.rows: list[Row] = []
        self._live = Live(console=self._console, auto_refresh=False, transient=False)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """In the body the chart is on the screen."""
        if not self._console.is_terminal:
            yield
            self._console.print(self._table())
            return
        with self._live:
            yield
            self.draw()

    def draw(self) -> None:
        """Show what there is now."""
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Group:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("")
        table.add_column("misses, token by token", no_wrap=True)
        wide = self._console.width >= WIDE
        for name in ("misses", "read", "first", *(["then"] if wide else [])):
            table.add_column(name, justify="right", no_wrap=True)
        if wide:
            table.add_column("")
        for row in self.rows:
            table.add_row(*row.cells(self._plain, wide))
        return Group(table)


class App:
    """A process that has the model, as any program of a user would; the first one starts the daemon."""

    def __init__(self, home: Home) -> None:
        command = [sys.executable, "-m", "tools.warmth_app", str(DEMO_MODEL)]
        with (home.log / "apps.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.ready_s = float(self._hear()["ready_s"])

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"an app ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def answer(self, row: Row, chart: Chart, after: Callable[[int], None] = lambda token: None) -> None:
        """Have it answer the row's prompt; ``after`` is called with the number of each token."""
        assert self._process.stdin is not None
        chart.rows.append(row)
        self._process.stdin.write(json.dumps({"prompt": row.prompt, "tokens": TOKENS}) + "\n")
        self._process.stdin.flush()
        while "text" not in (told := self._hear()):
            row.misses.append(told["misses"])
            row.seconds.append(told["seconds"])
            row.bytes += told["bytes"]
            chart.draw()
            after(len(row.misses))
        row.text = told["text"]

    def end(self) -> None:
        """Let it end as it likes to."""
        self._process.communicate(timeout=30)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    began = time.monotonic()
    chart = show()
    same = compare(chart.rows)
    print(f"\nthe same text as plain mlx-lm: {same} of {len(chart.rows)} answers ({time.monotonic() - began:.0f} s)")
    if same != len(chart.rows):
        sys.exit(1)


def show(disk: str | None = DISK) -> Chart:
    """Draw the chart while it all happens, on a ``disk`` as of ``--simulate-ssd``; None: this machine's."""
    experts = expert_bytes(DEMO_MODEL)
    budget = budget_of(DEMO_MODEL, SHARE)
    slow = "this disk" if disk is None else f"a disk of {disk.replace(',', ', ')}"
    print(f"{show_size(experts)} of experts, a budget of {show_size(budget)}, {slow}\n", flush=True)
    chart = Chart()
    with ExitStack() as stack:
        home = stack.enter_context(temporary_home())
        home.config.write_text(f"budget = {budget}\n")
        if disk is not None:
            os.environ["EXPERTD_SIMULATE_SSD"] = disk
        stack.callback(stop_daemon, home, "demo")
        with chart.shown():
            run(chart, home, stack)
    return chart


def run(chart: Chart, home: Home, stack: ExitStack) -> None:
    """All that is shown, in order."""
    first = App(home)
    stack.callback(first.kill)
    first.answer(Row("cold", PYTHON_DOCS, f"loaded in {first.ready_s:.2f} s"), chart)
    first.answer(Row("the same again", PYTHON_DOCS), chart)
    first.answer(Row("another topic", WRITING), chart)
    first.answer(Row("and back", PYTHON_DOCS), chart)

    def crash(token: int) -> None:
        if token == TOKENS // 3:
            os.kill(ask_status(home).daemon.pid, signal.SIGKILL)

    first.answer(Row("daemon killed", PYTHON_DOCS, f"at token {TOKENS // 3}"), chart, crash)
    second = App(home)
    stack.callback(second.kill)
    second.answer(Row("a second app", PYTHON_DOCS, f"loaded in {second.ready_s:.2f} s"), chart)
    for app in (first, second):
        app.end()
    stop_daemon(home, "demo")  # whatever starts next finds nothing but files, as after a restart of the machine
    third = App(home)
    stack.callback(third.kill)
    waited_s = settle(home)
    third.answer(Row("after a restart", PYTHON_DOCS, f"refilled in {waited_s:.1f} s"), chart)


def settle(home: Home) -> float:
    """Wait until what was worth keeping is there again; return the seconds that it took."""
    began = time.monotonic()
    while time.monotonic() - began < SETTLED_S:
        models = ask_status(home).models
        if models and not any(model.warming for model in models):
            break
        time.sleep(0.05)
    return time.monotonic() - began


def compare(rows: Sequence[Row]) -> int:
    """How many of the answers are those of plain mlx-lm."""
    from mlx_lm import generate, load

    plain, tokenizer = load(str(DEMO_MODEL))[:2]
    said = {}
    for prompt in {row.prompt for row in rows}:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        said[prompt] = generate(plain, tokenizer, tokens, max_tokens=TOKENS)
    return sum(row.text == said[row.prompt] for row in rows)


if __name__ == "__main__":
    main()
