"""The gateway's log of failures, without a word of what clients have sent.

An exception's message may quote it: aiohttp's of a broken header has the whole line, and that may be the one with a
key.  So where a failure is logged, it is logged with its place and its kind, and its words are left out.
"""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from expertd.protocol.errors import ExpertdError
from expertd.protocol.logs import Log, Sparsely

__all__ = ["failure", "server_log", "wordless"]

log = Log(__name__)


class _Wordless(Exception):
    """Stands in a log for an exception whose message must not."""


def wordless(error: BaseException) -> BaseException:
    """What can be logged of ``error``: where it happened, and of which class it is."""
    found = _Wordless(f"{type(error).__qualname__}; what it says is left out, for it may be a client's")
    return found.with_traceback(error.__traceback__)


def failure(request: web.Request, error: BaseException) -> ExpertdError:
    """Log what ``request`` failed with, which nobody has foreseen; returns what its client is told."""
    route = request.match_info.route.resource
    log.error("a request failed", method=request.method, path=route and route.canonical, exc_info=wordless(error))
    return ExpertdError("the gateway failed; its log says where")


class _Discreet(logging.Filter):
    """For what aiohttp's server says."""

    def __init__(self) -> None:
        super().__init__()
        self._strangers = Sparsely()

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        if isinstance(error, HttpProcessingError):  # anybody can send such, all day
            record.msg, record.args, record.exc_info = "what came from a client is no HTTP", (), None
            record.levelno, record.levelname = logging.INFO, "INFO"
            return self._strangers.add()
        if error is not None:
            record.exc_info = (_Wordless, wordless(error), error.__traceback__)
        return True


def server_log() -> logging.Logger:
    """The logger for aiohttp's server."""
    log = logging.getLogger("expertd.clients.gateway.server")
    if not any(isinstance(known, _Discreet) for known in log.filters):
        log.addFilter(_Discreet())
    return log
