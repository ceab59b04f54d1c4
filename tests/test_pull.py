"""``expertd pull`` against a stand-in for the hub: what is fetched, what is told, what is left after each failure."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from expertd.clients.hub.download import PIECE, look_up
from expertd.protocol.errors import HubError, HubRefused
from expertd.protocol.paths import Home
from tests.conftest import DEADLINE_S, wait_for
from tests.gateway_stage import serving
from tests.hub_server import Hub, Repository, hub_server
from tools.factory import write_checkpoint
from tools.stage import ask_status

ID = "org/Tiny-MoE"
COMMAND = [sys.executable, "-m", "expertd.clients.cli"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("pull") / "model", "qwen3_moe", hidden=128, expert_width=256)


@pytest.fixture
def hub(tmp_path: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that commands of this test ask, and a user who has nothing yet."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    with hub_server() as running:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield running


@pytest.fixture
def repository(hub: Hub, folder: Path) -> Repository:
    """The model that the hub has, beside files that nobody needs."""
    made = Repository.of(folder)
    made.files |= {"README.md": b"words" * 2000, "original/model-1.safetensors": b"x" * 9000, "model.gguf": b"x" * 9000}
    hub.repositories[ID] = made
    return made


def expertd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def refused(code: str, *arguments: str, **environment: str) -> str:
    """The one sentence with which a command fails; lines that tell how far it is do not count."""
    done = expertd(*arguments, **environment)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("fetched ")]
    assert done.returncode != 0
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("expertd: ")
    assert lines[0].endswith(f" [{code}]")
    return lines[0].removeprefix("expertd: ").removesuffix(f" [{code}]")


def snapshot(tmp_path: Path, repository: Repository, id: str = ID) -> Path:
    return tmp_path / "hf/hub" / ("models--" + id.replace("/", "--")) / "snapshots" / repository.commit


def leftovers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "hf").rglob("*.incomplete"))


def host(hub: Hub) -> str:
    return hub.url.removeprefix("http://")


# -- what is fetched ---------------------------------------------------------------------------------------------------


def test_what_mlx_lm_needs_is_fetched_and_nothing_else(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    done = expertd("pull", ID)
    there = snapshot(tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in there.iterdir()} == set(repository.files) - {
        "README.md", "original/model-1.safetensors", "model.gguf",
    }  # fmt: skip
    assert all((there / path.name).read_bytes() == repository.files[path.name] for path in there.iterdir())
    assert done.stdout.splitlines()[0].startswith(f"{ID} is here: ")
    assert done.stdout.splitlines()[0].endswith(" fetched")
    assert done.stdout.splitlines()[1:] == [f"  in {there}", f"serve it with: expertd serve {ID}"]
    assert done.stderr.splitlines()[-1].startswith("fetched ")
    assert "(100 %)" in done.stderr


def test_what_is_here_already_is_not_fetched_again(hub: Hub, repository: Repository) -> None:
    expertd("pull", ID)
    hub.requests.clear()
    done = expertd("pull", ID)
    assert "nothing to fetch" in done.stdout
    assert done.stderr == ""
    assert hub.fetched() == []
    repository.files["config.json"] += b" "
    repository.commit = "d" * 40
    assert "B fetched" in expertd("pull", ID).stdout
    assert not any(WEIGHTS in line for line in hub.fetched()), "a new version fetches what has changed"


def test_pull_as_json(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    told = json.loads(expertd("pull", f"https://huggingface.co/{ID}", "--json").stdout)
    assert told["fetched"] == told["bytes"] > 100_000
    assert (told["id"], told["revision"], told["servable"], told["why_not"]) == (ID, repository.commit, True, None)
    assert told["path"] == str(snapshot(tmp_path, repository))


def test_what_a_killed_download_has_left_is_removed_after_a_day(repository: Repository, tmp_path: Path) -> None:
    blobs = snapshot(tmp_path, repository).parents[1] / "blobs"
    blobs.mkdir(parents=True)
    old, fresh = blobs / "abc.1234.incomplete", blobs / "def.5678.incomplete"
    for path in (old, fresh):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    assert expertd("pull", ID).returncode == 0
    assert leftovers(tmp_path) == [fresh]


def test_a_revision_is_called_by_its_name_afterwards(hub: Hub, repository: Repository, home: Home) -> None:
    repository.branches["v1"] = "e" * 40
    done = expertd("pull", ID, "--revision", "v1")
    assert done.stdout.splitlines()[2] == f"serve it with: expertd serve {ID}@v1"
    assert "e" * 40 in done.stdout
    assert f"{ID} has no revision 'v2'" in refused("hub_not_found", "pull", f"{ID}@v2")
    assert expertd("pull", f"{ID}@v1", "--revision", "v2").returncode == 2


def test_a_model_that_cannot_be_served_is_fetched_and_told(hub: Hub, tmp_path: Path, folder: Path) -> None:
    dense = Repository.of(folder)
    config = json.loads(dense.files["config.json"])
    dense.files["config.json"] = json.dumps({**config, "model_type": "no_such_family"}).encode()
    hub.repositories["org/strange"] = dense
    done = expertd("pull", "org/strange")
    assert done.returncode == 0
    assert done.stdout.splitlines()[2] == "expertd cannot serve it: mlx-lm has no model of type 'no_such_family'"


def test_what_has_no_weights_of_the_right_kind_is_refused_before_anything_is_fetched(hub: Hub) -> None:
    hub.repositories["org/gguf"] = Repository({"config.json": b"{}", "model.gguf": b"x"})
    said = refused("not_a_checkpoint", "pull", "org/gguf")
    assert said == (
        "org/gguf holds no model*.safetensors, so mlx-lm cannot load it (it has .gguf files of another layout)"
    )
    assert hub.fetched() == []


# -- by its id, everywhere ---------------------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_called_by_its_id_everywhere(
    hub: Hub, repository: Repository, folder: Path, own_home: Home, tmp_path: Path
) -> None:
    assert refused("model_not_here", "generate", ID, "hello") == (
        f"{ID} is not on this machine; download it with: expertd pull {ID}"
    )
    expertd("pull", ID)
    hub.requests.clear()
    plain = expertd("generate", str(folder), "hello", "--max-tokens", "8", "--budget", "64MiB")
    by_id = expertd("generate", ID, "hello", "--max-tokens", "8", HF_HUB_OFFLINE="0")
    assert by_id.returncode == 0, by_id.stderr
    assert by_id.stdout == plain.stdout
    assert f"\n{ID}\n" in expertd("status").stdout
    packed = expertd("pack", ID)
    assert packed.returncode == 0, packed.stderr
    assert expertd("unload", ID).returncode == 0
    assert refused("model_not_loaded", "unload", ID).startswith(f"the daemon holds nothing of '{ID}'")
    assert expertd("generate", ID, "hello", "--max-tokens", "8").stdout == plain.stdout
    (model,) = [one for one in ask_status(own_home).models if "snapshots" in one.path]
    assert model.packed == str(next(own_home.packed.glob("*.packed")))
    prompts = tmp_path / "prompts"
    prompts.write_text("hello\n")
    trace = str(tmp_path / "out.npz")
    assert expertd("trace", "record", ID, "--prompts", str(prompts), "-o", trace, "--max-tokens", "4").returncode == 0
    assert f"model     {ID}: " in expertd("trace", "show", trace).stdout
    assert hub.requests == [], "nobody but pull asks the hub"


def test_a_gateway_calls_a_model_of_the_hub_by_its_id(
    hub: Hub, repository: Repository, own_home: Home, tmp_path: Path
) -> None:
    expertd("pull", ID)
    with serving(own_home, Path(ID)) as served:
        assert served.line.startswith(f"expertd: serving {ID} at ")
        assert [model["id"] for model in served.request("GET", "/v1/models")[2]["data"]] == [ID]
        assert served.request("GET", f"/v1/models/{ID}")[2]["id"] == ID
        for name in (ID, "Tiny-MoE", str(snapshot(tmp_path, repository))):
            answer = served.client().chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=2
            )
            assert answer.model == ID


def test_load_takes_an_id_and_a_revision(hub: Hub, repository: Repository, own_home: Home) -> None:
    repository.branches["v1"] = "e" * 40
    expertd("pull", ID, "--revision", "v1")
    program = f"import expertd\nmodel, _ = expertd.load({ID!r}, revision='v1', budget='64MiB')\nexpertd.unload(model)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ask_status(own_home).models[0].path.endswith("e" * 40)


# -- broken off, and gone on with --------------------------------------------------------------------------------------


def test_a_connection_that_is_cut_goes_on_where_it_was(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    repository.cuts[WEIGHTS] = [PIECE + 70_000, 2 * PIECE + 50_000]
    done = expertd("pull", ID)
    assert done.returncode == 0, done.stderr
    assert (snapshot(tmp_path, repository) / WEIGHTS).read_bytes() == repository.files[WEIGHTS]
    begins = [line for line in hub.fetched() if line.startswith(f"GET /cdn/{ID}/{WEIGHTS}")]
    assert begins == [f"GET /cdn/{ID}/{WEIGHTS}{begin}" for begin in ("", f" {PIECE}-", f" {3 * PIECE}-")]


def test_a_download_that_breaks_off_keeps_what_is_complete(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    repository.files["vocab.json"] = b"y" * 9000
    repository.cut_always = 20_000
    said = refused("hub_failed", "pull", ID)
    assert said.startswith(f"the download of {ID} from {host(hub)} broke off (")
    assert said.endswith("; what is complete is kept, and the same command goes on with the rest")
    assert leftovers(tmp_path) == []
    assert refused("model_incomplete", "generate", ID, "hello").endswith(f"get the rest with: expertd pull {ID}")
    repository.cut_always = None
    hub.requests.clear()
    assert expertd("pull", ID).returncode == 0
    assert not any("vocab" in line for line in hub.fetched()), "it was complete"
    assert [line for line in hub.fetched() if WEIGHTS in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_whoever_interrupts_it_leaves_nothing_incomplete(
    number: signal.Signals, hub: Hub, repository: Repository, tmp_path: Path
) -> None:
    repository.rate = 200_000
    with subprocess.Popen([*COMMAND, "pull", ID], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: bool(leftovers(tmp_path)))
            process.send_signal(number)
            out, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    assert errors.splitlines()[-1] == (
        "expertd: interrupted; files that are complete are kept, and the same command goes on"
    )
    assert leftovers(tmp_path) == []
    repository.rate = None
    assert expertd("pull", ID).returncode == 0


# -- what the hub, the network and the disk refuse ---------------------------------------------------------------------


def test_each_refusal_of_the_hub_is_one_sentence_with_the_way_out(hub: Hub, repository: Repository) -> None:
    assert refused("hub_not_found", "pull", "org/none") == (
        f"{host(hub)} has no model org/none, or it is private; check the name, or log in with: hf auth login"
    )
    repository.gated = True
    assert refused("hub_refused", "pull", ID) == (
        f"{ID} is given only to those who accept its conditions: do that at {hub.url}/{ID}, "
        "then log in with: hf auth login"
    )


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, HubRefused, f"does not give {ID} to you (401); log in with: hf auth login"),
        (403, HubRefused, f"does not give {ID} to you (403); log in with: hf auth login"),
        (404, HubError, f"does not answer as it should (404 for {ID}); try again later"),
        (429, HubError, "says that too much was asked of it (429); try again later"),
        (500, HubError, f"does not answer as it should (500 for {ID}); try again later"),
    ],
)
def test_each_status_has_its_sentence(
    status: int, kind: type[HubError], words: str, hub: Hub, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    repository.refused = status, ""
    with pytest.raises(kind) as raised:
        look_up(ID)
    assert raised.value.message == f"{host(hub)} {words}"


def test_a_token_opens_what_is_private(hub: Hub, repository: Repository) -> None:
    repository.token = "hf_secret"
    assert "or it is private" in refused("hub_not_found", "pull", ID)
    done = expertd("pull", ID, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


def test_offline_it_says_so_at_once(hub: Hub, repository: Repository) -> None:
    assert refused("hub_unreachable", "pull", ID, HF_HUB_OFFLINE="1") == (
        "HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or give a model that 'expertd models' lists"
    )
    assert hub.requests == []
    assert refused("hub_unreachable", "pull", ID, HF_ENDPOINT="http://127.0.0.1:9") == (
        "127.0.0.1:9 cannot be reached (Connection refused); check the network, or give a model that "
        "'expertd models' lists"
    )


def test_what_does_not_fit_on_the_disk_is_refused_before_it_is_fetched(hub: Hub, repository: Repository) -> None:
    repository.claimed[WEIGHTS] = 10**18
    said = refused("disk_full", "pull", ID)
    assert said.startswith(f"{ID} needs 1000000.0 TB more, and ")
    assert said.endswith("make room, or set HF_HUB_CACHE to a folder on another disk")
    assert hub.fetched() == []


def test_a_disk_that_fills_up_meanwhile_is_told(hub: Hub, repository: Repository, tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run([*COMMAND, "pull", ID], capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert done.returncode == 1
    assert f"expertd: {ID} could not be written (File too large); make room; what is complete is kept" in done.stderr
    assert leftovers(tmp_path) == []


def test_what_cannot_be_an_id_is_refused(hub: Hub) -> None:
    done = expertd("pull", "no id at all")
    assert done.returncode == 2
    assert "'no id at all' is no id of a model on the hub; write it as org/name" in done.stderr
    assert hub.requests == []


# -- on a terminal -----------------------------------------------------------------------------------------------------


def on_a_terminal(answer: str, *arguments: str) -> tuple[int, str]:
    """Run a command on a terminal, answer its question, and return its status and what was on the screen."""
    main, terminal = pty.openpty()
    process = subprocess.Popen([*COMMAND, *arguments], stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    said = b""
    try:
        deadline = time.monotonic() + 4 * DEADLINE_S
        while time.monotonic() < deadline:
            if not select.select([main], [], [], 1.0)[0]:
                continue
            try:
                piece = os.read(main, 4096)
            except OSError:  # Linux: the other end is closed
                piece = b""
            if not piece:
                break
            said += piece
            if b"[y/N]" in said and answer:
                os.write(main, f"{answer}\n".encode())
                answer = ""
        return process.wait(DEADLINE_S), said.decode()
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_generate_asks_on_a_terminal_and_downloads_only_after_yes(
    hub: Hub, repository: Repository, own_home: Home
) -> None:
    status, said = on_a_terminal("n", "generate", ID, "hello", "--budget", "64MiB")
    assert status == 2
    assert "Download " in said
    assert "B now? [y/N]" in said
    line = " ".join(said.split())
    assert f"{ID} is not on this machine; download it with: expertd pull {ID} [model_not_here]" in line
    assert hub.fetched() == []
    status, said = on_a_terminal("y", "generate", ID, "hello", "--max-tokens", "4", "--budget", "64MiB")
    assert status == 0, said
    assert "(100 %)" in said
    assert hub.fetched() != []


def test_on_a_terminal_what_the_hub_has_not_either_is_told(hub: Hub) -> None:
    status, said = on_a_terminal("", "generate", "org/none", "hello")
    assert status == 1
    assert said.splitlines()[0] == "expertd: org/none is not on this machine"
    assert said.rstrip().endswith("[hub_not_found]")


def test_nothing_is_asked_about_what_can_only_be_a_path(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    status, said = on_a_terminal("", "generate", f"{tmp_path}/models/none", "hello")
    assert status == 2
    assert "[not_a_checkpoint]" in said
    assert hub.requests == []
