"""``expertd.clients.Client`` and the commands that have experts resident, against a real daemon."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import expertd
from expertd.clients import Client
from expertd.clients import client as expertd_client
from expertd.protocol.errors import (
    BlocksInvalid,
    BudgetTooSmall,
    DaemonLost,
    DaemonNotRunning,
    ModelInUse,
    ModelNotLoaded,
    SizeInvalid,
)
from expertd.protocol.messages import Happened
from expertd.protocol.paths import Home
from tests.conftest import DEADLINE_S, StartDaemon, wait_for

DEMO = Path(__file__).parents[1] / "models" / "demo"


@pytest.fixture
def client(home: Home, start_daemon: StartDaemon) -> Iterator[Client]:
    start_daemon("3MB")
    with Client() as found:
        yield found


@pytest.fixture
def model(client: Client) -> Iterator[Any]:
    loaded, _ = expertd.load(DEMO)
    yield loaded
    expertd.unload(loaded)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "expertd.clients.cli", *words], capture_output=True, text=True)


def test_there_has_to_be_a_daemon(home: Home) -> None:
    with pytest.raises(DaemonNotRunning, match="expertd daemon run"):
        Client()


def test_a_home_may_be_named(home: Home, client: Client) -> None:
    with Client(str(home.root)) as other:
        assert other.status().daemon.pid == client.status().daemon.pid


def test_the_budget(client: Client) -> None:
    assert client.budget("4MB") == 4_000_000
    assert client.budget(5_000_000) == client.status().budget_bytes == 5_000_000
    with pytest.raises(SizeInvalid):
        client.budget("much")


def test_a_budget_below_what_is_needed_is_refused(client: Client, model: Any) -> None:
    with pytest.raises(BudgetTooSmall):
        client.budget("10kB")


def test_blocks_that_are_named_are_brought_in(client: Client, model: Any) -> None:
    blocks = [(layer, expert) for expert in (31, 30) for layer in range(6)]
    assert client.warm(DEMO, blocks) == 12
    wait_for(lambda: client.status().models[0].warming == 0)
    (found,) = client.status().models
    assert found.resident_blocks == 12
    assert [layer.resident_blocks for layer in found.layers] == [2] * 6
    assert (found.hits, found.misses) == (0, 0)


def test_without_names_all_free_slots_are_filled(client: Client, model: Any) -> None:
    assert client.warm("demo") == 192
    wait_for(lambda: client.status().models[0].warming == 0)
    (found,) = client.status().models
    assert found.resident_blocks == found.slots < found.blocks
    assert found.evictions == 0


def test_pins(client: Client, model: Any) -> None:
    assert client.pin("demo", [(0, 1), (5, 31)]) == 2
    wait_for(lambda: client.status().models[0].resident_blocks == 2)
    assert client.pin("demo", [(0, 1), (0, 2)]) == client.status().models[0].pinned == 3
    assert client.unpin("demo", [(0, 1)]) == 2
    assert client.unpin("demo") == client.status().models[0].pinned == 0


def test_pins_that_cannot_be_are_refused(client: Client, model: Any) -> None:
    with pytest.raises(BlocksInvalid, match="the model has 6 MoE layers, there is no layer 6"):
        client.pin("demo", [(6, 0)])
    with pytest.raises(BlocksInvalid, match="layer 0 has 32 experts, there is no expert 32"):
        client.warm("demo", [(0, 32)])
    with pytest.raises(BlocksInvalid, match="64 pinned blocks would share a pool of 56 slots; 28 may be pinned there"):
        client.pin("demo", [(layer, expert) for layer in range(2) for expert in range(32)])
    assert client.status().models[0].pinned == 0


def test_a_model_has_to_be_loaded(client: Client) -> None:
    for call in (client.warm, client.unpin, client.unload):
        with pytest.raises(ModelNotLoaded, match="what it holds: none"):
            call("demo")


def test_a_model_in_use_stays(client: Client, model: Any) -> None:
    with pytest.raises(ModelInUse):
        client.unload(DEMO)


def test_load_fills_memory_and_leaves_the_model_to_others(client: Client) -> None:
    done = command("load", str(DEMO))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{DEMO}: 56 of 192 blocks (29 %) are resident\n"
    (found,) = client.status().models
    assert (found.sessions, found.resident_blocks, found.warming) == ([], 56, 0)
    again = command("load", str(DEMO))
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "MB" not in again.stderr  # there was nothing to do
    assert client.unload(DEMO) > 0


def test_load_needs_no_worker_where_the_model_is_in_use(client: Client, model: Any) -> None:
    (before,) = client.status().models
    assert command("load", str(DEMO)).returncode == 0
    (found,) = client.status().models
    assert found.resident_blocks == 56
    assert [session.pid for session in found.sessions] == [session.pid for session in before.sessions]


def test_load_means_the_files_that_are_there_now_though_somebody_uses_those_before(
    client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    before, _ = expertd.load(folder)
    (folder / "model.safetensors").touch()
    done = command("load", str(folder))
    old, new = client.status().models
    assert (len(old.sessions), old.resident_blocks, new.sessions) == (1, 0, [])
    assert new.resident_blocks > 0
    assert done.stdout.startswith(f"{folder}: {new.resident_blocks} of 192 blocks ("), done.stderr
    assert client.pin(folder, [(0, 1)]) == 1
    assert [model.pinned for model in client.status().models] == [0, 1]
    expertd.unload(before)
    wait_for(lambda: [model.id for model in client.status().models] == [new.id])


def test_warm_runs_prompts(client: Client, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Write a loop.\n")
    done = command("warm", str(DEMO), "What is socket?", "--prompts", str(prompts), "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first == f"{DEMO}: 56 of 192 blocks (29 %) are resident"
    assert second.endswith("% of what these prompts used was there already")
    (found,) = client.status().models
    assert (found.sessions, found.resident_blocks) == ([], 56)
    assert found.hits > 0


def test_warm_wants_a_prompt(client: Client) -> None:
    done = command("warm", str(DEMO))
    assert done.returncode == 2
    assert "expertd load" in done.stderr


def test_events_tell_what_happens(client: Client) -> None:
    events = client.events()
    found: list[tuple[str, dict[str, Any]]] = []
    with ThreadPoolExecutor(1) as beside:
        heard = beside.submit(lambda: [found.append((happened.event, happened.facts)) for happened in take(events, 3)])
        wait_for(lambda: said_at_least(client, found))
        heard.result(DEADLINE_S)
    assert found[0][0].startswith("budget changed")


def take(events: Iterator[Happened], count: int) -> Iterator[Happened]:
    for _ in range(count):
        yield next(events)


def said_at_least(client: Client, found: list[Any]) -> bool:
    """Have something happen again and again until it was heard of often enough: the subscription takes a moment."""
    client.budget(3_000_000 + int(time.monotonic() * 1000) % 1_000_000)
    return len(found) >= 3


def test_events_end_with_the_daemon(home: Home, start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expertd_client, "RENEW_S", 0.2)
    daemon = start_daemon("3MB")
    with Client() as client:
        events = client.events()
        with ThreadPoolExecutor(1) as beside:
            heard = beside.submit(lambda: list(events))
            time.sleep(0.5)
            daemon.kill()
            with pytest.raises(DaemonLost):
                heard.result(DEADLINE_S)
