"""The cache's rules as a state machine without I/O: events in, instructions out.  Start reading at ``core.Core``."""

from expertd.daemon.core import events, instructions
from expertd.daemon.core.core import Core

__all__ = ["Core", "events", "instructions"]
