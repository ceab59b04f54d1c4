"""The checkpoint factory: its files are reproducible, plain mlx-lm runs each kind, and routing is not degenerate."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm import load
from mlx_lm.models import cache, switch_layers
from mlx_lm.utils import load_model
from safetensors import safe_open

from tools.factory import FAMILIES, Cell, cells, left_out, write_checkpoint
from tools.factory.__main__ import main
from tools.factory.cells import unwritable
from tools.factory.stream import FileTensor, write_safetensors
from tools.factory.tokenizer import EOS_ID, SPECIAL_TOKENS

PROMPT = list(range(40, 60))


def write_cell(folder: Path, cell: Cell, **options: Any) -> Path:
    return write_checkpoint(folder, cell.family, experts=cell.experts, dense=cell.dense, names=cell.names, **options)


def logits(folder: Path, decode: int = 2) -> np.ndarray:
    """Greedy logits of a prompt's last token and of ``decode`` tokens after it, ``[1 + decode, vocab]``."""
    model, _ = load_model(folder)
    state = cache.make_prompt_cache(model)
    step = mx.array([PROMPT])
    rows = []
    for _ in range(1 + decode):
        last = model(step, cache=state)[:, -1].astype(mx.float32)
        rows.append(np.array(last[0]))
        step = mx.argmax(last, axis=-1, keepdims=True)
    return np.stack(rows)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("cell", cells(), ids=str)
def test_plain_mlx_lm_runs_the_cell_with_finite_logits(cell: Cell, tmp_path: Path) -> None:
    assert np.isfinite(logits(write_cell(tmp_path, cell))).all()


@pytest.mark.parametrize(
    "cell", [c for c in cells() if c.names != "stacked" and c.experts in ("mxfp4", "float32")], ids=str
)
def test_every_naming_form_loads_as_the_same_model(cell: Cell, tmp_path: Path) -> None:
    form = logits(write_cell(tmp_path / "form", cell))
    stacked = logits(write_cell(tmp_path / "stacked", cell._replace(names="stacked")))
    assert np.array_equal(form, stacked)


@pytest.mark.parametrize("names", ["stacked", "per_expert"])
def test_sharded_files_load_as_the_same_model(names: str, tmp_path: Path) -> None:
    single = write_checkpoint(tmp_path / "single", "mixtral", names=names)
    sharded = write_checkpoint(tmp_path / "sharded", "mixtral", names=names, shards=3)
    assert np.array_equal(logits(sharded), logits(single))


def test_the_index_names_the_file_of_each_tensor(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3_moe", shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "numpy") as opened:
            held |= dict.fromkeys(opened.keys(), file.name)
    assert index["weight_map"] == held and len(set(held.values())) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_arguments_give_equal_bytes(family: str, tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "first", family, experts="affine", seed=7)
    second = write_checkpoint(tmp_path / "second", family, experts="affine", seed=7)
    assert digests(first) == digests(second)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    first = digests(write_checkpoint(tmp_path / "first", "qwen3_moe", seed=1))
    second = digests(write_checkpoint(tmp_path / "second", "qwen3_moe", seed=2))
    assert [name for name in first if first[name] != second[name]] == ["model.safetensors"]


def test_no_two_experts_are_alike(tmp_path: Path) -> None:
    model, _ = load_model(write_checkpoint(tmp_path, "qwen3_moe", experts="affine"))
    for part in ("weight", "scales", "biases"):
        stacks = [np.array(layer.mlp.switch_mlp.up_proj[part]) for layer in model.layers]
        experts = {expert.tobytes() for stack in stacks for expert in stack}
        assert len(experts) == len(stacks) * len(stacks[0])


@pytest.mark.parametrize("experts", ["mxfp4", "affine"])
def test_dequantized_experts_are_centred_and_scaled_by_fan_in(experts: str, tmp_path: Path) -> None:
    model, _ = load_model(write_checkpoint(tmp_path, "qwen3_moe", experts=experts, hidden=128))
    linear = model.layers[0].mlp.switch_mlp.up_proj
    floats = np.array(
        mx.dequantize(
            linear.weight, linear.scales, linear.get("biases"), linear.group_size, linear.bits, linear.mode
        ).astype(mx.float32)
    )
    assert abs(floats.mean()) < 0.02 * 128**-0.5 and floats.std() == pytest.approx(128**-0.5, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_experts_are_quantized(family: str, tmp_path: Path) -> None:
    model, _ = load_model(write_checkpoint(tmp_path, family))
    experts, quantized = set(), set()
    for path, module in model.named_modules():
        if isinstance(module, (switch_layers.SwitchGLU, switch_layers.SwitchMLP)):
            experts |= {f"{path}.{name}" for name, child in module.children().items() if isinstance(child, nn.Module)}
        if "scales" in module:
            quantized.add(path)
    assert quantized and quantized == {path for path in experts if not path.endswith("activation")}


@pytest.mark.parametrize("family", FAMILIES)
def test_different_tokens_choose_different_experts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[int, set[int]] = {}

    def recording(original: Any) -> Any:
        def call(self: Any, x: mx.array, indices: mx.array) -> Any:
            chosen.setdefault(id(self), set()).update(np.array(indices).ravel().tolist())
            return original(self, x, indices)

        return call

    for kind in (switch_layers.SwitchGLU, switch_layers.SwitchMLP):
        monkeypatch.setattr(kind, "__call__", recording(kind.__call__))
    logits(write_checkpoint(tmp_path, family))
    assert len(chosen) >= 2 and min(map(len, chosen.values())) > FAMILIES[family].sizes.top_k


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_not_one_token_repeated(family: str, tmp_path: Path) -> None:
    rows = logits(write_checkpoint(tmp_path, family), decode=24)
    assert len(set(rows.argmax(axis=-1).tolist())) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_the_special_tokens_are_never_the_greedy_choice(family: str, tmp_path: Path) -> None:
    rows = logits(write_checkpoint(tmp_path, family))
    assert (rows[:, : len(SPECIAL_TOKENS)] == 0).all() and (rows.max(axis=-1) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_loads_with_the_model(family: str, tmp_path: Path) -> None:
    _, tokenizer = load(str(write_checkpoint(tmp_path, family)))
    assert tokenizer.eos_token_ids == {EOS_ID}


@pytest.mark.parametrize("vocab", [320, 512, 40_000])
def test_text_comes_back_from_a_vocabulary_of_exactly_the_models_size(vocab: int, tmp_path: Path) -> None:
    _, tokenizer = load(str(write_checkpoint(tmp_path, "mixtral", vocab=vocab)))
    text = "The quick brown fox, naïve 東京 🦊\n\tdef f(x): return x**2  "
    ids = tokenizer.encode(text)
    assert (len(tokenizer.get_vocab()), tokenizer.decode(ids)) == (vocab, text)


def test_the_chat_template_is_chatml(tmp_path: Path) -> None:
    _, tokenizer = load(str(write_checkpoint(tmp_path, "mixtral")))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("experts", "names"), [("mxfp4", "stacked"), ("float32", "per_expert")])
def test_writing_holds_a_small_part_of_the_checkpoint_in_memory(experts: str, names: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden": 256, "expert_width": 256, "n_experts": 64, "layers": 2, "vocab": 30_000}
    write_checkpoint(tmp_path / "warm", "qwen3_moe")
    mx.reset_peak_memory()
    tracemalloc.start()
    write_checkpoint(tmp_path / "big", "qwen3_moe", experts=experts, names=names, **sizes)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written_bytes = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert written_bytes > 70e6 and peak_bytes < 32e6 and mx.get_peak_memory() < 1e6


def test_a_tensor_that_yields_too_few_bytes_is_an_error(tmp_path: Path) -> None:
    short = FileTensor("w", "F32", (4,), lambda: [np.zeros(3, np.float32)])
    with pytest.raises(RuntimeError, match="w: 12 bytes generated, 16 declared"):
        write_safetensors(tmp_path / "model.safetensors", [short])


def test_cells_and_left_out_cover_every_combination_once() -> None:
    everything = [*cells(), *(cell for cell, _ in left_out())]
    assert len(everything) == len(set(everything)) == len(FAMILIES) * 4 * 2 * 3


def test_each_cell_left_out_has_a_sentence_as_its_reason() -> None:
    assert all(reason.endswith(".") and len(reason.split()) > 5 for _, reason in left_out())


def test_no_form_that_mlx_lm_cannot_load_is_written(tmp_path: Path) -> None:
    for cell, reason in left_out():
        if unwritable(FAMILIES[cell.family], cell.experts, cell.names):
            with pytest.raises(ValueError) as refused:
                write_cell(tmp_path / str(cell), cell)
            assert str(refused.value) == reason


@pytest.mark.skipif(mx.metal.is_available(), reason="a limit of the CPU back end")
def test_the_cpu_back_end_really_cannot_run_what_is_left_out_on_its_account(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="float32"):
        logits(write_checkpoint(tmp_path, "qwen3_moe", experts="bfloat16", dense="bfloat16"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "gpt2"}, "family='gpt2': has to be one of qwen3_moe, mixtral"),
        ({"experts": "int3"}, "experts='int3': has to be one of mxfp4, affine, float32, bfloat16"),
        ({"dense": "float16"}, "dense='float16': has to be one of float32, bfloat16"),
        ({"names": "fused"}, "names='fused': has to be one of stacked, per_expert, derived"),
        ({"shards": 0}, "shards=0: has to be at least 1"),
        ({"shards": 1000}, "shards=1000: has to be at most"),
        ({"width": 64}, "width: not a size; the sizes are hidden, layers"),
        ({"layers": 0}, "layers=0: has to be a whole number of at least 1"),
        ({"family": "llama4", "layers": 3}, "layers=3: llama4 needs at least 4"),
        ({"family": "llama4", "top_k": 2}, "top_k=2: llama4 routes each token to 1 expert"),
        ({"top_k": 17}, "top_k=17: at most n_experts, which is 16"),
        ({"hidden": 100}, "hidden=100: has to be a multiple of 8 times heads, which is 4"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3: has to divide heads, which is 4"),
        ({"vocab": 100}, "vocab=100: has to be from 320 to 500000"),
        ({"expert_width": 48}, "expert_width=48: has to be a multiple of group_size, which is 32"),
        ({"experts": "affine", "hidden": 96}, "hidden=96: has to be a multiple of group_size, which is 64"),
        ({"group_size": 64}, "group_size=64: has to be one of 32"),
        ({"experts": "float32", "group_size": 32}, "group_size=32: experts='float32' are not quantized"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        write_checkpoint(tmp_path, **({"family": "qwen3_moe"} | arguments))
    assert str(refused.value).startswith(message)


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_checkpoint(tmp_path, "qwen3_moe")


def test_the_command_line_writes_the_same_checkpoint(tmp_path: Path) -> None:
    arguments = ["--family", "olmoe", "--experts", "affine", "--layers", "2", "--n-experts", "8", "--seed", "3"]
    result = CliRunner().invoke(main, [str(tmp_path / "command"), *arguments])
    write_checkpoint(tmp_path / "call", "olmoe", experts="affine", layers=2, n_experts=8, seed=3)
    assert result.exit_code == 0 and digests(tmp_path / "command") == digests(tmp_path / "call")


def test_the_command_line_reports_a_bad_argument_as_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "new"), "--family", "llama4", "--layers", "2"])
    assert (result.exit_code, result.output) == (1, "Error: layers=2: llama4 needs at least 4.\n")
