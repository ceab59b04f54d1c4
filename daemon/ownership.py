"""One daemon a home: the lock that says which process it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator

from expertd.protocol.errors import DaemonAlreadyRunning
from expertd.protocol.paths import Home


@contextlib.contextmanager
def owned(home: Home) -> Iterator[None]:
    """Hold the home's lock: one daemon a home.  The kernel releases it however this process ends."""
    with home.daemon_lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise DaemonAlreadyRunning(
                f"a daemon (process {owner}) already runs in {home.root}; stop it with: expertd daemon stop"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
