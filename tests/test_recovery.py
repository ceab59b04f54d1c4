"""Nothing is lost: daemons that die, sessions that are stopped, pools that move, budgets that change.  All real."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import psutil
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

import expertd
from expertd.protocol import messages
from expertd.protocol.connection import Connection
from expertd.protocol.errors import BudgetTooSmall, DaemonLost, DaemonNotRunning, FileChanged
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon
from expertd.worker import attach, load, succession
from expertd.worker.link import Link
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from tests.conftest import DEADLINE_S, StartDaemon
from tests.programs import Program
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
SIZES: dict[str, Any] = {"hidden": 128, "expert_width": 256, "layers": 4, "n_experts": 16, "top_k": 4}
BLOCKS = 4 * 16


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A row of a slab fills a page: so a budget gives just the slots that it should.
    folder = tmp_path_factory.mktemp("recovery") / "model"
    return write_checkpoint(folder, "qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> Any:
    return load_lazily(model_path).manifest


def generate(model: Any, tokens: int) -> list[int]:
    return [int(token) for token, _ in generate_step(mx.arange(3, 20), model, max_tokens=tokens)]


@pytest.fixture(scope="module")
def expected(model_path: Path) -> list[int]:
    return generate(load_model(model_path)[0], 400)


@pytest.fixture(autouse=True)
def no_daemon_stays(home: Home) -> Iterator[None]:
    """Models in these tests start daemons of their own."""
    yield
    with suppress(DaemonNotRunning):
        stop_daemon(home, "test")


@contextmanager
def loaded(path: Path, budget: int, **options: Any) -> Iterator[Any]:
    model, _ = expertd.load(path, budget=str(budget), **options)
    try:
        yield model
    finally:
        expertd.unload(model)


def set_budget(home: Home, budget: int) -> messages.BudgetSet:
    with Connection(home.daemon_socket, "test") as connection:
        return connection.ask(messages.SetBudget(budget=budget), messages.BudgetSet)


def wait_for(condition: Any, what: str = "") -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.02)


def end_daemon(home: Home) -> int:
    """kill -9, and wait until it is gone."""
    pid = ask_status(home).daemon.pid
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.kill()
        process.wait(DEADLINE_S)
    return pid


# -- the daemon dies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", ["shm", "copy"])
@pytest.mark.parametrize("slots", [4, 24])
def test_generation_goes_on_when_the_daemon_is_killed_in_the_middle(
    model_path: Path, manifest: Any, home: Home, expected: list[int], alias: str, slots: int
) -> None:
    budget = budget_for(manifest, slots) * (2 if alias == "copy" else 1)
    with loaded(model_path, budget, alias=alias) as model:
        seen, daemons = [], set()
        for token, _ in generate_step(mx.arange(3, 20), model, max_tokens=60):
            seen.append(int(token))
            if len(seen) % 20 == 10:
                daemons.add(end_daemon(home))
        assert seen == expected[:60]
        assert len(daemons) == 3
        assert [len(m.sessions) for m in ask_status(home).models] == [1]


def test_a_model_that_is_resident_as_a_whole_needs_no_daemon(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int]
) -> None:
    """And takes the next one's pools when there is one, so that no memory is held twice."""
    start_daemon(str(budget_for(manifest, BLOCKS)))
    with loaded(model_path, budget_for(manifest, BLOCKS)) as model:
        wait_for(lambda: all(pool.complete for pool in session_of(model).pools))
        assert generate(model, 20) == expected[:20]
        before = session_of(model).pools
        end_daemon(home)
        assert generate(model, 20) == expected[:20]
        assert session_of(model).pools == before
        start_daemon(str(budget_for(manifest, 20)))
        wait_for(lambda: session_of(model).pools != before, "for the idle session to adopt")
        assert generate(model, 40) == expected[:40]
        assert ask_status(home).models[0].slots == 20


def test_without_any_daemon_a_miss_fails_with_a_retryable_error_and_the_next_try_may_work(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    start_daemon(str(budget_for(manifest, 8)))
    with loaded(model_path, budget_for(manifest, 8)) as model:
        session_of(model)._succession.start = None  # as under a service manager that gave up
        monkeypatch.setattr(succession, "RECOVERY_S", 1.0)
        end_daemon(home)
        with pytest.raises(DaemonLost, match="no daemon has come back") as lost:
            generate(model, 40)
        assert lost.value.retryable
        start_daemon(str(budget_for(manifest, 8)))
        assert generate(model, 40) == expected[:40]


def test_a_checkpoint_that_changed_meanwhile_is_refused_until_it_is_back(
    tmp_path: Path, home: Home, expected: list[int]
) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", **SIZES)
    weights = path / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    with loaded(path, budget_for(load_lazily(path).manifest, 8)) as model:
        os.utime(weights, ns=(1, 1))
        end_daemon(home)
        with pytest.raises(FileChanged):
            generate(model, 40)
        os.utime(weights, ns=times)
        assert generate(model, 40) == expected[:40]


@pytest.mark.parametrize("damage", ["empty", "touched", "touched while it is read"])
def test_base_weights_of_a_file_that_changes_while_it_is_loaded_are_refused(
    tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """MLX reads them itself, long after the headers were checked."""
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", **SIZES)
    weights, attach_model, check = path / "model.safetensors", load._attach, load.check_unchanged

    def attach_and_damage(*arguments: Any) -> Any:
        model = attach_model(*arguments)
        if damage == "empty":
            os.truncate(weights, 0)
        elif damage == "touched":
            os.utime(weights, ns=(1, 1))
        return model

    def check_and_damage(*arguments: Any) -> None:
        check(*arguments)
        os.utime(weights, ns=(1, 1))

    monkeypatch.setattr(load, "_attach", attach_and_damage)
    if damage == "touched while it is read":
        monkeypatch.setattr(load, "check_unchanged", check_and_damage)
    with pytest.raises(FileChanged):
        expertd.load(path)
    wait_for(lambda: not home.daemon_socket.exists() or not any(m.sessions for m in ask_status(home).models))


@linux_only
def test_an_old_daemons_pools_are_unmapped(
    model_path: Path, manifest: Any, home: Home, expected: list[int]
) -> None:
    others = _segments_of(os.getpid())
    with loaded(model_path, budget_for(manifest, 24)) as model:
        for _ in range(3):
            end_daemon(home)
            assert generate(model, 30) == expected[:30]
        wait_for(lambda: len(_segments_of(os.getpid()) - others) == 2, "for old pools to be unmapped")  # one is base


def pool_for(manifest: Any, slots: int) -> int:
    """Bytes of a pool of ``slots`` blocks, without base weights."""
    return budget_for(msgspec.structs.replace(manifest, base=()), slots)


def _segments_of(pid: int) -> set[str]:
    """Inodes of the shared-memory segments that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/dev/shm/expertd" in line}


# -- pools move --------------------------------------------------------------------------------------------------------


@linux_only
def test_the_budget_changes_under_a_running_model(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int]
) -> None:
    daemon = start_daemon(str(budget_for(manifest, 24)))
    others = _segments_of(os.getpid())
    with loaded(model_path, budget_for(manifest, 24)) as model:
        steps = generate_step(mx.arange(3, 20), model, max_tokens=200)
        seen = [int(next(steps)[0]) for _ in range(10)]
        for slots in (12, 40, BLOCKS, 20, BLOCKS, 6, 30):
            before = ask_status(home).budget_bytes
            assert set_budget(home, budget_for(manifest, slots)).before == before
            seen += [int(next(steps)[0]) for _ in range(20)]
            wait_for(lambda slots=slots: ask_status(home).models[0].slots == slots)
        assert seen == expected[: len(seen)]
        steps.close()
        wait_for(lambda: ask_status(home).used_bytes == budget_for(manifest, 30), "for what was left to be given back")
        assert len(_segments_of(daemon.pid)) == 1
        wait_for(lambda: len(_segments_of(os.getpid()) - others) == 2, "for old pools to be unmapped")  # one is base


def test_blocks_follow_into_the_next_generation(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int]
) -> None:
    start_daemon(str(budget_for(manifest, BLOCKS)))
    with loaded(model_path, budget_for(manifest, BLOCKS)) as model:
        wait_for(lambda: all(pool.complete for pool in session_of(model).pools))
        read = ask_status(home).models[0].bytes_read
        set_budget(home, budget_for(manifest, 40))
        wait_for(lambda: ask_status(home).models[0].resident_blocks == 40)
        assert ask_status(home).models[0].bytes_read == read, "what was in memory was read again"
        assert generate(model, 30) == expected[:30]


def test_a_budget_below_what_is_in_use_is_refused(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 24)))
    with loaded(model_path, budget_for(manifest, 24)), pytest.raises(BudgetTooSmall, match="at least"):
        set_budget(home, budget_for(manifest, 2))
    assert ask_status(home).budget_bytes == budget_for(manifest, 24)


# -- sessions that are stopped -----------------------------------------------------------------------------------------


def test_a_stopped_process_is_left_behind_and_right_when_it_wakes(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int]
) -> None:
    budget = budget_for(manifest, 12)
    start_daemon(str(budget))
    with Program(model_path) as stopped, loaded(model_path, budget) as model:
        stopped.ask(300)
        wait_for(lambda: any(s.fetches > 20 for s in ask_status(home).models[0].sessions if s.pid == stopped.pid))
        os.kill(stopped.pid, signal.SIGSTOP)
        assert generate(model, 30) == expected[:30]
        (behind,) = [s for s in ask_status(home).models[0].sessions if s.left_behind]
        assert (behind.pid, behind.held_bytes) == (stopped.pid, pool_for(manifest, 12))
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.answer() == expected[:300]
        assert generate(model, 30) == expected[:30]
        wait_for(lambda: ask_status(home).used_bytes == budget, "for the old pool to be given back")
        wait_for(lambda: ask_status(home).models[0].slots == 12)
        assert not any(s.left_behind for s in ask_status(home).models[0].sessions)


def test_a_stopped_process_that_is_killed_frees_what_it_held(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int]
) -> None:
    budget = budget_for(manifest, 12)
    start_daemon(str(budget))
    with loaded(model_path, budget) as model:
        with Program(model_path) as stopped:
            stopped.ask(300)
            wait_for(lambda: any(s.fetches > 20 for s in ask_status(home).models[0].sessions if s.pid == stopped.pid))
            os.kill(stopped.pid, signal.SIGSTOP)
            assert generate(model, 30) == expected[:30]
        wait_for(lambda: generate(model, 10) == expected[:10] and ask_status(home).used_bytes == budget)
        assert ask_status(home).models[0].slots == 12


def test_the_whole_machine_asleep_and_awake_again(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, expected: list[int]
) -> None:
    """Everybody is stopped for longer than any deadline that a waiting session has; nobody is declared dead."""
    budget = budget_for(manifest, 8)
    daemon = start_daemon(str(budget))
    with Program(model_path) as one, Program(model_path) as two:
        for program in (one, two):
            program.ask(120)
        wait_for(lambda: all(s.fetches > 20 for s in ask_status(home).models[0].sessions))
        everybody = [one.pid, two.pid, daemon.pid]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in reversed(everybody):
            os.kill(pid, signal.SIGCONT)
        assert one.answer() == expected[:120]
        assert two.answer() == expected[:120]
        assert "left behind" not in home.daemon_log.read_text()
        assert len(ask_status(home).models[0].sessions) == 2


def test_a_stopped_daemon_is_waited_for(
    model_path: Path, manifest: Any, start_daemon: StartDaemon, expected: list[int]
) -> None:
    daemon = start_daemon(str(budget_for(manifest, 8)))
    with loaded(model_path, budget_for(manifest, 8)) as model:
        timers = [
            threading.Timer(after_s, daemon.send_signal, (number,))
            for after_s, number in ((0.1, signal.SIGSTOP), (4.0, signal.SIGCONT))
        ]
        for timer in timers:
            timer.start()
        assert generate(model, 60) == expected[:60]
        for timer in timers:
            timer.join()


# -- at the same moment ------------------------------------------------------------------------------------------------


def test_two_processes_attach_at_the_same_moment_and_share_everything(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    """Sessions of two threads are two sessions to the daemon; a hundred times, from a barrier."""
    for _ in range(4):
        daemon = start_daemon(str(budget_for(manifest, BLOCKS)))
        for _ in range(25):
            barrier = threading.Barrier(2)
            sessions: list[attach.Session] = []

            def open_one(barrier: threading.Barrier = barrier, sessions: list[attach.Session] = sessions) -> None:
                barrier.wait()
                sessions.append(attach.Session(home, manifest, "shm"))

            threads = [threading.Thread(target=open_one) for _ in range(2)]
            with ExitStack() as stack:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for session in sessions:
                    stack.callback(session.close)
                (status,) = ask_status(home).models
                assert len(status.sessions) == 2
                assert len({pool.segment for session in sessions for pool in session.pools}) == 1
                wait_for(lambda: ask_status(home).models[0].resident_blocks == BLOCKS)
        assert ask_status(home).models[0].bytes_read == BLOCKS * manifest.layers[0].block_bytes
        daemon.terminate()
        daemon.wait()


def test_a_failed_daemon_leaves_no_numpy_views(manifest: Any, home: Home, start_daemon: StartDaemon) -> None:
    """A session that is closed while its daemon is gone ends at once and keeps nothing mapped."""
    start_daemon(str(budget_for(manifest, 8)))
    session = attach.Session(home, manifest, "shm")
    end_daemon(home)
    session.close()
    assert not session._thread.is_alive()
    assert np.array_equal(session.pools, [])


def test_a_session_that_took_no_segment_is_over_only_when_nothing_is_looked_up_there_any_more(
    model_path: Path, manifest: Any, expected: list[int], home: Home, start_daemon: StartDaemon,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its process has no descriptor left, say.  A daemon that took it for over would fill slots again that it reads."""
    start_daemon(str(budget_for(manifest, 40)))
    model, _ = expertd.load(model_path)
    assert generate(model, 5) == expected[:5]
    receive, failed = Link.receive_pool, threading.Event()

    def fail_once(link: Link, info: messages.PoolInfo) -> Any:
        if not failed.is_set():
            failed.set()
            raise OSError(24, "too many open files")
        return receive(link, info)

    monkeypatch.setattr(Link, "receive_pool", fail_once)
    session = session_of(model)
    with session.between_forwards():  # so nothing is adopted
        with Connection(home.daemon_socket, "test") as connection:
            connection.ask(messages.SetBudget(budget=budget_for(manifest, 30)), messages.BudgetSet)
        wait_for(lambda: failed.is_set() and len(ask_status(home).models[0].sessions) == 2)
    assert generate(model, 60) == expected[:60]
    wait_for(lambda: len(ask_status(home).models[0].sessions) == 1)
    assert generate(model, 60) == expected[:60]
    expertd.unload(model)
