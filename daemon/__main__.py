"""``python -m expertd.daemon``: what ``expertd daemon run`` and on-demand starts run.  See ``--help``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import sys

import psutil

from expertd.daemon.policy import DEFAULT_POLICY, POLICIES
from expertd.daemon.server import Server
from expertd.protocol.errors import ExpertdError
from expertd.protocol.paths import Home
from expertd.protocol.sizes import parse_size

OPEN_FILES = 65_536
"""Open files that a daemon asks for: it needs a few for each session, segment and checkpoint file."""


def default_budget() -> int:
    """Half of the machine's memory: the rest is for the dense weights, the system and the page cache."""
    return int(psutil.virtual_memory().total) // 2


def raise_file_limit() -> int:
    """Raise the soft limit of open files towards the hard one; the limit that holds now.  Never fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (OPEN_FILES, 10_240):  # macOS names no hard limit and may still take no more than its OPEN_MAX
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            break
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):
            continue
        break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def run(budget: str | None, idle_exit_s: float | None, policy: str = DEFAULT_POLICY) -> None:
    """Run a daemon in the current home until it is told to end; ``policy`` is one of ``POLICIES``.

    Raises:
        ExpertdError: it cannot start; nothing is left behind.
    """
    size = default_budget() if budget is None else parse_size(budget)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    raise_file_limit()

    async def serve() -> None:
        await Server(Home.current(), size, POLICIES[policy], idle_exit_s=idle_exit_s).run()

    asyncio.run(serve())


def main() -> int:
    """Parse arguments, run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m expertd.daemon", description=__doc__)
    parser.add_argument("--budget", help="memory for expert weights, for example 512MB, 2GiB or bytes")
    parser.add_argument("--idle-exit", type=float, help="end after so many seconds without a session")
    parser.add_argument("--policy", choices=POLICIES, default=DEFAULT_POLICY, help="which blocks to evict")
    arguments = parser.parse_args()
    try:
        run(arguments.budget, arguments.idle_exit, arguments.policy)
    except ExpertdError as error:
        print(f"expertd: {error.message} [{error.code}]", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
