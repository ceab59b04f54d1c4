"""The status page: what the gateway and its daemon do, for a person in a browser.

``figures`` puts together all that there is to show, as ``GET /status.json`` answers it; ``Page`` makes HTML of them,
out of the templates in ``status_page``.  The server renders everything; the page's script only fetches the middle of it
again each second, so a browser without scripts shows the same.  Pure, but for reading the templates once.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from expertd.clients.gateway.observe import RequestView
from expertd.clients.gateway.watch import KEPT_S, Found, Point
from expertd.clients.terminal.glance import duration, percent
from expertd.clients.terminal.rates import LayerRates, ModelRates
from expertd.protocol import VERSION
from expertd.protocol.messages import ModelStatus
from expertd.protocol.model_names import shown_name
from expertd.protocol.sizes import show_size

__all__ = ["Page", "ServedModel", "figures", "lines"]

FOLDER = Path(__file__).parent / "status_page"
SHORTEST_S = 60.0
"""A chart is of so many seconds at least, and of as many as there are to show."""
GAP_S = 12.0
"""Points that lie farther apart are not joined: nobody looked meanwhile."""


@dataclass(frozen=True)
class ServedModel:
    """A model that the gateway serves.

    Attributes:
        name: by which answers call it.
        state: in a word: ``ready``, ``asleep``, ``loading``, ``restarting``.
        why: why it takes no requests, in a sentence; empty if it does.
        waiting, running: answers that wait for their turn, and that its worker has.
    """

    name: str
    state: str
    why: str = ""
    waiting: int = 0
    running: int = 0


# -- what there is to show ---------------------------------------------------------------------------------------------


def figures(
    served: Sequence[ServedModel],
    requests: Sequence[RequestView],
    found: Found,
    points: Sequence[Point],
    now: float,
) -> dict[str, Any]:
    """Everything that is shown, as an object for JSON.

    Args:
        points: of the last minutes, by the same clock as ``now``.
    """
    status, rates = found.status, found.rates
    held = {} if status is None else {shown_name(Path(model.path)): model for model in status.models}
    of_now = {} if rates is None else {model.id: model for model in rates.models}
    names = [model.name for model in served]
    models = [
        _model(model, model.name, held.get(model.name), of_now, found)
        for model in served
    ]
    models += [_model(None, name, model, of_now, found) for name, model in held.items() if name not in names]
    return {
        "version": VERSION,
        "ready": any(not model.why for model in served),
        "daemon": None if status is None else {
            "pid": status.daemon.pid,
            "uptime_s": status.daemon.uptime_s,
            "budget_bytes": status.budget_bytes,
            "limit_bytes": status.limit_bytes,
            "used_bytes": status.used_bytes,
            "pressure": status.pressure,
            "pressure_figure": status.pressure_figure,
            "hit_rate": None if rates is None else rates.hit_rate,
            "read_bytes_per_s": 0.0 if rates is None else rates.read_bytes_per_s,
            "tokens_per_s": 0.0 if rates is None else rates.tokens_per_s + rates.prompt_tokens_per_s,
        },
        "trouble": found.trouble,
        "models": models,
        "history": [
            {"ago_s": round(now - point.at, 1)} | {key: value for key, value in asdict(point).items() if key != "at"}
            for point in points
        ],
        "requests": [asdict(request) | {"tokens_per_s": request.tokens_per_s} for request in requests],
    }  # fmt: skip


def _model(
    served: ServedModel | None,
    name: str,
    held: ModelStatus | None,
    of_now: Mapping[str, ModelRates],
    found: Found,
) -> dict[str, Any]:
    return {
        "name": name,
        "served": served is not None,
        "state": "not served here" if served is None else served.state,
        "why": "" if served is None else served.why,
        "waiting": 0 if served is None else served.waiting,
        "running": 0 if served is None else served.running,
        "cache": None if held is None else _cache(held, of_now.get(held.id), found.names),
    }


def _cache(model: ModelStatus, of_now: ModelRates | None, names: Mapping[int, str]) -> dict[str, Any]:
    rates: Sequence[LayerRates | None] = [None] * len(model.layers)
    if of_now is not None and len(of_now.layers) == len(model.layers):
        rates = of_now.layers
    experts = model.blocks / max(1, model.moe_layers)
    return {
        "blocks": model.blocks,
        "resident_blocks": model.resident_blocks,
        "bytes": model.pool_bytes,
        "hits": model.hits,
        "misses": model.misses,
        "bytes_read": model.bytes_read,
        "stall_s": model.waited_s,
        "load_s": model.read_wait_s,
        "programs": [names.get(session.pid, f"process {session.pid}") for session in model.sessions],
        "layers": [
            {
                "held": min(1.0, layer.resident_blocks / max(1.0, experts)),
                "hits": layer.hits,
                "misses": layer.misses,
                "read_bytes_per_s": 0.0 if rate is None else rate.read_bytes_per_s,
            }
            for layer, rate in zip(model.layers, rates, strict=True)
        ],
    }


def lines(history: Sequence[Mapping[str, Any]], name: str, top: float, span_s: float) -> list[str]:
    """The line of one figure, as the ``points`` of polylines in a box of ``span_s`` by 100 units, the newest right.

    There are several, because where nothing was measured there is no line.

    Args:
        top: the value that is drawn at the upper edge.
    """
    found: list[list[str]] = []
    before: float | None = None
    for point in history:
        value, ago_s = point[name], point["ago_s"]
        if value is None:
            before = None
            continue
        if before is None or before - ago_s > GAP_S:
            found.append([])
        found[-1].append(f"{span_s - ago_s:.1f},{100 - 100 * min(1.0, value / top if top else 0.0):.1f}")
        before = ago_s
    return [" ".join(line) for line in found if len(line) > 1]


# -- HTML --------------------------------------------------------------------------------------------------------------


class Page:
    """Makes HTML of figures."""

    def __init__(self) -> None:
        """Read the templates."""
        environment = Environment(
            loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        environment.filters |= {"size": show_size, "duration": duration, "rate": _rate, "number": _number}
        environment.globals |= {"percent": percent, "lines": lines, "shown_s": _shown_s, "highest": _highest}
        style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        environment.globals |= {"style": style, "script": script}
        self._whole, self._part = environment.get_template("page.html"), environment.get_template("live.html")
        self.headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        """They let the page load nothing, and run nothing but its own script."""

    def whole(self, shown: Mapping[str, Any]) -> str:
        """The page."""
        return self._whole.render(shown)

    def part(self, shown: Mapping[str, Any]) -> str:
        """What changes of it."""
        return self._part.render(shown)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _rate(value: float) -> str:
    return f"{show_size(round(value))}/s"


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _shown_s(history: Sequence[Mapping[str, Any]]) -> float:
    """How many seconds charts are of."""
    oldest = float(history[0]["ago_s"]) if history else 0.0
    return min(KEPT_S, max(SHORTEST_S, oldest))


def _highest(history: Sequence[Mapping[str, Any]], name: str) -> float:
    return max((float(point[name] or 0) for point in history), default=0.0)
