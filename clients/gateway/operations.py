"""The routes for whoever runs the gateway: metrics, and the status page.

What they show comes from elsewhere: of requests from ``expertd.clients.gateway.observe``, of the daemon from ``watch``,
of models from ``served``.  The figures and the page are ``metrics`` and ``page``.  Health is ``app``'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from expertd.clients.gateway.metrics import CONTENT_TYPE
from expertd.clients.gateway.observe import Observer
from expertd.clients.gateway.served import Models, Served
from expertd.clients.gateway.watch import DaemonWatch
from expertd.protocol.errors import ExpertdError

if TYPE_CHECKING:
    from expertd.clients.gateway.page import Page, ServedModel

__all__ = ["Operations"]


class Operations:
    """The routes, to be added to an application."""

    def __init__(self, models: Models, observer: Observer, watch: DaemonWatch) -> None:
        """Show what these tell."""
        self._models, self._observer, self._watch = models, observer, watch
        self._page: Page | None = None

    def routes(self) -> list[web.RouteDef]:
        """For ``Application.add_routes``."""
        return [
            web.get("/", self._whole),
            web.get("/status.html", self._part),
            web.get("/status.json", self._json),
            web.get("/metrics", self._metrics),
        ]

    async def _metrics(self, request: web.Request) -> web.Response:
        found, metrics = await self._watch.look(), self._observer.metrics
        for one in self._models.all:
            metrics.model(one.name, ready=not _why_not(one), waiting=one.waiting, running=one.running)
        return web.Response(body=metrics.render(found.status), headers={"Content-Type": CONTENT_TYPE})

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
        return figures([_served(one) for one in self._models.all], self._observer.requests(), found, points, now)

    def _templates(self) -> Page:
        """Read when somebody looks for the first time: most gateways are never looked at."""
        if self._page is None:
            from expertd.clients.gateway.page import Page

            self._page = Page()
        return self._page


def _served(one: Served) -> ServedModel:
    from expertd.clients.gateway.page import ServedModel

    return ServedModel(one.name, one.state, _why_not(one), one.waiting, one.running)


def _why_not(one: Served) -> str:
    """Why a model takes no requests, in a sentence; empty if it does."""
    try:
        one.check_ready()
    except ExpertdError as error:
        return error.message
    return ""
