"""Trace files without a model: whole ones, unfinished ones, damaged ones, and disks that are full."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expertd.protocol.errors import TraceInvalid, TraceWriteFailed
from expertd.protocol.traces import ARRAYS, DECODE, TraceFile, TraceInfo, part_of, read_trace, recover
from tests.conftest import DEADLINE_S

ROOT = Path(__file__).parents[1]
DEVELOPMENT_TRACE = ROOT.parent / "shared" / "traces" / "gpt_oss_20b_dev.npz"
LAYERS, EXPERTS, TOP_K = 3, 16, 4
INFO = TraceInfo(model="small", layers=LAYERS, experts=EXPERTS, top_k=TOP_K, candidates=2 * TOP_K)

Arrays = dict[str, NDArray[Any]]


def tokens(count: int, first: int = 0) -> Arrays:
    """``count`` tokens of one sequence, from place ``first`` on; the first of all is a prompt's."""
    rng = np.random.default_rng(first)
    ranked = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.uint8), (count, LAYERS, 1)), axis=-1)[..., : 2 * TOP_K]
    pos = np.arange(first, first + count, dtype=np.uint32)
    return {
        "experts": ranked[..., :TOP_K].copy(),
        "candidates": ranked,
        "scores": -np.sort(-rng.normal(size=ranked.shape)).astype(np.float16),
        "seq_id": np.full(count, 7, np.uint32),
        "pos": pos,
        "forward": pos + 100,
        "phase": np.where(pos == 0, 1 - DECODE, DECODE).astype(np.uint8),
    }


def joined(*pieces: Arrays) -> Arrays:
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def assert_holds(path: Path, expected: Arrays, *, finished: bool) -> None:
    """``read_trace`` finds exactly these tokens."""
    found = read_trace(path)
    assert found.finished is finished
    assert found.info.tokens == len(expected["pos"])
    for name, array in expected.items():
        assert getattr(found, name).dtype == array.dtype, name
        assert np.array_equal(getattr(found, name), array), name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.npz"


def recorded(path: Path, *pieces: Arrays) -> TraceFile:
    file = TraceFile(path, INFO)
    for piece in pieces:
        file.append(piece)
    return file


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_trace_comes_back_as_it_was_written(path: Path) -> None:
    file = recorded(path, tokens(5), tokens(1, 5), tokens(30, 6))
    assert file.tokens == 36
    info = file.finish([1.0, 0.5, 1.0])
    assert names(path.parent) == ["trace.json", "trace.npz"]
    assert_holds(path, joined(tokens(5), tokens(1, 5), tokens(30, 6)), finished=True)
    assert (info.tokens, info.decode_tokens, info.sequences, info.agreement) == (36, 35, 1, [1.0, 0.5, 1.0])
    assert read_trace(path).info == info
    beside = json.loads(path.with_suffix(".json").read_text())
    assert beside == {
        "format": 1, "model": "small", "layers": 3, "experts": 16, "top_k": 4, "candidates": 8, "tokens": 36,
        "decode_tokens": 35, "sequences": 1, "agreement": [1.0, 0.5, 1.0],
    }  # fmt: skip
    with np.load(path) as archive:  # for who has no expertd
        assert tuple(archive) == ARRAYS


def test_every_array_of_a_trace_is_one_that_the_document_names() -> None:
    text = (ROOT / "protocol" / "PROTOCOL.md").read_text(encoding="utf-8").split("## Trace files")[1].split("\n## ")[0]
    assert [name for name in ARRAYS if f"| `{name}` |" in text] == list(ARRAYS)


def test_scores_may_be_left_out(path: Path) -> None:
    lean = {name: array for name, array in tokens(4).items() if name not in ("candidates", "scores")}
    file = TraceFile(path, TraceInfo(layers=LAYERS, experts=EXPERTS, top_k=TOP_K))
    file.append(lean)
    file.finish()
    assert_holds(path, lean, finished=True)
    found = read_trace(path)
    assert found.candidates is None
    assert found.scores is None


def test_a_recording_can_be_read_while_it_goes_on(path: Path) -> None:
    file = TraceFile(path, INFO)
    with pytest.raises(TraceInvalid, match="no token yet"):
        read_trace(path)
    file.append(tokens(3))
    assert_holds(path, tokens(3), finished=False)
    file.append(tokens(2, 3))
    assert_holds(part_of(path), joined(tokens(3), tokens(2, 3)), finished=False)
    assert (read_trace(path).info.model, read_trace(path).info.decode_tokens) == ("small", 4)
    file.finish()
    assert_holds(path, joined(tokens(3), tokens(2, 3)), finished=True)


def test_an_empty_recording_leaves_nothing(path: Path) -> None:
    assert TraceFile(path, INFO).finish().tokens == 0
    assert names(path.parent) == []


def test_a_recording_that_is_forgotten_leaves_nothing(path: Path) -> None:
    recorded(path, tokens(3)).discard()
    assert names(path.parent) == []


def test_what_is_there_already_is_never_overwritten(path: Path) -> None:
    recorded(path, tokens(3)).finish()
    with pytest.raises(TraceWriteFailed, match="is there already; choose another name"):
        TraceFile(path, INFO)
    path.unlink()
    with pytest.raises(TraceWriteFailed, match=r"trace\.json is there already"):
        TraceFile(path, INFO)
    path.with_suffix(".json").unlink()
    first = recorded(path, tokens(3))
    with pytest.raises(TraceWriteFailed, match=r"'expertd trace recover .*trace\.npz'"):
        TraceFile(path, INFO)
    first.append(tokens(1, 3))
    first.finish()
    assert_holds(path, joined(tokens(3), tokens(1, 3)), finished=True)


def test_names_and_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceWriteFailed, match=r"ends in \.npz, and trace\.txt does not"):
        TraceFile(tmp_path / "trace.txt", INFO)
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(TraceWriteFailed, match=rf"no folder {wrong} to write trace\.npz into"):
            TraceFile(wrong / "trace.npz", INFO)
    assert names(tmp_path) == ["file"]


def test_a_torn_record_is_as_if_it_had_not_been_written(path: Path) -> None:
    """As a machine that lost its power leaves it: at every byte of a record's head, and at many of its payload."""
    file = recorded(path, tokens(3), tokens(2, 3))
    part = part_of(path)
    before = part.stat().st_size
    file.append(tokens(1, 5))
    file.leave()
    whole = part.read_bytes()
    assert len(whole) > before
    for size in {*range(before, before + 20), *range(before, len(whole), 9), len(whole) - 2, len(whole) - 1}:
        part.write_bytes(whole[:size])
        assert_holds(path, joined(tokens(3), tokens(2, 3)), finished=False)
    for size in (before, before + 1, before + 12, before + 13, len(whole) - 1):
        part.write_bytes(whole[:size])
        assert recover(path).tokens == 5
        assert names(path.parent) == ["trace.json", "trace.npz"]
        assert_holds(path, joined(tokens(3), tokens(2, 3)), finished=True)


def test_a_damaged_record_ends_the_recording_before_it(path: Path) -> None:
    file = recorded(path, tokens(3))
    part = part_of(path)
    before = part.stat().st_size
    file.append(tokens(2, 3))
    middle = part.stat().st_size
    file.append(tokens(1, 5))
    whole = part.read_bytes()
    for place in range(before, middle, 7):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert_holds(path, tokens(3), finished=False)
    part.write_bytes(whole[:before] + whole[middle:])  # a record that is not there at all is not missed
    assert read_trace(path).pos.tolist() == [0, 1, 2, 5]


def test_a_part_whose_beginning_is_damaged_is_none(path: Path) -> None:
    recorded(path, tokens(3)).leave()
    part = part_of(path)
    whole = part.read_bytes()
    for place in (0, 4, 8, 12, 40):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        for use in (read_trace, recover):
            with pytest.raises(TraceInvalid):
                use(path)
    for size in range(40):
        part.write_bytes(whole[:size])
        for use in (read_trace, recover):
            with pytest.raises(TraceInvalid):
                use(path)


def test_recover_makes_the_trace_of_a_part(path: Path) -> None:
    recorded(path, tokens(3), tokens(2, 3)).leave()
    info = recover(path)
    assert (info.tokens, info.decode_tokens, info.sequences, info.agreement) == (5, 4, 1, [])
    assert names(path.parent) == ["trace.json", "trace.npz"]
    assert_holds(path, joined(tokens(3), tokens(2, 3)), finished=True)


def test_recover_refuses_what_is_no_rest(path: Path) -> None:
    with pytest.raises(TraceInvalid, match="could not be read"):
        recover(path)
    TraceFile(path, INFO).leave()
    with pytest.raises(TraceInvalid, match="holds no token; remove it"):
        recover(path)
    part_of(path).write_text("not a part\n" * 10)
    with pytest.raises(TraceInvalid, match="not the rest of a recording"):
        recover(path)
    assert names(path.parent) == ["trace.npz.part"]


def test_recovering_a_recording_that_goes_on_loses_nothing(path: Path) -> None:
    """The sentence of a part that exists proposes ``recover``, and it may be one that runs: either it is refused, or
    what is appended later is kept too."""
    file = recorded(path, tokens(3))
    try:
        recover(path)
    except (TraceInvalid, TraceWriteFailed):
        pass
    file.append(tokens(2, 3))
    if part_of(path).exists():
        file.finish()
    assert_holds(path, joined(tokens(3), tokens(2, 3)), finished=True)


# -- what is no trace --------------------------------------------------------------------------------------------------


def save(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


def save_but(**changed: Any) -> Callable[[Path], None]:
    return save(**(tokens(4) | changed))


def zip_words(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("experts", "hello")


def without(name: str) -> Callable[[Path], None]:
    return save(**{key: array for key, array in tokens(4).items() if key != name})


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("hello\n" * 20), "not an .npz file"),
    "empty": (lambda path: path.write_bytes(b""), "not an .npz file"),
    "folder": (lambda path: path.mkdir(), "could not be read"),
    "one array": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "not an .npz file"),
    "zip of no arrays": (zip_words, "no trace|no routing trace|damaged"),
    "no experts": (without("experts"), "no array 'experts'"),
    "no seq_id": (without("seq_id"), "no array 'seq_id'"),
    "no pos": (without("pos"), "no array 'pos'"),
    "objects": (save_but(experts=np.array([{}, {}, {}, {}])), "damaged"),
    "float experts": (save_but(experts=np.zeros((4, 3, 4))), "not integers"),
    "flat experts": (save_but(experts=np.zeros((4, 12), np.uint8)), "not integers"),
    "no tokens": (save(**tokens(0)), "not integers"),
    "fewer places": (save_but(pos=np.arange(3, dtype=np.uint32)), "'pos' has shape"),
    "more sequences": (save_but(seq_id=np.zeros(5, np.uint32)), "'seq_id' has shape"),
    "table of places": (save_but(pos=np.zeros((4, 2), np.uint32)), "'pos' is uint32.*, not integers"),
    "flat scores": (save_but(scores=np.zeros(4, np.float16)), "'scores' is float16.*, not floats"),
    "fewer candidates": (save_but(candidates=np.zeros((3, 3, 8), np.uint8)), "'candidates' has shape"),
    "one place": (save_but(pos=np.uint32(3)), "'pos'"),
    "places in words": (save_but(pos=np.array(["a", "b", "c", "d"])), "'pos'"),
    "phases in words": (save_but(phase=np.array(["a", "b", "c", "d"])), "'phase'"),
    "negative experts": (save_but(experts=np.full((4, 3, 4), -1, np.int8)), "expert"),
    "candidates of fewer layers": (save_but(candidates=np.zeros((4, 2, 8), np.uint8)), "'candidates'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_trace_is_refused_by_name(kind: str, path: Path) -> None:
    write, words = BAD[kind]
    write(path)
    with pytest.raises(TraceInvalid, match=words) as refused:
        read_trace(path)
    assert path.name in refused.value.message


BESIDE = {
    "newer": (b'{"format": 2}', "format 2; this expertd reads up to 1: update it"),
    "no JSON": (b'{"format": ', "cannot be used"),
    "no text": (b"\xff\xfe\x00", "cannot be used"),
    "a list": (b"[]", "cannot be used"),
    "other types": (b'{"experts": "many"}', "cannot be used"),
    "fewer experts": (b'{"experts": 3}', "names expert .* of 3"),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_beside_a_trace_has_to_fit(kind: str, path: Path) -> None:
    recorded(path, tokens(9)).finish()
    text, words = BESIDE[kind]
    path.with_suffix(".json").write_bytes(text)
    with pytest.raises(TraceInvalid, match=words):
        read_trace(path)


def test_a_part_of_a_newer_format_is_refused(path: Path) -> None:
    recorded(path, tokens(3)).finish()
    newer = TraceFile(path.with_name("newer.npz"), INFO)
    newer.discard()
    written = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; from expertd.protocol import traces as t\n"
         "t.FORMAT = 2; t.TraceFile(Path(sys.argv[1]), t.TraceInfo())", str(newer.path)],
        check=False,
    )  # fmt: skip
    assert written.returncode == 0
    for use in (read_trace, recover):
        with pytest.raises(TraceInvalid, match="format 2; this expertd reads up to 1"):
            use(newer.path)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
def test_a_damaged_file_is_refused_or_read_as_it_was(packed: bool, path: Path) -> None:
    """Any one byte, and any length: zip files have checksums, and some bytes that nobody needs."""
    if packed:
        recorded(path, tokens(5)).finish()
    else:
        np.savez(path, allow_pickle=True, **tokens(5))
    whole = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    damaged = [whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :]
               for place in range(len(whole))]  # fmt: skip
    damaged += [whole[:size] for size in range(0, len(whole), 5)]
    for content in damaged:
        path.write_bytes(content)
        try:
            found = read_trace(path)
        except TraceInvalid as error:
            refused += 1
            assert path.name in error.message
        else:
            assert np.array_equal(found.experts, tokens(5)["experts"])
    assert refused > len(damaged) // 2


def test_a_missing_trace_is_no_trace(path: Path) -> None:
    with pytest.raises(TraceInvalid, match=r"could not be read \(No such file or directory\)"):
        read_trace(path)


def test_old_traces_have_three_arrays(path: Path) -> None:
    given = tokens(6)
    np.savez(path, experts=given["experts"], seq_id=given["seq_id"], pos=given["pos"])
    found = read_trace(path)
    assert np.array_equal(found.experts, given["experts"])
    assert found.forward.tolist() == [0, 1, 2, 3, 4, 5]
    assert (found.phase == DECODE).all()
    assert (found.scores, found.candidates) == (None, None)
    info = found.info
    assert (info.layers, info.experts, info.top_k) == (LAYERS, int(given["experts"].max()) + 1, TOP_K)
    assert (info.tokens, info.decode_tokens, info.sequences) == (6, 6, 1)


@pytest.mark.skipif(not DEVELOPMENT_TRACE.exists(), reason="the traces for development are not in ../shared/traces")
def test_the_trace_for_development_is_one() -> None:
    info = read_trace(DEVELOPMENT_TRACE).info
    assert (info.layers, info.experts, info.top_k, info.sequences) == (24, 32, 4, 150)
    assert info.tokens > 20_000


# -- disks that are full, recorders that are killed --------------------------------------------------------------------

# The longest file that a process may write stands for the end of the disk: the system refuses in the same way, in the
# middle of a write as well.  Python ignores the signal that comes with it.
FULL = """
import resource, sys
from pathlib import Path
from expertd.protocol.errors import ExpertdError
from expertd.protocol.traces import TraceFile
from tests.test_trace_files import INFO, tokens
path, limit, in_the_end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "end"
limited = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
done = 0
try:
    if not in_the_end:
        limited()
    file = TraceFile(path, INFO)
    while done < 40:
        file.append(tokens(4, done))
        done += 4
    if in_the_end:
        limited()
    file.finish()
except ExpertdError as error:
    print(done, error.code, error.message)
"""


def fill(path: Path, limit: int, when: str) -> tuple[int, str, str]:
    """Record 40 tokens where files have ``limit`` bytes at most: how many there was room for, the error, its words."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(limit), when],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    count, code, words = done.stdout.split(maxsplit=2)
    return int(count), code, words


@pytest.mark.parametrize("limit", [5_000, 7_777, 11_000])
def test_a_disk_that_fills_keeps_what_was_recorded(limit: int, path: Path) -> None:
    count, code, words = fill(path, limit, "at once")
    assert 0 < count < 40
    assert code == "trace_write_failed"
    assert f"its {count} tokens stay readable, and 'expertd trace recover {path}'" in words
    expected = joined(*(tokens(4, first) for first in range(0, count, 4)))
    assert names(path.parent) == ["trace.npz.part"]
    assert part_of(path).stat().st_size < limit
    assert_holds(path, expected, finished=False)
    assert recover(path).tokens == count
    assert_holds(path, expected, finished=True)


@pytest.mark.parametrize("limit", [100, 1_000, 2_000])
def test_a_disk_without_room_for_the_finished_trace_keeps_the_part(limit: int, path: Path) -> None:
    count, code, words = fill(path, limit, "end")
    assert (count, code) == (40, "trace_write_failed")
    assert f"the 40 recorded tokens stay readable in {part_of(path).name}: make room" in words
    assert names(path.parent) == ["trace.npz.part"]
    expected = joined(*(tokens(4, first) for first in range(0, 40, 4)))
    assert_holds(path, expected, finished=False)
    assert recover(path).tokens == 40
    assert_holds(path, expected, finished=True)


def test_a_disk_that_is_full_from_the_beginning_leaves_nothing(path: Path) -> None:
    count, code, _ = fill(path, 20, "at once")
    assert (count, code) == (0, "trace_write_failed")
    assert names(path.parent) == []


def test_a_recorder_that_is_killed_leaves_what_it_appended(path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from expertd.protocol.traces import TraceFile\n"
        "from tests.test_trace_files import INFO, tokens\n"
        "file = TraceFile(Path(sys.argv[1]), INFO)\n"
        "for first in range(0, 4_000_000, 4):\n"
        "    file.append(tokens(4, first))\n"
        "    print(file.tokens, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as recorder:
        assert recorder.stdout is not None
        for _ in range(5):
            said = int(recorder.stdout.readline())
        recorder.send_signal(signal.SIGKILL)
        said = max(said, *map(int, recorder.stdout.read().split()), 0)
        assert recorder.wait(DEADLINE_S) == -signal.SIGKILL
    found = read_trace(path)
    assert not found.finished
    assert found.info.tokens in (said, said + 4)  # it may have been killed before it could say so
    expected = joined(*(tokens(4, first) for first in range(0, found.info.tokens, 4)))
    assert_holds(path, expected, finished=False)
    assert recover(path).tokens == found.info.tokens
    assert_holds(path, expected, finished=True)
