"""A real gateway with its worker and daemon, for the tests that need one."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil

from expertd.protocol.connection import Connection
from expertd.protocol.errors import DaemonNotRunning
from expertd.protocol.messages import Stop
from expertd.protocol.paths import Home

DEADLINE_S = 60.0
HELLO = [{"role": "user", "content": "Hello there."}]
ENDLESS = 30_000
"""An answer that would take minutes."""


class Served:
    """A running gateway."""

    def __init__(self, process: subprocess.Popen[str], home: Home, model: Path) -> None:
        self.process = process
        self.home = home
        self.model = model.name
        self.line = ""
        self.url = ""

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line, f"the gateway ended with {self.process.wait(5)}: {self.errors()}"
        self.url = self.line.split()[-1]

    def errors(self) -> str:
        return (self.home.root / "stderr").read_text()

    @property
    def port(self) -> int:
        return int(self.url.split(":")[2].removesuffix("/v1"))

    @property
    def worker(self) -> psutil.Process:
        (worker,) = self.workers()
        return worker

    def workers(self) -> list[psutil.Process]:
        """The worker, once it is started; the daemon is a child too until the gateway ends."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            try:
                if "--gateway" in child.cmdline():
                    found.append(child)
            except psutil.Error:
                continue
        return found

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=DEADLINE_S)

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """One plain HTTP request: status, headers in lower case, decoded body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, json.loads(answer.read() or b"null")
        finally:
            connection.close()

    def raw_chat(self, **fields: Any) -> socket.socket:
        """A connection on which a chat request was sent and nothing was read."""
        body = json.dumps({"model": self.model, "messages": HELLO, "temperature": 0} | fields).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection


@contextmanager
def starting(home: Home, model: Path, *options: str, prepare: str = "") -> Iterator[Served]:
    """A gateway that was told to start; whatever happens, it has ended afterwards.

    ``prepare`` is Python that its process runs first.
    """
    program = f"{prepare}\nfrom expertd.clients.cli import main\nmain()"
    command = [sys.executable, "-c", program, "serve", str(model), "--port", "0", "--budget", "64MiB", *options]
    environment = {**os.environ, "EXPERTD_HOME": str(home.root)}
    with (home.root / "stderr").open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    with process:
        try:
            yield Served(process, home, model)
        finally:
            process.terminate()
            try:
                process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@contextmanager
def serving(home: Home, model: Path, *options: str, prepare: str = "") -> Iterator[Served]:
    """A gateway that takes requests."""
    with starting(home, model, *options, prepare=prepare) as served:
        served.wait_ready()
        yield served


@contextmanager
def serving_alone(
    model: Path | Callable[[Path], Path], *options: str, prepare: str = ""
) -> Iterator[Served]:
    """A gateway in a home of its own, for all tests of a module; ``model`` may be written into a folder first."""
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as root:
        home = Home(Path(root) / "home")
        home.prepare()
        folder = model if isinstance(model, Path) else model(Path(root))
        try:
            with serving(home, folder, *options, prepare=prepare) as served:
                yield served
        finally:
            stop_daemon(home)


def stop_daemon(home: Home) -> None:
    """End the daemon that a gateway started."""
    try:
        with Connection(home.daemon_socket, "test", handshake_s=1.0) as connection:
            daemon = psutil.Process(connection.daemon.pid)
            connection.send(Stop())
            daemon.wait(DEADLINE_S)
    except (DaemonNotRunning, psutil.NoSuchProcess):
        pass


def eventually(condition: Callable[[], bool], deadline_s: float = 20.0) -> bool:
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def idle(worker: psutil.Process) -> bool:
    """Whether the worker computes nothing for half a second."""

    def used_s() -> float:
        times = worker.cpu_times()
        return times.user + times.system

    before = used_s()
    time.sleep(0.5)
    return used_s() - before < 0.1


def say(client: openai.OpenAI, served: Served, **options: Any) -> Any:
    given: dict[str, Any] = {"model": served.model, "messages": HELLO, "temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(**given)
