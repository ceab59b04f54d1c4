"""What a gateway survives: workers that die, hang or cannot load, a machine that sleeps, strangers, too many clients.

Real processes and real kills; the supervision's rules alone are tested without any.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import psutil
import pytest
import zmq

from expertd.clients.gateway import supervision
from expertd.clients.gateway.link import RECEIVE_FRAMES, SEND_FRAMES, Link
from expertd.clients.gateway.supervision import Supervision
from expertd.clients.gateway.workers import Worker
from expertd.protocol.connection import Connection
from expertd.protocol.errors import QueueFull, WorkerUnavailable
from expertd.protocol.messages import Cancel, Delta, Finished, Message, Shutdown, WorkerFailed, WorkerReady, encode
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

SILENCE_S = 2.0
STOP_S = 2 * SILENCE_S
LIMITS = f"""
import functools
from expertd.clients.gateway import lifetime, served
lifetime.serve = functools.partial(lifetime.serve, stall_s={SILENCE_S})
served.Limits = functools.partial(served.Limits, silence_s={SILENCE_S})
"""
FILES = 112
FEW_FILES = f"""
import resource
from expertd.clients.gateway import connections
connections.WANTED_FILES = {FILES}
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
"""
IDLE_CLIENTS = 120
FRAMES = 100_000
FLAT_BYTES = 64 << 20
STRANGERS = 4
LONGEST = 32 << 20


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path]) -> Iterator[Served]:
    """One gateway with short deadlines for the tests that leave it with a working worker."""
    with serving_alone(checkpoints["stacked"], prepare=LIMITS) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with served.client() as client:
        yield client


def is_ready(served: Served) -> bool:
    return served.request("GET", "/health/ready")[0] == 200


def text(client: openai.OpenAI, served: Served, max_tokens: int = 24) -> str:
    return str(say(client, served, max_tokens=max_tokens).choices[0].message.content)


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it went between the two questions
        return True


def daemon_of(home: Home) -> psutil.Process:
    with Connection(home.daemon_socket, "test") as connection:
        return psutil.Process(connection.daemon.pid)


# -- when to start again -----------------------------------------------------------------------------------------------


def test_the_first_death_waits_for_nothing_and_the_next_ones_ever_longer() -> None:
    life, now, waits = Supervision(), 0.0, []
    for _ in range(10):
        life.started(now)
        life.ready(now + 1)
        waits.append(life.died(now + 2))
        now += 2 + waits[-1]
    assert waits == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_a_worker_that_could_never_load_is_tried_for_ever() -> None:
    life = Supervision()
    assert [life.died(0.0) for _ in range(5000)][-1] == 30.0


def test_a_worker_that_was_ready_for_a_minute_begins_anew() -> None:
    life = Supervision()
    for _ in range(5):
        life.started(0.0)
        life.died(1.0)
    life.started(10.0)
    life.ready(20.0)
    assert life.died(79.0) == 8.0
    life.started(90.0)
    life.ready(100.0)
    assert life.died(160.0) == 0.0
    life.started(160.0)
    assert life.died(260.0) == 0.5, "a long load is no health"


def test_asking_again_is_worth_it_after_the_wait_and_a_load() -> None:
    life = Supervision()
    life.started(0.0)
    assert life.retry_after_s(0.0) == 5.0
    assert life.retry_after_s(60.0) == 1.0
    life.ready(8.0)
    assert life.retry_after_s(9.0) == 1.0
    for _ in range(4):
        life.died(10.0)
    assert life.retry_after_s(10.0) == 2.0 + 8.0
    assert life.retry_after_s(11.5) == 0.5 + 8.0
    life.started(12.0)
    assert life.retry_after_s(15.0) == 5.0


def test_the_same_reason_is_news_once() -> None:
    life = Supervision()
    assert [life.is_news(why) for why in ("a", "a", "b", "b", "a")] == [True, False, True, False, True]
    life.ready(1.0)
    assert life.is_news("a"), "it was well in between"


# -- a worker that dies ------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_started_again(client: openai.OpenAI, served: Served) -> None:
    before = text(client, served)
    for _ in range(2):
        worker = served.worker
        stream = say(client, served, stream=True, max_tokens=ENDLESS)
        next(stream)
        with served.raw_chat(max_tokens=ENDLESS) as whole:
            assert eventually(lambda: not idle(served.worker))
            worker.kill()
            with pytest.raises(openai.APIError, match="killed by signal 9"):
                list(stream)
            head = whole.recv(65536).decode()
        assert head.startswith("HTTP/1.1 503 ")
        assert "\r\nRetry-After: " in head
        assert "worker_unavailable" in head
        with pytest.raises(openai.InternalServerError) as caught:
            say(client, served)
        assert (caught.value.status_code, caught.value.code) == (503, "worker_unavailable")
        assert "started again" in caught.value.message
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        assert served.request("GET", "/health/live")[0] == 200
        assert served.request("GET", "/health/ready")[0] == 503
        assert eventually(lambda: is_ready(served), DEADLINE_S)
        assert gone(worker)
        assert served.worker.pid != worker.pid
        assert text(client, served) == before
    assert served.errors().count("is ready again") == 2


def test_a_worker_that_cannot_load_again_says_why_until_it_can(
    own_home: Home, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoints["stacked"], model)
    with serving(own_home, model) as served, served.client() as client:
        before = text(client, served)
        (model / "config.json").rename(tmp_path / "config.json")
        served.worker.kill()

        def reason() -> str:
            return str(served.request("GET", "/health/ready")[2])

        assert eventually(lambda: "config.json" in reason(), DEADLINE_S)
        seen: set[int] = set()

        def several_were_tried() -> bool:
            seen.update(one.pid for one in served.workers())
            return len(seen) >= 2

        assert eventually(several_were_tried, DEADLINE_S)
        assert "config.json" in reason()
        assert served.errors().count("[config_missing]") == 1, "one line for one reason"
        (tmp_path / "config.json").rename(model / "config.json")
        assert eventually(lambda: is_ready(served), DEADLINE_S)
        assert text(client, served) == before


def test_a_worker_that_hangs_is_killed_and_another_started(client: openai.OpenAI, served: Served) -> None:
    worker = served.worker
    stream = say(client, served, stream=True, max_tokens=ENDLESS)
    next(stream)
    worker.suspend()
    with pytest.raises(openai.APIError, match="said nothing for 2 s"):
        list(stream)
    assert eventually(lambda: is_ready(served), DEADLINE_S)
    assert gone(worker)
    assert text(client, served)


@pytest.mark.parametrize("when", ["waiting", "loading"])
@pytest.mark.parametrize("how", ["end", "stop", "kill"])
def test_nothing_is_left_of_a_worker_that_is_ended_before_it_is_back(
    own_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, how: str
) -> None:
    # This worker is ready at once, and loads for ever the next time.
    started, program, command = tmp_path / "started", tmp_path / "worker.py", tmp_path / "command"
    program.write_text(f"""
import os, pathlib, sys, time, zmq
from expertd.protocol.messages import WorkerReady, encode
started = pathlib.Path({str(started)!r})
if not started.exists():
    started.touch()
    link = zmq.Context.instance().socket(zmq.DEALER)
    link.connect(sys.argv[sys.argv.index("--gateway") + 1])
    link.send(encode(WorkerReady(pid=os.getpid(), model="m", context=8, at_once=1)))
time.sleep({DEADLINE_S})
""")
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    command.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(command))
    children = psutil.Process().children()

    async def end() -> None:
        worker = Worker(own_home, tmp_path)
        await worker.start()
        try:
            async with asyncio.timeout(DEADLINE_S):
                first = psutil.Process((await worker.ready()).pid)
                if when == "waiting":
                    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 600.0)
                    monkeypatch.setattr(supervision, "LONGEST_WAIT_S", 600.0)
                    worker._supervision.died(0.0)
                first.kill()
                while not gone(first) or worker._peer is not None or (when == "loading" and worker._process is None):
                    await asyncio.sleep(0.01)
                with pytest.raises(WorkerUnavailable, match="killed by signal 9"):
                    worker.check()
                if how == "end":
                    worker.end()
                elif how == "kill":
                    worker.kill()
                await worker.stop()
                with pytest.raises(WorkerUnavailable, match="being stopped"):
                    worker.check()
        finally:
            worker.kill()
            await worker.stop()

    asyncio.run(end())
    assert psutil.Process().children() == children
    assert not list(own_home.run.glob("gateway-*"))


# -- a machine that sleeps ---------------------------------------------------------------------------------------------


def test_nobody_is_at_fault_when_all_were_asleep(client: openai.OpenAI, served: Served) -> None:
    undisturbed = text(client, served, 400)
    worker = served.worker
    everybody = [psutil.Process(served.process.pid), worker, daemon_of(served.home)]
    stream = say(client, served, stream=True, max_tokens=400)
    said = [next(stream), next(stream)]
    for process in everybody:
        process.suspend()
    time.sleep(STOP_S)
    for process in everybody:
        process.resume()
    said += stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == undisturbed
    assert said[-1].choices[0].finish_reason == "length"
    assert served.worker.pid == worker.pid
    assert is_ready(served)


@pytest.mark.parametrize("stopped_s", [0.0, 2.0])
def test_a_deadline_counts_only_time_awake(stopped_s: float) -> None:
    program = """
import asyncio, sys
from expertd.clients.gateway import awake
async def main():
    try:
        async with awake.timeout(1.0):
            print("begun", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
    except TimeoutError:
        print("too late", flush=True)
    else:
        print("in time", flush=True)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "begun\n"
            if stopped_s:
                process.send_signal(signal.SIGSTOP)
                time.sleep(stopped_s)
                process.stdin.write("\n")
                process.stdin.flush()
                process.send_signal(signal.SIGCONT)
            assert process.stdout.readline() == ("in time\n" if stopped_s else "too late\n")
        finally:
            process.kill()


# -- strangers ---------------------------------------------------------------------------------------------------------


def hostile_frames(worker: int) -> list[list[bytes]]:
    others: list[Message] = [
        WorkerReady(pid=worker, model="m", context=1, at_once=1),
        WorkerFailed(pid=worker, code="internal", message="no"),
        WorkerReady(pid=1, model="m", context=1, at_once=1),
        Delta(request=1, text="x", tokens=1),
        Finished(request=1, reason="stop", prompt_tokens=1, completion_tokens=1),
        Cancel(request=1),
        Shutdown(),
    ]
    frames = [[b""], [b"\x00" * 100], os.urandom(64), b"\x91" * 5000, b"\x81\xa4type\xa5delta", b"{}"]
    singles = [frame if isinstance(frame, list) else [frame] for frame in frames]
    return [*singles, [b"a", b"b"], [b""] * 200, [b"x" * (1 << 16)], *([encode(other)] for other in others)]


def test_strangers_cost_neither_memory_nor_answers(client: openai.OpenAI, served: Served) -> None:
    path = served.home.gateway_socket(served.process.pid)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    gateway, before, lines = psutil.Process(served.process.pid), text(client, served), len(served.errors().splitlines())
    resident = gateway.memory_info().rss
    most = 0
    frames = hostile_frames(served.worker.pid)
    began = time.monotonic()
    answers = 0

    def flood() -> None:
        with zmq.Context() as context, ExitStack() as stack:
            strangers = []
            for _ in range(STRANGERS):
                stranger = stack.enter_context(context.socket(zmq.DEALER))
                stranger.setsockopt(zmq.LINGER, int(DEADLINE_S * 1000))
                stranger.connect(f"ipc://{path}")
                strangers.append(stranger)
            for number in range(FRAMES):
                strangers[number % STRANGERS].send_multipart(frames[number % len(frames)])
            for stranger in strangers:
                stranger.send(b"\xc1" * LONGEST)

    flooding = threading.Thread(target=flood)
    flooding.start()
    while flooding.is_alive() or not answers:
        assert text(client, served) == before
        answers += 1
        most = max(most, gateway.memory_info().rss)
    flooding.join()
    took_s = time.monotonic() - began
    assert text(client, served) == before
    assert most - resident < FLAT_BYTES + RECEIVE_FRAMES * (1 << 16) + STRANGERS * LONGEST, "one long frame of each"
    assert eventually(lambda: gateway.memory_info().rss - resident < FLAT_BYTES), "nothing of it is kept"
    assert 0 < len(served.errors().splitlines()) - lines <= took_s + 2, "a line a second"
    assert "frames dropped" in served.errors()


def test_a_worker_that_reads_nothing_fills_no_memory(home: Home) -> None:
    async def fill() -> int:
        link = Link(home.gateway_socket(os.getpid()))
        link.bind()
        heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        listening = asyncio.create_task(link.listen(lambda peer, message: heard.set_result(peer)))
        try:
            with zmq.Context() as context, context.socket(zmq.DEALER) as worker:
                worker.setsockopt(zmq.LINGER, 0)
                worker.setsockopt(zmq.RCVHWM, 1)
                worker.connect(link.address)
                worker.send(encode(Shutdown()))
                async with asyncio.timeout(DEADLINE_S):
                    peer = await heard
                for sent in range(100 * SEND_FRAMES):
                    try:
                        link.send(peer, bytes(100_000))
                    except QueueFull:
                        return sent
            raise AssertionError("it takes anything")
        finally:
            listening.cancel()
            await asyncio.wait([listening])
            link.close()

    assert SEND_FRAMES <= asyncio.run(fill()) < 3 * SEND_FRAMES


# -- a gateway that is killed ------------------------------------------------------------------------------------------


def kill_while_idle(served: Served) -> psutil.Process:
    served.wait_ready()
    return served.worker


def kill_while_generating(served: Served) -> psutil.Process:
    served.wait_ready()
    with served.raw_chat(stream=True, max_tokens=ENDLESS) as connection:
        assert connection.recv(1)
    served.raw_chat(stream=True, max_tokens=ENDLESS).detach()
    worker = served.worker
    assert eventually(lambda: not idle(worker))
    return worker


def kill_while_loading(served: Served) -> psutil.Process:
    assert eventually(lambda: bool(served.workers()))
    daemon_of(served.home).suspend()
    worker = served.worker
    assert eventually(lambda: idle(worker)), "it waits for the daemon"
    return worker


@pytest.mark.parametrize("until", [kill_while_idle, kill_while_generating, kill_while_loading])
def test_when_the_gateway_is_killed_its_worker_ends(
    own_home: Home, checkpoints: dict[str, Path], until: Callable[[Served], psutil.Process]
) -> None:
    with starting(own_home, checkpoints["stacked"]) as served:
        worker = until(served)
        try:
            served.process.kill()
            served.process.wait(DEADLINE_S)
            assert eventually(lambda: gone(worker))
        finally:
            for process in psutil.process_iter():
                if is_daemon(process, own_home):
                    process.resume()
    left = own_home.gateway_socket(served.process.pid)
    assert left.exists(), "nobody was there to remove it"
    if until is kill_while_idle:
        with serving(own_home, checkpoints["stacked"]):
            assert not left.exists(), "the next gateway does"


def is_daemon(process: psutil.Process, home: Home) -> bool:
    try:
        return "expertd.daemon" in process.cmdline() and process.environ().get("EXPERTD_HOME") == str(home.root)
    except psutil.Error:
        return False


# -- too many clients --------------------------------------------------------------------------------------------------


def test_idle_clients_keep_nobody_out_and_leave_descriptors_for_a_worker(
    own_home: Home, checkpoints: dict[str, Path]
) -> None:
    with (
        serving(own_home, checkpoints["stacked"], prepare=FEW_FILES) as served,
        served.client() as client,
        ExitStack() as stack,
    ):
        before = text(client, served)
        gateway, worker = psutil.Process(served.process.pid), served.worker
        body = json.dumps({"model": served.model, "messages": HELLO, "max_tokens": 8}).encode()
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S))
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        slow.sendall(b"Content-Length: %d\r\n\r\n" % len(body))
        for _ in range(IDLE_CLIENTS):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", served.port))
        with served.client() as another:  # the first one's idle connection may be hung up at any moment now
            assert text(another, served) == before
        assert gateway.num_fds() < FILES - 16
        slow.sendall(body)
        assert slow.recv(65536).startswith(b"HTTP/1.1 200 "), "who is busy is not hung up on"
        worker.kill()
        assert eventually(lambda: worker not in served.workers() and len(served.workers()) == 1, DEADLINE_S)
        assert eventually(lambda: is_ready(served), DEADLINE_S)
        stack.close()
        with served.client() as another:
            assert text(another, served) == before
        assert eventually(lambda: gateway.num_fds() < FILES // 2), "those who have left hold nothing"
