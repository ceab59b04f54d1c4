"""What open sessions say, as events of the core; and what the daemon keeps of it beside the core: tokens and waits.

That a message comes from the session that it names has been seen to by ``expertd.daemon.server``, which also answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from expertd.daemon.core import events
from expertd.daemon.tokens import TokenCounts
from expertd.daemon.tracing import Tracing
from expertd.daemon.waits import Waits
from expertd.protocol import messages
from expertd.protocol.routing import unpack

Said = (
    messages.Fetch | messages.Ahead | messages.Ack | messages.RoutingLog | messages.Released | messages.Recorded
    | messages.Pong
)  # fmt: skip


class Hearing:
    """Owned by the daemon's loop."""

    def __init__(
        self, waits: Waits, tokens: TokenCounts, tracing: Tracing, feed: Callable[[events.Event], None]
    ) -> None:
        """``feed`` gives an event to the core; the others are told what they count."""
        self._waits, self._tokens, self._tracing, self._feed = waits, tokens, tracing, feed

    def take(self, said: Said) -> None:
        """A session has said something.

        Raises:
            MessageInvalid: a routing log in it is none.
        """
        match said:
            case messages.Fetch(session=session, sequence=sequence, segment=segment, layer=layer):
                experts, routing = tuple(said.experts), tuple(unpack(said.routing))
                self._tokens.reported(session, said.decode_tokens, said.prompt_tokens, sequence)
                self._waits.fetched(session, sequence, segment, layer, experts, time.monotonic())
                fetch = events.Fetch(
                    session, sequence, segment, layer, experts, routing,
                    tuple(said.then), said.leases_only, self._waits.waited_s(session),
                )  # fmt: skip
                self._feed(fetch)
            case messages.Ahead(session=session, segment=segment, layer=layer, distance=distance, prompt=prompt):
                experts, routing = tuple(said.experts), tuple(unpack(said.routing))
                self._feed(events.Ahead(session, segment, layer, experts, distance, prompt, routing))
            case messages.Ack(session=session):
                routing = tuple(unpack(said.routing))
                self._tokens.reported(session, said.decode_tokens, said.prompt_tokens)
                self._feed(events.Ack(session, said.version, said.sequence, routing))
            case messages.RoutingLog(session=session):
                self._feed(events.Routed(session, tuple(unpack(said.routing))))
                self._tokens.reported(session, said.decode_tokens, said.prompt_tokens)
            case messages.Released(session=session, segment=segment):
                self._feed(events.Released(session, segment))
            case messages.Recorded():
                self._tracing.recorded(said)
            case messages.Pong(session=session):
                self._feed(events.Heard(session))
