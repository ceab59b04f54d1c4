"""``python -m expertd.daemon``: what ``expertd daemon run`` and on-demand starts run.  See ``--help``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from expertd.daemon.machine import default_budget, this_machine
from expertd.daemon.ownership import wait_for_home
from expertd.daemon.policy import POLICIES
from expertd.daemon.pressure import system_source
from expertd.daemon.pressure.scripted import ScriptedSource
from expertd.daemon.server import Server
from expertd.daemon.simulated_ssd import SimulatedSsd, parse_ssd
from expertd.protocol.config import read_config
from expertd.protocol.errors import DaemonAlreadyRunning, ExpertdError
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import counted, why_refused

OPEN_FILES = 65_536
"""Open files that a daemon asks for: it needs a few for each session, segment and checkpoint file."""

SWITCH_S = 0.0005
"""A reading thread that has been woken waits so long for the loop, which may have 60 more reads to hand out."""


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


def run(
    budget: str | None,
    idle_exit_s: float | None,
    policy: str | None = None,
    *,
    keep_alive_s: float | None = None,
    background_rate: str | None = None,
    simulate_pressure: Path | None = None,
    simulate_ssd: str | None = None,
    read_ahead: bool | None = None,
) -> None:
    """Run a daemon in the current home until it is told to end.

    What is None is as the environment or the home's config file says, else as is the default (``protocol.config``).

    Args:
        budget: a size, or ``auto``: what the machine can spare, which is the default.
        idle_exit_s: end after so long without a session; by default never.
        policy: one of ``POLICIES``.
        keep_alive_s: give a model back when nobody has used it for so long; by default when memory is needed.
        background_rate: bytes a second that are read at most while nobody waits for them (``sizes.parse_rate``).
        simulate_pressure: a script of memory pressure (``daemon.pressure.scripted``), in the place of the system's.
        read_ahead: whether what sessions will soon need is read before they ask for it; by default it is.
        simulate_ssd: ``RATE[,LATENCY]`` of an SSD that reads are slowed down to (``daemon.simulated_ssd``).

    Raises:
        ExpertdError: it cannot start; nothing is left behind.
    """
    _end_well()
    home = Home.current()
    config = read_config(
        home, budget=budget, idle_exit=idle_exit_s, policy=policy, keep_alive=keep_alive_s,
        background_rate=background_rate, read_ahead=read_ahead,
    )  # fmt: skip
    size = config.budget.value or default_budget(this_machine()).size
    pressure = system_source() if simulate_pressure is None else ScriptedSource(simulate_pressure)
    ssd = None if simulate_ssd is None else SimulatedSsd(parse_ssd(simulate_ssd))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)

    raise_file_limit()
    sys.setswitchinterval(SWITCH_S)

    async def serve() -> None:
        await Server(
            home, size, POLICIES[config.policy.value],
            idle_exit_s=config.idle_exit.value, keep_alive_s=config.keep_alive.value, pressure=pressure,
            read=ssd or os.preadv, simulated_ssd=str(ssd or ""), background_rate=config.background_rate.value,
            reads_ahead=config.read_ahead.value,
        ).run()  # fmt: skip

    asyncio.run(serve())


def run_service() -> None:
    """Run the daemon that a service manager keeps: its settings are the environment's and the config file's.

    It waits for its turn where another daemon owns the home, and returns at once if it has died too often
    (``protocol.quick_deaths``).

    Raises:
        ExpertdError: see ``run``.
    """
    _end_well()
    home = Home.current()
    home.prepare()
    with counted(home, "daemon") as may_start:
        if not may_start:
            _tell(why_refused(home, "daemon", home.daemon_log))
            return
        while True:
            wait_for_home(home, _tell)
            try:
                run(None, None)
            except DaemonAlreadyRunning:
                continue  # somebody was quicker
            return


def _end_well() -> None:
    """Take SIGTERM until the loop does: to be told to end is no failure, however early."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))


def _tell(line: str) -> None:
    print(f"expertd: {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Parse arguments, run, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m expertd.daemon", description=__doc__)
    parser.add_argument("--budget", help="memory for expert weights, for example 512MB, 2GiB or bytes, or auto")
    parser.add_argument("--idle-exit", type=float, help="end after so many seconds without a session")
    parser.add_argument("--policy", choices=POLICIES, help="which blocks to evict")
    parser.add_argument("--keep-alive", type=float, help="give a model back after so many seconds without a session")
    parser.add_argument("--background-rate", help="read at most so much a second while nobody waits for it")
    parser.add_argument("--simulate-pressure", type=Path, help="a script of memory pressure: lines 'SECONDS LEVEL'")
    parser.add_argument("--simulate-ssd", help="slow reads down to an SSD of RATE[,LATENCY], for example 2GB,100us")
    parser.add_argument(
        "--read-ahead", action=argparse.BooleanOptionalAction, help="read what will soon be needed, where that pays"
    )
    parser.add_argument("--service", action="store_true", help="run as a service manager's: other flags are not used")
    arguments = parser.parse_args()
    try:
        if arguments.service:
            run_service()
            return 0
        run(
            arguments.budget, arguments.idle_exit, arguments.policy,
            keep_alive_s=arguments.keep_alive, background_rate=arguments.background_rate,
            simulate_pressure=arguments.simulate_pressure, simulate_ssd=arguments.simulate_ssd,
            read_ahead=arguments.read_ahead,
        )  # fmt: skip
    except ExpertdError as error:
        print(f"expertd: {error.message} [{error.code}]", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
