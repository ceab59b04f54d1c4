"""All sessions of this process: what happens to them after a fork, at exit, and when a model comes.

What a session is: ``expertd.worker.attach``.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertd.worker.attach import Session

_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def register(session: Session) -> None:
    """It has been opened."""
    _sessions.add(session)


def close_all() -> None:
    """Close every session of this process (at exit)."""
    for session in list(_sessions):
        session.close(at_once=True)


def end_forgotten() -> None:
    """Let the pages of models go that were garbage-collected, as far as nobody else uses them."""
    for session in list(_sessions):
        if session.abandoned:
            session.close()


def _void_after_fork() -> None:
    for session in _sessions:
        session.void()


os.register_at_fork(after_in_child=_void_after_fork)
