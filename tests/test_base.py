"""Base weights: once in shared memory, exact, read once, and each process's own where that cannot be."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

import expertd
from expertd.daemon import bases
from expertd.daemon.bases import AT_ONCE, CHUNK, SharedBases, chunks
from expertd.daemon.core.bases import Base, Bases
from expertd.daemon.core.plan import smallest
from expertd.daemon.files import Read
from expertd.daemon.index import build_index
from expertd.daemon.large_pages import LargePages
from expertd.daemon.reader import Reader
from expertd.protocol.checkpoint import read_header
from expertd.protocol.errors import HeaderInvalid
from expertd.protocol.layout import PAGE, base_layout
from expertd.protocol.manifest import BaseTensor, FileMark, Layer, Manifest, Part
from expertd.protocol.messages import BaseInfo, ModelStatus
from expertd.protocol.paths import Home
from expertd.protocol.rendezvous import stop_daemon
from expertd.protocol.segments import Segment, create, map_readonly, segment_name
from expertd.worker.load import session_of
from expertd.worker.manifest import LazyModel, load_lazily
from expertd.worker.verify import first_difference, greedy
from tests.conftest import DEADLINE_S, StartDaemon, wait_for
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
PROMPT = np.arange(3, 20)[None]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", "qwen3_moe", hidden=128, expert_width=256)


@pytest.fixture
def own_path(model_path: Path, tmp_path: Path) -> Path:
    """A checkpoint whose files a test may change."""
    return Path(shutil.copytree(model_path, tmp_path / "model"))


def the_model(home: Home) -> ModelStatus:
    (model,) = ask_status(home).models
    return model


def exact(path: Path, model: Any) -> bool:
    plain, _ = load_model(path)
    return first_difference(greedy(plain, PROMPT, 8), greedy(model, PROMPT, 8)) is None


def spoil_weights(path: Path) -> None:
    """Overwrite the bytes of all tensors, without a mark of it: whoever reads them now computes something else."""
    for file in path.glob("model*.safetensors"):
        header, status = read_header(file), file.stat()
        with file.open("r+b") as opened:
            for tensor in header.tensors.values():
                opened.seek(tensor.start)
                opened.write(bytes(tensor.end - tensor.start))
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


# -- which tensors -----------------------------------------------------------------------------------------------------


def base_of(loaded: LazyModel) -> dict[str, str]:
    """The tensor's name by the parameter's path."""
    return {path: loaded.manifest.base[number].name for path, number in loaded.base.items()}


def test_every_parameter_that_is_no_expert_s_is_named(model_path: Path) -> None:
    loaded = load_lazily(model_path)
    paths = [path for path, _ in tree_flatten(loaded.model.parameters()) if ".switch_mlp." not in path]
    assert base_of(loaded) == {path: path for path in paths}
    sizes = {path: array.nbytes for path, array in tree_flatten(loaded.model.parameters())}
    assert {tensor.name: tensor.bytes for tensor in loaded.manifest.base} == {path: sizes[path] for path in paths}


def test_who_shares_base_weights_has_the_key_of_one_who_does_not(model_path: Path) -> None:
    manifest = load_lazily(model_path).manifest
    alone = msgspec.structs.replace(manifest, base=())
    assert (alone.key, alone.base_key) == (manifest.key, alone.base_key)
    assert alone.base_key != manifest.base_key != msgspec.structs.replace(manifest, base=manifest.base[1:]).base_key


def test_what_sanitize_computes_stays_with_each_process(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, home: Home, start_daemon: StartDaemon
) -> None:
    from mlx_lm.models import qwen3_moe

    sanitize = qwen3_moe.Model.sanitize

    def change(self: Any, weights: dict[str, Any]) -> dict[str, Any]:
        weights = sanitize(self, weights)
        weights["model.norm.weight"] += 1  # keeps the object, not what it stands for
        weights["model.layers.0.input_layernorm.weight"] = weights["model.layers.0.input_layernorm.weight"] * 2
        weights["model.layers.2.input_layernorm.weight"] = weights["model.layers.1.input_layernorm.weight"]
        return weights

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", change)
    loaded = load_lazily(model_path)
    names = base_of(loaded)
    assert "model.norm.weight" not in names and "model.layers.0.input_layernorm.weight" not in names
    assert names["model.layers.2.input_layernorm.weight"] == names["model.layers.1.input_layernorm.weight"]
    assert len(set(loaded.base.values())) == len(loaded.manifest.base) == len(loaded.base) - 1
    start_daemon(str(budget_for(loaded.manifest, 24)))
    model, _ = expertd.load(model_path)
    assert the_model(home).sessions[0].shares_base
    assert exact(model_path, model)
    expertd.unload(model)


def quantized(path: Path, folder: Path, tied: bool) -> Path:
    """The checkpoint in ``path`` with everything quantized that can be, embeddings too, as mlx-lm writes it."""
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": tied}
    changed = Path(shutil.copytree(path, folder / "changed"))
    (changed / "config.json").write_text(json.dumps(config))
    model, config = load_model(changed)
    model, config = quantize_model(model, config, 32, 8)
    save_model(folder / "model", model)
    save_config(config, folder / "model" / "config.json")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / name, folder / "model")
    return folder / "model"


def without_vision(path: Path, folder: Path) -> Path:
    """The checkpoint in ``path`` as the language part of one that has a vision part too."""
    weights: dict[str, Any] = dict(mx.load(str(path / "model.safetensors")))  # type: ignore[arg-type]
    inner = json.loads((path / "config.json").read_text())
    renamed = {f"language_model.{name}": array for name, array in weights.items()}
    Path(shutil.copytree(path, folder / "model"))
    mx.save_safetensors(str(folder / "model" / "model.safetensors"), {**renamed, "visual.patch": mx.ones((64, 64))})
    config = {"model_type": "qwen3_vl_moe", "text_config": inner, "quantization": inner["quantization"]}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder / "model"


def in_bfloat16(path: Path, folder: Path) -> Path:
    return write_checkpoint(folder / "model", "qwen3_moe", experts="affine", dense="bfloat16", hidden=128, shards=3)


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "quantized embeddings": lambda path, folder: quantized(path, folder, tied=False),
    "tied quantized embeddings": lambda path, folder: quantized(path, folder, tied=True),
    "language part of a multimodal file": without_vision,
    "bfloat16": in_bfloat16,
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_shared_and_exact(
    form: str, tmp_path: Path, model_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    unquantized = form.endswith("embeddings")
    plain = write_checkpoint(tmp_path / "plain", "qwen3_moe", experts="float32", hidden=128) if unquantized else None
    path = FORMS[form](plain or model_path, tmp_path)
    loaded = load_lazily(path)
    base = [path for path, _ in tree_flatten(loaded.model.parameters()) if ".switch_mlp." not in path]
    assert sorted(loaded.base) == sorted(base), "every one of them is shared"
    assert not any("visual" in tensor.name for tensor in loaded.manifest.base)
    start_daemon(str(budget_for(loaded.manifest, 24)))
    model, _ = expertd.load(path)
    assert the_model(home).sessions[0].shares_base
    for name, array in tree_flatten(load_model(path)[0].parameters()):
        if ".switch_mlp." not in name:
            aliased = dict(tree_flatten(model.parameters()))[name]
            assert (aliased.dtype, aliased.shape) == (array.dtype, array.shape)
            assert mx.array_equal(aliased.view(mx.uint8), array.view(mx.uint8)).item(), name
    assert exact(path, model)
    expertd.unload(model)


# -- what a second process costs ---------------------------------------------------------------------------------------


def test_a_second_session_reads_no_tensor(own_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    plain, _ = load_model(own_path)
    mx.eval(plain.parameters())
    expected = greedy(plain, PROMPT, 8)
    start_daemon("64MiB")
    first, _ = expertd.load(own_path)
    wait_for(lambda: all(pool.complete for pool in session_of(first).pools))
    read = the_model(home).base_read
    spoil_weights(own_path)
    second, _ = expertd.load(own_path)
    assert first_difference(expected, greedy(second, PROMPT, 8)) is None
    assert the_model(home).base_read == read == sum(tensor.bytes for tensor in load_lazily(own_path).manifest.base)
    expertd.unload(first)
    expertd.unload(second)


@linux_only
def test_base_weights_take_no_memory_of_the_process(tmp_path: Path, start_daemon: StartDaemon) -> None:
    path = write_checkpoint(tmp_path / "model", "qwen3_moe", hidden=512, vocab=16384)  # 67 MB of embeddings
    start_daemon("200MiB")
    base = sum(tensor.bytes for tensor in load_lazily(path).manifest.base)
    private: dict[str, int] = {}
    for alias in ("auto", "copy"):
        command = [sys.executable, "-m", "tools.hold", str(path), "1", alias]
        done = subprocess.run(command, input="", capture_output=True, text=True, timeout=4 * DEADLINE_S, check=True)
        said = json.loads(done.stdout)
        private[alias] = said["anonymous_after"] - said["anonymous_before"]
    assert private["auto"] < private["copy"] - 0.9 * base


@linux_only
def test_nobody_can_write_to_them_once_they_are_read(model_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("64MiB")
    model, _ = expertd.load(model_path)
    size = the_model(home).base_bytes
    maps = [line.split() for line in Path(f"/proc/{daemon.pid}/maps").read_text().splitlines()]
    sizes = [int(end, 16) - int(begin, 16) for begin, end in (entry[0].split("-") for entry in maps if len(entry) > 5
             and entry[5].startswith("/dev/shm/expertd"))]  # fmt: skip
    assert size not in sizes and len(sizes) == 1, "only the pool is still mapped"
    expertd.unload(model)


# -- the budget, and the end -------------------------------------------------------------------------------------------


def test_they_count_against_the_budget_until_the_model_goes(
    model_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    manifest = load_lazily(model_path).manifest
    start_daemon(str(budget_for(manifest, 24)), "--keep-alive", "1")
    first, _ = expertd.load(model_path)
    found = ask_status(home)
    assert found.models[0].base_bytes == base_layout(manifest.base)[1]
    assert found.used_bytes == found.models[0].base_bytes + found.models[0].pool_bytes == found.budget_bytes
    assert (found.models[0].slots, found.limit_bytes) == (24, found.budget_bytes)
    expertd.unload(first)
    wait_for(lambda: not ask_status(home).models)
    assert ask_status(home).used_bytes == 0


def test_an_idle_model_s_base_weights_give_way_too(
    model_path: Path, tmp_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    other = write_checkpoint(tmp_path / "other", "qwen3_moe", hidden=128, expert_width=256, seed=1)
    manifest = load_lazily(other).manifest
    start_daemon(str(budget_for(manifest, 48)))
    first, _ = expertd.load(model_path)
    expertd.unload(first)
    wait_for(lambda: not the_model(home).sessions)
    second, _ = expertd.load(other)
    wait_for(lambda: the_model(home).slots == 48)
    found = ask_status(home)
    assert [model.path for model in found.models] == [str(other)]
    assert found.models[0].sessions[0].shares_base and found.used_bytes == found.budget_bytes
    assert exact(other, second)
    expertd.unload(second)


def test_without_room_in_the_budget_each_process_has_its_own(
    model_path: Path, home: Home, start_daemon: StartDaemon
) -> None:
    manifest = load_lazily(model_path).manifest
    least = smallest(manifest) + base_layout(manifest.base)[1]
    daemon = start_daemon(str(least - 1))
    models = [expertd.load(model_path)[0] for _ in range(2)]
    found = the_model(home)
    assert not any(session.shares_base for session in found.sessions)
    assert (found.base_bytes, found.base_problem.split("give it ")[1].split()[0]) == (0, str(least))
    assert home.daemon_log.read_text().count("base weights are not shared") == 1, "said once"
    assert all(exact(model_path, model) for model in models)
    for model in models:
        expertd.unload(model)
    daemon.terminate()
    daemon.wait()
    start_daemon(str(least))
    model, _ = expertd.load(model_path)
    assert the_model(home).sessions[0].shares_base and not the_model(home).base_problem
    expertd.unload(model)


def test_they_outlive_their_daemon(own_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    expected = greedy(load_model(own_path)[0], PROMPT, 8)
    daemon = start_daemon("64MiB")
    model, _ = expertd.load(own_path)
    greedy(model, PROMPT, 2)
    daemon.kill()
    daemon.wait()
    start_daemon("64MiB")
    wait_for(lambda: bool(ask_status(home).models) and bool(the_model(home).sessions))
    assert first_difference(expected, greedy(model, PROMPT, 8)) is None
    assert the_model(home).base_bytes == base_layout(load_lazily(own_path).manifest.base)[1]
    other, _ = expertd.load(own_path)
    assert [session.shares_base for session in the_model(home).sessions] == [True, True]
    assert the_model(home).base_read == 0, "the session has handed back those of before"
    assert first_difference(expected, greedy(other, PROMPT, 8)) is None
    expertd.unload(model)
    expertd.unload(other)
    stop_daemon(home, "test")


def test_parameters_of_a_model_that_was_unloaded_are_empty_and_kept_arrays_are_not(
    model_path: Path, start_daemon: StartDaemon
) -> None:
    start_daemon("64MiB")
    model, _ = expertd.load(model_path)
    expected = dict(tree_flatten(load_model(model_path)[0].parameters()))["model.embed_tokens.weight"]
    kept = model.model.embed_tokens.weight
    expertd.unload(model)
    assert model.model.embed_tokens.weight.size == 0
    other, _ = expertd.load(model_path)
    assert mx.array_equal(kept, expected).item()
    expertd.unload(other)


# -- reading -----------------------------------------------------------------------------------------------------------


class Daemon:
    """The part of a daemon that shares base weights, on a loop of its own; ``read`` stands for ``os.preadv``."""

    def __init__(self, home: Home, read: Read = os.preadv) -> None:
        self.changes = 0
        self.reader = Reader(read=read)
        pages = LargePages(None, short=lambda: False)
        self.bases = SharedBases(segment_name(home.root), self.reader, asyncio.Lock(), pages, self._changed)

    def _changed(self) -> None:
        self.changes += 1

    async def share(self, manifest: Manifest, most: int = 1 << 30) -> Base | None:
        return await self.bases.share(manifest, build_index(manifest), most, 0, False)

    async def close(self) -> None:
        await self.bases.close()
        self.reader.close()


def test_sessions_that_come_together_share_one_reading(model_path: Path, home: Home) -> None:
    sizes: list[int] = []

    def noting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(os.preadv(descriptor, buffers, offset))
        return sizes[-1]

    async def body() -> None:
        daemon = Daemon(home, noting)
        manifest = load_lazily(model_path).manifest
        found = await asyncio.gather(*(daemon.share(manifest) for _ in range(5)))
        assert found[0] is not None and all(base is found[0] for base in found)
        assert found[0].opening == 5 and found[0].read == sum(tensor.bytes for tensor in manifest.base)
        assert sum(sizes) < 1.1 * found[0].read
        mapping = map_readonly(os.dup(daemon.bases.descriptor(found[0])), found[0].size)
        weights = mx.load(str(model_path / "model.safetensors"))
        assert isinstance(weights, dict)
        for tensor, offset in zip(manifest.base, base_layout(manifest.base)[0], strict=True):
            flat = np.array(weights[tensor.name].reshape(-1).view(mx.uint8), copy=False)
            assert mapping[offset : offset + tensor.bytes] == flat.tobytes(), tensor.name
        found[0].opening = 0
        assert daemon.bases.sweep([manifest.key]) is False, "its model is kept"
        assert daemon.bases.sweep([]) is True and daemon.bases.known.used == 0
        await daemon.close()

    asyncio.run(body())


@pytest.mark.parametrize("what", ["EIO", "changed", "no memory"])
def test_a_reading_that_fails_is_said_once_and_tried_again_by_the_next(
    what: str, own_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = True
    weights = own_path / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if failing and what == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def body() -> None:
        nonlocal failing
        daemon = Daemon(home, read)
        manifest = load_lazily(own_path).manifest
        index = build_index(manifest)
        with monkeypatch.context() as patched:
            if what == "changed":
                os.utime(weights, ns=(1, 1))
            if what == "no memory":
                patched.setattr("expertd.protocol.segments.os.ftruncate", no_room)
            for _ in range(2):
                assert await daemon.bases.share(manifest, index, 1 << 30, 0, False) is None
        problem = daemon.bases.known.problems[manifest.key]
        wanted = {"EIO": "Input/output error", "changed": "has changed", "no memory": "No space left on device"}[what]
        assert wanted in problem and problem.endswith("each process reads and holds its own")
        assert caplog.text.count("base weights are not shared") == 1
        assert daemon.bases.known.used == 0
        failing = False
        os.utime(weights, ns=times)
        base = await daemon.bases.share(manifest, index, 1 << 30, 0, False)
        assert base is not None and daemon.bases.known.problems == {}
        await daemon.close()

    asyncio.run(body())


def test_a_reading_that_fails_holds_no_memory(
    own_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given back at once, not when rings of what went wrong are collected some day."""
    mappings: list[weakref.ref[mmap.mmap]] = []

    def watched(name: str, size: int) -> Segment:
        segment = create(name, size)
        mappings.append(weakref.ref(segment.mapping))
        return segment

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def body() -> None:
        daemon = Daemon(home, read)
        manifest = load_lazily(own_path).manifest
        index = build_index(manifest)
        gc.disable()
        try:
            assert await daemon.bases.share(manifest, index, 1 << 30, 0, False) is None
            async with asyncio.timeout(10):  # the thread that read it may be about to let it go
                while mappings[0]() is not None:
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
        await daemon.close()

    monkeypatch.setattr(bases, "create", watched)
    asyncio.run(body())
    assert caplog.text.count("base weights are not shared") == 1


def held_reads(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[int], Callable[..., int]]:
    """Small reads that wait until the event is set: it, the bytes of each, and what reads."""
    monkeypatch.setattr(bases, "CHUNK", 16 << 10)
    through = threading.Event()
    sizes: list[int] = []

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        assert through.wait(10)
        sizes.append(os.preadv(descriptor, buffers, offset))
        return sizes[-1]

    return through, sizes, read


def test_what_nobody_waits_for_any_more_is_not_read_to_its_end(
    model_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes a moment later begins anew, and what is left of the first reading does it no harm."""
    through, sizes, read = held_reads(monkeypatch)

    async def body() -> None:
        daemon = Daemon(home, read)
        manifest = load_lazily(model_path).manifest
        index = build_index(manifest)
        first = asyncio.ensure_future(daemon.bases.share(manifest, index, 1 << 30, 0, False))
        await asyncio.sleep(0.05)
        (base,) = daemon.bases.known
        first.cancel()
        await asyncio.wait([first])
        assert list(daemon.bases.known) == [] and daemon.bases.known.problems == {}
        second = asyncio.ensure_future(daemon.bases.share(manifest, index, 1 << 30, 0, False))
        await asyncio.sleep(0.05)
        through.set()
        found = await second
        assert found is not None and found.segment != base.segment
        assert sum(sizes) < 1.5 * found.read, "what was given up was read too"
        assert list(daemon.bases.known) == [found]
        await daemon.close()

    asyncio.run(body())


@contextmanager
def left_by_an_earlier_daemon(home: Home, manifest: Manifest) -> Iterator[tuple[BaseInfo, int]]:
    """Base weights that a session still has, and their descriptor."""
    descriptor, found = -1, BaseInfo(segment=0, size=1, nonce=bytes(16))

    async def body() -> None:
        nonlocal descriptor, found
        before = Daemon(home)
        base = await before.share(manifest)
        assert base is not None
        descriptor, found = os.dup(before.bases.descriptor(base)), before.bases.info(base)
        await before.close()

    asyncio.run(body())
    try:
        yield found, descriptor
    finally:
        os.close(descriptor)


def adopt(daemon: Daemon, manifest: Manifest, info: BaseInfo, descriptor: int) -> Base | None:
    return daemon.bases.adopt(manifest, info, info.size, os.dup(descriptor), 1 << 30, 0, False)


def test_what_is_handed_back_while_it_is_read_takes_its_place(
    model_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was first and waits gets what the session has that came later, and the rest is not read."""
    through, sizes, read = held_reads(monkeypatch)

    async def body(info: BaseInfo, descriptor: int) -> None:
        daemon = Daemon(home, read)
        first = asyncio.ensure_future(daemon.share(manifest))
        await asyncio.sleep(0.05)
        wrong = BaseInfo(segment=info.segment, size=info.size, nonce=bytes(16))
        assert adopt(daemon, manifest, wrong, descriptor) is None
        base = adopt(daemon, manifest, info, descriptor)
        through.set()
        assert base is not None and await first is base
        assert (base.opening, base.read) == (2, 0)
        assert daemon.bases.info(base).nonce == info.nonce
        assert os.path.sameopenfile(daemon.bases.descriptor(base), descriptor)
        assert sum(sizes) <= (AT_ONCE + 1) * bases.CHUNK
        assert daemon.bases.known.used == base.size
        await daemon.close()

    manifest = load_lazily(model_path).manifest
    with left_by_an_earlier_daemon(home, manifest) as (info, descriptor):
        asyncio.run(body(info, descriptor))


def test_what_is_handed_back_beside_what_has_been_read_counts_as_long_as_it_is_used(
    model_path: Path, home: Home
) -> None:
    async def body(info: BaseInfo, descriptor: int) -> None:
        daemon = Daemon(home)
        shared = await daemon.share(manifest)
        assert shared is not None
        copies = [adopt(daemon, manifest, info, descriptor) for _ in range(2)]
        copy = copies[0]
        assert copy is not None and copies[1] is copy is not shared
        assert daemon.bases.known.used == 2 * shared.size
        assert await daemon.share(manifest) is shared, "nobody else gets it"
        copy.opening = 0
        copy.users = {7}
        assert daemon.bases.sweep([manifest.key]) is False
        daemon.bases.known.ended(7)
        assert daemon.bases.sweep([manifest.key]) is True
        assert list(daemon.bases.known) == [shared]
        await daemon.close()

    manifest = load_lazily(model_path).manifest
    with left_by_an_earlier_daemon(home, manifest) as (info, descriptor):
        asyncio.run(body(info, descriptor))


def test_a_block_that_somebody_waits_for_comes_between(own_path: Path, home: Home) -> None:
    """However much there is to read, only so many pieces of it are in the queue."""
    waiting: list[int] = []

    async def body() -> None:
        daemon = Daemon(home)
        work = daemon.reader.work
        under_way = 0

        def counted(what: Any, done: Any) -> Any:
            nonlocal under_way
            under_way += 1
            waiting.append(under_way)

            def ended(size: int, error: Any) -> None:
                nonlocal under_way
                under_way -= 1
                done(size, error)

            return work(what, ended)

        daemon.reader.work = counted  # type: ignore[method-assign]
        path = write_checkpoint(own_path / "large", "qwen3_moe", hidden=128, vocab=65536)  # 67 MB of embeddings
        assert await daemon.share(load_lazily(path).manifest) is not None
        await daemon.close()

    asyncio.run(body())
    assert len(waiting) > 10 and max(waiting) == AT_ONCE


def test_a_manifest_that_the_headers_contradict_is_refused(model_path: Path) -> None:
    manifest = load_lazily(model_path).manifest
    first = manifest.base[0]
    for wrong in (
        msgspec.structs.replace(first, name="nothing"),
        msgspec.structs.replace(first, file=7),
        msgspec.structs.replace(first, dtype="U8"),
        msgspec.structs.replace(first, shape=(*first.shape, 2)),
    ):
        with pytest.raises(HeaderInvalid):
            build_index(msgspec.structs.replace(manifest, base=(wrong,)))


# -- what is pure ------------------------------------------------------------------------------------------------------


def manifest_of(*tensors: BaseTensor, folder: str = "/m") -> Manifest:
    part = Part("weight", "F32", (4096,), ("w",), (0,))
    marks = (FileMark("model.safetensors", 1, 1, 1, ""),)
    return Manifest(folder, "f", marks, (Layer("l", 8, 2, (part,)),), base=tensors)


@given(st.lists(st.integers(1, 3 * CHUNK // 4), min_size=1, max_size=12), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_chunks_are_of_bounded_size_and_leave_nothing_out(lengths: list[int], gap: int) -> None:
    manifest = manifest_of(*(BaseTensor(f"t{n}", 0, "I32", (length,)) for n, length in enumerate(lengths)))
    offsets, size = base_layout(manifest.base)
    segment = bytearray(size)
    starts = [sum(4 * length + gap for length in lengths[:n]) for n in range(len(lengths))]
    found = chunks(manifest, starts, memoryview(segment))
    assert all(sum(len(piece.row) for _, piece in chunk) <= CHUNK for chunk in found)
    pieces = [piece for chunk in found for _, piece in chunk]
    assert sum(len(piece.row) for piece in pieces) == sum(4 * length for length in lengths)
    for piece in pieces:
        piece.row[:] = b"x" * len(piece.row)
    for offset, length in zip(offsets, lengths, strict=True):
        assert segment[offset : offset + 4 * length].count(b"x") == 4 * length
    assert all(offset % PAGE == 0 for offset in offsets) and size % PAGE == 0
    assert [piece.offset for piece in pieces] == sorted(piece.offset for piece in pieces), "one sweep"


@given(st.lists(st.tuples(st.sampled_from(["come", "end", "leave", "fail"]), st.integers(0, 3)), max_size=40))
def test_bytes_that_are_used_are_those_of_the_bases_that_there_are(steps: list[tuple[str, int]]) -> None:
    """Whoever comes has one; it stays while it is used, or its model is kept; then nothing is left of it."""
    known = Bases(1000)
    manifests = [manifest_of(BaseTensor("t", 0, "U8", (size,)), folder=f"/{size}") for size in (1, 20_000, 40_000, 9)]
    users: dict[int, set[int]] = {number: set() for number in range(4)}
    number = 0
    for step, which in steps:
        manifest = manifests[which]
        base = known.find(manifest.base_key)
        if step == "come":
            base = base or known.add(manifest)
            number += 1
            base.users.add(number)
            users[which].add(number)
        elif step == "end" and users[which]:
            known.ended(users[which].pop())
        elif step == "fail" and base is not None and not base.users:
            known.failed(base, "why")
        elif step == "leave":
            gone = known.leave([manifests[0].key])
            assert not any(one.in_use or one.model == manifests[0].key for one in gone)
        sizes = [base_layout(manifests[n].base)[1] for n in range(4) if users[n]]
        assert known.in_use == sum(sizes) <= known.used
        assert len({one.segment for one in known}) == len(list(known))
        for session in users[which]:
            assert known.of_session(session) is known.find(manifest.base_key)
    known.leave([])
    assert known.used == known.in_use


def test_they_have_a_place_as_soon_as_one_event_fits_beside_them() -> None:
    known = Bases(1)
    manifest = manifest_of(BaseTensor("t", 0, "U8", (100_000,)))
    least = base_layout(manifest.base)[1] + smallest(manifest)
    assert known.refusal(manifest, least, 0, opened=False) is None
    assert f"give it {least} bytes" in (known.refusal(manifest, least - 1, 0, opened=False) or "")
    assert known.refusal(manifest, least - 1, smallest(manifest) - 1, opened=True) is None
    assert known.refusal(manifest, least, 1, opened=False) is not None


def test_of_two_models_that_come_together_each_counts_what_the_other_needs_at_least() -> None:
    known = Bases(1)
    first, second = (manifest_of(BaseTensor("t", 0, "U8", (100_000,)), folder=name) for name in ("/a", "/b"))
    pools, weights = smallest(first), base_layout(first.base)[1]
    base = known.add(first)
    base.opening = 1
    needed = known.coming([], but=second.key)
    assert needed == pools
    assert known.refusal(second, 2 * (pools + weights), needed, opened=False) is None
    assert known.refusal(second, 2 * (pools + weights) - 1, needed, opened=False) is not None
    assert known.coming([], but=first.key) == 0
    assert known.coming([first.key], but=second.key) == 0, "the core counts it now"


def test_why_they_are_not_shared_is_known_while_their_model_is_opened_and_as_long_as_it_is_there() -> None:
    known = Bases(1)
    manifest = manifest_of(BaseTensor("t", 0, "U8", (100_000,)))
    known.opening[manifest.key] += 1
    known.failed(known.add(manifest), "why")
    known.leave([])
    assert known.problems == {manifest.key: "why"}
    known.opening[manifest.key] -= 1
    known.leave([manifest.key])
    assert known.problems == {manifest.key: "why"}
    known.leave([])
    assert known.problems == {}


def test_the_batch_generator_and_text_are_as_plain_mlx_lm_s(model_path: Path, start_daemon: StartDaemon) -> None:
    start_daemon("64MiB")
    plain, tokenizer = mlx_lm.load(str(model_path))[:2]
    model, _ = expertd.load(model_path)
    expected = mlx_lm.generate(plain, tokenizer, "hello", max_tokens=32)
    assert mlx_lm.generate(model, tokenizer, "hello", max_tokens=32) == expected
    expertd.unload(model)
