"""Whatever a user gets wrong: one clear sentence with a stable code, a non-zero exit, nothing left running.

Through the command line as installed, in processes of their own.  HTTP's share is in ``test_gateway``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from expertd.clients.gateway.lifetime import listen
from expertd.protocol.errors import ConfigInvalid, SizeInvalid
from expertd.protocol.paths import Home
from tests.conftest import StartDaemon
from tools.factory import write_checkpoint

COMMANDS = (["generate", "MODEL", "hello"], ["serve", "MODEL", "--port", "0"], ["verify", "MODEL"])


def expertd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def assert_one_sentence(done: subprocess.CompletedProcess[str], code: str, status: int, *words: str) -> None:
    """One line on stderr that ends with the code and holds ``words``; the exit status; no traceback."""
    lines = [line for line in done.stderr.splitlines() if "started a daemon" not in line]
    assert done.returncode == status, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("expertd: ")
    assert lines[0].endswith(f"[{code}]")
    for word in words:
        assert word in lines[0]


def nothing_runs_in(home: Home) -> bool:
    """Whether no process of this home is left, and no socket."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("EXPERTD_HOME") == str(home.root) and process.pid != os.getpid():
                return False
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            continue
    return not list(home.run.glob("*.sock"))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bad") / "model", "qwen3_moe")


@pytest.fixture
def spoiled(good: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoiled."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def no_such_path(model: Path) -> None:
    shutil.rmtree(model)


def a_file_instead(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("not a folder")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def cut_off(model: Path) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 1000)


def rewrite_header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the header of a file without moving its data (which a lying header would not do either)."""
    path = model / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def lying_offsets(model: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name != "__metadata__")
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [begin + 4, end + 4]

    rewrite_header(model, change)


def lying_shape(model: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        name = next(name for name in header if name.endswith("gate_proj.weight"))
        header[name]["shape"][0] *= 2

    rewrite_header(model, change)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def unknown_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "qwen99_moe"}))


def contradicting_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))


def dense(model: Path) -> None:
    """A small llama of mlx-lm's own making."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.llama import Model, ModelArgs

    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64,
        "num_attention_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    llama = Model(ModelArgs.from_dict(config))
    mx.save_safetensors(str(model / "model.safetensors"), dict(tree_flatten(llama.parameters())))
    (model / "config.json").write_text(json.dumps(config))


SPOILT = [
    (no_such_path, "not_a_checkpoint"),
    (a_file_instead, "not_a_checkpoint"),
    (no_weights, "not_a_checkpoint"),
    (cut_off, "checkpoint_truncated"),
    (lying_offsets, "header_invalid"),
    (lying_shape, "header_invalid"),
    (no_config, "config_missing"),
    (broken_config, "config_missing"),
    (unknown_family, "unknown_family"),
    (contradicting_config, "checkpoint_invalid"),
    (dense, "dense_model"),
]


@pytest.mark.parametrize(("spoil", "code"), SPOILT, ids=[spoil.__name__ for spoil, _ in SPOILT])
def test_a_spoilt_checkpoint_is_named(spoil: Callable[[Path], None], code: str, spoiled: Path, home: Home) -> None:
    spoil(spoiled)
    done = expertd("generate", str(spoiled), "hello")
    assert_one_sentence(done, code, 2, str(spoiled))
    assert nothing_runs_in(home)


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_every_command_that_loads_names_a_spoilt_checkpoint(command: list[str], spoiled: Path, home: Home) -> None:
    cut_off(spoiled)
    done = expertd(*(word.replace("MODEL", str(spoiled)) for word in command))
    assert_one_sentence(done, "checkpoint_truncated", 2, "download it again")
    assert nothing_runs_in(home)


@pytest.mark.parametrize("command", COMMANDS, ids=[command[0] for command in COMMANDS])
def test_a_budget_that_is_too_small_names_the_smallest(command: list[str], good: Path, home: Home) -> None:
    done = expertd(*(word.replace("MODEL", str(good)) for word in command), "--budget", "20kB")
    assert_one_sentence(done, "budget_too_small", 4, "--budget 114688 or more")
    assert nothing_runs_in(home)


def test_derived_experts_are_refused_with_the_way_out(tmp_path: Path, home: Home) -> None:
    path = write_checkpoint(tmp_path / "model", "gpt_oss", names="derived")
    assert_one_sentence(expertd("generate", str(path), "hello"), "derived_experts", 2, f"expertd pack {path}")
    assert nothing_runs_in(home)


def test_a_home_that_is_too_long_names_the_limit(good: Path) -> None:
    long = "/tmp/" + "x" * 100
    for command in (["generate", str(good), "hello"], ["daemon", "run"], ["serve", str(good), "--port", "0"]):
        assert_one_sentence(expertd(*command, EXPERTD_HOME=long), "home_too_long", 2, long, "at most")
    assert not Path(long).exists()


def test_a_home_that_is_a_file_is_refused(home: Home) -> None:
    file = home.root / "file"
    file.write_text("")
    assert_one_sentence(expertd("daemon", "run", EXPERTD_HOME=str(file)), "home_invalid", 2, str(file))


def test_a_second_daemon_in_one_home_is_refused(home: Home, start_daemon: StartDaemon) -> None:
    first = start_daemon()
    done = expertd("daemon", "run", "--budget", "1MB")
    assert_one_sentence(done, "daemon_already_running", 5, str(first.pid), "expertd daemon stop")
    assert first.poll() is None


@pytest.mark.parametrize("size", ["much", "-1", "0", "12 parsecs"])
def test_a_size_that_is_none_is_refused(size: str, home: Home) -> None:
    assert_one_sentence(expertd("daemon", "run", "--budget", size), "size_invalid", 2, size, "or auto")


TAKE_A_BUDGET = (
    *COMMANDS,
    ["trace", "record", "MODEL", "--prompts", "PROMPTS", "-o", "OUT.npz"],
    ["worker", "MODEL", "--gateway", "ipc:///nowhere"],
)


@pytest.mark.parametrize("command", TAKE_A_BUDGET, ids=[command[0] for command in TAKE_A_BUDGET])
def test_a_wrong_budget_is_told_before_anything_is_looked_at(command: list[str], home: Home) -> None:
    done = expertd(*command, "--budget", "much")  # none of the files exists
    assert_one_sentence(done, "size_invalid", 2, "'much'", "or auto")
    assert not home.daemon_log.exists()


def test_load_refuses_a_wrong_budget_before_it_looks_at_the_model(home: Home, tmp_path: Path) -> None:
    from expertd import load

    with pytest.raises(SizeInvalid, match="or auto"):
        load(tmp_path / "nothing", budget="much")


def test_the_budget_may_be_auto(good: Path, home: Home) -> None:
    done = expertd("generate", str(good), "hello", "--max-tokens", "1", "--budget", "auto")
    assert done.returncode == 0, done.stderr
    assert expertd("budget", "auto").returncode == 0
    assert expertd("daemon", "stop").returncode == 0


def test_without_a_daemon_status_and_stop_say_how_to_start_one(home: Home) -> None:
    for command in (["status"], ["daemon", "stop"]):
        done = expertd(*command)
        assert done.stdout == ""
        assert_one_sentence(done, "daemon_not_running", 3, "expertd daemon run")


def test_shared_memory_that_is_full_is_an_error_and_not_a_crash(good: Path, home: Home) -> None:
    """A process may not have files above its limit, shared memory included: not even one event has room."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "from expertd.daemon.__main__ import run\n"
        "run(budget='64MB')\n"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while not home.daemon_socket.exists():
            assert daemon.poll() is None
        done = expertd("generate", str(good), "hello")
        assert_one_sentence(done, "segment_failed", 4, "shared memory")
        assert daemon.poll() is None
    finally:
        daemon.terminate()
        daemon.wait(20)


def test_arguments_of_mlx_lm_that_are_not_supported_are_refused(good: Path, home: Home) -> None:
    from expertd import load
    from expertd.protocol.errors import CheckpointError

    with pytest.raises(CheckpointError, match="does not support"):
        load(good, adapter_path="lora")
    with pytest.raises(CheckpointError, match="is a folder, which has no revisions"):
        load(good, revision="main")
    assert nothing_runs_in(home)


@pytest.mark.parametrize("host", ["foo.invalid", "192.0.2.1", "a" * 80])
def test_an_address_that_is_not_this_machine_s_is_told(host: str) -> None:
    with pytest.raises(ConfigInvalid, match="--host takes") as refused:
        listen(host, 0)
    assert host in refused.value.message and refused.value.exit_status == 2
