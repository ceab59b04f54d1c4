"""``python -m benchmarks.pressure.eater CGROUP VERSION LEAVE``: takes memory until LEAVE bytes are left, and keeps it.

500 MB a second, every page written.  Ends when its standard input does.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from benchmarks.pressure.cgroup import Cgroup

PIECE = 10_000_000
RATE = 500_000_000


def main() -> None:
    """See the module."""
    cgroup, leave = Cgroup(Path(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3])
    eaten: list[bytes] = []
    began = time.monotonic()
    while cgroup.left > leave + PIECE:
        eaten.append(b"\x01" * PIECE)
        time.sleep(max(0.0, began + len(eaten) * PIECE / RATE - time.monotonic()))
    print(len(eaten) * PIECE, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
