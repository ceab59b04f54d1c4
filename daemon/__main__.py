"""``python -m expertd.daemon``: what ``expertd daemon run`` and on-demand starts run.  See ``--help``."""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from expertd.daemon.holders import Holders
from expertd.daemon.machine import default_budget, this_machine
from expertd.daemon.ownership import wait_for_home
from expertd.daemon.policy import POLICIES
from expertd.daemon.pressure import system_source
from expertd.daemon.pressure.scripted import ScriptedSource
from expertd.daemon.server import Server
from expertd.daemon.simulated_ssd import SimulatedSsd, parse_ssd
from expertd.protocol import logs
from expertd.protocol.config import KEYS, read_config
from expertd.protocol.errors import DaemonAlreadyRunning, ExpertdError
from expertd.protocol.paths import Home
from expertd.protocol.quick_deaths import counted, why_refused
from expertd.protocol.service import read_service, write_service

OPEN_FILES = 65_536
"""Open files that a daemon asks for: it needs a few for each session, segment and checkpoint file."""

SWITCH_S = 0.0005
"""A reading thread that has been woken waits so long for the loop, which may have 60 more reads to hand out."""

FLAGS = tuple(key for key in KEYS.values() if key.section == "log" or (not key.section and key.name != "model_folders"))
"""The settings that a daemon has a use for."""


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


def run(*, simulate_pressure: Path | None = None, simulate_ssd: str | None = None, **flags: Any) -> None:
    """Run a daemon in the current home until it is told to end.

    Args:
        simulate_pressure: a script of memory pressure (``daemon.pressure.scripted``), in the place of the system's.
        simulate_ssd: ``RATE[,LATENCY]`` of an SSD that reads are slowed down to (``daemon.simulated_ssd``); without it
            what EXPERTD_SIMULATE_SSD says, for daemons that start on demand.
        flags: settings by their names in ``protocol.config``; what is None or missing is as the environment or the
            home's config file says, else as is the default.

    Raises:
        ExpertdError: it cannot start; nothing is left behind.
    """
    _end_well()
    home = Home.current()
    config = read_config(home, **flags)
    size = config.budget.value or default_budget(this_machine(), Holders(home.daemon_holders).before).size
    pressure = system_source() if simulate_pressure is None else ScriptedSource(simulate_pressure)
    simulate_ssd = simulate_ssd or os.environ.get("EXPERTD_SIMULATE_SSD") or None
    ssd = None if simulate_ssd is None else SimulatedSsd(parse_ssd(simulate_ssd))
    logs.set_up("daemon", home.daemon_log, home, config)
    raise_file_limit()
    sys.setswitchinterval(SWITCH_S)

    async def serve() -> None:
        await Server(
            home, size, POLICIES[config.policy.value],
            idle_exit_s=config.idle_exit.value, keep_alive_s=config.keep_alive.value, pressure=pressure,
            read=ssd or os.preadv, simulated_ssd=str(ssd or ""), background_rate=config.background_rate.value,
            reads_ahead=config.read_ahead.value, remembers=config.remember.value,
        ).run()  # fmt: skip

    asyncio.run(serve())


def _is_back(home: Home) -> None:
    """The service was stopped, and the next login has started it: from now on it is asked for daemons again."""
    service = read_service(home)
    if service is not None and service.stopped:
        try:
            write_service(home, msgspec.structs.replace(service, stopped=False))
        except OSError as error:
            _tell(f"{home.service} cannot be written ({error.strerror}); until 'expertd service start' daemons that "
                  "are missing start on demand")  # fmt: skip


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
            _tell(why_refused(home, "daemon"))
            return
        while True:
            wait_for_home(home, _tell)
            _is_back(home)
            try:
                run()
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
    for key in FLAGS:
        if key.default is True:
            parser.add_argument(key.flag, dest=key.name, action=argparse.BooleanOptionalAction, help=key.help)
        else:
            kind = float if isinstance(key.read("1"), float) else int if isinstance(key.read("1"), int) else str
            parser.add_argument(key.flag, dest=key.name, type=kind, choices=key.choices or None, help=key.help)
    parser.add_argument("--simulate-pressure", type=Path, help="a script of memory pressure: lines 'SECONDS LEVEL'")
    parser.add_argument("--simulate-ssd", help="slow reads down to an SSD of RATE[,LATENCY], for example 2GB,100us")
    parser.add_argument("--service", action="store_true", help="run as a service manager's: other flags are not used")
    arguments = vars(parser.parse_args())
    try:
        if arguments.pop("service"):
            run_service()
        else:
            run(**arguments)
    except ExpertdError as error:
        print(f"expertd: {error.message} [{error.code}]", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
