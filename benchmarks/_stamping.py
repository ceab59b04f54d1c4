"""What stands in for the interpreter that a gateway starts its workers with, in ``benchmarks serving``.

A worker is the real one, but each text that it sends is the time at which it was sent (nanoseconds of the system's
monotonic clock, which all processes share), and the end of each cancel is written to the file EXPERTD_CANCELS, with the
request's seed.  Everything else runs as it would have.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import msgspec


def stamp_worker() -> None:
    """Have this process's worker stamp what it sends."""
    from expertd.protocol.messages import Delta, Generate, Message
    from expertd.worker import process
    from expertd.worker.engine import Engine

    send, submit, cancel = process._Worker._send, Engine.submit, Engine.cancel
    seeds: dict[int, int | None] = {}

    def stamped(self: Any, message: Message) -> None:
        if isinstance(message, Delta) and message.text:
            message = msgspec.structs.replace(message, text=f"{time.monotonic_ns()} ")
        send(self, message)

    def submitted(self: Any, message: Generate) -> None:
        seeds[message.request] = message.sampling.seed
        submit(self, message)

    def cancelled(self: Any, request: int) -> None:
        cancel(self, request)
        with Path(os.environ["EXPERTD_CANCELS"]).open("a") as file:
            file.write(f"{seeds.get(request)} {time.monotonic_ns()}\n")

    process._Worker._send = stamped  # type: ignore[method-assign]
    Engine.submit, Engine.cancel = submitted, cancelled  # type: ignore[method-assign]


def main() -> None:
    """Run ``-m MODULE ARGUMENTS...`` of the command line."""
    _, flag, module, *arguments = sys.argv
    assert flag == "-m"
    sys.argv = [module, *arguments]
    if arguments[:1] == ["worker"]:
        stamp_worker()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
