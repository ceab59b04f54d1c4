"""Clients that stream answers over and over, and note when tokens came and whether they were right."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass, field

from benchmarks.pressure.stalls import Gap

RETRY_S = 0.5
"""After a refusal: the gateway asks for longer, but whoever comes early finds out when it lets requests in again."""
ANSWER_S = 300.0
"""A gateway that says nothing for so long counts as failed."""


@dataclass
class Stream:
    """One client: asks the same question again and again until it is told to end.

    Attributes:
        came: when each piece of text came (``time.monotonic``).
        gaps: between two pieces of one answer: decode only, because neither the prompt, nor the wait for a place, nor
            the model's load comes after a first piece.
        refused: requests that were answered with 503.
    """

    address: tuple[str, int]
    model: str
    question: str
    expected: str
    tokens: int
    came: list[float] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    answers: int = 0
    wrong: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)

    def run(self, ending: threading.Event) -> None:
        """Until ``ending`` is set."""
        while not ending.is_set():
            self._ask()

    def _ask(self) -> None:
        connection = http.client.HTTPConnection(*self.address, timeout=ANSWER_S)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self.question}],
            "max_tokens": self.tokens,
            "temperature": 0,
            "stream": True,
        }
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status == 503:
                self.refused += 1
                response.read()
                time.sleep(RETRY_S)
                return
            if response.status != 200:
                self.failed.append(f"{response.status} {response.read()[:200]!r}")
                time.sleep(RETRY_S)
                return
            self._listen(response)
        except OSError as error:
            self.failed.append(repr(error))
            time.sleep(RETRY_S)
        finally:
            connection.close()

    def _listen(self, response: http.client.HTTPResponse) -> None:
        text, last = "", None
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                self.failed.append(str(chunk["error"])[:200])
                return
            piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
            if not piece:  # the first chunk of an answer tells the role only
                continue
            now = time.monotonic()
            if last is not None:
                self.gaps.append(Gap(last, now))
            last = now
            self.came.append(now)
            text += piece
        self.answers += 1
        self.wrong += text != self.expected
