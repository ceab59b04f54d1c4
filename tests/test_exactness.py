"""Workers against plain mlx-lm, bit for bit, with real daemons: families, forms, capacities, prompts, batches, modes.

The whole matrix is ``python -m benchmarks exactness``; here are few cells, each with something of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import msgspec
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator
from mlx_lm.utils import load_model

import expertd
from expertd.protocol.errors import DerivedExperts
from expertd.protocol.paths import Home
from expertd.worker.load import session_of
from expertd.worker.manifest import load_lazily
from expertd.worker.verify import compare_layers, first_difference, greedy
from tests.conftest import StartDaemon
from tools.factory import write_checkpoint
from tools.stage import ask_status, budget_for

CELLS = [
    ("qwen3_moe", "mxfp4", "stacked"),
    ("mixtral", "affine", "per_expert"),
    ("gpt_oss", "mxfp4", "stacked"),
    ("deepseek_v3", "float32", "per_expert"),
    ("olmoe", "affine", "stacked"),
    ("qwen3_next", "float32", "per_expert"),
    ("llama4", "mxfp4", "stacked"),
    ("nemotron_h", "mxfp4", "stacked"),
]


def prompts(length: int, batch: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(length).integers(3, 512, (batch, length))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``written(family, experts, names)``: the folder of a small checkpoint, written once."""
    done: dict[tuple[str, str, str], Path] = {}

    def write(family: str, experts: str = "mxfp4", names: str = "stacked") -> Path:
        key = (family, experts, names)
        if key not in done:
            folder = tmp_path_factory.mktemp("-".join(key)) / "model"
            # A row of a 4-bit slab fills a page: so a budget gives just the slots that it should.
            done[key] = write_checkpoint(
                folder, family, experts=experts, names=names, shards=2, hidden=128, expert_width=256
            )
        return done[key]

    return write


@pytest.mark.parametrize(("family", "experts", "names"), CELLS, ids=["-".join(cell) for cell in CELLS])
def test_logits_are_bit_equal_with_a_quarter_of_the_experts(
    family: str, experts: str, names: str, written: Any, start_daemon: StartDaemon
) -> None:
    path = written(family, experts, names)
    manifest = load_lazily(path).manifest
    slots = max(manifest.layers[0].top_k, manifest.layers[0].experts // 4) * len(manifest.layers)
    start_daemon(str(budget_for(manifest, slots)))
    plain, _ = load_model(path)
    cached, _ = expertd.load(path)
    for length, batch in ((1, 1), (7, 4), (300, 1)):
        prompt = prompts(length, batch)
        assert first_difference(greedy(plain, prompt, 16), greedy(cached, prompt, 16)) is None
    expertd.unload(cached)


@pytest.mark.parametrize("slots", [4, 5, 16, 47, 48])
def test_any_pool_from_one_event_upwards_is_exact(slots: int, written: Any, start_daemon: StartDaemon) -> None:
    path = written("qwen3_moe")
    start_daemon(str(budget_for(load_lazily(path).manifest, slots)))
    plain, _ = load_model(path)
    cached, _ = expertd.load(path)
    assert session_of(cached).pools[0].layout.slots == slots
    for length, batch in ((7, 1), (300, 1), (7, 4)):
        prompt = prompts(length, batch)
        assert first_difference(greedy(plain, prompt, 24), greedy(cached, prompt, 24)) is None
    expertd.unload(cached)


def test_copy_mode_is_exact_and_says_so(written: Any, home: Home, start_daemon: StartDaemon) -> None:
    path = written("gpt_oss")
    alone = msgspec.structs.replace(load_lazily(path).manifest, base=())  # who copies has base weights of its own
    start_daemon(str(2 * budget_for(alone, 24)))
    plain, _ = load_model(path)
    cached, _ = expertd.load(path, alias="copy")
    assert ask_status(home).models[0].sessions[0].mode == "copy"
    assert ask_status(home).models[0].slots == 24
    assert first_difference(greedy(plain, prompts(60), 24), greedy(cached, prompts(60), 24)) is None
    expertd.unload(cached)


def test_mlx_lm_generates_the_same_text(written: Any, start_daemon: StartDaemon) -> None:
    path = written("qwen3_moe")
    start_daemon(str(budget_for(load_lazily(path).manifest, 12)))
    plain, tokenizer = mlx_lm.load(str(path))[:2]
    cached, _ = expertd.load(path)
    for prompt in ("hello", "def f(x):\n    return x"):
        expected = mlx_lm.generate(plain, tokenizer, prompt, max_tokens=48)
        assert mlx_lm.generate(cached, tokenizer, prompt, max_tokens=48) == expected
        pieces = mlx_lm.stream_generate(cached, tokenizer, prompt, max_tokens=48)
        assert "".join(piece.text for piece in pieces) == expected
    expertd.unload(cached)


def batch_tokens(model: Any, inputs: list[list[int]]) -> dict[int, list[int]]:
    """What mlx-lm's BatchGenerator makes of prompts of different lengths that join one after the other."""
    generator = BatchGenerator(model, max_tokens=24)
    tokens: dict[int, list[int]] = {}
    try:
        for prompt in inputs:
            tokens.update({uid: [] for uid in generator.insert([prompt])})
            for _ in range(3):
                for response in generator.next()[1]:
                    tokens[response.uid].append(response.token)
        while responses := generator.next():
            if not responses[0] and not responses[1]:
                break
            for response in responses[1]:
                tokens[response.uid].append(response.token)
    finally:
        generator.close()
    return tokens


def test_the_batch_generator_gives_the_same_tokens(written: Any, start_daemon: StartDaemon) -> None:
    path = written("qwen3_moe")
    start_daemon(str(budget_for(load_lazily(path).manifest, 12)))
    plain, _ = load_model(path)
    cached, _ = expertd.load(path)
    inputs = [prompts(length)[0].tolist() for length in (5, 40, 12)]
    expected = batch_tokens(plain, inputs)
    assert [len(tokens) for tokens in expected.values()] == [24, 24, 24]
    assert batch_tokens(cached, inputs) == expected
    expertd.unload(cached)


def test_experts_that_mlx_lm_computes_at_load_are_refused_until_they_are_packed(
    written: Any, start_daemon: StartDaemon
) -> None:
    start_daemon()
    for family, experts in (("gpt_oss", "mxfp4"), ("llama4", "float32")):
        path = written(family, experts, "derived")
        with pytest.raises(DerivedExperts, match=f"expertd pack {path}"):
            expertd.load(path)


def test_a_tensor_that_sanitize_changes_in_place_is_derived(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import qwen3_moe

    sanitize = qwen3_moe.Model.sanitize

    def spoil(self: Any, weights: dict[str, Any]) -> dict[str, Any]:
        weights = sanitize(self, weights)
        weights["model.layers.1.mlp.switch_mlp.up_proj.scales"] += 0  # keeps the object, not what it stands for
        return weights

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", spoil)
    manifest = load_lazily(written("qwen3_moe")).manifest
    derived = [(layer.path, part.name) for layer in manifest.layers for part in layer.parts if not part.tensors]
    assert derived == [("model.layers.1.mlp.switch_mlp", "up_proj.scales")]
    assert manifest.derived_by.startswith("mlx-lm ")


def test_the_comparison_by_layer_finds_a_wrong_byte(written: Any, start_daemon: StartDaemon) -> None:
    path = written("qwen3_moe")
    start_daemon(str(budget_for(load_lazily(path).manifest, 48)))
    cached, _ = expertd.load(path)
    assert compare_layers(path, cached, [prompts(20)]) == []
    switch = dict(cached.named_modules())["model.layers.1.mlp.switch_mlp"]._parts.switch
    mx.eval(cached(mx.array(prompts(20))))
    switch.down_proj.scales = switch.down_proj.scales + mx.array(1, mx.uint8)
    assert compare_layers(path, cached, [prompts(20)])[0].startswith("model.layers.1.mlp.switch_mlp")
    expertd.unload(cached)
