"""What users call models: which folder a name finds, in which order, and what is said where it finds none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from expertd.protocol.checkpoint import missing_files
from expertd.protocol.errors import ConfigInvalid, ModelAmbiguous, ModelIncomplete, ModelNotHere, NotACheckpoint
from expertd.protocol.model_names import check_complete, find_model, hub_id, known_models, models_in, shown_name
from expertd.protocol.paths import Home
from tools.factory import write_checkpoint

ID = "mlx-community/Tiny-MoE-4bit"
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home folder with nothing in it, where the working directory is too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(folder: Path, *shards: str) -> Path:
    """A folder that looks like a model; nobody loads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    for shard in shards or ("model.safetensors",):
        (folder / shard).write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def cached(id: str, commit: str = COMMIT, branch: str | None = "main", *shards: str) -> Path:
    """A snapshot in the hub's cache, with symbolic links to blobs as its library makes them."""
    repo = Path(constants.HF_HUB_CACHE) / ("models--" + id.replace("/", "--"))
    snapshot = model(repo / "snapshots" / commit, *shards)
    (repo / "blobs").mkdir(exist_ok=True)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        blob = path.rename(repo / "blobs" / f"{commit[:6]}{number}")
        path.symlink_to(Path("../../blobs") / blob.name)
    if branch is not None:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    return snapshot


# -- what a name finds -------------------------------------------------------------------------------------------------


def test_a_path_comes_before_a_name(home: Home, user: Path) -> None:
    cached("mine/model")
    assert find_model("mine/model", home) == Path(constants.HF_HUB_CACHE) / "models--mine--model/snapshots" / COMMIT
    here = model(user / "mine" / "model")
    assert find_model("mine/model", home) == here
    assert find_model("~/mine/model", home) == here
    assert find_model(Path("mine/model"), home) == here
    (user / "link").symlink_to(here)
    assert find_model("link", home) == here


def test_an_id_finds_main_or_the_revision_that_is_asked_for(home: Home) -> None:
    newer, older = cached(ID), cached(ID, OLDER, "v1")
    assert find_model(ID, home) == newer
    assert find_model(f"{ID}@main", home) == newer
    assert find_model(f"{ID}@v1", home) == older
    assert find_model(f"{ID}@{OLDER}", home) == older
    assert find_model(f"{ID}@{OLDER[:8]}", home) == older
    with pytest.raises(ModelNotHere, match=f"^{ID}@v2 is not on this machine"):
        find_model(f"{ID}@v2", home)


def test_without_main_the_only_version_is_found_and_of_several_none(home: Home) -> None:
    only = cached(ID, OLDER, None)
    assert find_model(ID, home) == only
    cached(ID, COMMIT, None)
    with pytest.raises(ModelAmbiguous, match=rf"several versions of {ID} are here.*: {ID}@aaaaaaaaaaaa, {ID}@bbbb"):
        find_model(ID, home)
    assert sorted(model.name for model in known_models(home)) == [f"{ID}@{COMMIT}", f"{ID}@{OLDER}"]


def test_lm_studio_and_the_users_own_folders_are_looked_through(home: Home, user: Path) -> None:
    studio = model(user / ".lmstudio/models/some-org/Studio-MoE")
    old = model(user / ".cache/lm-studio/models/some-org/Old-MoE")
    plain, nested = model(user / "models/Plain"), model(user / "models/org/Nested")
    assert find_model("some-org/Studio-MoE", home) == studio
    assert find_model("Old-MoE", home) == old
    assert (find_model("Plain", home), find_model("org/Nested", home)) == (plain, nested)
    home.config.write_text('model_folders = ["~/elsewhere"]\n')
    with pytest.raises(ModelNotHere):
        find_model("Plain", home)
    elsewhere = model(user / "elsewhere/Plain")
    assert find_model("Plain", home) == elsewhere


def test_the_folders_can_be_set_by_a_variable(home: Home, user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = model(user / "a/One"), model(user / "b/Other")
    monkeypatch.setenv("EXPERTD_MODEL_FOLDERS", f"{user}/a:~/b")
    assert (find_model("One", home), find_model("Other", home)) == (one, other)
    monkeypatch.setenv("EXPERTD_MODEL_FOLDERS", "b")
    with pytest.raises(ConfigInvalid, match=r"^EXPERTD_MODEL_FOLDERS: 'b' is relative, but to what"):
        find_model("Other", home)


def test_the_last_part_of_an_id_does_if_only_one_model_has_it(home: Home, user: Path) -> None:
    snapshot = cached(ID)
    assert find_model("Tiny-MoE-4bit", home) == snapshot
    model(user / f".lmstudio/models/{ID}")
    assert find_model("Tiny-MoE-4bit", home) == snapshot, "two copies of one model"
    cached("other/Tiny-MoE-4bit")
    with pytest.raises(ModelAmbiguous, match="are called Tiny-MoE-4bit: mlx-community/Tiny-MoE-4bit, other/Tiny"):
        find_model("Tiny-MoE-4bit", home)


def test_lm_studio_is_followed_where_its_pointer_leads(home: Home, user: Path) -> None:
    folder = model(user / "disk" / "lm" / "models" / "org" / "Moved-MoE")
    (user / ".lmstudio-home-pointer").write_text(f"{user}/disk/lm\n")
    old = model(user / ".lmstudio" / "models" / "org" / "Old-MoE")
    assert [known.folder for known in known_models(home)] == [folder, old]
    assert shown_name(folder) == "org/Moved-MoE"


@pytest.mark.parametrize(("variable", "below"), [("HF_HOME", "hub/"), ("HF_HUB_CACHE", "")])
def test_the_variables_of_the_hub_are_respected(variable: str, below: str, home: Home, user: Path) -> None:
    snapshot = cached(ID)
    there = user / "there" / below
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(Path(constants.HF_HUB_CACHE), there)
    program = f"from expertd.protocol.model_names import find_model\nprint(find_model({ID!r}))"
    environment = {**os.environ, variable: str(user / "there")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == str(there / snapshot.relative_to(constants.HF_HUB_CACHE)), done.stderr


def test_a_name_is_looked_up_without_http_and_without_mlx(home: Home) -> None:
    cached(ID)
    program = (
        "import sys\nfrom expertd.protocol.model_names import find_model\nfrom huggingface_hub import constants\n"
        f"constants.HF_HUB_CACHE = {constants.HF_HUB_CACHE!r}\nfind_model({ID!r})\n"
        "print(sorted({'mlx', 'httpx', 'httpx2', 'requests', 'difflib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("org/none", "org/none is not on this machine; download it with: expertd pull org/none"),
        (
            "mlx-community/Tiny-MoE-4bits",
            "mlx-community/Tiny-MoE-4bits is not on this machine (did you mean mlx-community/Tiny-MoE-4bit?); "
            "download it with: expertd pull mlx-community/Tiny-MoE-4bits",
        ),
        (
            "Tiny-MoE-8bit",
            "Tiny-MoE-8bit is neither a folder nor a model on this machine (did you mean mlx-community/Tiny-MoE-4bit?)"
            "; give a folder, or a name that 'expertd models' lists",
        ),
        ("what is", "'what is' is neither a folder nor a model on this machine; 'expertd models' lists those"),
        ("", "'' is neither a folder nor a model on this machine; 'expertd models' lists those"),
        (
            "folder/modle",
            "folder/modle does not exist, and no model on this machine is called so; did you mean folder/model?",
        ),
        ("folder/x/y", "folder/x/y does not exist; give the folder of an mlx-lm checkpoint, or a model's name"),
        ("./folder/modle", "folder/modle does not exist; did you mean folder/model?"),
        ("foldre/model/", "foldre/model does not exist; did you mean folder?"),
    ],
)
def test_what_is_not_here_is_told_in_one_sentence(text: str, sentence: str, home: Home, user: Path) -> None:
    cached(ID)
    model(user / "folder/model")
    with pytest.raises((ModelNotHere, NotACheckpoint)) as raised:
        find_model(text, home)
    assert raised.value.message == sentence


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("org/name", ("org/name", None)),
        ("gpt2", ("gpt2", None)),
        ("org/name@refs/pr/1", ("org/name", "refs/pr/1")),
        ("org/na--me", None),
        ("org/../name", None),
        ("org/name/more", None),
        ("-org/name", None),
        ("org/name@", None),
        ("a b", None),
    ],
)
def test_what_can_be_an_id(text: str, found: object) -> None:
    assert hub_id(text) == found


def test_what_a_folder_is_called(user: Path) -> None:
    assert shown_name(cached(ID)) == ID
    assert shown_name(user / "models/Some-Model") == "Some-Model"
    assert shown_name(user / ".lmstudio/models/org/name") == "org/name"
    assert shown_name(Path("/elsewhere/snapshots/abc")) == "abc"


# -- incomplete models -------------------------------------------------------------------------------------------------

SHARDS = tuple(f"model-{n:05}-of-00004.safetensors" for n in range(1, 5))


def test_a_snapshot_that_lacks_shards_is_named_so(home: Home) -> None:
    snapshot = cached(ID, COMMIT, "main", *SHARDS[:2])
    with pytest.raises(ModelIncomplete) as raised:
        find_model(ID, home)
    assert raised.value.message == (
        f"{ID} is here, but 2 of its files are missing ({SHARDS[2]}, {SHARDS[3]}); "
        f"get the rest with: expertd pull {ID}"
    )
    with pytest.raises(ModelIncomplete, match=f"expertd pull {ID}$"):
        find_model(str(snapshot), home)


def test_a_link_to_a_blob_that_is_gone_is_a_file_that_is_missing(home: Home) -> None:
    snapshot = cached(ID)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(ModelIncomplete, match=r"a file is missing \(model.safetensors\)"):
        find_model(ID, home)


def test_an_incomplete_version_beside_main_is_got_by_its_revision(home: Home) -> None:
    cached(ID)
    cached(ID, OLDER, "v1", *SHARDS[:3])
    with pytest.raises(ModelIncomplete, match=f"expertd pull {ID}@{OLDER}$"):
        find_model(f"{ID}@v1", home)


def test_an_index_tells_what_is_missing_unless_it_is_out_of_date(user: Path) -> None:
    folder = write_checkpoint(user / "sharded", "qwen3_moe", experts="float32", names="per_expert", shards=3)
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    assert missing_files(folder) == []
    (folder / names[1]).unlink()
    assert missing_files(folder) == [names[1]]
    with pytest.raises(ModelIncomplete, match=rf"a file is missing \({names[1]}\); copy it once more"):
        check_complete(folder)
    gone = {name for name, file in entries["weight_map"].items() if file == names[1]}
    entries["weight_map"] = {name: names[0] if name in gone else "old" for name in entries["weight_map"]}
    index.write_text(json.dumps(entries))
    assert missing_files(folder) == [], "the tensors are all in files that are here"


def test_folders_that_are_no_models_are_left_to_who_loads_them(home: Home, user: Path) -> None:
    (user / "empty").mkdir()
    assert find_model("empty", home) == user / "empty"
    (user / "file").write_text("")
    assert find_model("file", home) == user / "file"
    assert list(models_in(user / "nowhere")) == []
