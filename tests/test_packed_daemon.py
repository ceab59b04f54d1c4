"""Packed stores under real daemons and real models: the tokens are those of plain mlx-lm, whatever the store is."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load_model

import expertd
from expertd.clients.cli import main
from expertd.protocol.checkpoint import read_header
from expertd.protocol.errors import DerivedExperts, FileChanged, ReadFailed
from expertd.protocol.manifest import Manifest
from expertd.protocol.messages import ModelStatus
from expertd.protocol.packed import ALIGN, SUFFIX, header_of, layout_of, store_name
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from expertd.worker.verify import first_difference, greedy
from tests.conftest import StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

CELLS = [
    ("qwen3_moe", "mxfp4", "stacked", 128),
    ("mixtral", "affine", "per_expert", 64),
    ("gpt_oss", "mxfp4", "stacked", 64),
    ("deepseek_v3", "float32", "per_expert", 64),
    ("qwen3_next", "float32", "per_expert", 72),
    ("nemotron_h", "mxfp4", "stacked", 96),
]
"""Family, experts, names and expert width; biases, scales and the last two's weights are no multiples of a sector."""


def prompt(length: int) -> Any:
    return np.random.default_rng(length).integers(3, 512, (1, length))


def pack(path: Path, *options: str) -> None:
    done = CliRunner().invoke(main, ["pack", str(path), *options])
    assert done.exit_code == 0, done.stderr


def quarter(manifest: Manifest) -> str:
    """A budget for a quarter of the blocks."""
    slots = max(manifest.layers[0].top_k, manifest.layers[0].experts // 4) * len(manifest.layers)
    return str(budget_for(manifest, slots))


def record_bytes(manifest: Manifest) -> int:
    return header_of(manifest).layers[0].record_bytes


def the_model(home: Home) -> ModelStatus:
    (model,) = ask_status(home).models
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint whose files tests may change."""
    return write_checkpoint(tmp_path / "model", "qwen3_moe", hidden=128, expert_width=256)


@pytest.fixture
def plain(model: Path) -> Any:
    return load_model(model)[0]


def same_tokens(plain: Any, cached: Any, *lengths: int) -> bool:
    return all(first_difference(greedy(plain, prompt(n), 16), greedy(cached, prompt(n), 16)) is None for n in lengths)


@pytest.mark.parametrize(("family", "experts", "names", "width"), CELLS, ids=["-".join(map(str, c)) for c in CELLS])
def test_a_packed_model_is_exact_while_blocks_are_evicted(
    family: str, experts: str, names: str, width: int, home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", family, experts=experts, names=names, shards=2, expert_width=width)
    manifest = load_lazily(path).manifest
    pack(path)
    start_daemon(quarter(manifest))
    plain, _ = load_model(path)
    cached, _ = expertd.load(path)
    assert same_tokens(plain, cached, 1, 60)
    found = the_model(home)
    assert found.packed == str(home.packed / store_name(manifest.key))
    assert found.evictions > 0
    assert found.bytes_read > 0
    assert found.bytes_read % record_bytes(manifest) == 0
    assert found.bytes_read >= found.misses * record_bytes(manifest)
    expertd.unload(cached)


DERIVED = [("gpt_oss", "mxfp4", 64), ("llama4", "float32", 72)]


@pytest.mark.parametrize(("family", "experts", "width"), DERIVED, ids=[cell[0] for cell in DERIVED])
def test_experts_that_mlx_lm_computes_are_served_from_their_store_alone(
    family: str, experts: str, width: int, home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = write_checkpoint(
        tmp_path / "model", family, experts=experts, names="derived", shards=2, expert_width=width
    )
    manifest = load_lazily(path).manifest
    start_daemon(quarter(manifest))
    with pytest.raises(DerivedExperts, match=f"expertd pack {path}"):
        expertd.load(path)
    pack(path)
    pack(path, "--verify")
    plain, _ = load_model(path)
    cached, _ = expertd.load(path)
    assert same_tokens(plain, cached, 1, 60)
    assert the_model(home).evictions > 0
    store = home.packed / store_name(manifest.key)
    assert the_model(home).packed == str(store)

    hidden = store.rename(store.with_name("hidden"))
    with pytest.raises(ReadFailed, match=f"expertd pack {path} --verify"):
        greedy(cached, prompt(50), 8)
    hidden.rename(store)
    assert same_tokens(plain, cached, 50)  # it is what it was, so it is used again
    expertd.unload(cached)


def with_fp8_experts(path: Path) -> Path:
    """Give a per-expert checkpoint of float32 8-bit experts and scales, as DeepSeek's originals have."""
    chance, file = np.random.default_rng(0), path / "model.safetensors"
    entries: dict[str, Any] = {}
    data = bytearray()

    def put(name: str, dtype: str, shape: Sequence[int], raw: bytes) -> None:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data.extend(raw)

    old = file.read_bytes()
    for name, tensor in read_header(file).tensors.items():
        if ".mlp.experts." not in name:
            put(name, tensor.dtype, tensor.shape, old[tensor.start : tensor.end])
            continue
        scales = [-(-n // 128) for n in tensor.shape]
        put(name, "F8_E4M3", tensor.shape, chance.integers(0, 0x50, tensor.shape, np.uint8).tobytes())
        put(name + "_scale_inv", "F32", scales, (chance.random(scales, np.float32) / 50).tobytes())
    header = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_8_bit_experts_that_mlx_lm_widens_are_served_from_their_store(
    home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = with_fp8_experts(
        write_checkpoint(tmp_path / "model", "deepseek_v3", experts="float32", names="per_expert")
    )
    manifest = load_lazily(path).manifest
    assert {part.dtype for part in manifest.layers[0].parts} == {"BF16"}
    pack(path)
    pack(path, "--verify")
    start_daemon(quarter(manifest))
    plain, _ = load_model(path)
    cached, _ = expertd.load(path)
    assert same_tokens(plain, cached, 1, 60)
    assert the_model(home).evictions > 0
    expertd.unload(cached)


def test_computed_experts_fail_when_the_model_s_files_change(
    home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "model", "gpt_oss", names="derived")
    pack(path)
    start_daemon(quarter(load_lazily(path).manifest))
    cached, _ = expertd.load(path)
    os.utime(path / "model.safetensors", ns=(1, 1))
    with pytest.raises(FileChanged):
        greedy(cached, prompt(60), 16)
    expertd.unload(cached)


def test_a_store_of_computed_experts_belongs_to_one_version_of_mlx_lm(
    home: Home, start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_checkpoint(tmp_path / "model", "gpt_oss", names="derived")
    pack(path)
    start_daemon(quarter(load_lazily(path).manifest))
    monkeypatch.setattr("expertd.worker.manifest.version", lambda package: "9.9")
    with pytest.raises(DerivedExperts, match=f"expertd pack {path}"):
        expertd.load(path)
    assert f"is of another version of {path}" in home.daemon_log.read_text()


def test_the_store_alone_is_read(model: Path, home: Home, start_daemon: StartDaemon) -> None:
    """All blocks fit, so each is read once, and the daemon opens no file of the model's own."""
    manifest = load_lazily(model).manifest
    pack(model)
    daemon = start_daemon()
    cached, _ = expertd.load(model)
    wait_for(lambda: the_model(home).resident_blocks == the_model(home).blocks)
    assert the_model(home).bytes_read == the_model(home).blocks * record_bytes(manifest)
    descriptors = [path.resolve().name for path in Path(f"/proc/{daemon.pid}/fd").iterdir()]
    assert store_name(manifest.key) in descriptors
    assert not any(name.endswith(".safetensors") for name in descriptors)
    expertd.unload(cached)


def test_status_and_log_name_the_store(model: Path, home: Home, start_daemon: StartDaemon, tmp_path: Path) -> None:
    output = tmp_path / "disk"
    output.mkdir()
    pack(model, "-o", str(output))
    start_daemon()
    cached, _ = expertd.load(model)
    store = output / store_name(load_lazily(model).manifest.key)
    assert the_model(home).packed == str(store)
    shown = CliRunner().invoke(main, ["status", "--verbose"]).stdout
    assert f"\n  packed    {store}\n" in shown
    assert f"{model} is read from the packed store {store}" in home.daemon_log.read_text()
    expertd.unload(cached)


def test_a_store_that_is_written_while_the_model_is_warm_is_used_from_the_next_session_on(
    model: Path, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(quarter(load_lazily(model).manifest))
    first, _ = expertd.load(model)
    assert the_model(home).packed == ""
    assert "packed" not in CliRunner().invoke(main, ["status", "--verbose"]).stdout
    pack(model)
    second, _ = expertd.load(model)
    assert the_model(home).packed.endswith(SUFFIX)
    expertd.unload(first)
    expertd.unload(second)


def spoil_all_records(store: Path, manifest: Manifest) -> None:
    """Change every record behind the daemon's back: neither size nor time tells of it."""
    layout, before = layout_of(header_of(manifest)), store.stat()
    with store.open("r+b") as file:
        for number, layer in enumerate(manifest.layers):
            for expert in range(layer.experts):
                file.seek(layout.record(number, expert) + ALIGN)
                file.write(b"\xa5" * 64)
    os.utime(store, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("what", ["damaged", "truncated", "gone"])
def test_a_store_that_fails_in_the_middle_costs_a_warning_and_no_token(
    what: str, model: Path, plain: Any, home: Home, start_daemon: StartDaemon
) -> None:
    manifest = load_lazily(model).manifest
    pack(model)
    start_daemon(quarter(manifest))
    cached, _ = expertd.load(model)
    assert same_tokens(plain, cached, 7)
    assert the_model(home).packed
    store = home.packed / store_name(manifest.key)
    match what:
        case "damaged":
            spoil_all_records(store, manifest)
        case "truncated":
            os.truncate(store, 8192)
        case "gone":
            store.unlink()
    assert same_tokens(plain, cached, 60, 5)
    assert the_model(home).packed == ""
    assert home.daemon_log.read_text().count(f"the safetensors of {model} are read") == 1
    expertd.unload(cached)


def test_a_store_of_another_model_is_refused_and_the_tokens_are_right(
    model: Path, plain: Any, home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", "qwen3_moe", hidden=128, expert_width=256, seed=1)
    pack(other)
    (store,) = home.packed.iterdir()
    manifest = load_lazily(model).manifest
    store.rename(home.packed / store_name(manifest.key))
    start_daemon(quarter(manifest))
    cached, _ = expertd.load(model)
    assert same_tokens(plain, cached, 20)
    assert the_model(home).packed == ""
    assert f"is of another model, {other}; its safetensors are read instead" in home.daemon_log.read_text()
    expertd.unload(cached)


def test_a_store_of_an_earlier_version_of_the_model_is_not_used(
    model: Path, home: Home, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    pack(model)
    shutil.rmtree(model)
    write_checkpoint(model, "qwen3_moe", hidden=128, expert_width=256, seed=1)
    start_daemon(quarter(load_lazily(model).manifest))
    plain, _ = load_model(model)
    cached, _ = expertd.load(model)
    assert same_tokens(plain, cached, 20)
    assert the_model(home).packed == ""
    assert f"is of another version of {model}" in home.daemon_log.read_text()
    expertd.unload(cached)


def test_a_model_file_that_is_replaced_under_the_daemon_is_an_error_though_its_store_is_there(
    model: Path, home: Home, start_daemon: StartDaemon
) -> None:
    pack(model)
    start_daemon(quarter(load_lazily(model).manifest))
    cached, _ = expertd.load(model)
    greedy(cached, prompt(5), 4)
    path = model / "model.safetensors"
    shutil.copy(path, model / "new")
    (model / "new").replace(path)
    with pytest.raises(FileChanged):
        greedy(cached, prompt(60), 16)
    assert the_model(home).packed
    expertd.unload(cached)


def test_a_store_can_be_written_while_the_daemon_reads_the_model(
    model: Path, plain: Any, home: Home, start_daemon: StartDaemon
) -> None:
    start_daemon(quarter(load_lazily(model).manifest))
    cached, _ = expertd.load(model)
    command = [sys.executable, "-m", "expertd.clients.cli", "pack", str(model)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as packing:
        assert same_tokens(plain, cached, 40)
    assert packing.returncode == 0
    expertd.unload(cached)
