"""What becomes of requests for text: when they began, when their tokens came, how they ended.

The figures go to ``expertd.clients.gateway.metrics``; the latest requests are kept for the status page.  Nothing of a
prompt, an answer or a key comes here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from expertd.clients.gateway.metrics import Metrics
from expertd.protocol.messages import Delta, Finished

__all__ = ["CLIENT_LEFT", "Observer", "RequestView", "Seen"]

KEPT = 12
"""So many requests that have ended are kept."""
CLIENT_LEFT = 499
"""What stands for a status where the client left before it got one, as nginx has it."""
NAMES = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
    "/v1/messages": "messages",
    "/v1/messages/count_tokens": "count_tokens",
    "/generate": "generate",
}
"""What the APIs are called, by their paths."""


@dataclass(frozen=True)
class RequestView:
    """A request as the status page shows it.

    Attributes:
        state: ``waiting``, ``running`` or ``ended``.
        age_s: seconds since it began.
        first_token_s: seconds from its begin to its first token; None before that.
        tokens: of its answers, so far.
        seconds: that it took, or has taken so far.
        status: of HTTP; None before its end.
        error: the code of what ended it early, or empty.
    """

    api: str
    model: str
    key: str
    state: str
    age_s: float
    first_token_s: float | None
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    seconds: float
    status: int | None
    error: str

    @property
    def tokens_per_s(self) -> float | None:
        """How fast tokens came after the first; None if there were not two."""
        if self.first_token_s is None or self.tokens < 2 or self.seconds <= self.first_token_s:
            return None
        return (self.tokens - 1) / (self.seconds - self.first_token_s)


class Seen:
    """One request, from its begin to its end."""

    def __init__(self, observer: Observer, api: str, key: str) -> None:
        self._observer = observer
        self.api, self.key, self.model = api, key, ""
        self.began = observer.clock()
        self.first_at: float | None = None
        self.ended_at: float | None = None
        self.last_at: dict[int, float] = {}
        self.heard = False
        self.prompt_tokens = self.cached_tokens = self.tokens = 0
        self.status: int | None = None
        self.error = ""

    def of(self, model: str) -> None:
        """It is for ``model``, which is served here, and waits for it from now on."""
        self.model = model
        self._between = self._observer.metrics.between_tokens(model)
        self._observer.under_way.add(self)

    def event(self, place: int, event: Delta | Finished) -> None:
        """The answer at ``place`` has gone on."""
        self.heard = True
        if isinstance(event, Finished):
            self.prompt_tokens = max(self.prompt_tokens, event.prompt_tokens)
            self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
            self._observer.metrics.computed(
                self.model, event.prompt_tokens, event.cached_tokens, event.completion_tokens
            )
            return
        if not event.tokens:
            return
        now = self._observer.clock()
        self.tokens += event.tokens
        last = self.last_at.get(place)
        self.last_at[place] = now
        if last is not None:
            self._between((now - last) / event.tokens)
        if self.first_at is None:
            self.first_at = now
            self._observer.metrics.first_token(self.model, now - self.began)

    def end(self, status: int | None, error: str = "", *, left: bool = False) -> None:
        """It is over.  ``left``: because the client is gone."""
        self.ended_at = self._observer.clock()
        self.status = CLIENT_LEFT if left or status is None else status
        self.error = error
        self._observer.ended(self, self.ended_at - self.began)

    @property
    def state(self) -> str:
        if self.ended_at is not None:
            return "ended"
        return "running" if self.heard else "waiting"

    def view(self, now: float) -> RequestView:
        """As it is now."""
        return RequestView(
            api=self.api, model=self.model, key=self.key, state=self.state,
            age_s=now - self.began,
            first_token_s=None if self.first_at is None else self.first_at - self.began,
            prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens, tokens=self.tokens,
            seconds=(self.ended_at or now) - self.began,
            status=self.status, error=self.error,
        )  # fmt: skip


class Observer:
    """All requests of one gateway.  Owned by its loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.under_way: set[Seen] = set()
        self._recent: deque[Seen] = deque(maxlen=KEPT)
        self.metrics = Metrics()

    def begin(self, path: str, key: str | None = None) -> Seen:
        """A request for text has come to ``path``, with the key of that name."""
        return Seen(self, NAMES.get(path, "other"), key or "")

    def ended(self, seen: Seen, seconds: float) -> None:
        """What ``Seen.end`` tells."""
        self.under_way.discard(seen)
        self._recent.appendleft(seen)
        assert seen.status is not None
        self.metrics.ended(seen.model, seen.api, seen.status, seconds, seen.error)

    def requests(self) -> list[RequestView]:
        """Those under way, the oldest first, and behind them those that have ended, the latest first."""
        now = self.clock()
        return [seen.view(now) for seen in [*sorted(self.under_way, key=lambda seen: seen.began), *self._recent]]
