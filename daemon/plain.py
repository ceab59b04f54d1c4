"""A model's own files as the daemon reads them: each as long as it is the one that was indexed.

Which ranges make a block is in ``expertd.daemon.index``; how they are read, in ``expertd.daemon.direct``.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from expertd.daemon.direct import DirectFile, Piece
from expertd.daemon.files import FillFailed, Read
from expertd.protocol.checkpoint import FileMark, check_unchanged
from expertd.protocol.errors import FileChanged, ReadFailed


class PlainFile:
    """One file of a model, opened at first use.  Its methods may be called from any thread."""

    def __init__(self, path: Path, mark: FileMark) -> None:
        self._path, self._mark = path, mark
        self._lock = threading.Lock()
        self._file: DirectFile | None = None

    def read(self, run: Sequence[Piece], read: Read) -> None:
        """Fill pieces that touch, in one read if the system does it in one.

        Raises:
            ReadFailed: the system failed, or the file ended early.
            FileChanged: the file is not the one that was indexed.
        """
        file = self._open()
        problem: str | None = None  # no error: what is kept in a name here holds the rows until a collection
        try:
            file.read(run, read)
        except FillFailed as failed:
            if failed.ended:
                problem = f"{self._path} ended at byte {failed.offset}, inside a block"
            else:
                problem = f"reading {self._path} failed at byte {failed.offset} ({failed.why})"
        # Afterwards, because the device can work meanwhile; what was read of another file is of no use.
        check_unchanged(self._path, self._mark, file.descriptor)
        if problem is not None:
            raise ReadFailed(problem)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None

    def _open(self) -> DirectFile:
        with self._lock:
            if self._file is None:
                try:
                    self._file = DirectFile(self._path)
                except OSError as error:
                    raise FileChanged(
                        f"{self._path} cannot be opened any more ({error.strerror}); load the model again"
                    ) from error
            return self._file
