"""The gateway as its users meet it: a real process, a real worker and daemon, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import openai
import pytest
from aiohttp import web

from expertd.clients.gateway import responses
from expertd.clients.gateway.access import Access
from expertd.clients.gateway.app import Gateway
from expertd.clients.gateway.lifetime import listen
from expertd.clients.gateway.served import Models
from expertd.clients.gateway.stored import Stored
from expertd.clients.gateway.wanted import Wanted
from expertd.clients.gateway.watch import DaemonWatch
from expertd.protocol.errors import ExpertdError, PortInUse, QueueFull, WorkerUnavailable
from expertd.protocol.messages import Delta, Finished
from expertd.protocol.paths import Home
from tests.gateway_stage import (
    DEADLINE_S,
    ENDLESS,
    HELLO,
    Served,
    eventually,
    idle,
    say,
    serving,
    serving_alone,
    starting,
)


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path]) -> Iterator[Served]:
    """One gateway for all tests that leave it as it was."""
    with serving_alone(checkpoints["stacked"]) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def plain_text(checkpoints: dict[str, Path]) -> str:
    """What plain mlx-lm says to HELLO."""
    model, tokenizer = mlx_lm.load(str(checkpoints["stacked"]))
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)
    return str(mlx_lm.generate(model, tokenizer, prompt, max_tokens=24))


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_start_line_tells_the_name_and_the_url(served: Served) -> None:
    assert served.line == f"expertd: serving {served.model} at http://127.0.0.1:{served.port}/v1\n"


def test_an_answer_is_that_of_plain_mlx_lm(client: openai.OpenAI, served: Served, plain_text: str) -> None:
    answer = say(client, served)
    assert answer.choices[0].message.content == plain_text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", served.model)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert abs(answer.created - time.time()) < DEADLINE_S


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI, served: Served, plain_text: str) -> None:
    chunks = list(say(client, served, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == plain_text
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI, served: Served) -> None:
    *others, last = say(client, served, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert all(chunk.usage is None for chunk in others)


def test_the_wire_of_a_stream(served: Served) -> None:
    with served.raw_chat(stream=True, max_tokens=3) as connection:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    headers = head.decode().lower().split("\r\n")
    assert headers[0] == "http/1.1 200 ok"
    assert "content-type: text/event-stream; charset=utf-8" in headers
    assert "cache-control: no-cache" in headers
    assert "x-accel-buffering: no" in headers
    assert not any(header.startswith("access-control") for header in headers)
    assert body.count(b'"role"') == 1
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_stop_string_is_honoured(client: openai.OpenAI, served: Served, plain_text: str) -> None:
    stop = plain_text[4:7]
    answer = say(client, served, stop=stop)
    assert answer.choices[0].message.content == plain_text[: plain_text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_several_clients_at_once_each_get_their_answer(client: openai.OpenAI, served: Served, plain_text: str) -> None:
    async def all_at_once() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0) as several:
            answers = await asyncio.gather(
                *(
                    several.chat.completions.create(
                        model=served.model,
                        messages=HELLO,  # type: ignore[arg-type]
                        temperature=0,
                        max_tokens=24,
                    )
                    for _ in range(6)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(all_at_once()) == [plain_text] * 6


def test_models(client: openai.OpenAI, served: Served) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (served.model, "model", "expertd")
    assert isinstance(model.created, int)
    assert client.models.retrieve(served.model) == model


def test_the_folder_is_a_name_too(client: openai.OpenAI, served: Served, checkpoints: dict[str, Path]) -> None:
    answer = say(client, served, model=str(checkpoints["stacked"]), max_tokens=1)
    assert answer.model == served.model


def test_health(served: Served) -> None:
    assert served.request("GET", "/health/live")[::2] == (200, {"status": "live"})
    assert served.request("GET", "/health/ready")[::2] == (200, {"status": "ready", "pressure": "normal", "figure": ""})


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_not_found_and_not_fetched(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        say(client, served, model="somebody/some-model")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("somebody/some-model")


def test_a_parameter_without_effect_is_refused_by_name(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, served, modalities=["audio"])
    assert (caught.value.code, caught.value.param) == ("parameter_unsupported", "modalities")
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(("max_tokens", "param"), [(32_760, "messages"), (40_000, "max_tokens")])
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_refused_before_a_stream_begins(
    client: openai.OpenAI, served: Served, max_tokens: int, param: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        say(client, served, max_tokens=max_tokens, stream=stream)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", param)
    assert "this model's maximum context length is 32768 tokens" in caught.value.message


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "route_not_found"),
        ("GET", "/nothing", None, 404, "route_not_found"),
        ("GET", "/v1/chat/completions", None, 405, "method_not_allowed"),
        ("POST", "/v1/models", b"{}", 405, "method_not_allowed"),
        ("POST", "/v1/chat/completions", b"{not json", 400, "request_invalid"),
        ("POST", "/v1/chat/completions", b"", 400, "request_invalid"),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400, "request_invalid"),
        ("POST", "/v1/chat/completions", b'"\\ud800"', 400, "request_invalid"),
        ("POST", "/v1/chat/completions", b"[]", 400, "request_invalid"),
    ],
)
def test_every_error_has_the_shape_of_openai(
    served: Served, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    answered, headers, error = served.request(method, path, body)
    assert answered == status
    assert error["error"].keys() == {"message", "type", "param", "code"}
    assert (error["error"]["type"], error["error"]["code"]) == ("invalid_request_error", code)
    assert headers["x-should-retry"] == "false"


def test_a_long_body_is_taken_and_a_huge_one_refused(served: Served) -> None:
    long = json.dumps({"model": "other", "messages": HELLO, "user": "x" * (8 << 20)}).encode()
    assert served.request("POST", "/v1/chat/completions", long)[0] == 404
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S) as connection:
        length = 65 << 20
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())
        try:
            for _ in range(length >> 20):
                connection.sendall(bytes(1 << 20))
        except ConnectionError:
            pass
        received = connection.recv(65536)
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"request_too_large"' in received


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "192.168.0.7", "localhost.evil.example", ""])
def test_a_strange_host_is_refused(served: Served, host: str) -> None:
    status, _, error = served.request("GET", "/v1/models", headers={"Host": host})
    assert (status, error["error"]["code"]) == (400, "request_invalid")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "[::1]"])
def test_the_machine_itself_is_no_strange_host(served: Served, host: str) -> None:
    assert served.request("GET", "/v1/models", headers={"Host": host})[0] == 200


# -- clients that leave ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_worker_stops_when_its_client_is_gone(served: Served, stream: bool) -> None:
    connection = served.raw_chat(stream=stream, max_tokens=ENDLESS)
    worker = served.worker
    assert eventually(lambda: not idle(worker)), "the worker works"
    connection.close()
    assert eventually(lambda: idle(worker)), "the worker has stopped"


def test_the_worker_stops_in_the_middle_of_a_prompt(served: Served) -> None:
    long = [{"role": "user", "content": "a b c d " * 7_000}]
    connection = served.raw_chat(messages=long, max_tokens=1)
    worker = served.worker
    assert eventually(lambda: not idle(worker)), "the worker works"
    connection.close()
    began = time.monotonic()
    assert eventually(lambda: idle(worker)), "the worker has stopped"
    assert time.monotonic() - began < 10


def test_an_answer_comes_while_another_is_under_way(client: openai.OpenAI, served: Served, plain_text: str) -> None:
    with served.raw_chat(stream=True, max_tokens=ENDLESS) as other:
        assert other.recv(1)
        assert say(client, served).choices[0].message.content == plain_text


class EndlessWorker:
    """Answers every request with text for ever, and counts who is let go."""

    name, names, paths = "endless", ["endless"], {"endless"}
    count, ended = 1, False

    def __init__(self, text: str = "x" * 100_000) -> None:
        self.text = text
        self.released = 0
        self.silent_after: int | None = None

    def open(self, client: str, *wanted: Wanted) -> EndlessWorker:
        self.sent = 0
        return self

    def retry_after_s(self) -> float:
        return 6.5

    def __enter__(self) -> EndlessWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.released += 1

    def watch(self, watcher: Callable[[int, Delta], None]) -> None:
        """Nobody is told."""

    async def receive(self, timeout_s: float, pass_on: object = None) -> tuple[int, Delta | Finished] | None:
        self.sent += 1
        if self.silent_after is not None and self.sent > self.silent_after:
            await asyncio.sleep(timeout_s)
            return None
        await asyncio.sleep(0)
        return 0, Delta(request=1, text=self.text, tokens=1)


async def with_endless_worker(
    worker: EndlessWorker, use: Callable[[asyncio.StreamReader], Any], path: str = "chat/completions", **limits: float
) -> None:
    """Stream from a gateway in this process, configured as the real one is."""
    watch = DaemonWatch(Home(Path("nowhere")))
    gateway = Gateway(Models([worker]), Access("127.0.0.1"), watch, **limits)  # type: ignore[list-item]
    runner = web.AppRunner(gateway.app, handler_cancellation=True, access_log=None)
    await runner.setup()
    with listen("127.0.0.1", 0) as listener:
        await web.SockSite(runner, listener).start()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        asked = {"input": "hello"} if path == "responses" else {"messages": HELLO}
        body = json.dumps({"model": "endless", "stream": True} | asked).encode()
        writer.write(b"POST /v1/%s HTTP/1.1\r\nHost: localhost\r\n" % path.encode())
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        try:
            await use(reader)
        finally:
            writer.close()
            await runner.cleanup()


def test_a_client_that_does_not_read_is_let_go() -> None:
    worker = EndlessWorker()

    async def read_nothing(reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(20):
            while not worker.released:
                await asyncio.sleep(0.05)

    asyncio.run(with_endless_worker(worker, read_nothing, stall_s=0.3))


def test_a_silent_stream_carries_comments() -> None:
    worker = EndlessWorker("hello")
    worker.silent_after = 1

    async def read_comments(reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(20):
            await reader.readuntil(b": keepalive\n\n")
            await reader.readuntil(b": keepalive\n\n")

    asyncio.run(with_endless_worker(worker, read_comments, keepalive_s=0.1))


class BriefWorker(EndlessWorker):
    """Says one word."""

    async def receive(self, timeout_s: float, pass_on: object = None) -> tuple[int, Delta | Finished] | None:
        if not self.sent:
            return await super().receive(timeout_s)
        self.ended = True
        return 0, Finished(request=1, reason="stop", prompt_tokens=1, completion_tokens=1)


@pytest.mark.parametrize(("broken", "status", "ends_with"), [
    (["begin"], 500, "error"),
    (["event"], 200, "failed"),
    (["end"], 200, "failed"),
    (["event", "failed"], 200, None),
    (["keep"], 200, "completed"),
], ids=str)  # fmt: skip
def test_what_fails_after_a_stream_has_begun_is_no_second_answer(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: list[str],
    status: int,
    ends_with: str | None,
) -> None:
    def fails(*given: object) -> Any:
        raise ValueError(secret)  # which a traceback quotes by its name

    async def read(reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(20):
            told.append(await reader.readuntil(b"\r\n\r\n"))
            with contextlib.suppress(ConnectionResetError):
                while data := await reader.read(1 << 16):
                    told.append(data)
                    if data.endswith((b"\r\n0\r\n\r\n", b"}")):
                        break

    secret = "a client's words"
    told: list[bytes] = []
    kept: list[Any] = []
    monkeypatch.setattr(Stored, "keep", lambda stored, response, *given: kept.append(response))
    for name in broken:
        monkeypatch.setattr(Stored if name == "keep" else responses.Rendering, name, fails)
    worker = BriefWorker("hello")
    with caplog.at_level("INFO"):
        asyncio.run(with_endless_worker(worker, read, "responses"))
    answer = b"".join(told).decode()
    assert answer.startswith(f"HTTP/1.1 {status} ") and answer.count("HTTP/1.1") == 1
    if ends_with == "error":
        assert json.loads(answer.splitlines()[-1])["error"]["code"] == "internal"
    else:
        assert answer.endswith("\r\n0\r\n\r\n") == (ends_with is not None)
        assert ("event: response.completed" in answer) == (ends_with == "completed")
        assert ("event: response.failed" in answer) == (ends_with == "failed")
    assert ("the gateway failed; its log says where" in answer) == (ends_with in ("error", "failed"))
    assert (kept, worker.released) == ([], 1)
    failures = [record for record in caplog.records if record.levelname == "ERROR"]
    assert {record.message for record in failures} == {"a request failed: method=POST path=/v1/responses"}
    assert len(failures) == len(broken) and secret not in caplog.text
    (line,) = (record.message for record in caplog.records if record.message.startswith("request finished"))
    assert f"status={status}" in line and "error=internal" in line


# -- the worker --------------------------------------------------------------------------------------------------------


def test_a_full_queue_and_a_missing_worker_are_worth_another_try() -> None:
    class Full(EndlessWorker):
        def __init__(self, error: ExpertdError) -> None:
            super().__init__()
            self.error = error

        def open(self, client: str, *wanted: Wanted) -> EndlessWorker:
            raise self.error

    async def head(reader: asyncio.StreamReader) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())

    heads: list[str] = []
    for error in (QueueFull("full"), WorkerUnavailable("loading")):
        asyncio.run(with_endless_worker(Full(error), head))
    assert [head.split()[1] for head in heads] == ["429", "503"]
    assert "\r\nRetry-After: 1\r\n" in heads[0]
    assert "\r\nRetry-After: 7\r\n" in heads[1]


# -- start and end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "sigint"])
def test_a_signal_ends_it_and_leaves_nothing_behind(
    own_home: Home, checkpoints: dict[str, Path], number: signal.Signals
) -> None:
    with serving(own_home, checkpoints["stacked"]) as served:
        worker = served.worker
        served.process.send_signal(number)
        assert served.process.wait(DEADLINE_S) == 0
        assert not worker.is_running()
        assert not list(own_home.run.glob("gateway-*"))
        assert served.process.stdout is not None
        assert served.process.stdout.read() == "", "one line is all it says"
        assert "started a daemon" in served.errors()
        assert len(served.errors().splitlines()) == 1


def test_running_requests_are_ended_when_it_stops(own_home: Home, checkpoints: dict[str, Path]) -> None:
    with serving(own_home, checkpoints["stacked"]) as served, served.client() as client:
        stream = say(client, served, stream=True, max_tokens=ENDLESS)
        next(stream)
        served.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="being stopped"):
            list(stream)
        assert served.process.wait(DEADLINE_S) == 0


def test_it_can_be_stopped_while_the_model_loads(own_home: Home, checkpoints: dict[str, Path]) -> None:
    with starting(own_home, checkpoints["stacked"]) as served:
        assert eventually(lambda: bool(served.workers()))
        served.process.terminate()
        assert served.process.wait(DEADLINE_S) == 0
        assert served.process.stdout is not None
        assert served.process.stdout.read() == ""
        assert not list(own_home.run.glob("gateway-*"))


def refused(home: Home, *arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a serve command that does not get far."""
    command = [sys.executable, "-m", "expertd.clients.cli", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_taken_port_is_told_before_anything_starts(own_home: Home, checkpoints: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, errors = refused(own_home, str(checkpoints["stacked"]), "--port", str(port))
    assert status == PortInUse.exit_status == 5
    assert errors.endswith("[port_in_use]\n")
    assert str(port) in errors
    assert not own_home.daemon_socket.exists()


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [(["--budget", "much"], 2, "size_invalid"), (["--host", "203.0.113.1"], 2, "config_invalid")],
    ids=["budget", "host"],
)
def test_options_are_checked_before_anything_starts(
    own_home: Home, checkpoints: dict[str, Path], options: list[str], status: int, code: str
) -> None:
    assert refused(own_home, str(checkpoints["stacked"]), "--port", "0", *options)[0] == status
    assert not own_home.daemon_socket.exists()


def test_a_missing_folder_is_told_at_once(own_home: Home, tmp_path: Path) -> None:
    status, errors = refused(own_home, str(tmp_path / "nothing"))
    assert (status, errors.count("\n")) == (2, 1)
    assert "[not_a_checkpoint]" in errors
    assert not own_home.daemon_socket.exists()


def test_why_a_model_cannot_be_loaded_is_told_in_one_sentence(
    own_home: Home, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.safetensors").symlink_to(checkpoints["stacked"] / "model.safetensors")
    status, errors = refused(own_home, str(broken), "--port", "0")
    assert status == 2
    last = errors.splitlines()[-1]
    assert last.startswith("expertd: ")
    assert last.endswith("[config_missing]")
    assert "Traceback" not in errors
    assert not list(own_home.run.glob("gateway-*"))
