"""One daemon a home: the lock that says which process it is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from expertd.protocol.errors import DaemonAlreadyRunning
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import lock_holder

LOOK_S = 0.5
"""How often a daemon that waits for its home looks whether it is free."""


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


def wait_for_home(home: Home, tell: Callable[[str], None]) -> None:
    """Return when no daemon owns the home; ``tell`` is called once with a sentence if one does.

    For the service's daemon: to fail while one that was started on demand still has sessions would look like a fault.
    """
    told = False
    while (holder := lock_holder(home)) is not None:
        if not told:
            owner = f"the daemon (process {holder or 'unknown'})"
            tell(f"{owner} has {home.root}; the service's daemon begins when it ends")
            told = True
        time.sleep(LOOK_S)
