"""A streamed response: events of answers, as their API writes them, on their way into one connection.

Usually nothing has to wait: the client has read all that there was, and what a token is written as is small.  Then it
is written by whoever brings it, and no task is woken.  Whatever might have to wait (a client that reads slowly, the end
of an answer, an error) goes through the task that answers the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from expertd.clients.gateway import awake
from expertd.clients.gateway.answers import Renderer, Told
from expertd.clients.gateway.discreet import failure
from expertd.clients.gateway.served import Answers
from expertd.protocol.errors import ExpertdError
from expertd.protocol.messages import Delta, Finished

__all__ = ["Stream"]

SMALL = 16 << 10
"""Bytes that an empty buffer of a connection always takes."""
SMALL_TEXT = 1 << 10
"""Characters that are small in any API, whatever is around them."""
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class Stream:
    """The stream that ``request`` is answered with; ``run`` writes all of it."""

    def __init__(
        self,
        request: web.Request,
        answers: Answers,
        rendering: Renderer,
        told: Sequence[Told],
        facts: dict[str, Any],
        *,
        keepalive_s: float,
        stall_s: float,
    ) -> None:
        """Nothing is written yet.

        Args:
            told: where the ends of answers are noted.
            facts: where it is noted what ended the stream early, if something did.
            keepalive_s: it is never silent for longer.
            stall_s: so long the client may leave a full buffer unread.
        """
        self._request, self._answers, self._rendering = request, answers, rendering
        self._told, self._facts = told, facts
        self._keepalive_s, self._stall_s = keepalive_s, stall_s
        self._loop = asyncio.get_running_loop()
        self._response = web.StreamResponse(headers=HEADERS)
        self._written_at = self._loop.time()

    async def run(self) -> web.StreamResponse:
        """Write it, to its end or until the client has left.

        Whatever it raises, nothing is written: what fails later is told in the stream, or breaks the connection, for
        another answer would be read as a part of this one.

        Raises:
            ExpertdError: why nothing is written.
        """
        # Until the worker has taken the request, or the client has waited long, an error can still be a status.
        first = await self._answers.receive(self._keepalive_s)
        begin = b"".join(self._rendering.begin())
        try:
            await self._response.prepare(self._request)
            await self._write(begin)
            await self._follow(first)
        except ConnectionError:
            self._facts["ended"] = "the client left"
        except TimeoutError:
            self._facts["ended"] = f"the client read nothing for {self._stall_s:.0f} s"
            self._abort()
        except Exception as error:  # not even an error can be written
            self._facts["error"] = failure(self._request, error).code
            self._abort()
        return self._response

    async def _follow(self, first: tuple[int, Delta | Finished] | None) -> None:
        """Write what comes, from the first event on, which is there already, and the end; or what went wrong."""
        try:
            await self._write_events(first)
            await self._write(b"".join(self._rendering.end()))
            return
        except ExpertdError as error:
            told = error
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            told = failure(self._request, error)
        self._facts["error"] = told.code
        await self._write(b"".join(self._rendering.failed(told)))

    async def _write_events(self, received: tuple[int, Delta | Finished] | None) -> None:
        while True:
            if received is not None:
                await self._write(self._render(*received))
            elif self._loop.time() >= self._written_at + self._keepalive_s:
                await self._write(self._rendering.keepalive)
            if self._answers.ended:
                return
            silent_s = self._loop.time() - self._written_at
            received = await self._answers.receive(max(0.0, self._keepalive_s - silent_s), self._pass_on)

    def _render(self, place: int, event: Delta | Finished) -> bytes:
        if isinstance(event, Finished):
            self._told[place].add(event)
        return b"".join(self._rendering.event(place, event))

    async def _write(self, data: bytes) -> None:
        """Write ``data`` if there is any.

        Raises:
            ConnectionError: the client has left.
            TimeoutError: it leaves unread what it has.
        """
        if not data:
            return
        if len(data) < SMALL and self._takes():
            await self._response.write(data)
        else:
            async with awake.timeout(self._stall_s):
                await self._response.write(data)
        self._written_at = self._loop.time()

    def _pass_on(self, place: int, event: Delta | Finished) -> bool:
        """Write ``event`` at once, if nothing can have to wait; returns whether it did."""
        if not isinstance(event, Delta) or event.logprobs or not self._takes():
            return False
        called = sum(len(call.name) + len(call.arguments) for call in event.calls)
        if len(event.text) + len(event.reasoning) + called > SMALL_TEXT:
            return False
        if data := self._render(place, event):
            writing = self._response.write(data)
            try:
                writing.send(None)  # It has nothing to wait for, so this is all of it.
            except StopIteration:
                pass
            finally:
                writing.close()
            self._written_at = self._loop.time()
        return True

    def _abort(self) -> None:
        if self._request.transport is not None:
            self._request.transport.abort()

    def _takes(self) -> bool:
        """Whether the client is there, and has been sent all that there was."""
        transport = self._request.transport
        return transport is not None and not transport.is_closing() and not transport.get_write_buffer_size()
