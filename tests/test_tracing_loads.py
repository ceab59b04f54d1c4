"""What is traced while a model is looked through: this folder's files, on this thread, and nothing else."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from expertd.worker import manifest
from expertd.worker.manifest import load_lazily
from tools.factory import write_checkpoint


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tracing") / "model", "qwen3_moe", hidden=128, expert_width=256)


@pytest.fixture
def other(tmp_path: Path) -> dict[str, Any]:
    """Arrays in two files elsewhere, one of which has the name of the model's."""
    arrays = {"a": mx.arange(4), "b": mx.zeros((2, 3))}
    for name in ("adapter.safetensors", "model.safetensors"):
        mx.save_safetensors(str(tmp_path / name), arrays)
    return arrays


@pytest.mark.parametrize("elsewhere", [True, False], ids=["in another thread", "in the same thread"])
def test_whatever_else_is_loaded_meanwhile_is_let_be(
    model_path: Path, tmp_path: Path, other: dict[str, Any], monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    expected = load_lazily(model_path).manifest
    found: list[Any] = []

    def load_others() -> None:
        for name in ("adapter.safetensors", "model.safetensors"):
            found.append(mx.load(str(tmp_path / name)))
            with (tmp_path / name).open("rb") as file:
                found.append(mx.load(file, format="safetensors"))
            found.append({"a": mx.stack([found[-1]["a"]])[0], "b": mx.stack([found[-1]["b"]], axis=0)[0]})
        mx.eval(found)

    def load_model(*arguments: Any, **options: Any) -> Any:
        if elsewhere:
            thread = threading.Thread(target=load_others)
            thread.start()
            thread.join()
        else:
            load_others()
        return plain(*arguments, **options)

    plain = manifest.load_model
    monkeypatch.setattr(manifest, "load_model", load_model)
    assert load_lazily(model_path).manifest == expected
    assert len(found) == 6
    for arrays in found:
        assert {name: array.tolist() for name, array in arrays.items()} == {n: a.tolist() for n, a in other.items()}


def test_another_thread_that_reads_the_models_own_files_changes_nothing(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arrays are none of the model's, whatever becomes of their identities."""
    expected = load_lazily(model_path).manifest
    plain = manifest.load_model

    def load_model(*arguments: Any, **options: Any) -> Any:
        def load_too() -> None:
            for _ in range(3):
                mx.load(str(model_path / "model.safetensors"))

        thread = threading.Thread(target=load_too)
        thread.start()
        thread.join()
        return plain(*arguments, **options)

    monkeypatch.setattr(manifest, "load_model", load_model)
    assert load_lazily(model_path).manifest == expected


def test_a_model_is_found_by_way_of_a_link(model_path: Path, tmp_path: Path) -> None:
    """Its folder may be one, and so may each of its files, as in a hub's cache."""
    (tmp_path / "folder").symlink_to(model_path)
    (tmp_path / "files").mkdir()
    for file in model_path.iterdir():
        (tmp_path / "files" / file.name).symlink_to(file)
    expected = load_lazily(model_path).manifest
    for folder in ("folder", "files"):
        found = load_lazily(tmp_path / folder).manifest
        assert (found.layers, found.base) == (expected.layers, expected.base)
