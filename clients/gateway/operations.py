"""The routes for whoever runs the gateway: health, metrics, and the status page.

What they show comes from elsewhere: of requests from ``expertd.clients.gateway.observe``, of the daemon from
``watch``, of models from the gateway itself.  The figures and the page are ``metrics`` and ``page``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from expertd.clients.gateway.metrics import CONTENT_TYPE
from expertd.clients.gateway.observe import Observer, ServedModel
from expertd.clients.gateway.watch import DaemonWatch
from expertd.protocol import VERSION
from expertd.protocol.messages import Pressure

if TYPE_CHECKING:
    from expertd.clients.gateway.page import Page

__all__ = ["Operations"]


class Operations:
    """The routes, to be added to an application."""

    def __init__(
        self,
        observer: Observer,
        watch: DaemonWatch,
        models: Callable[[], Sequence[ServedModel]],
        pressure: Callable[[], Pressure],
    ) -> None:
        """Show what these tell.

        Args:
            models: those that are served.
            pressure: how short of memory the machine is, as far as workers have told.
        """
        self._observer = observer
        self._watch = watch
        self._models = models
        self._pressure = pressure
        self._page: Page | None = None

    def routes(self) -> list[web.RouteDef]:
        """For ``Application.add_routes``."""
        return [
            web.get("/", self._whole),
            web.get("/status.html", self._part),
            web.get("/status.json", self._json),
            web.get("/metrics", self._metrics),
            web.get("/health", self._health),
        ]

    async def _health(self, request: web.Request) -> web.Response:
        """All in one; 503 while no model takes requests."""
        models, counts, pressure = self._models(), self._observer.counts(), self._pressure()
        ready = any(model.is_ready for model in models)
        body = {
            "status": "ready" if ready else "not ready",
            "version": VERSION,
            "pressure": pressure.level,
            "figure": pressure.figure,
            "models": [
                {
                    "id": model.name,
                    "state": model.state,
                    "why": model.why,
                    "waiting": counts.get(model.name, (0, 0))[0],
                    "running": counts.get(model.name, (0, 0))[1],
                }
                for model in models
            ],
        }
        return web.Response(
            body=msgspec.json.encode(body), status=200 if ready else 503, content_type="application/json"
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        found = await self._watch.look()
        text = self._observer.metrics.render(found.status, {model.name: model.is_ready for model in self._models()})
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})

    async def _json(self, request: web.Request) -> web.Response:
        return web.Response(
            body=msgspec.json.encode(await self._figures()), content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )  # fmt: skip

    async def _whole(self, request: web.Request) -> web.Response:
        page, shown = self._templates(), await self._figures()
        return web.Response(text=page.whole(shown), content_type="text/html", headers=page.headers)

    async def _part(self, request: web.Request) -> web.Response:
        page, shown = self._templates(), await self._figures()
        return web.Response(text=page.part(shown), content_type="text/html", headers=page.headers)

    async def _figures(self) -> dict[str, Any]:
        from expertd.clients.gateway.page import figures

        found, now = await self._watch.look(), self._watch.clock()
        points = self._watch.history.points(now)
        return figures(self._models(), self._observer.requests(), self._observer.counts(), found, points, now)

    def _templates(self) -> Page:
        """Read when somebody looks for the first time: most gateways are never looked at."""
        if self._page is None:
            from expertd.clients.gateway.page import Page

            self._page = Page()
        return self._page
