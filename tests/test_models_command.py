"""``expertd models``: what it says of each kind of checkpoint, in narrow and wide terminals, and that it is quick."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from expertd.clients.cli.models import Row, listing
from expertd.clients.hub.survey import Facts, mlx_families, packed_stores, survey
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tools.factory import cells, write_checkpoint

DEMO = Path(__file__).parents[1] / "models/demo"


def expertd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "expertd.clients.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "EXPERTD_BUDGET": "1GB", **environment}
    )


# -- what a survey tells -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stacked", "per_expert", "sharded"])
def test_a_survey_tells_what_the_worker_finds(name: str, checkpoints: dict[str, Path]) -> None:
    manifest = load_lazily(checkpoints[name]).manifest
    found = survey(checkpoints[name], name)
    assert found.servable
    assert not found.pack_first
    assert found.layers == len(manifest.layers)
    assert {(layer.experts, layer.top_k) for layer in manifest.layers} == {(found.experts, found.top_k)}
    assert found.expert_bytes == sum(layer.experts * layer.block_bytes for layer in manifest.layers)
    files = sum(path.stat().st_size for path in checkpoints[name].glob("*.safetensors"))
    assert found.size == files
    assert 0 < found.rest_bytes < files - found.expert_bytes


@pytest.fixture
def spoiled(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["sharded"], tmp_path / "model"))


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_what_cannot_be_served_is_told_in_words(spoiled: Path, tmp_path: Path) -> None:
    change_config(spoiled, model_type="no_such_family")
    assert survey(spoiled, "x").why_not == "mlx-lm has no model of type 'no_such_family'"
    (spoiled / "config.json").write_text("{}")
    assert survey(spoiled, "x").why_not == "its config.json names no model_type"
    (spoiled / "config.json").unlink()
    assert survey(spoiled, "x").why_not == "it is not complete: config.json missing"
    shards = sorted(spoiled.glob("model-*.safetensors"))
    shards[1].unlink()
    assert survey(spoiled, "x").why_not == "it is not complete: config.json and 1 more missing"
    with shards[0].open("r+b") as file:
        file.truncate(1000)
    assert "is truncated" in survey(spoiled, "x").why_not
    for shard in shards:
        shard.unlink(missing_ok=True)
    assert survey(spoiled, "x").why_not == "its weights are not here"
    (spoiled / "weights.safetensors").write_bytes(b"")
    assert survey(spoiled, "x").why_not == "its weights are not in mlx-lm's layout (model*.safetensors)"
    (spoiled / "model.gguf").write_bytes(b"")
    assert survey(spoiled, "x").why_not == "it is GGUF, and expertd reads safetensors"


def test_a_dense_model_is_told_as_such(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    header = json.dumps({"model.layers.0.mlp.up_proj.weight": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}})
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = survey(folder, "x")
    assert found.why_not == "it is a dense model: it has no experts to cache"
    assert (found.layers, found.experts, found.expert_bytes, found.rest_bytes) == (0, 0, 0, 4)
    assert found.share(1000) is None


def test_the_families_are_those_of_mlx_lm() -> None:
    from mlx_lm.utils import MODEL_REMAPPING

    assert {"qwen3_moe", "gpt_oss", "mixtral", *MODEL_REMAPPING} <= mlx_families()
    assert "no_such_family" not in mlx_families()


def test_a_store_counts_as_long_as_it_fits(home: Home, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["stacked"], tmp_path / "model"))
    assert expertd("pack", str(folder)).returncode == 0
    found = survey(folder, "x", packed_stores(home))
    assert found.packed is not None
    assert found.packed.parent == home.packed
    os.utime(folder / "model.safetensors", (1, 1))
    assert survey(folder, "x", packed_stores(home)).packed is None, "it is another version now"
    (home.packed / "broken.packed").write_bytes(b"nothing")
    assert len(packed_stores(home)) == 1


# -- how it is shown ---------------------------------------------------------------------------------------------------

ROWS = [
    Row(
        Facts(
            "mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit", Path("/x"), 17_190_000_000, "qwen3_moe", 48, 128, 8,
            16_307_453_952, 867_000_000,
        ),
        "hub cache", 0.77,
    ),
    Row(Facts("gpt-oss-20b", Path("/y"), 13_800_000_000, "gpt_oss", 24, 32, 4, 10_200_000_000, 3_600_000_000,
              pack_first=True), "~/models", 1.0),
    Row(Facts("lmstudio-community/Qwen3-8B-GGUF", Path("/z"), why_not="it is GGUF, and expertd reads safetensors"),
        "LM Studio", None),
]  # fmt: skip


def test_eighty_columns_show_a_few_lines_a_model() -> None:
    assert listing(ROWS, 80) == [
        "mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit                         hub cache",
        "  17.2 GB: experts 16.3 GB (48 x 128, 8 a token), the rest 867 MB",
        "  can be served, not packed, 77 % of its experts fit",
        "",
        "gpt-oss-20b                                                             ~/models",
        "  13.8 GB: experts 10.2 GB (24 x 32, 4 a token), the rest 3.6 GB",
        "  can be served after 'expertd pack', not packed, 100 % of its experts fit",
        "",
        "lmstudio-community/Qwen3-8B-GGUF                                       LM Studio",
        "  not served: it is GGUF, and expertd reads safetensors",
    ]


def test_two_hundred_columns_show_a_table() -> None:
    lines = listing(ROWS, 200)
    assert len(lines) == 4
    assert lines[0].split("  ")[0] == "model"
    assert lines[1].split()[-4:] == ["77", "%", "no", "yes"]
    assert lines[3].endswith("no: it is GGUF, and expertd reads safetensors")
    assert "expected hits" not in lines[0]


def test_what_is_expected_is_shown_where_it_was_reckoned() -> None:
    row = Row(ROWS[0].facts, "hub cache", 0.77, 0.931, 12.34)
    table = listing([row, *ROWS[1:]], 250)
    assert "expected hits  tokens/s" in table[0]
    assert "93 %" in table[1]
    assert "12.3" in table[1]
    told = " ".join(line.strip() for line in listing([row], 80))
    assert told.endswith("77 % of its experts fit, expected: 93 % hits and 12.3 tokens/s")


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_demo_model_is_listed_as_it_is(home: Home, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/demo").symlink_to(DEMO)
    done = expertd("models", str(tmp_path / "models"), HOME=str(tmp_path))
    assert done.stdout.splitlines() == [
        "the budget for experts is 1.0 GB",
        "",
        f"demo{'~/models':>76}",
        "  19.2 MB: experts 10.0 MB (6 x 32, 4 a token), the rest 9.1 MB",
        "  can be served, not packed, 100 % of its experts fit",
    ]
    (model,) = json.loads(expertd("models", str(DEMO.parent), "--json", EXPERTD_BUDGET="5MB").stdout)["models"]
    assert (model["name"], model["servable"], model["moe_layers"], model["experts"]) == ("demo", True, 6, 32)
    assert model["fits"] == pytest.approx(5_000_000 / model["expert_bytes"])
    assert model["expected_hits"] is model["tokens_per_s"] is None
    done = expertd("models", str(DEMO.parent), "--json", "--expect", EXPERTD_BUDGET="5MB")
    (reckoned,) = json.loads(done.stdout)["models"]
    assert 0.3 < reckoned["expected_hits"] < 1
    assert reckoned["tokens_per_s"] > 0


def test_each_model_is_listed_once_whatever_ways_lead_to_it(home: Home, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/one").symlink_to(DEMO)
    (tmp_path / "models/two").symlink_to(DEMO)
    found = json.loads(expertd("models", "--json", HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf")).stdout)
    assert [(model["name"], model["place"]) for model in found["models"]] == [("one", "~/models")]


def test_where_nothing_is_it_says_how_to_get_something(home: Home, tmp_path: Path) -> None:
    done = expertd("models", HOME=str(tmp_path), HF_HOME=str(tmp_path / "hf"))
    assert (done.returncode, done.stdout) == (
        0, "no model is on this machine; get one with: expertd pull mlx-community/Qwen3-30B-A3B-4bit\n",
    )  # fmt: skip
    done = expertd("models", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere is no folder" in done.stderr


def test_fifty_models_are_listed_from_their_headers_alone(home: Home, tmp_path: Path) -> None:
    """Counted, not timed: no file is read past its header, and nothing heavy is imported."""
    for number in range(50):
        shutil.copytree(DEMO, tmp_path / f"models/model-{number:02}", copy_function=os.link)
    program = (
        "import sys, builtins, pathlib\n"
        "from click.testing import CliRunner\n"
        "from expertd.clients.cli import main\n"
        "from expertd.protocol import checkpoint\n"
        "read = []\n"
        "parse = checkpoint._parse\n"
        "def counting(path, file):\n"
        "    found = parse(path, file)\n"
        "    read.append(file.tell())\n"
        "    return found\n"
        "checkpoint._parse = counting\n"
        f"done = CliRunner().invoke(main, ['models', {str(tmp_path / 'models')!r}])\n"
        "assert done.exit_code == 0, done.output\n"
        "print(len(read), max(read), sorted({'mlx', 'mlx_lm', 'transformers', 'httpx', 'httpx2'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    count, most, imported = done.stdout.strip().split(" ", 2)
    assert (count, imported) == ("50", "[]"), done.stderr
    assert int(most) < 100_000 < (DEMO / "model.safetensors").stat().st_size


def test_what_has_to_be_packed_first_is_what_the_worker_refuses(tmp_path: Path) -> None:
    """Over every kind of checkpoint that can be made here, the survey says what loading it would find."""
    wrong = []
    for cell in cells():
        folder = write_checkpoint(
            tmp_path / "cell", cell.family, experts=cell.experts, dense=cell.dense, names=cell.names
        )
        manifest = load_lazily(folder).manifest
        found = survey(folder, "x")
        loaded = (bool(manifest.derived_by), len(manifest.layers), max(layer.experts for layer in manifest.layers))
        if not found.servable or (found.pack_first, found.layers or loaded[1], found.experts) != loaded:
            wrong.append((cell, found, loaded))
        shutil.rmtree(folder)
    assert not wrong
