"""One answer as it is written: taken apart by its channels, cut where a stop string or a call ends it.

Stop strings are for what is said: what is thought before, and what calls say, may contain them.  Works on text alone;
tokens are the business of ``expertd.worker.engine``.
"""

from __future__ import annotations

from collections.abc import Sequence

from expertd.protocol.messages import ToolCall
from expertd.worker.channels import Channels, Piece
from expertd.worker.stops import StopText

__all__ = ["Written"]


class Written:
    """What there is to tell of an answer.

    Attributes:
        ended: whether the answer is over before its model ends it: by a stop string, or by the only call it may have.
    """

    def __init__(self, channels: Channels, stops: Sequence[str], one_call: bool) -> None:
        """``one_call``: a call ends the answer, and of several that come at once the first is taken."""
        self.ended = False
        self._channels = channels
        self._stops = StopText(stops)
        self._one_call = one_call
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether a tool was called."""
        return self._calls > 0

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stops.found

    def feed(self, text: str, last: bool, cut: bool = False) -> list[Piece]:
        """Take the next text, the ``last`` of the answer or not; return what can be told now, in its order.

        ``cut``: it is the last because there may be no more, and not because the model ended.
        """
        pieces = self._cut(self._channels.feed(text, self._one_call))
        if self._one_call and self._channels.call_ended:
            self.ended = True
        if last and not self.ended:
            pieces += self._cut(self._channels.finish(cut))
        if last and not self.ended:
            pieces.append(Piece(text=self._stops.flush()))
        return list(filter(None, pieces))

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        found: list[Piece] = []
        for piece in pieces:
            if piece.reasoning:
                found.append(Piece(text=self._stops.flush()))
            piece.text, stopped = self._stops.feed(piece.text)
            found.append(piece)
            if stopped:
                piece.calls = []
                self.ended = True
                break
            if piece.calls:
                piece.text += self._stops.flush()  # no stop string goes on behind a call
            piece.calls = list(filter(self._allowed, piece.calls))
        return found

    def _allowed(self, call: ToolCall) -> bool:
        """Whether the answer may have this call, or piece of one."""
        self._calls += call.id != ""
        return not self._one_call or self._calls == 1
