"""Pages are unmapped when nothing can read them any more, and as long as something can, the daemon counts them."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import expertd
from expertd.protocol.connection import Connection
from expertd.protocol.messages import BudgetSet, SessionStatus, SetBudget
from expertd.protocol.paths import Home
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.verify import greedy
from tests.conftest import StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROMPT = np.arange(3, 20)[None]
WEIGHT = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("letting") / "model", "qwen3_moe", hidden=128, expert_width=256)


@pytest.fixture(scope="module")
def manifest(model_path: Path) -> Any:
    return load_lazily(model_path).manifest


@pytest.fixture(scope="module")
def plain(model_path: Path) -> Any:
    return load_model(model_path)[0]


_of_others: set[str] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    """What other modules' tests have left in this process is none of these tests' business."""
    gc.collect()
    _of_others.update(_mapped())


def segments() -> set[str]:
    """Inodes of the shared-memory segments that this process has mapped since the test began."""
    return _mapped() - _of_others


def _mapped() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/dev/shm/expertd" in line}


def sessions(home: Home) -> list[SessionStatus]:
    return [session for model in ask_status(home).models for session in model.sessions]


def wait_until_complete(model: Any) -> None:
    wait_for(lambda: all(pool.complete for pool in session_of(model).pools))


@pytest.fixture
def daemon(manifest: Any, start_daemon: StartDaemon) -> Iterator[subprocess.Popen[Any]]:
    """One with room for three quarters of the experts."""
    yield start_daemon(str(budget_for(manifest, 36)))


@pytest.mark.parametrize("room", [36, 48])
def test_pages_of_a_forgotten_model_go_by_themselves(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon, room: int
) -> None:
    """Before its session ends, and without the garbage collector where nothing refers to it in a circle."""
    start_daemon(str(budget_for(manifest, room)))
    model, _ = expertd.load(model_path)
    if room == 48:
        wait_until_complete(model)
    greedy(model, PROMPT, 4)
    assert len(segments()) == 2  # a pool, and the base weights
    gc.disable()
    try:
        del model
        wait_for(lambda: not sessions(home))
        assert not segments()
    finally:
        gc.enable()


def test_loading_waits_for_the_pages_of_a_forgotten_model(
    model_path: Path, home: Home, daemon: subprocess.Popen[Any]
) -> None:
    for _ in range(2):
        model, _ = expertd.load(model_path)
        greedy(model, PROMPT, 2)
        assert (len(segments()), len(sessions(home))) == (2, 1)
        del model
    wait_for(lambda: not sessions(home))


def test_a_layer_that_outlives_its_model_goes_on(
    model_path: Path, home: Home, plain: Any, daemon: subprocess.Popen[Any]
) -> None:
    model, _ = expertd.load(model_path)
    inner = model.model
    del model
    gc.collect()
    expected = plain.model(mx.array(PROMPT))
    assert mx.array_equal(inner(mx.array(PROMPT)), expected).item()
    assert len(sessions(home)) == 1
    del inner
    wait_for(lambda: not sessions(home) and not segments())


@pytest.mark.parametrize("forget", [False, True])
def test_a_weight_that_is_kept_is_counted_and_right_until_it_goes(
    model_path: Path, manifest: Any, home: Home, plain: Any, daemon: subprocess.Popen[Any], forget: bool
) -> None:
    model, _ = expertd.load(model_path)
    greedy(model, PROMPT, 2)
    kept = model.model.embed_tokens.weight
    if not forget:
        expertd.unload(model)
    del model
    gc.collect()
    # Its session is one that looks nothing up: it follows when pools move, so that old ones are given back.
    with Connection(home.daemon_socket, "test") as connection:
        connection.ask(SetBudget(budget=budget_for(manifest, 24)), BudgetSet)
    wait_for(lambda: ask_status(home).used_bytes == budget_for(manifest, 24))
    assert len(sessions(home)) == 1
    expected = dict(tree_flatten(plain.parameters()))[WEIGHT]
    assert mx.array_equal(kept, expected).item()
    other, _ = expertd.load(model_path)
    assert np.array_equal(greedy(other, PROMPT, 4).tokens, greedy(plain, PROMPT, 4).tokens)
    expertd.unload(other)
    kept = kept + 1
    assert mx.array_equal(kept, expected + 1).item()
    wait_for(lambda: not sessions(home) and not segments())


def test_a_weight_that_is_kept_goes_without_a_daemon_too(
    model_path: Path, plain: Any, daemon: subprocess.Popen[Any]
) -> None:
    """And the experts, which nothing can read, at once."""
    model, _ = expertd.load(model_path)
    session = session_of(model)
    kept = model.model.embed_tokens.weight
    expertd.unload(model)
    daemon.kill()
    daemon.wait()
    wait_for(lambda: len(segments()) == 1)
    assert mx.array_equal(kept, dict(tree_flatten(plain.parameters()))[WEIGHT]).item()
    assert session._thread.is_alive()
    del kept
    wait_for(lambda: not session._thread.is_alive())
    assert not segments()


OVERWRITES = """
import sys, mlx.core as mx, expertd
model, _ = expertd.load(sys.argv[1])
weight = model.model.embed_tokens.weight[:3]
mx.eval(weight)
expected = (mx.array(weight) + 0).tolist()
expertd.unload(model)
weight = weight + 0
mx.eval(weight)
assert weight.tolist() == expected
other, _ = expertd.load(sys.argv[1])
assert other.model.embed_tokens.weight[:3].tolist() == expected
weight = weight + 1
mx.eval(weight)
assert other.model.embed_tokens.weight[:3].tolist() == expected
print("as it was")
"""


def test_mlx_may_write_to_what_a_view_was_the_last_to_use(
    model_path: Path, home: Home, daemon: subprocess.Popen[Any]
) -> None:
    """Nobody else sees that, and the daemon counts what stays mapped, to the end of the process."""
    command = [sys.executable, "-c", OVERWRITES, str(model_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "as it was\n"), done.stderr
    wait_for(lambda: not sessions(home))


def test_results_that_were_not_evaluated_keep_their_pages(
    model_path: Path, manifest: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(str(budget_for(manifest, 48)))
    code = (
        "import sys, time, mlx.core as mx, expertd\n"
        "from expertd.worker.load import session_of\n"
        "model, _ = expertd.load(sys.argv[1])\n"
        "while not all(pool.complete for pool in session_of(model).pools): time.sleep(0.01)\n"
        "lazy = model(mx.array([[3, 4, 5]]))\n"
        "expertd.unload(model)\n"
        "print(flush=True)\n"
        "sys.stdin.readline()\n"
        "print(lazy.sum().item())\n"
    )
    command = [sys.executable, "-c", code, str(model_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "\n"
        assert [session.pid for session in sessions(home)] == [program.pid]
        out, _ = program.communicate("\n", timeout=60)
    expected = load_model(model_path)[0](mx.array([[3, 4, 5]])).sum().item()
    assert float(out) == expected
    wait_for(lambda: not sessions(home))
