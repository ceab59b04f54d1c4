"""What the cache holds on this machine already: that is no memory which others have taken."""

from __future__ import annotations

import json

from expertd.daemon.holders import Holders
from expertd.protocol.paths import Home
from expertd.protocol.quick import quick_status


def cache_holds(home: Home) -> int:
    """Bytes that the home's daemon holds, or, where none runs, what sessions still hold of one that has ended."""
    told = quick_status(str(home.root))
    return Holders(home.daemon_holders).before if told is None else int(json.loads(told)["used_bytes"])
