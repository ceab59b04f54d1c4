"""``expertd models``: the models on this machine, what is in them, and which of them expertd can serve.

Output: a table where the terminal is wide enough, else a few lines a model.  What is known of a model is
``expertd.clients.hub.survey``; where models are looked for ``expertd.protocol.model_names``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.clients.cli.parameters import json_option, model_folder_option
from expertd.protocol.config import read_config
from expertd.protocol.errors import ExpertdError, NotACheckpoint
from expertd.protocol.model_names import HUB_CACHE, LM_STUDIO, KnownModel, known_models, models_in
from expertd.protocol.paths import Home, expanded
from expertd.protocol.sizes import show_size

if TYPE_CHECKING:
    from expertd.clients.hub.survey import Facts

_file = click.Path(path_type=Path)


@dataclass(frozen=True)
class Row:
    """A model as it is listed.  ``hits`` is a part of 1; it and ``tokens_per_s`` are None where nothing is expected."""

    facts: Facts
    place: str
    share: float | None
    hits: float | None = None
    tokens_per_s: float | None = None


@click.command()
@click.argument("folders", nargs=-1, type=_file, metavar="[FOLDER]...")
@click.option(
    "--expect", is_flag=True, help="Reckon hits and tokens a second too, as 'expertd plan' does (seconds a model)."
)
@model_folder_option
@json_option()
def models(folders: Sequence[Path], expect: bool, as_json: bool) -> None:
    """List the models on this machine: what is in them, and whether expertd can serve them.

    Looks into the hub's cache, LM Studio's folders and the folders of the setting 'model_folders', or only into the
    FOLDERs.  Reads headers, never weights.  'fits' is the part of a model's experts that the budget of a daemon holds
    which would be started now; a model of which little fits is served too, only slower.
    """
    from expertd.clients.hub.survey import packed_stores, survey

    home = Home.current()
    budget = _budget(home)
    stores = packed_stores(home)
    rows = [
        _row(home, survey(model.folder, model.name, stores), model.place, budget, expect)
        for model in _listed(home, folders)
    ]
    if as_json:
        click.echo(json.dumps({"budget_bytes": budget, "models": [as_object(row) for row in rows]}, indent=2))
        return
    if not rows:
        click.echo("no model is on this machine; get one with: expertd pull mlx-community/Qwen3-30B-A3B-4bit")
        return
    click.echo(f"the budget for experts is {show_size(budget)}\n")
    for line in listing(rows, shutil.get_terminal_size().columns):
        click.echo(line)


def as_object(row: Row) -> dict[str, Any]:
    """The object of a model that ``--json`` prints.  Sizes are in bytes, parts of 1."""
    facts = row.facts
    return {
        "name": facts.name,
        "path": str(facts.folder),
        "place": row.place,
        "family": facts.family or None,
        "size_bytes": facts.size,
        "moe_layers": facts.layers,
        "experts": facts.experts,
        "top_k": facts.top_k,
        "expert_bytes": facts.expert_bytes,
        "rest_bytes": facts.rest_bytes,
        "servable": facts.servable,
        "why_not": facts.why_not or None,
        "pack_first": facts.pack_first,
        "packed": None if facts.packed is None else str(facts.packed),
        "fits": row.share,
        "expected_hits": row.hits,
        "tokens_per_s": row.tokens_per_s,
    }


def listing(rows: Sequence[Row], width: int) -> list[str]:
    """The models as lines for a person, the ones that can be served first: a table if that fits ``width``."""
    ordered = sorted(rows, key=lambda row: (not row.facts.servable, row.place, row.facts.name.lower()))
    lines = _table(ordered)
    if max(map(len, lines)) <= width:
        return lines
    return [line for row in ordered for line in (*_paragraph(row, width), "")][:-1]


def _table(rows: Sequence[Row]) -> list[str]:
    head = ["model", "where", "size", "layers x experts", "experts", "rest", "fits", "packed", "served"]
    cells = [_cells(row) for row in rows]
    if any(row.hits is not None or row.tokens_per_s is not None for row in rows):
        head[7:7] = ["expected hits", "tokens/s"]
        for line, row in zip(cells, rows, strict=True):
            line[7:7] = [_percent(row.hits), "" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}"]
    left = {"model", "where", "packed", "served"}
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(size) if name in left else cell.rjust(size)
            for cell, size, name in zip(line, widths, head, strict=True)
        ).rstrip()
        for line in (head, *cells)
    ]


def _cells(row: Row) -> list[str]:
    facts = row.facts
    if not facts.expert_bytes:
        return [facts.name, row.place, _size(facts.size), _shape(facts), "", "", "", _packed(facts), _served(facts)]
    sizes = [show_size(facts.expert_bytes), show_size(facts.rest_bytes), _percent(row.share)]
    return [facts.name, row.place, _size(facts.size), _shape(facts), *sizes, _packed(facts), _served(facts)]


def _paragraph(row: Row, width: int) -> list[str]:
    facts = row.facts
    gap = max(2, width - len(facts.name) - len(row.place))
    head = f"{facts.name}{' ' * gap}{row.place}"
    lines = [head] if len(head) <= width else [facts.name, f"  in {row.place}"]
    if facts.expert_bytes:
        lines.append(
            f"  {_size(facts.size)}: experts {show_size(facts.expert_bytes)} ({_shape(facts)}), "
            f"the rest {show_size(facts.rest_bytes)}"
        )
    elif facts.size:
        lines.append(f"  {_size(facts.size)}" + (f" ({_shape(facts)})" if facts.experts else ""))
    if not facts.servable:
        return [*lines, *click.wrap_text(f"not served: {facts.why_not}", width, "  ", "    ").splitlines()]
    told = ["can be served" + (" after 'expertd pack'" if facts.pack_first else "")]
    told.append("packed" if facts.packed else "not packed")
    if row.share is not None:
        told.append(f"{_percent(row.share)} of its experts fit")
    foreseen = [] if row.hits is None else [f"{_percent(row.hits)} hits"]
    if row.tokens_per_s is not None:
        foreseen.append(f"{row.tokens_per_s:.1f} tokens/s")
    if foreseen:
        told.append("expected: " + " and ".join(foreseen))
    return [*lines, *click.wrap_text(", ".join(told), width, "  ", "    ").splitlines()]


def _shape(facts: Facts) -> str:
    if not facts.experts:
        return ""
    layers = f"{facts.layers} x " if facts.layers else ""
    return f"{layers}{facts.experts}" + (f", {facts.top_k} a token" if facts.top_k else "")


def _served(facts: Facts) -> str:
    if facts.why_not:
        return f"no: {facts.why_not}"
    return "after 'expertd pack'" if facts.pack_first else "yes"


def _packed(facts: Facts) -> str:
    return "yes" if facts.packed else "no" if facts.servable else ""


def _size(size: int) -> str:
    return show_size(size) if size else ""


def _percent(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.0f} %"


# -- what there is to list ---------------------------------------------------------------------------------------------


def _listed(home: Home, folders: Sequence[Path]) -> Iterator[KnownModel]:
    """The models of ``folders``, or of all places; each folder once, by the name that was found first."""
    seen: set[Path] = set()
    for model in known_models(home) if not folders else _given(folders):
        real = model.folder.resolve()
        if real not in seen:
            seen.add(real)
            yield model


def _given(folders: Sequence[Path]) -> Iterator[KnownModel]:
    for folder in folders:
        place = expanded(folder).absolute()
        if not place.is_dir():
            raise NotACheckpoint(f"{folder} is no folder; give a model's folder, or one that has models in it")
        yield from models_in(place)


def _budget(home: Home) -> int:
    """Bytes that a daemon which is started now would give to experts."""
    from expertd.clients.cli.budget import cache_holds
    from expertd.daemon.machine import default_budget, this_machine

    return read_config(home).budget.value or default_budget(this_machine(), cache_holds(home)).size


def _row(home: Home, facts: Facts, place: str, budget: int, expect: bool) -> Row:
    known = expect and facts.servable and facts.expert_bytes
    hits, speed = expected(home, facts.folder, budget) if known else (None, None)
    told = place if place in (HUB_CACHE, LM_STUDIO) else _short(place)
    return Row(facts, told, facts.share(budget), hits, speed)


def _short(place: str) -> str:
    home = str(expanded("~"))
    return "~" + place[len(home) :] if place == home or place.startswith(home + "/") else place


def expected(home: Home, folder: Path, budget: int) -> tuple[float | None, float | None]:
    """The hits (a part of 1) and tokens a second to expect of a model with ``budget`` bytes; None where unknown."""
    from expertd.clients.cli.plan import reckon

    try:
        row = reckon(home, folder, sizes=[budget]).plan.rows[0]
    except ExpertdError:
        return None, None
    return row.hits, row.tokens_s
