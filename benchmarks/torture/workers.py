"""The threads that ask the four workers all the time and compare each answer with plain mlx-lm's.

Nothing here waits with a deadline of its own: ``check`` is called now and then by the harness, finds a request that
neither ends nor fails, and cuts it off.  Time during which processes were stopped on purpose does not count.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import threading
import time
from typing import Any

from benchmarks.torture.journal import Journal
from benchmarks.torture.references import QUESTION, References
from benchmarks.torture.stage import Gateway, Zygote

STUCK_S = 60.0
PAUSE_S = 0.2
LONGEST_PAUSE_S = 1.0


class Asker(threading.Thread):
    """What both kinds have in common: one request at a time until told to end."""

    def __init__(self, name: str, references: References, journal: Journal, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.references = references
        self.journal = journal
        self.chance = random.Random(f"{seed} {name}")
        self.ending = threading.Event()
        self.stopped_s = 0.0  # how long it has been stopped on purpose, all in all
        self.answers = 0
        self.last_answer = 0.0
        self._since: float | None = None
        self._stuck = False

    def run(self) -> None:
        pause_s = PAUSE_S
        while not self.ending.is_set():
            self._since = time.monotonic() - self.stopped_s
            right = self.ask(self.chance.randrange(len(self.references.prompts)))
            self._since = None
            self._stuck = False
            if right:
                self.answers += 1
                self.last_answer = time.monotonic()
                pause_s = PAUSE_S
            else:
                self.ending.wait(pause_s)
                pause_s = min(LONGEST_PAUSE_S, pause_s * 1.5)
        self.let_go()

    def check(self) -> None:
        """Cut a request off that takes too long, once."""
        since = self._since
        waited_s = 0.0 if since is None else time.monotonic() - self.stopped_s - since
        if waited_s > STUCK_S and not self._stuck:
            self._stuck = True
            self.cut_off()
            self.journal.hangs(self.name, waited_s)

    def ask(self, number: int) -> bool:
        """Ask prompt ``number``, note in the journal how it ended, and return whether with right tokens."""
        raise NotImplementedError

    def cut_off(self) -> None:
        """End a request that hangs."""
        raise NotImplementedError

    def pid(self) -> int | None:
        """The worker's process, if it runs."""
        raise NotImplementedError

    def kill(self) -> int | None:
        """Kill -9 the worker."""
        raise NotImplementedError

    def let_go(self) -> None:
        """The last thing that the thread does."""


class Program(Asker):
    """A program that calls ``expertd.load`` and mlx-lm's own generator, forked again when it has died."""

    def __init__(self, name: str, references: References, journal: Journal, seed: int, zygote: Zygote) -> None:
        super().__init__(name, references, journal, seed)
        self._zygote = zygote
        self._pid: int | None = None
        self._channel: socket.socket | None = None
        self._lines: Any = None
        self._killed = False
        self._restart = False
        self.session = 0  # of the last token
        self.waiting_since: tuple[float, int, str] | None = None  # a daemon's death, the session that it ended, how

    def pid(self) -> int | None:
        return self._pid

    def kill(self) -> int | None:
        pid = self._pid
        if pid is not None:
            self._killed = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def restart(self) -> None:
        """Have the program end in order after its request, and another take its place."""
        self._restart = True

    def daemon_died(self, how: str) -> None:
        """Measure how long it takes until this worker says a right token again, over a new session."""
        if self.waiting_since is None and self.session:
            self.waiting_since = (time.monotonic(), self.session, how)

    def cut_off(self) -> None:
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGUSR1)  # its stacks go to the log
                time.sleep(0.5)
        self.kill()

    def ask(self, number: int) -> bool:
        if self._restart:
            self._restart = False
            self.let_go()
        if self._channel is None:
            self._killed = False
            self._pid, self._channel = self._zygote.fork()
            self._lines = self._channel.makefile("rw")
        request = {"prompt": self.references.prompts[number], "tokens": self.references.tokens}
        try:
            self._lines.write(json.dumps(request) + "\n")
            self._lines.flush()
            return self._compare(number)
        except (OSError, ValueError, EOFError) as error:
            self._died(error)
            return False

    def _compare(self, number: int) -> bool:
        expected = [said[number] for said in self.references.said]
        possible, got = set(range(len(expected))), list[int]()
        while True:
            line = self._lines.readline()
            if not line:
                raise EOFError("it hung up")
            said = json.loads(line)
            if "token" in said:
                got.append(said["token"])
                possible = {p for p in possible if expected[p][: len(got)] == got}
                if possible:
                    self._right_token(said["session"])
            elif "error" in said:
                if not possible:
                    self._wrong(number, got)
                    return False
                self.journal.typed_error(self._who(), said["error"], said["message"])
                return False
            elif "failed" in said:
                self.journal.failed(self._who(), said["failed"])
                return False
            elif not possible or len(got) != self.references.tokens:
                self._wrong(number, got)
                return False
            else:
                self.journal.answered()
                return True

    def _right_token(self, session: int) -> None:
        waiting = self.waiting_since
        if waiting is not None and session != waiting[1]:
            self.journal.recoveries[waiting[2]].append(time.monotonic() - waiting[0])
            self.waiting_since = None
        self.session = session

    def _wrong(self, number: int, got: list[int]) -> None:
        expected = self.references.said[0][number]
        self.journal.wrong_answer(self._who(), str(self.references.prompts[number]), str(expected), str(got))

    def _who(self) -> str:
        return f"{self.name} (process {self._pid}, session {self.session})"

    def _died(self, error: Exception) -> None:
        pid, self._pid = self._pid, None
        self._hang_up()
        self.waiting_since = None
        assert pid is not None
        status = self._zygote.status(pid)
        if self._killed:
            self.journal.cut_off()
        else:
            self.journal.failed(f"{self.name} (process {pid})", f"it ended with status {status} ({error})")

    def _hang_up(self) -> None:
        for end in (self._lines, self._channel):
            with contextlib.suppress(OSError):
                end.close()
        self._channel = None

    def let_go(self) -> None:
        """End the program in order, by end of file."""
        if self._channel is None or self._pid is None:
            return
        pid, self._pid = self._pid, None
        self._channel.shutdown(socket.SHUT_WR)
        status = self._zygote.status(pid, STUCK_S)
        self._hang_up()
        self.waiting_since = None
        if status is None:
            self.journal.hangs(f"{self.name} (process {pid}), told to end,", STUCK_S)
            os.kill(pid, signal.SIGKILL)
        elif status != 0 and not self._killed:
            self.journal.failed(f"{self.name} (process {pid})", f"told to end, it ended with status {status}")


class Client(Asker):
    """A client of one gateway; the gateway restarts its worker."""

    def __init__(self, references: References, journal: Journal, seed: int, gateway: Gateway) -> None:
        super().__init__(gateway.name, references, journal, seed)
        self.gateway = gateway
        self._connection: http.client.HTTPConnection | None = None

    def pid(self) -> int | None:
        return self.gateway.worker()

    def kill(self) -> int | None:
        pid = self.pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pid

    def cut_off(self) -> None:
        if (pid := self.pid()) is not None:
            os.kill(pid, signal.SIGKILL)
        time.sleep(2.0)
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def ask(self, number: int) -> bool:
        stream = self.chance.random() < 0.5
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": QUESTION.format(number)}],
            "max_tokens": self.references.tokens,
            "temperature": 0,
            "stream": stream,
        }
        self._connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port)
        try:
            self._connection.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = self._connection.getresponse()
            if answer.status == 200:
                text, error = _streamed(answer) if stream else _whole(answer)
            else:
                text, error = "", json.loads(answer.read())["error"]
        except (OSError, http.client.HTTPException, ValueError, LookupError) as failure:
            if not self._stuck:
                self.journal.failed(self.name, f"no answer of the gateway: {type(failure).__name__}: {failure}")
            return False
        finally:
            self._connection.close()
            self._connection = None
        possible = [texts[number] for texts in self.references.texts]
        if error is not None:
            if not any(whole.startswith(text) for whole in possible):
                self.journal.wrong_answer(self.name, f"question {number}", possible[0], text)
            else:
                self.journal.typed_error(self.name, error["code"], error["message"])
            return False
        if text not in possible:
            self.journal.wrong_answer(self.name, f"question {number}", possible[0], text)
            return False
        self.journal.answered()
        return True


def _whole(answer: http.client.HTTPResponse) -> tuple[str, dict[str, Any] | None]:
    choice = json.loads(answer.read())["choices"][0]
    return choice["message"]["content"], None


def _streamed(answer: http.client.HTTPResponse) -> tuple[str, dict[str, Any] | None]:
    """The text of a stream, and the error that ended it.  Raises ValueError if it just ends."""
    texts: list[str] = []
    for line in answer:
        if line.strip() == b"data: [DONE]":
            return "".join(texts), None
        if line.startswith(b"data: "):
            event = json.loads(line[6:])
            if "error" in event:
                return "".join(texts), event["error"]
            texts.append(event["choices"][0]["delta"].get("content") or "")
    raise ValueError("the stream ended without [DONE] and without an error")
