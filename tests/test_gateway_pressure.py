"""Memory pressure as the gateway's users meet it: a daemon that is told of it, a real worker, a real gateway."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from expertd.protocol.paths import Home
from tests.conftest import StartDaemon
from tests.gateway_stage import ENDLESS, HELLO, Served, eventually, say, serving
from tests.test_worker_pressure import Script

FIGURE = "a test says so"
LITTLE = 300_000
"""Bytes; the small model's caches take 196,608 for each 256 tokens."""


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "pressure")


@pytest.fixture
def served(
    home: Home, start_daemon: StartDaemon, script: Script, checkpoints: dict[str, Path]
) -> Iterator[Served]:
    start_daemon("64MiB", "--simulate-pressure", str(script.path))
    with serving(home, checkpoints["stacked"]) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def readiness(served: Served) -> tuple[int, dict[str, Any]]:
    status, _, body = served.request("GET", "/health/ready")
    return status, body


def reaches(served: Served, level: str) -> bool:
    return eventually(lambda: bool(readiness(served)[1]["pressure"] == level))


def test_at_a_warning_requests_are_taken(served: Served, client: openai.OpenAI, script: Script) -> None:
    assert readiness(served) == (200, {"status": "ready", "pressure": "normal", "figure": ""})
    script.say("warning")
    assert reaches(served, "warning")
    assert readiness(served) == (200, {"status": "ready", "pressure": "warning", "figure": FIGURE})
    assert say(client, served).usage.completion_tokens == 24


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_at_critical_no_request_is_taken_until_it_is_over(
    served: Served, client: openai.OpenAI, script: Script, stream: bool
) -> None:
    script.say("critical")
    assert reaches(served, "critical")
    with pytest.raises(openai.InternalServerError) as caught:
        say(client, served, stream=stream)
    message = f"the machine is short of memory: {FIGURE}; close other apps or try again in a while"
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "10"
    assert caught.value.response.json() == {
        "error": {"message": message, "type": "server_error", "param": None, "code": "memory_pressure"}
    }
    script.say("normal")
    assert reaches(served, "normal")
    assert say(client, served).usage.completion_tokens == 24


def test_health_tells_what_is_the_matter(served: Served, script: Script) -> None:
    script.say("critical")
    assert reaches(served, "critical")
    status, headers, body = served.request("GET", "/health/ready")
    assert (status, headers["retry-after"]) == (503, "10")
    assert body["error"]["code"] == "memory_pressure"
    assert {name: body[name] for name in ("status", "pressure", "figure")} == {
        "status": "not ready",
        "pressure": "critical",
        "figure": FIGURE,
    }
    assert served.request("GET", "/health/live")[::2] == (200, {"status": "live"})
    assert served.request("GET", "/v1/models")[0] == 200
    assert FIGURE in served.errors()


def test_an_answer_that_is_under_way_goes_on(served: Served, client: openai.OpenAI, script: Script) -> None:
    stream = say(client, served, stream=True, max_tokens=ENDLESS)
    next(stream)
    script.say("critical")
    assert reaches(served, "critical")
    for _ in range(100):
        chunk = next(stream)
        assert chunk.choices[0].finish_reason is None
    stream.close()


def test_a_worker_that_is_started_again_begins_at_normal(
    served: Served, client: openai.OpenAI, script: Script
) -> None:
    script.say("critical")
    assert reaches(served, "critical")
    served.worker.kill()
    assert reaches(served, "normal")
    status, body = readiness(served)
    assert (status, body["error"]["code"]) == (503, "worker_unavailable")
    script.say("normal")
    assert eventually(lambda: readiness(served)[0] == 200)
    assert say(client, served).usage.completion_tokens == 24


def test_a_worker_that_loads_under_pressure_tells_so(
    home: Home, start_daemon: StartDaemon, script: Script, checkpoints: dict[str, Path]
) -> None:
    script.say("warning")
    start_daemon("64MiB", "--simulate-pressure", str(script.path))
    with serving(home, checkpoints["stacked"]) as served:
        assert reaches(served, "warning")


def test_a_prompt_whose_cache_does_not_fit_is_refused_with_the_figures(
    home: Home, start_daemon: StartDaemon, tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    program, command = tmp_path / "worker.py", tmp_path / "command"
    program.write_text(f"""
import sys, types
import psutil
psutil.virtual_memory = lambda: types.SimpleNamespace(available={LITTLE})
sys.argv[1:] = sys.argv[3:]
import expertd.worker.load
expertd.worker.load.check_room = lambda *_: None  # the model is there already when memory gets short
from expertd.clients.cli import main
main()
""")
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    command.chmod(0o700)
    start_daemon()
    prepare = f"import sys; sys.executable = {str(command)!r}"
    with serving(home, checkpoints["stacked"], prepare=prepare) as served, served.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            say(client, served, max_tokens=1000)
        assert (caught.value.code, caught.value.param) == ("memory_pressure", "max_tokens")
        assert caught.value.response.headers["retry-after"] == "10"
        assert "max_tokens is 1000, for which the KV cache needs 786 kB, but only 300 kB" in caught.value.message
        long = [{"role": "user", "content": HELLO[0]["content"] * 300}]
        with pytest.raises(openai.InternalServerError, match="shorter prompt") as caught:
            say(client, served, messages=long, max_tokens=None, stream=True)
        assert (caught.value.code, caught.value.param) == ("memory_pressure", "messages")
        assert say(client, served).usage.completion_tokens == 24
