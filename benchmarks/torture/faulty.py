"""``python -m benchmarks.torture.faulty --budget BYTES --faults FILE``: a daemon whose reads fail on demand.

The first byte of FILE is the share of reads that go wrong, in 256ths: an error of the device, fewer bytes than asked
for, or none.  Only the reader's ``preadv`` is replaced; all else is ``python -m expertd.daemon``.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import mmap
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from expertd.daemon.files import SECTOR
from expertd.daemon.server import Server
from expertd.protocol import logs
from expertd.protocol.config import read_config
from expertd.protocol.errors import ExpertdError
from expertd.protocol.paths import Home

IDLE_EXIT_S = 120.0


class FaultyReads:
    """``os.preadv`` with faults; called by the reader's threads."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._rate = mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)
        self._chance = random.Random()

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self._chance.random() * 256 >= self._rate[0]:
            return os.preadv(descriptor, buffers, offset)
        match self._chance.randrange(4):
            case 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case 1:
                return 0
            case _:  # short, which is no failure: the reader has to go on where it ended
                first = buffers[0]
                third = len(first) // 3
                # Direct reads take whole sectors only; where there is but one, they are refused, which is a fault too.
                return os.preadv(descriptor, [first[: max(1, third - third % SECTOR or third)]], offset)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--faults", type=Path, required=True)
    arguments = parser.parse_args()
    reads = FaultyReads(arguments.faults)
    home = Home.current()
    try:
        logs.set_up("daemon", home.daemon_log, home, read_config(home))
        asyncio.run(_serve(arguments.budget, reads))
    except ExpertdError as error:
        print(f"expertd: {error.message} [{error.code}]", file=sys.stderr)
        return error.exit_status
    return 0


async def _serve(budget: int, reads: FaultyReads) -> None:
    await Server(Home.current(), budget, idle_exit_s=IDLE_EXIT_S, read=reads).run()


if __name__ == "__main__":
    sys.exit(main())
