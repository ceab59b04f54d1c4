"""A model that does not fit into memory is refused before its weights are read (``worker.room``)."""

from __future__ import annotations

from pathlib import Path

import pytest

import expertd
from expertd.protocol.errors import MemoryPressure
from expertd.protocol.paths import Home
from expertd.worker import load as loading
from expertd.worker.kv_memory import cache_bytes, measure
from expertd.worker.manifest import LazyModel, load_lazily
from expertd.worker.room import KV_TOKENS, check_room, least_experts
from tests.conftest import StartDaemon
from tools.stage import ask_status


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> LazyModel:
    return load_lazily(checkpoints["stacked"])


def needs(loaded: LazyModel) -> tuple[int, int, int]:
    """Base weights, the experts of one token, one KV cache: from the files, the manifest, and mlx-lm's own cache."""
    layers = loaded.manifest.layers
    folder = Path(loaded.manifest.folder)
    import mlx.core as mx

    total = sum(array.nbytes for path in folder.glob("*.safetensors") for array in mx.load(str(path)).values())
    base = total - sum(layer.experts * layer.block_bytes for layer in layers)
    experts = layers[0].top_k * layers[0].block_bytes
    return base, experts, cache_bytes(measure(loaded.model), KV_TOKENS)


def test_a_model_fits_exactly_where_base_weights_experts_and_a_cache_do(loaded: LazyModel) -> None:
    need = sum(needs(loaded))
    check_room(loaded, 0, lambda: need)
    check_room(loaded, need, lambda: 0)
    with pytest.raises(MemoryPressure, match=r"base weights take .*experts of one token .*KV cache.*close other apps"):
        check_room(loaded, 0, lambda: need - 1)


def test_the_fewest_experts_are_those_of_one_token_for_each_shape(checkpoints: dict[str, Path]) -> None:
    layers = load_lazily(checkpoints["stacked"]).manifest.layers
    assert least_experts(layers) == layers[0].top_k * layers[0].block_bytes
    assert least_experts([]) == 0


def test_what_does_not_fit_opens_no_session(
    home: Home, checkpoints: dict[str, Path], start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_daemon()
    monkeypatch.setattr(loading, "check_room", lambda loaded, pools: check_room(loaded, pools, lambda: 1000))
    with pytest.raises(MemoryPressure):
        expertd.load(checkpoints["stacked"])
    assert ask_status(home).models == []
    monkeypatch.undo()
    expertd.unload(expertd.load(checkpoints["stacked"])[0])
