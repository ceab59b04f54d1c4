"""Profiles: their files, how they are counted and imported, what a daemon makes of one; and the commands, for real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from expertd.clients.cli import main
from expertd.clients.cli.pin import in_use_everywhere, within
from expertd.clients.cli.signals import ENDS, Stop
from expertd.clients.profiles.counting import profile_of
from expertd.clients.profiles.flash_moe import read_flash_moe
from expertd.daemon.policy import Forecast
from expertd.daemon.remembering import recall
from expertd.daemon.warm_record import WarmRecord, write
from expertd.protocol.errors import ProfileInvalid, ProfileNotFound
from expertd.protocol.messages import LayerStatus, ModelStatus
from expertd.protocol.paths import Home
from expertd.protocol.profiles import (
    Profile,
    profile_names,
    profile_path,
    profiles_in_use,
    read_profile,
    remove_profile,
    use_profile,
    write_profile,
)
from expertd.protocol.traces import Trace, TraceInfo
from tests.conftest import StartDaemon, wait_for
from tests.test_core import manifest
from tools.stage import ask_status

DEMO = Path(__file__).parents[1] / "models" / "demo"
USES = [[9, 0, 2, 0], [0, 5, 2, 1]]


def profile(uses: list[list[int]] = USES, seen: list[list[int]] | None = None, prompts: int = 2) -> Profile:
    return Profile(
        model="m", made_at=1.0, source="a test", tokens=10, prompts=prompts, experts=[len(row) for row in uses],
        uses=uses, seen=seen or [[min(count, prompts) for count in row] for row in uses],
    )  # fmt: skip


# -- the files ---------------------------------------------------------------------------------------------------------


def test_a_profile_comes_back_as_it_was(home: Home) -> None:
    write_profile(home, "code", profile())
    assert read_profile(home, "code") == profile()
    assert profile_names(home) == ["code"]


def test_blocks_come_in_the_order_of_their_uses_spread_over_the_layers() -> None:
    assert profile().blocks == [(0, 0), (1, 1), (0, 2), (1, 2), (1, 3)]


def test_in_use_everywhere_is_what_half_of_the_prompts_used() -> None:
    assert profile(seen=[[4, 0, 1, 0], [0, 2, 1, 1]], prompts=4).everywhere == [(0, 0), (1, 1)]


@pytest.mark.parametrize("name", ["", "../code", "a/b", ".hidden", "x" * 65, "a b", "é"])
def test_what_cannot_be_a_name(home: Home, name: str) -> None:
    with pytest.raises(ProfileInvalid, match="cannot be a profile's name"):
        write_profile(home, name, profile())


def test_one_that_is_there_is_replaced_only_if_wanted(home: Home) -> None:
    write_profile(home, "code", profile())
    with pytest.raises(ProfileInvalid, match="--replace"):
        write_profile(home, "code", profile(prompts=5))
    write_profile(home, "code", profile(prompts=5), replace=True)
    assert read_profile(home, "code").prompts == 5
    assert [path.name for path in home.profiles.iterdir()] == ["code.json"]


def test_one_that_is_not_there_is_named_with_those_that_are(home: Home) -> None:
    with pytest.raises(ProfileNotFound, match="expertd profile record"):
        read_profile(home, "code")
    write_profile(home, "prose", profile())
    with pytest.raises(ProfileNotFound, match="there is no profile 'code'; there are: prose"):
        read_profile(home, "code")


@pytest.mark.parametrize(
    "spoilt",
    [
        b"", b"[]", b"{}", b'{"model": 1}', {"uses": [[1]]}, {"seen": [[1, 2, 3], [1]]},
        {"uses": [[-1, 0, 0, 0], [0] * 4]}, {"uses": [[1 << 60, 0, 0, 0], [0] * 4]}, {"made_at": 1e300},
        {"experts": [], "uses": [], "seen": []}, {"experts": [0, 4], "uses": [[], [1] * 4], "seen": [[], [1] * 4]},
    ],
)
def test_a_damaged_file_is_refused_and_says_what_to_do(home: Home, spoilt: bytes | dict[str, Any]) -> None:
    write_profile(home, "code", profile())
    if isinstance(spoilt, dict):
        spoilt = msgspec.json.encode({**msgspec.to_builtins(profile()), **spoilt})
    profile_path(home, "code").write_bytes(spoilt)
    with pytest.raises(ProfileInvalid, match="expertd profile remove code"):
        read_profile(home, "code")


def test_a_newer_format_is_refused(home: Home) -> None:
    write_profile(home, "code", msgspec.structs.replace(profile(), format=9))
    with pytest.raises(ProfileInvalid, match="update it"):
        read_profile(home, "code")


def test_a_profile_fits_a_shape() -> None:
    assert profile().misfit([4, 4]) is None
    problem = "it is for 2 MoE layers of 4 experts, and the model has 2 MoE layers of 4/8 experts"
    assert profile().misfit([4, 8]) == problem


def test_which_model_uses_which(home: Home) -> None:
    write_profile(home, "code", profile())
    assert profiles_in_use(home) == {}
    use_profile(home, "/a", "code")
    use_profile(home, "/b", "code")
    use_profile(home, "/b", None)
    assert profiles_in_use(home) == {"/a": "code"}
    assert remove_profile(home, "code") == ["/a"]
    assert profiles_in_use(home) == {}
    with pytest.raises(ProfileNotFound):
        remove_profile(home, "code")


# -- how they are made -------------------------------------------------------------------------------------------------


def trace(experts: list[list[list[int]]], sequences: list[int], of: int = 4) -> Trace:
    chosen = np.array(experts, np.uint16)
    count = len(chosen)
    info = TraceInfo(layers=chosen.shape[1], experts=of, top_k=chosen.shape[2], tokens=count)
    at = np.arange(count, dtype=np.uint32)
    phase = np.ones(count, np.uint8)
    return Trace(info, chosen, None, None, np.array(sequences, np.uint32), at, at, phase)


def test_traces_are_counted_by_uses_and_by_sequences() -> None:
    one = trace([[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[0, 3], [2, 3]]], [7, 7, 8])
    other = trace([[[0, 1], [0, 1]]], [7])
    made = profile_of([one, other], "m", "a test", 1.0, [4, 4])
    assert made.uses == [[4, 2, 1, 1], [1, 2, 3, 2]]
    assert made.seen == [[3, 2, 1, 1], [1, 2, 2, 2]]
    assert (made.tokens, made.prompts) == (4, 3)


def test_a_trace_of_another_model_or_of_nothing_is_refused() -> None:
    with pytest.raises(ProfileInvalid, match="a trace has 1 layers of 8 experts and m has 2 of 4"):
        profile_of([trace([[[0]]], [1], of=8)], "m", "a test", 1.0, [4, 4])
    with pytest.raises(ProfileInvalid, match="nothing was recorded"):
        profile_of([], "m", "a test", 1.0, [4, 4])


PATHS = ["model.layers.1.mlp.switch_mlp", "model.layers.3.mlp.switch_mlp"]


def flash_moe(path: Path, layers: dict[str, Any], **more: Any) -> Profile:
    path.write_text(json.dumps({"model": "x/y", "num_prompts": 20, "threshold": 0.5, "layers": layers, **more}))
    return read_flash_moe(path, "m", 1.0, PATHS, [4, 4])


def test_a_profile_of_flash_moe_is_taken_over(tmp_path: Path) -> None:
    layers = {"0": {"universal": [2], "activation_counts": {"2": 20, "0": 3}}, "1": {"universal": [1]}}
    made = flash_moe(tmp_path / "profile.json", layers)
    assert made.seen == made.uses == [[3, 0, 20, 0], [0, 20, 0, 0]]
    assert made.everywhere == [(1, 1), (0, 2)]
    assert (made.prompts, made.source) == (20, "flash-moe's profile.json")


def test_its_layers_may_be_numbered_as_the_models(tmp_path: Path) -> None:
    made = flash_moe(tmp_path / "p.json", {"1": {"activation_counts": {"0": 1}}, "3": {"activation_counts": {"1": 2}}})
    assert made.uses == [[1, 0, 0, 0], [0, 2, 0, 0]]


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ({"5": {"universal": [1]}}, "do not fit the model's 2 MoE layers"),
        ({}, "do not fit the model's 2 MoE layers"),
        ({"0": {"universal": [4]}}, "it counts expert 4 of layer 0, where m has 4 experts"),
        ({"0": {"activation_counts": {"-1": 3}}}, "which is no expert's number"),
        ({"0": {"activation_counts": {"1": -3}}}, "it counts expert 1"),
        ({"0": {"activation_counts": {"1": 0}}}, "counts nothing"),
        ({"0": {"activation_counts": {"1": "many"}}}, "is no profile of flash-moe"),
        ([], "is no profile of flash-moe"),
    ],
)
def test_a_file_that_is_none_of_flash_moes_is_refused(tmp_path: Path, layers: Any, why: str) -> None:
    with pytest.raises(ProfileInvalid, match=why):
        flash_moe(tmp_path / "profile.json", layers)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileInvalid, match="cannot be read"):
        read_flash_moe(tmp_path / "none.json", "m", 1.0, PATHS, [4, 4])


# -- what becomes of them ----------------------------------------------------------------------------------------------

MODEL = manifest()


def test_a_daemon_goes_by_the_profile_that_the_model_uses(home: Home) -> None:
    write_profile(home, "code", profile())
    unused = recall(home, MODEL, "Forecast")
    assert unused is not None
    assert (unused.blocks, unused.chances, len(unused.topics)) == ((), None, 1), "it is a topic, and nothing else"
    use_profile(home, MODEL.folder, "code")
    left = recall(home, MODEL, "Forecast")
    assert left is not None and left.chances is not None
    assert list(left.blocks) == profile().blocks
    assert left.recorded_at == 0
    assert left.chances.sum(1).tolist() == pytest.approx([2, 2]), "a token uses two experts of each layer"
    policy = Forecast(2, 4, 2)
    assert policy.expect(left.chances)
    for block in profile().blocks:
        policy.admitted(block)
    assert policy.ranked()[0] == (0, 0)
    assert policy.ranked()[-1] == (1, 3)


def test_what_a_record_names_goes_before_the_profile(home: Home) -> None:
    write_profile(home, "code", profile())
    use_profile(home, MODEL.folder, "code")
    statistics = Forecast(2, 4, 2).statistics()
    write(home, WarmRecord.of(MODEL.key, MODEL.folder, 5.0, "Forecast", [(1, 3), (0, 1)], statistics))
    left = recall(home, MODEL, "Forecast")
    assert left is not None
    assert left.blocks[:3] == ((1, 3), (0, 1), (0, 0))
    assert sorted(left.blocks) == sorted({(1, 3), (0, 1), *profile().blocks})
    without = recall(home, MODEL, "Forecast", remembers=False)
    assert without is not None and list(without.blocks) == profile().blocks


@pytest.mark.parametrize("damage", ["shape", "gone", "file"])
def test_a_profile_that_cannot_be_used_is_left_aside_and_the_log_says_so(
    home: Home, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_profile(home, "code", profile([[1, 2]]) if damage == "shape" else profile())
    use_profile(home, MODEL.folder, "code")
    if damage == "gone":
        profile_path(home, "code").unlink()
    elif damage == "file":
        home.profiles_in_use.write_text("nonsense")
    left = recall(home, MODEL, "Forecast")
    assert left is None or (left.blocks, left.chances) == ((), None)
    assert (left is None) == (damage != "file"), "it is a topic as long as it can be read and fits"
    assert ("the profile that a model uses is left aside" in caplog.text) == (damage != "file")


def test_chances_of_another_shape_or_beyond_reason_change_nothing() -> None:
    policy = Forecast(2, 4, 2)
    before = policy.statistics()["rates"].copy()
    for chances in (np.zeros((2, 5)), np.full((2, 4), -1), np.full((2, 4), np.nan), np.full((2, 4), 1e9)):
        assert not policy.expect(chances.astype(np.float32))
    assert np.array_equal(policy.statistics()["rates"], before)


def status(slots: tuple[int, int]) -> ModelStatus:
    layers = [
        LayerStatus(pool=n, pool_slots=s, resident_blocks=0, hits=0, misses=0, bytes_read=0, evictions=0)
        for n, s in enumerate(slots)
    ]
    return ModelStatus(
        id="", path="/m", family="", moe_layers=2, experts=4, top_k=2, block_bytes=1, blocks=8, slots=sum(slots),
        resident_blocks=0, hits=0, misses=0, bytes_read=0, evictions=0, pool_bytes=0, sessions=[], layers=layers,
    )  # fmt: skip


def test_pins_are_what_every_profile_uses_everywhere_and_a_share_of_each_pool() -> None:
    one = profile([[9, 8, 7, 1], [9, 8, 0, 0]], seen=[[4, 4, 3, 1], [4, 4, 0, 0]], prompts=4)
    other = profile([[5, 9, 0, 0], [9, 1, 0, 0]], seen=[[4, 4, 0, 0], [4, 1, 0, 0]], prompts=4)
    assert in_use_everywhere([one]) == one.everywhere
    both = in_use_everywhere([one, other])
    assert set(both) == {(0, 0), (0, 1), (1, 0)}
    first = next(block for block in both if block[0] == 0)
    assert within(both, status((10, 40)), 10) == [block for block in both if block in (first, (1, 0))]
    assert within(both, status((2, 2)), 10) == []


# -- the commands ------------------------------------------------------------------------------------------------------


def expertd(*words: str) -> str:
    """What a command prints, run in this process."""
    found = CliRunner().invoke(main, list(words))
    assert found.exit_code == 0, found.output
    return found.output


def refused(*words: str) -> str:
    found = CliRunner().invoke(main, list(words))
    assert found.exit_code == 2, found.output
    return found.output


def test_a_profile_from_its_recording_to_its_end(tmp_path: Path, home: Home, start_daemon: StartDaemon) -> None:
    start_daemon("7MB")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is the module socket for?\nclass Stack:\n")
    model = str(DEMO)
    said = expertd("profile", "record", "code", model, "--prompts", str(prompts), "--max-tokens", "4")
    assert "of 2 prompts of prompts.txt" in said
    assert f"bring it in with: expertd warm {model} --profile code" in said
    made = read_profile(home, "code")
    assert (made.prompts, made.experts) == (2, [32] * 6)
    assert all(sum(row) == 4 * made.tokens for row in made.uses)

    assert "--replace" in refused("profile", "record", "code", model, "--prompts", str(prompts))
    (listed,) = json.loads(expertd("profile", "list", "--json"))["profiles"]
    assert (listed["name"], listed["blocks"], listed["used_by"]) == ("code", 192, [])
    assert expertd("profile", "list").startswith(f"code: {listed['blocks_used']} of 192 experts of demo, 2 prompts")
    shown = json.loads(expertd("profile", "show", "code", "--json"))
    assert len(shown["by_layer"]) == 6
    assert len(expertd("profile", "show", "code").splitlines()) == 4 + 6

    wait_for(lambda: list(home.warmth.glob("*")) != [])
    expertd("unload", model)
    assert list(home.warmth.glob("*")) == [], "who unloads a model does not want it back by itself"
    expertd("profile", "use", model, "code")
    assert profiles_in_use(home) == {str(DEMO): "code"}
    assert "are resident" in expertd("warm", model, "--wait")
    (held,) = ask_status(home).models
    assert held.recalled is not None
    assert held.recalled.back == min(held.slots, len(made.blocks))
    assert held.misses == 0

    assert "experts are pinned" in expertd("pin", model, "--share", "20")
    (held,) = ask_status(home).models
    assert 0 < held.pinned <= held.slots // 5
    assert f"{held.pinned} pinned" in expertd("status")
    assert "nothing is pinned" in expertd("pin", model, "--none")
    assert ask_status(home).models[0].pinned == 0

    assert "uses no profile any more" in expertd("profile", "remove", "code")
    assert "no profile yet" in expertd("profile", "list")
    assert "no profile fits demo" in refused("pin", model)
    assert "give a PROMPT, --prompts FILE or --profile NAME" in refused("warm", model)


def test_live_traffic_is_watched_until_a_signal_and_no_longer(home: Home, start_daemon: StartDaemon) -> None:
    from tests.programs import Program

    start_daemon()
    with Program(DEMO) as program:
        program.run(4)
        for number in (signal.SIGINT, signal.SIGTERM):
            command = [sys.executable, "-m", "expertd.clients.cli", "profile", "record", number.name]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as recorder:
                wait_for(lambda: ask_status(home).tracing != "")
                time.sleep(0.5)
                assert len(program.run(20)) == 20
                recorder.send_signal(number)
                said, complained = recorder.communicate(timeout=60)
            assert recorder.returncode == 0, complained
            assert "Ctrl-C ends it" in complained
            assert f"profile {number.name} of demo" in said
            assert ask_status(home).tracing == ""
            assert read_profile(home, number.name).tokens >= 20


@pytest.fixture
def hung_up() -> Iterator[None]:
    """SIGHUP is not ignored, as it is where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hung_up")
def test_what_ends_a_command_is_a_wish_first_and_an_interrupt_then() -> None:
    for number in ENDS:
        stop, before = Stop(), signal.getsignal(number)
        with stop.on(*ENDS):
            signal.raise_signal(number)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(number) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    with stop.on(*ENDS):
        signal.raise_signal(signal.SIGHUP)
    assert not stop(), "nohup is obeyed"


def test_what_does_not_go_together_is_refused(home: Home, tmp_path: Path) -> None:
    write_profile(home, "small", profile())
    assert "is none for demo: it is for 2 MoE layers of 4 experts" in refused("profile", "use", str(DEMO), "small")
    assert "small is a profile; the model comes first" in refused("profile", "use", "small", str(DEMO))
    assert "give the NAME of a profile, or --none" in refused("profile", "use", str(DEMO))
    assert "there is no profile 'x'; there are: small" in refused("profile", "show", "x")
    assert "give prompts, or a profile, but not both" in refused("warm", str(DEMO), "Hi", "--profile", "small")
    assert "one of --prompts, --trace and --seconds" in refused(
        "profile", "record", "a", str(DEMO), "--trace", "t.npz", "--seconds", "3"
    )
    (tmp_path / "p.json").write_text("{}")
    theirs = ("profile", "import", str(tmp_path / "p.json"), "a", "--model", str(DEMO))
    assert "is no profile of flash-moe" in refused(*theirs)
    use_profile(home, str(DEMO), "small")
    assert "demo uses no profile" in expertd("profile", "use", str(DEMO), "--none")
    assert profiles_in_use(home) == {}


def test_a_profile_of_flash_moe_is_imported_by_a_command(home: Home, tmp_path: Path) -> None:
    layers = {str(layer): {"activation_counts": {"3": 5, "31": 1}} for layer in range(6)}
    (tmp_path / "theirs.json").write_text(json.dumps({"num_prompts": 5, "layers": layers}))
    said = expertd("profile", "import", str(tmp_path / "theirs.json"), "theirs", "--model", str(DEMO))
    assert "12 of 192 experts used, 6 of them in half of the prompts or more" in said
    assert read_profile(home, "theirs").everywhere == [(layer, 3) for layer in range(6)]
