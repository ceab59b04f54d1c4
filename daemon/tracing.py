"""Who records routing traces, and into which files: live tracing, as ``expertd trace start | stop`` steer it.  Pure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from expertd.protocol.errors import DaemonBusy, MessageInvalid
from expertd.protocol.messages import Record, Recorded, TraceStopped


class Tracing:
    """What was asked of each session, and what came of it.

    Attributes:
        folder: where the files go, None while nothing is traced.
    """

    def __init__(self, taken: Callable[[Path], bool] = lambda path: False) -> None:
        """``taken``: whether there is something in the place of a trace."""
        self.folder: Path | None = None
        self._taken = taken
        self._asked: set[int] = set()
        self._open: dict[int, str] = {}
        self._ended: list[Recorded] = []
        self._used: set[str] = set()

    def start(self, folder: Path) -> None:
        """From now on sessions are traced into ``folder``.

        Raises:
            MessageInvalid: it is no folder by its absolute path.
            DaemonBusy: sessions are traced already, or have not finished what they were told to end.
        """
        if not folder.is_absolute() or "\0" in str(folder):
            raise MessageInvalid(f"traces go into a folder by its absolute path, and {str(folder)[:200]!r} is none")
        if self.folder is not None:
            raise DaemonBusy(f"traces are being recorded in {self.folder}; end that with 'expertd trace stop'")
        if self.waiting:
            raise DaemonBusy("traces that were stopped are still being written; try again when 'trace stop' is done")
        self.folder = folder
        self._ended = []

    def begin(self, session: int, pid: int, model: str) -> Record | None:
        """What to tell a session that is open, or has just been opened; None if nothing is traced."""
        if self.folder is None or session in self._asked:
            return None
        name, number = f"{model}-{pid}.npz", 1
        while name in self._used or self._taken(self.folder / name):
            number += 1
            name = f"{model}-{pid}-{number}.npz"
        self._used.add(name)
        self._asked.add(session)
        self._open[session] = str(self.folder / name)
        return Record(session=session, path=self._open[session])

    def recorded(self, message: Recorded) -> None:
        """A session says that its recording has ended, or could not begin."""
        if self._open.get(message.session) == message.path:
            del self._open[message.session]
            self._ended.append(message)

    def gone(self, session: int) -> None:
        """A session has ended; if it was recorded and has not said so, its file is unfinished."""
        self._asked.discard(session)
        path = self._open.pop(session, None)
        if path is not None:
            self._ended.append(Recorded(session=session, path=path, tokens=0, error="its process ended first"))

    def stop(self) -> list[Record]:
        """Nothing is traced any more; what to tell the sessions that were asked."""
        asked = [Record(session=session, path="") for session in sorted(self._asked)]
        self.folder = None
        self._used, self._asked = set(), set()
        return asked

    @property
    def waiting(self) -> bool:
        """Whether a session that was told to end its recording has not said yet that it did."""
        return self.folder is None and bool(self._open)

    def report(self) -> TraceStopped:
        """What came of it all; what has not answered is forgotten."""
        report = TraceStopped(ended=self._ended, unfinished=list(self._open.values()))
        self._ended, self._open = [], {}
        return report
