"""Sessions and what they share: one copy, no frames on hits, death and detachment, forks and threads."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import expertd
from expertd.protocol.errors import BudgetTooSmall, FileChanged, SessionClosed
from expertd.protocol.layout import pool_layout
from expertd.protocol.paths import Home
from expertd.protocol.segments import create
from expertd.worker.alias import CopiedSlabs
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.verify import greedy
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.memory import memory_of
from tools.stage import ask_status, budget_for

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or forks a process that has used MLX")
PROMPT = np.arange(3, 20)[None]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A row of a slab fills a page: so a budget gives just the slots that it should.
    return write_checkpoint(
        tmp_path_factory.mktemp("sharing") / "model", "qwen3_moe", hidden=128, expert_width=256
    )


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> Any:
    return load_lazily(model_path).manifest


@contextmanager
def holder(model: Path, tokens: int = 8) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Another process that has loaded ``model``, generated ``tokens``, and holds on; with what it said."""
    command = [sys.executable, "-m", "tools.hold", str(model), str(tokens)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
        process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def complete(model: Any) -> bool:
    return all(pool.complete for pool in session_of(model).pools)


def test_a_hit_costs_no_message(model_path: Path, manifest: Any, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(manifest, 48)))
    model, _ = expertd.load(model_path)
    wait_for(lambda: complete(model))
    greedy(model, PROMPT, 3)
    before = session_of(model).frames
    for _ in range(10):
        greedy(model, PROMPT, 100)  # a forward for the prompt, and one for each of the tokens but the last
    assert session_of(model).frames - before <= 20
    expertd.unload(model)


def test_hits_in_a_partial_pool_cost_no_message_either(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 47)))
    model, _ = expertd.load(model_path)
    token = mx.array([[7]])
    mx.eval(model(token))
    misses, before = ask_status(home).models[0].misses, session_of(model).frames
    for _ in range(1000):
        mx.eval(model(token))
    assert ask_status(home).models[0].misses == misses
    assert session_of(model).frames - before <= 20
    expertd.unload(model)


def test_every_lookup_is_counted_as_a_hit_or_a_miss(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 20)))
    model, _ = expertd.load(model_path)
    mx.eval(model(mx.array(PROMPT[:, :1])))
    expertd.unload(model)
    wait_for(lambda: not ask_status(home).models[0].sessions)
    found = ask_status(home).models[0]
    assert found.hits + found.misses == len(manifest.layers) * manifest.layers[0].top_k
    assert found.misses == found.resident_blocks
    assert found.bytes_read == found.misses * found.block_bytes


@linux_only
def test_two_processes_share_one_copy(model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(str(budget_for(manifest, 48)))
    with holder(model_path) as (first, said):
        wait_for(lambda: ask_status(home).models[0].resident_blocks == 48)
        one = memory_of(daemon.pid).shared + memory_of(first.pid).shared
        with holder(model_path) as (second, said_too):
            assert said["tokens"] == said_too["tokens"]
            two = sum(memory_of(pid).shared for pid in (daemon.pid, first.pid, second.pid))
            assert len(ask_status(home).models[0].sessions) == 2
        assert two <= one * 1.02
    assert ask_status(home).models[0].bytes_read == 48 * manifest.layers[0].block_bytes  # each block once


def test_two_sessions_alternate_in_a_pool_that_is_too_small_for_both(
    model_path: Path, manifest: Any, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 5)))
    expected = [int(token[0]) for token in greedy(plain_model(model_path), np.arange(3, 60)[None], 24).tokens]
    with holder(model_path, 24) as (_, said), holder(model_path, 24) as (_, said_too):
        assert said["tokens"] == said_too["tokens"] == expected


def plain_model(path: Path) -> Any:
    from mlx_lm.utils import load_model

    return load_model(path)[0]


def test_threads_with_one_model_take_turns(model_path: Path, manifest: Any, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(manifest, 6)))
    model, _ = expertd.load(model_path)
    chosen = [np.arange(start, start + 12)[None] for start in (3, 40, 90)]
    plain = plain_model(model_path)
    expected = [greedy(plain, prompt, 12).tokens for prompt in chosen]
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        found[number] = greedy(model, chosen[number], 12).tokens

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number in range(3):
        assert np.array_equal(found[number], expected[number])
    expertd.unload(model)


def test_the_death_of_a_process_ends_its_session(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 6)))
    with holder(model_path) as (process, _):
        assert len(ask_status(home).models[0].sessions) == 1
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not ask_status(home).models[0].sessions)
        process.wait()
        process.returncode = 0  # it was to be killed
    with holder(model_path, 24) as (_, said):  # its leases are gone: the next one gets the same few slots
        assert len(said["tokens"]) == 24


def test_an_unloaded_model_refuses_to_compute(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon()
    model, _ = expertd.load(model_path)
    expertd.unload(model)
    expertd.unload(model)
    with pytest.raises(SessionClosed, match="load it again"):
        model(mx.array(PROMPT))


@linux_only
def test_a_forked_child_refuses_and_its_parent_goes_on(
    model_path: Path, manifest: Any, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 8)))
    code = (
        "import os, sys, numpy as np, mlx.core as mx, expertd\n"
        "from expertd.worker.verify import greedy\n"
        "model, _ = expertd.load(sys.argv[1])\n"
        "prompt = np.arange(3, 20)[None]\n"
        "first = greedy(model, prompt, 4).tokens\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        model(mx.array(prompt))\n"
        "    except expertd.ExpertdError as error:\n"
        "        os._exit(7 if error.code == 'session_closed' else 8)\n"
        "    os._exit(9)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "assert np.array_equal(greedy(model, prompt, 4).tokens, first)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(model_path)], check=True, timeout=60)


def test_a_file_that_changes_fails_the_fetch_and_publishes_nothing(
    tmp_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe")
    start_daemon(str(budget_for(load_lazily(path).manifest, 8)))
    model, _ = expertd.load(path)
    weights = path / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(FileChanged, match="load the model again"):
        model(mx.array(PROMPT))
    assert ask_status(home).models[0].resident_blocks == 0
    expertd.unload(model)


def test_a_failed_read_leaves_the_session_usable(tmp_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe")
    start_daemon(str(budget_for(load_lazily(path).manifest, 8)))
    model, _ = expertd.load(path)
    weights = path / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    os.utime(weights, ns=(1, 1))
    with pytest.raises(FileChanged):
        model(mx.array(PROMPT))
    os.utime(weights, ns=times)
    expected = greedy(plain_model(path), PROMPT, 8).tokens
    assert np.array_equal(greedy(model, PROMPT, 8).tokens, expected)
    expertd.unload(model)


def test_an_idle_model_gives_way_to_one_that_comes(
    tmp_path: Path, model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    other = write_checkpoint(tmp_path / "model", "qwen3_moe", seed=1)
    start_daemon(str(budget_for(manifest, 48)))
    first, _ = expertd.load(model_path)
    expertd.unload(first)
    wait_for(lambda: not ask_status(home).models[0].sessions)
    second, _ = expertd.load(other)  # the first is idle now and gives way
    expected = greedy(plain_model(other), PROMPT, 8).tokens
    assert np.array_equal(greedy(second, PROMPT, 8).tokens, expected)
    assert [model.path for model in ask_status(home).models] == [str(other)]
    expertd.unload(second)


def test_the_smallest_budget_that_is_named_works(
    model_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon("100000")
    with pytest.raises(BudgetTooSmall) as refused:
        expertd.load(model_path)
    named = str(refused.value).split("--budget ")[1].split()[0]
    daemon.terminate()
    daemon.wait()
    start_daemon(str(int(named) - 1))
    with pytest.raises(BudgetTooSmall):
        expertd.load(model_path)
    subprocess.run([sys.executable, "-m", "expertd.clients.cli", "daemon", "stop"], check=True, capture_output=True)
    start_daemon(named)
    model, _ = expertd.load(model_path)
    expected = greedy(plain_model(model_path), PROMPT, 8).tokens
    assert np.array_equal(greedy(model, PROMPT, 8).tokens, expected)
    expertd.unload(model)


def test_an_interrupted_fetch_is_answered_before_anything_is_looked_up(
    model_path: Path, manifest: Any, start_daemon: StartDaemon
) -> None:
    """A daemon that is stopped cannot answer; the interrupt comes while a forward waits for it."""
    daemon = start_daemon(str(budget_for(manifest, 8)))
    model, _ = expertd.load(model_path)
    expected = greedy(plain_model(model_path), PROMPT, 8).tokens
    daemon.send_signal(signal.SIGSTOP)
    timer = threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model(mx.array(PROMPT))
    timer.join()
    assert session_of(model)._talk.unanswered is not None
    daemon.send_signal(signal.SIGCONT)
    assert np.array_equal(greedy(model, PROMPT, 8).tokens, expected)
    assert session_of(model)._talk.unanswered is None
    expertd.unload(model)


def test_layers_that_are_called_without_the_model_are_exact_too(
    model_path: Path, manifest: Any, start_daemon: StartDaemon
) -> None:
    """Nobody's forward is under way, and another session empties the pool before the result is evaluated."""
    start_daemon(str(budget_for(manifest, 19)))
    first, _ = expertd.load(model_path)
    second, _ = expertd.load(model_path)
    expected = plain_model(model_path).model(mx.array(PROMPT))
    hidden = first.model(mx.array(PROMPT))
    greedy(second, np.arange(200, 260)[None], 24)
    assert mx.array_equal(hidden, expected).item()
    expertd.unload(first)
    expertd.unload(second)


def test_a_model_that_is_forgotten_ends_its_session(model_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    start_daemon()
    model, _ = expertd.load(model_path)
    greedy(model, PROMPT, 4)
    del model
    gc.collect()
    wait_for(lambda: not ask_status(home).models[0].sessions)


def test_a_forked_child_does_not_keep_its_parents_session_alive(
    model_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon()
    code = (
        "import os, sys, time, expertd\n"
        "model, _ = expertd.load(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.stdin.read()\n"
        "    os._exit(0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(model_path)], stdin=subprocess.PIPE) as parent:
        parent.wait(60)
        wait_for(lambda: bool(ask_status(home).models) and not ask_status(home).models[0].sessions)
        parent.communicate()


def mapped_segments() -> int:
    """How many segments this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/dev/shm/expertd-")


@linux_only
def test_unloading_unmaps_the_pools(model_path: Path, manifest: Any, start_daemon: StartDaemon) -> None:
    start_daemon(str(budget_for(manifest, 48)))
    gc.collect()
    expertd.unload(expertd.load(model_path)[0])  # what other tests have forgotten goes with it
    before = mapped_segments()
    model, _ = expertd.load(model_path)
    wait_for(lambda: complete(model))
    greedy(model, PROMPT, 4)
    assert mapped_segments() == before + 2  # a pool, and the base weights
    expertd.unload(model)
    assert mapped_segments() == before


def test_a_result_may_be_evaluated_after_its_model_is_gone(
    model_path: Path, manifest: Any, start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(str(budget_for(manifest, 48)))
    expected = plain_model(model_path)(mx.array(PROMPT))
    for forget in (False, True):
        model, _ = expertd.load(model_path)
        wait_for(lambda model=model: complete(model))  # type: ignore[misc]
        lazy = model(mx.array(PROMPT))
        if not forget:
            expertd.unload(model)
        del model
        gc.collect()
        other, _ = expertd.load(model_path)
        assert mx.array_equal(lazy, expected).item()
        expertd.unload(other)
    daemon.terminate()


def test_a_copy_that_was_interrupted_is_made_again(manifest: Any) -> None:
    """The interrupt comes between two parts of a block, and later the slot gets its former block back."""
    layer = manifest.layers[0]
    layout = pool_layout(1, layer.experts, layer.parts, 4)
    segment = create(f"/expertd-copy-{os.getpid()}", layout.size)
    bytes_of = np.frombuffer(segment.mapping, np.uint8)
    slabs = CopiedSlabs(segment.mapping, layout)
    one, other, slot = np.array([3]), np.array([5]), np.array([2])
    bytes_of[:] = 10
    slabs.bring(0, one, slot)
    bytes_of[:] = 77
    rows = slabs._rows
    slabs._rows = [rows[0], (np.zeros(1), np.zeros(1))]  # the second part cannot be copied: no such slot
    with pytest.raises(IndexError):
        slabs.bring(0, other, slot)
    slabs._rows = rows
    bytes_of[:] = 10
    slabs.bring(0, one, slot)
    assert all((own[2].view(np.uint8) == 10).all() for own, _ in rows)
    slabs.let_go()
    del bytes_of, rows
    segment.close()
