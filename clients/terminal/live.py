"""One frame of ``expertd top``, drawn with rich from ``Rates``.  Where they come from: ``expertd.clients.cli.top``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertd.clients.terminal.glance import duration, percent
from expertd.clients.terminal.heat import fit, levels
from expertd.clients.terminal.rates import LayerRates, ModelRates, Rates, SessionRates, hit_rate
from expertd.protocol.messages import Status
from expertd.protocol.sizes import show_size

STRIP_AROUND = 38
"""Columns of a line that its strip leaves to the words beside it."""
QUIET_MISSES = 0.1
"""A layer with less of its lookups missed never looks hot."""
QUIET_READS = 1e6
"""Nor does one that reads less than so many bytes a second."""
KEYS = "q ends"
PRESSURE_STYLES = {"normal": "green", "warning": "yellow", "critical": "bold red"}


def frame(
    found: Status, rates: Rates | None, programs: Mapping[int, str], width: int, marks: str, keys: str = ""
) -> RenderableType:
    """What a terminal of ``width`` columns shows.

    Args:
        rates: None until there are two answers of this daemon.
        programs: names by process ids, as far as they are known.
        marks: the characters of strips, from nothing to most.
        keys: what the user can press.
    """
    parts: list[RenderableType] = [_title(found, rates, keys), Text()]
    if rates is None:
        return Group(*parts, Text("waiting for a second look ..."))
    parts.append(_figures(rates, found))
    for model in rates.models:
        parts += [Text(), _head(model), *_heat(model.layers, width, marks)]
        if model.sessions:
            parts.append(_sessions(model.sessions, programs))
        else:
            parts.append(Text("  no program uses it now", "dim"))
    if not rates.models:
        parts += [Text(), Text("No model has been used yet.")]
    return Group(*parts)


def trouble(sentence: str, interval_s: float) -> RenderableType:
    """What is shown while no daemon answers."""
    again = Text(f"asking again every {interval_s:g} s; {KEYS}", "dim")
    return Group(Text("expertd top", "bold"), Text(), Text(sentence, "yellow"), again)


def _title(found: Status, rates: Rates | None, keys: str) -> RenderableType:
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True)
    line.add_column(justify="right", no_wrap=True)
    daemon = f"   process {found.daemon.pid}, up {duration(found.daemon.uptime_s)}"
    about = "; ".join(filter(None, [f"the last {rates.seconds:.2g} s" if rates is not None else "", keys]))
    line.add_row(Text.assemble(("expertd top", "bold"), daemon), Text(about, "dim"))
    return line


def _figures(rates: Rates, found: Status) -> RenderableType:
    held = f"{show_size(rates.used_bytes)} of {show_size(min(rates.limit_bytes, rates.budget_bytes))}"
    figures = (
        ("tokens/s", f"{rates.tokens_per_s:.1f}", "bold cyan"),
        ("prompt tokens/s", f"{rates.prompt_tokens_per_s:.0f}", ""),
        ("hits", _share(rates.hit_rate, rates.hits, rates.misses), "bold"),
        ("disk", _speed(rates.read_bytes_per_s), ""),
        ("memory", held, ""),
        ("pressure", found.pressure, PRESSURE_STYLES.get(found.pressure, "")),
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name, _, _ in figures:
        table.add_column(name, no_wrap=True, overflow="crop", min_width=8)
    table.add_row(*(Text(value, style) for _, value, style in figures))
    return table


def _head(model: ModelRates) -> RenderableType:
    held = percent(model.resident_blocks, model.blocks)
    told = f"   {held} of its experts in memory, {show_size(model.pool_bytes)}"
    return Text.assemble((model.name, "bold"), told, overflow="crop", no_wrap=True)


def _heat(layers: Sequence[LayerRates], width: int, marks: str) -> list[RenderableType]:
    if not any(layer.hits or layer.misses or layer.read_bytes_per_s for layer in layers):
        return [Text("  idle", "dim")]
    missed = [1 - (hit_rate(layer.hits, layer.misses) or 0) if layer.hits + layer.misses else 0.0 for layer in layers]
    read = [layer.read_bytes_per_s for layer in layers]
    room = width - STRIP_AROUND
    return [
        _strip("misses", missed, QUIET_MISSES, room, marks, f"{100 * max(missed):.0f} %"),
        _strip("reads", read, QUIET_READS, room, marks, _speed(max(read))),
        _axis(len(layers), len(fit(missed, room))),
    ]


def _strip(label: str, values: Sequence[float], quiet: float, width: int, marks: str, most: str) -> RenderableType:
    text = levels(fit(values, width), max(quiet, *values), marks)
    line = Text(f"  {label:7} ", no_wrap=True)
    for mark, run in groupby(text):
        line.append("".join(run), _style(marks.index(mark), len(marks)))
    line.append(f"  most {most}, layer {values.index(max(values))}" if max(values) > 0 else "  none", "dim")
    return line


def _style(level: int, count: int) -> str:
    return ("blue", "cyan", "yellow", "red")[min(3, 4 * level // count)]


def _axis(layers: int, columns: int) -> RenderableType:
    last = str(layers - 1)
    return Text(f"  {'layer':7} {'0':{max(1, columns - len(last))}}{last}", "dim", no_wrap=True)


def _sessions(sessions: Sequence[SessionRates], programs: Mapping[int, str]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("  program", no_wrap=True, overflow="crop", min_width=16)
    for name in ("process", "tokens/s", "prompt tokens/s", "waiting"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, overflow="crop")
    for session in sorted(sessions, key=lambda one: (-one.tokens_per_s, -one.prompt_tokens_per_s, one.pid)):
        table.add_row(
            f"  {programs.get(session.pid, '?')}", str(session.pid), f"{session.tokens_per_s:.1f}",
            f"{session.prompt_tokens_per_s:.0f}", f"{100 * session.waited:.0f} %",
            Text("does not answer" if session.left_behind else "", "yellow"),
        )  # fmt: skip
    return table


def _share(rate: float | None, hits: int, misses: int) -> str:
    return "-" if rate is None else percent(hits, hits + misses)


def _speed(bytes_per_s: float) -> str:
    return f"{show_size(bytes_per_s)}/s"
