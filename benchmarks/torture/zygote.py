"""``python -m benchmarks.torture.zygote MODEL BUDGET``: forks program workers, so that one costs no import.

Its standard input is a Unix socket to the harness.  A packet with one descriptor asks for a worker that is reached over
that descriptor; the answer is ``{"started": pid}``, later ``{"ended": pid, "status": status}``.  Nothing of MLX or
ZeroMQ is used here before the fork, only imported.

A worker is a program as users write it: ``expertd.load``, then mlx-lm's own ``stream_generate``.  It reads requests as
JSON lines, and says each token as it comes, then how the request ended.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import mlx_lm

import expertd
from expertd.protocol.errors import ExpertdError
from expertd.worker.load import session_of

PATIENCE = 3
"""After so many errors in a row a program gives its model up and loads it again."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """See the module."""
    die_with_parent()
    model, budget = Path(sys.argv[1]), sys.argv[2]
    harness = socket.socket(fileno=0)
    assert threading.active_count() == 1
    gc.freeze()
    children: set[int] = set()
    harness.send(b'{"ready": true}\n')
    while True:
        if select.select([harness], [], [], 0.05)[0]:
            packet, descriptors, _, _ = socket.recv_fds(harness, 1, 1)
            if not packet:
                break
            pid = os.fork()
            if pid == 0:
                # MLX takes a file that got descriptor 0 for one that could not be opened, so 0 may not be free.
                os.dup2(os.open(os.devnull, os.O_RDONLY), harness.fileno())
                _be_a_worker(descriptors[0], model, budget)
            os.close(descriptors[0])
            children.add(pid)
            _say(harness, started=pid)
        for pid in list(children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                children.discard(pid)
                _say(harness, ended=pid, status=os.waitstatus_to_exitcode(status))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _say(harness: socket.socket, **what: int) -> None:
    harness.send(json.dumps(what).encode() + b"\n")


def _be_a_worker(descriptor: int, model: Path, budget: str) -> None:
    """Never returns; ends as a program does, with its exit handlers."""
    die_with_parent()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    status = 1
    try:
        with socket.socket(fileno=descriptor) as channel, channel.makefile("rw") as lines:
            program = _Program(model, budget, lines)
            for line in lines:
                program.serve(json.loads(line))
            program.let_go()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the harness has ended
    except BaseException:
        traceback.print_exc()
    sys.exit(status)


class _Program:
    """One worker: the model while it has one, and how often in a row it failed."""

    def __init__(self, model: Path, budget: str, lines: Any) -> None:
        self._path = model
        self._budget = budget
        self._lines = lines
        self._loaded: tuple[Any, Any] | None = None
        self._errors = 0

    def serve(self, request: dict[str, Any]) -> None:
        """Answer one request: tokens, then ``done``, or ``error`` with a code, or ``failed`` with a traceback."""
        try:
            if self._loaded is None:
                self._loaded = expertd.load(self._path, budget=self._budget)
            model, tokenizer = self._loaded
            answers = mlx_lm.stream_generate(model, tokenizer, request["prompt"], max_tokens=request["tokens"])
            for answer in answers:
                self._say(token=int(answer.token), session=session_of(model).number)
            self._errors = 0
            self._say(done=True)
        except ExpertdError as error:
            self._failed()
            self._say(error=error.code, message=error.message)
        except Exception:
            self._failed()
            self._say(failed=traceback.format_exc())

    def let_go(self) -> None:
        """Give up the model."""
        if self._loaded is not None:
            expertd.unload(self._loaded[0])
            self._loaded = None

    def _failed(self) -> None:
        self._errors += 1
        if self._errors >= PATIENCE:
            self._errors = 0
            self.let_go()

    def _say(self, **what: Any) -> None:
        self._lines.write(json.dumps(what) + "\n")
        self._lines.flush()


if __name__ == "__main__":
    main()
