"""Several models in one gateway, and who has the next turn."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from expertd.clients.cli import main
from expertd.clients.gateway import chat
from expertd.clients.gateway import served as served_module
from expertd.clients.gateway.fair import FairQueue
from expertd.clients.gateway.served import Answers, Limits, Models, Served
from expertd.protocol.errors import (
    DeadlineExceeded,
    ExpertdError,
    ModelNotFound,
    QueueFull,
    WorkerUnavailable,
)
from expertd.protocol.messages import Finished
from expertd.protocol.paths import Home
from tests.gateway_stage import ENDLESS, HELLO, eventually, serving, stop_daemon
from tests.gateway_stage import Served as Running

# -- whose turn it is --------------------------------------------------------------------------------------------------


def names(queue: FairQueue[str]) -> list[str]:
    """All that may run now."""
    found = []
    while (item := queue.take()) is not None:
        found.append(item)
    return found


def test_one_question_does_not_wait_for_the_fifty_of_another() -> None:
    queue: FairQueue[str] = FairQueue(limit=100, beginning=100)
    queue.room = 4
    for number in range(50):
        queue.add("agent", f"a{number}")
    assert names(queue) == ["a0", "a1", "a2", "a3"]
    queue.add("chat", "c0")
    queue.add("chat", "c1")
    queue.done("a0")
    assert names(queue) == ["c0"]
    queue.done("a1")
    assert names(queue) == ["c1"], "two of each"
    queue.done("c0")
    assert names(queue) == ["a4"], "who is alone has everything"


def test_clients_with_as_many_go_round() -> None:
    queue: FairQueue[str] = FairQueue(limit=100, beginning=100)
    queue.room = 1
    for client in "abc":
        queue.add(client, f"{client}0")
        queue.add(client, f"{client}1")
    order = []
    while (item := queue.take()) is not None:
        order.append(item)
        queue.done(item)
    assert order == ["a0", "b0", "c0", "a1", "b1", "c1"]


def test_no_more_prompts_are_begun_than_a_worker_can_go_on_with() -> None:
    queue: FairQueue[str] = FairQueue(beginning=2)
    queue.room = 8
    for number in range(5):
        queue.add("a", str(number))
    assert names(queue) == ["0", "1"]
    queue.begun("0")
    queue.begun("0")
    assert names(queue) == ["2"]
    queue.done("1")
    assert names(queue) == ["3"]
    assert (queue.waiting, queue.running) == (1, 3)


def test_one_client_leaves_room_for_others() -> None:
    queue: FairQueue[str] = FairQueue(limit=8)
    for number in range(6):
        queue.add("a", f"a{number}")
    with pytest.raises(QueueFull, match="6 requests of this client wait already"):
        queue.add("a", "a6")
    queue.add("b", "b0")
    queue.add("c", "c0")
    with pytest.raises(QueueFull, match="8 requests wait already"):
        queue.add("d", "d0")
    queue.done("a3")
    queue.add("d", "d0")
    assert queue.waiting == 8


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "take", "begun", "done", "leave"]), st.integers(0, 3), st.integers(0, 30))
    ),
    room=st.integers(1, 5),
)
def test_whatever_happens_limits_hold_and_each_client_keeps_its_order(
    steps: Sequence[tuple[str, int, int]], room: int
) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue(limit=12, beginning=3)
    queue.room = room
    waiting: dict[int, list[tuple[int, int]]] = {client: [] for client in range(4)}
    running: list[tuple[int, int]] = []
    beginning: set[tuple[int, int]] = set()
    for number, (what, client, choice) in enumerate(steps):
        if what == "add":
            try:
                queue.add(str(client), (client, number))
                waiting[client].append((client, number))
            except QueueFull:
                assert sum(map(len, waiting.values())) == 12 or len(waiting[client]) == 9
        elif what == "take":
            item = queue.take()
            if item is None:
                assert len(running) == room or len(beginning) == 3 or not any(waiting.values())
                continue
            assert waiting[item[0]].pop(0) == item, "first come first served"
            shares = Counter(client for client, _ in running)
            assert all(shares[item[0]] <= shares[other] for other, items in waiting.items() if items)
            running.append(item)
            beginning.add(item)
        elif running and what in ("begun", "done"):
            item = running[choice % len(running)]
            beginning.discard(item)
            if what == "begun":
                queue.begun(item)
            else:
                queue.done(item)
                running.remove(item)
        elif what == "leave" and waiting[client]:
            queue.done(waiting[client].pop(choice % len(waiting[client])))
        assert queue.waiting == sum(map(len, waiting.values()))
        assert queue.running == len(running)


# -- names -------------------------------------------------------------------------------------------------------------


def test_models_are_found_by_their_names(home: Home, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "one", tmp_path / "b" / "two"]
    for folder in folders:
        folder.mkdir(parents=True)

    async def check() -> None:
        one, two = (Served(home, folder, aliases=[f"alias-{folder.name}"]) for folder in folders)
        models = Models([one, two])
        assert [models.find(name) for name in ("one", "alias-one", str(folders[0]), "")] == [one] * 4
        assert [models.find(name) for name in ("two", "alias-two", str(folders[1]))] == [two] * 3
        with pytest.raises(ModelNotFound, match="'three' is not served here; 'one' and 'two' are"):
            models.find("three")

    asyncio.run(check())


# -- one model, with its worker ----------------------------------------------------------------------------------------

LIMITS = Limits()
WANTED = chat.parse({"model": "m", "messages": HELLO, "max_tokens": 2})


async def whole(answers: Answers) -> list[Finished]:
    """How all answers ended."""
    ends = []
    with answers:
        while not answers.ended:
            received = await answers.receive(1.0)
            if received is not None and isinstance(received[1], Finished):
                ends.append(received[1])
    return ends


def run_served(
    home: Home, model: Path, use: Callable[[Served], Any], limits: Limits = LIMITS, always: bool = False
) -> None:
    async def run() -> None:
        served = Served(home, model, options=("--budget", "64MiB"), always=always, limits=limits)
        served.start()
        try:
            await use(served)
        finally:
            await served.drain(0.0)
            await served.stop()
            assert not list(home.run.glob("gateway-*"))

    asyncio.run(run())


def test_a_worker_lives_from_the_first_request_until_nobody_asks(own_home: Home, checkpoints: dict[str, Path]) -> None:
    async def use(served: Served) -> None:
        assert served.state == "asleep"
        served.check_ready()
        first, second = served.open("a", WANTED), served.open("b", WANTED)
        with pytest.raises(QueueFull, match="of this client"):
            for _ in range(100):
                served.open("a", WANTED)
        assert served.waiting == 49, "nobody has been asked yet"
        (end,) = await whole(first)
        assert (end.completion_tokens, served.state) == (2, "ready")
        assert len(await whole(second)) == 1
        while served.state != "asleep":
            await asyncio.sleep(0.05)
        assert len(await whole(served.open("a", WANTED))) == 1, "it is loaded again"

    # The abandoned requests of "a" are answered, too, and nobody listens.
    run_served(own_home, checkpoints["stacked"], use, Limits(ttl_s=0.2))


def test_a_request_waits_only_so_long(own_home: Home, checkpoints: dict[str, Path]) -> None:
    async def use(served: Served) -> None:
        with pytest.raises(WorkerUnavailable, match=r"has not been loaded within 0\.1 s"):
            await whole(served.open("a", WANTED))
        assert (served.waiting, served.running) == (0, 0)
        await served.loaded()
        assert len(await whole(served.open("a", WANTED))) == 1, "as the others"

    run_served(own_home, checkpoints["stacked"], use, Limits(queue_wait_s=0.1))


def test_an_answer_takes_only_so_long(own_home: Home, checkpoints: dict[str, Path]) -> None:
    async def use(served: Served) -> None:
        await served.loaded()
        endless = chat.parse({"model": "m", "messages": HELLO, "max_tokens": ENDLESS, "temperature": 0})
        with pytest.raises(DeadlineExceeded, match=r"more than the 1 s .* --deadline"):
            await whole(served.open("a", endless))
        assert (served.waiting, served.running) == (0, 0)
        assert len(await whole(served.open("a", WANTED))) == 1

    run_served(own_home, checkpoints["stacked"], use, Limits(deadline_s=1.0), always=True)


def test_who_waits_is_told_why_a_model_cannot_be_loaded_and_it_is_tried_again_after_a_while(
    own_home: Home, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "RETRY_LOAD_S", 2.0)
    model = tmp_path / "model"
    shutil.copytree(checkpoints["stacked"], model)
    config = (model / "config.json").rename(tmp_path / "config.json")

    async def use(served: Served) -> None:
        for _ in range(2):
            with pytest.raises(ExpertdError, match=r"config\.json") as caught:
                await whole(served.open("a", WANTED))
            assert caught.value.code == "config_missing"
        assert 0 < served.retry_after_s() <= 4
        config.rename(model / "config.json")
        while True:
            try:
                assert len(await whole(served.open("a", WANTED))) == 1
                break
            except ExpertdError as error:
                assert error.code == "config_missing", "nobody loads it before its time"
                await asyncio.sleep(0.1)

    run_served(own_home, model, use)


def test_a_worker_that_cannot_be_started_is_told_and_tried_again(
    own_home: Home, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "RETRY_LOAD_S", 0.0)

    async def use(served: Served) -> None:
        run = own_home.run.rename(own_home.root / "elsewhere")
        with pytest.raises(WorkerUnavailable, match="the worker could not be started"):
            await whole(served.open("a", WANTED))
        run.rename(own_home.run)
        assert len(await whole(served.open("a", WANTED))) == 1

    run_served(own_home, checkpoints["stacked"], use)


def test_a_gateway_that_ends_answers_who_waits(own_home: Home, checkpoints: dict[str, Path]) -> None:
    async def use(served: Served) -> None:
        answers = served.open("a", WANTED)
        await served.drain(0.0)
        with pytest.raises(WorkerUnavailable, match="being stopped"):
            await whole(answers)
        with pytest.raises(WorkerUnavailable, match="being stopped"):
            served.open("a", WANTED)

    run_served(own_home, checkpoints["stacked"], use)


# -- through HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(checkpoints: dict[str, Path]) -> Iterator[Running]:
    """A gateway over two models, of which neither is loaded."""
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as root:
        home = Home(Path(root))
        home.prepare()
        first, second = checkpoints["stacked"], checkpoints["per_expert"]
        try:
            options = (str(second), "--alias", f"gpt-4o={second.name}", "--ttl", "inf", "--deadline", "60")
            with serving(home, first, *options) as served:
                yield served
        finally:
            stop_daemon(home)


def test_each_model_is_loaded_by_its_first_request(running: Running, checkpoints: dict[str, Path]) -> None:
    first, second = (checkpoints[name].name for name in ("stacked", "per_expert"))
    assert running.line.startswith(f"expertd: serving {first}, {second} at http://")
    assert running.workers() == []
    assert running.request("GET", "/health/ready")[0] == 200
    listed = running.request("GET", "/v1/models")[2]["data"]
    assert [model["id"] for model in listed] == [first, second, "gpt-4o"]
    with running.client() as client:

        def ask(model: str) -> Any:
            return client.chat.completions.create(model=model, messages=HELLO, max_tokens=4)  # type: ignore[arg-type]

        assert ask("gpt-4o").model == second
        health = running.request("GET", "/health")[2]
        assert health["status"] == "ok"
        assert {name: one["state"] for name, one in health["models"].items()} == {first: "asleep", second: "ready"}
        assert ask(first).model == first
        assert eventually(lambda: len(running.workers()) == 2)
        with pytest.raises(openai.NotFoundError, match=f"'gpt-5' is not served here; '{first}' and '{second}' are"):
            ask("gpt-5")
    assert running.request("GET", "/v1/models/gpt-4o")[2]["id"] == "gpt-4o"
    assert running.request("GET", "/v1/models/gpt-5")[0] == 404


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--alias", "gpt-4o"], "of which model? Write --alias gpt-4o=MODEL"),
        (["--alias", "gpt-4o=other"], "--alias: other is none of the models"),
        (["--alias", "=x"], "'' is no name of a model"),
        (["--pin", "other"], "--pin: other is none of the models"),
        (["--ttl", "-1"], "is not a number of seconds"),
        (["--deadline", "0"], "too few for any answer"),
    ],
)
def test_what_is_said_of_no_model_is_refused(
    checkpoints: dict[str, Path], home: Home, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setenv("EXPERTD_HOME", str(home.root))
    models = [str(checkpoints[name]) for name in ("stacked", "per_expert")]
    result = CliRunner().invoke(main, ["serve", *models, *options])
    assert result.exit_code == 2, result.output
    assert told in " ".join(result.output.split())


def test_names_that_two_models_share_are_refused(
    checkpoints: dict[str, Path], home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EXPERTD_HOME", str(home.root))
    model = checkpoints["stacked"]
    twin = shutil.copytree(model, tmp_path / model.name)
    for models, told in (([model, twin], f"are both called {model.name}"), ([model, model], "is named twice")):
        result = CliRunner().invoke(main, ["serve", *map(str, models)])
        assert result.exit_code == 2, result.output
        assert told in " ".join(result.output.split())
