"""Who may use the gateway: which names it is called by, pages of which sites, and with which keys.

Without keys it is there for this machine only.  A ``Host`` that is none of the gateway's is refused, so that a web page
cannot reach it through a name of its own (DNS rebinding); a page of another site is refused, unless its origin was
named, and only then there are CORS headers.  What keys are is ``expertd.clients.gateway.keys``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from aiohttp import web

from expertd.clients.gateway.keys import KeyFile, given_key
from expertd.protocol.errors import KeyInvalid, RequestInvalid
from expertd.protocol.logs import Log, Sparsely

__all__ = ["Access", "challenges"]

log = Log(__name__)

OPEN_PATHS = frozenset({"/health/live"})
"""What needs no key: it says only that somebody is there."""
BROWSER_PATHS = frozenset({"/", "/status.html", "/status.json", "/metrics", "/health", "/health/ready"})
"""What a person looks at, so a browser is told to ask for the key."""
METHODS = "GET, POST, DELETE"
EXPOSED = "Retry-After, x-should-retry"
"""Headers that a page may read, beyond those that every page may."""
PREFLIGHT_S = 600
WRONG_KEYS_S = 60.0
"""Wrong keys are told of once in so long, with how many there were."""


class Access:
    """What holds for each request, in order: its Host, its Origin, its key."""

    def __init__(
        self, host: str, names: Sequence[str] = (), origins: Sequence[str] = (), keys: KeyFile | None = None
    ) -> None:
        """Let in who calls ``host``, which is listened on, or this machine, or one of ``names``, with one of ``keys``.

        Args:
            origins: whose pages may use it, as browsers write them.
            keys: None: nobody needs one.
        """
        self._hosts = {"localhost", "127.0.0.1", "::1", host.lower(), *(name.lower() for name in names)}
        self._any_address = _is_address(host) and ipaddress.ip_address(host).is_unspecified
        self._origins = frozenset(origins)
        self._keys = keys
        self._wrong = Sparsely(WRONG_KEYS_S)

    def check(self, request: web.Request) -> str | None:
        """Let a request in; the name of the key that it has, or None where none is needed.

        Raises:
            RequestInvalid: it called another name, or a page of another site sent it.
            KeyInvalid: it has no key, or a wrong one.
            KeyFileInvalid: there is no telling, because the file of keys cannot be used.
        """
        self._check_host(request.headers.get("Host", ""))
        self._check_origin(request.headers.get("Origin", ""), request.headers.get("Host", ""))
        if self._keys is None or request.path in OPEN_PATHS:
            return None
        secret = given_key(request.headers)
        name = self._keys.name_of(secret)
        if name is None:
            if self._wrong.add():
                log.warning("a request had no key, or a wrong one", remote=request.remote, times=self._wrong.new)
            raise KeyInvalid(
                "this gateway needs an API key; send one as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
                if secret is None
                else "that API key is none of this gateway's; check it, or ask whoever runs the gateway for one"
            )
        return name

    def preflight(self, request: web.Request) -> web.Response | None:
        """What a browser is told that asks whether a page may send something; None if ``request`` is no such question.

        A browser sends no key with it.

        Raises:
            RequestInvalid: it may not.
        """
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return None
        self._check_host(request.headers.get("Host", ""))
        self._check_origin(request.headers.get("Origin", ""), request.headers.get("Host", ""))
        if request.headers.get("Origin") not in self._origins:
            return None
        headers = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": str(PREFLIGHT_S)}
        if wanted := request.headers.get("Access-Control-Request-Headers"):
            headers["Access-Control-Allow-Headers"] = wanted
        return web.Response(status=204, headers=headers)

    async def add_headers(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Let pages of named origins, and only those, read an answer.  A signal of aiohttp, before headers are sent."""
        if not self._origins:
            return
        response.headers.add("Vary", "Origin")
        origin = request.headers.get("Origin", "")
        if origin in self._origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED

    def _check_host(self, header: str) -> None:
        host = header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]
        if host.lower() in self._hosts or (self._any_address and _is_address(host)):
            return
        raise RequestInvalid(
            f"the Host '{header}' is not this gateway's; use localhost, or this machine's address in numbers, "
            "or start the gateway with --allow-host"
        )

    def _check_origin(self, header: str, called: str) -> None:
        """Refuse what a page of another site sends: it cannot read an answer, but it could have one computed.

        ``null`` is what a frame in a sandbox is, of any site, and a page out of a file.  Another machine's address may
        be anybody's, and so may another port of this one's: only what was ``called`` (the Host) is this gateway.
        """
        if not header or header in self._origins:
            return
        host, port = _site(header)
        named = host in self._hosts and not _is_others(host)
        if not named and (not host or (host, port) != _site(called, header.partition("://")[0])):
            raise RequestInvalid(
                f"pages of '{header}' may not use this gateway; if they should, start it with --allow-origin"
            )


def _site(header: str, scheme: str = "") -> tuple[str, int | None]:
    """Host and port in an Origin, or in the Host of a request of ``scheme``."""
    try:
        parts = urlsplit(f"{scheme}://{header}" if scheme else header)
        return parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return "", None


def challenges(path: str) -> Mapping[str, str]:
    """Headers of a 401.  Only where people look a browser may ask for the key, as a password."""
    kinds = ("Bearer", "Basic") if path in BROWSER_PATHS else ("Bearer",)
    return {"WWW-Authenticate": ", ".join(f'{kind} realm="expertd"' for kind in kinds)}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_others(host: str) -> bool:
    """Whether it is an address that other machines have, or may call."""
    return _is_address(host) and not ipaddress.ip_address(host).is_loopback
