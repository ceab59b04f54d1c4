"""Homes, sizes, the layout of pools, and the shared-memory segments that they lie in."""

from __future__ import annotations

import _posixshmem
import errno
import os
import stat
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.protocol.checkpoint import ITEM_BYTES
from expertd.protocol.errors import HomeError, HomeTooLong, PathInvalid, SegmentFailed, SizeInvalid
from expertd.protocol.layout import (
    PAGE,
    SLAB_ELEMENTS,
    most_slots,
    pool_layout,
    read_header,
    slot_limit,
    write_header,
)
from expertd.protocol.manifest import Part
from expertd.protocol.model_names import find_model
from expertd.protocol.paths import SOCKET_PATH_BYTES, Home, expanded
from expertd.protocol.segments import Segment, create, map_readonly, segment_name
from expertd.protocol.sizes import parse_budget, parse_size, show_size

# -- homes -------------------------------------------------------------------------------------------------------------


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_expertd_home_names_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPERTD_HOME", str(tmp_path))
    assert Home.current() == Home(tmp_path)


@pytest.mark.parametrize("named", [None, ""])
def test_without_expertd_home_it_is_in_the_users_folder(monkeypatch: pytest.MonkeyPatch, named: str | None) -> None:
    monkeypatch.delenv("EXPERTD_HOME", raising=False)
    if named is not None:
        monkeypatch.setenv("EXPERTD_HOME", named)
    assert Home.current() == Home(Path.home() / ".expertd")


def test_a_relative_home_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPERTD_HOME", "here")
    assert Home.current() == Home(tmp_path / "here")


def test_looking_at_a_home_creates_nothing(tmp_path: Path) -> None:
    found = Home(tmp_path / "h")
    assert found.daemon_socket.parent == found.run
    assert not found.root.exists()


def test_a_prepared_home_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        home = Home(Path("/tmp") / f"xd-{os.getpid()}-private")
        home.prepare()
        assert {_mode(path) for path in (home.root, home.run, home.root / "log")} == {0o700}
    finally:
        os.umask(before)
        for path in (home.run, home.root / "log", home.root):
            path.rmdir()


def test_a_home_may_be_prepared_twice(home: Home) -> None:
    home.prepare()
    assert _mode(home.run) == 0o700


def test_a_run_folder_that_others_may_enter_is_closed_to_them(home: Home) -> None:
    home.run.chmod(0o755)
    home.prepare()
    assert _mode(home.run) == 0o700


def _home_of_length(length: int) -> Home:
    return Home(Path("/" + "h" * (length - 1)))


ROOM = SOCKET_PATH_BYTES - len("/run/gateway-4194304-99.sock")


def test_the_longest_home_whose_sockets_fit_is_taken() -> None:
    _home_of_length(ROOM).check()


def test_a_home_that_is_too_long_is_refused_with_the_room_there_is() -> None:
    with pytest.raises(HomeTooLong, match=rf"\(1 bytes over\); set EXPERTD_HOME to a path of at most {ROOM} bytes"):
        _home_of_length(ROOM + 1).check()


def test_the_length_counts_bytes() -> None:
    with pytest.raises(HomeTooLong):
        Home(Path("/" + "ü" * (ROOM // 2 + 1))).check()


@pytest.mark.parametrize("name", ["", "run", "log"])
def test_a_file_in_the_way_is_refused(home: Home, name: str) -> None:
    root = home.root / "h"
    file = root / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    with pytest.raises(HomeError, match="cannot be used"):
        Home(root).prepare()


def test_a_home_below_a_file_is_refused(home: Home) -> None:
    (home.root / "file").touch()
    with pytest.raises(HomeError, match="cannot be used"):
        Home(home.root / "file" / "h").prepare()


# -- sizes -------------------------------------------------------------------------------------------------------------

SIZES = {
    "1": 1,
    "1048576": 1 << 20,
    "1b": 1,
    "1k": 1000,
    "1kB": 1000,
    "1KiB": 1024,
    "512MB": 512_000_000,
    "512MiB": 512 << 20,
    "2g": 2_000_000_000,
    "2GiB": 2 << 30,
    "1.5G": 1_500_000_000,
    "0.5 GiB": 512 << 20,
    " 8 GiB ": 8 << 30,
    "1T": 10**12,
    "1TiB": 1 << 40,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "nonsense", "0", "0GB", "0.1", "-1", "-1GB", "+1", "1 G B", "1GiBi", "1PB", "1e9", "1,5G", ".5G",
             "5.G", "inf", "nan", "0x10", "1_000", "GB", "1\0", "99999999999TB", "9" * 30, "9" * 5000,
             "9" * 39 + ".5T"],
)  # fmt: skip
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SizeInvalid, match="write for example 512MB"):
        parse_size(text)


@pytest.mark.parametrize(("text", "size"), [*SIZES.items(), ("auto", None), ("AUTO", None), (" auto ", None)])
def test_a_budget_is_a_size_or_auto(text: str, size: int | None) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "0", "much", "automatic", "auto 1GB"])
def test_what_is_no_budget_is_refused_and_auto_is_named_as_a_choice(text: str) -> None:
    with pytest.raises(SizeInvalid, match="512MB, 2GiB or a number of bytes, or auto for what the machine can spare"):
        parse_budget(text)


SHOWN = {
    0: "0 B",
    999: "999 B",
    1000: "1.0 kB",
    1500: "1.5 kB",
    99_900: "99.9 kB",
    512_000_000: "512 MB",
    1_288_490_189: "1.3 GB",
    2 << 30: "2.1 GB",
    10**12: "1.0 TB",
    10**15: "1000.0 TB",
}


@pytest.mark.parametrize(("size", "text"), SHOWN.items())
def test_a_size_is_shown(size: int, text: str) -> None:
    assert show_size(size) == text


@given(st.integers(1, 10**14))
def test_a_shown_size_is_near_the_true_one(size: int) -> None:
    assert abs(parse_size(show_size(size)) - size) <= size * 0.06


# -- layout ------------------------------------------------------------------------------------------------------------

PARTS = st.lists(
    st.builds(
        lambda dtype, shape: Part("p", dtype, tuple(shape), ("t",), (0,)),
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(1, 300), max_size=2),
    ),
    min_size=1,
    max_size=9,
)
LAYERS, EXPERTS = st.integers(1, 60), st.integers(1, 300)


@given(LAYERS, EXPERTS, PARTS, st.integers(0, 2000))
def test_slabs_start_on_pages_and_do_not_overlap(layers: int, experts: int, parts: list[Part], slots: int) -> None:
    layout = pool_layout(layers, experts, parts, slots)
    ends = [layout.table_offset + 4 * layers * experts]
    for slab, part in zip(layout.slabs, parts, strict=True):
        assert slab.offset % PAGE == 0
        assert slab.offset >= ends[-1]
        assert slab.shape == (slots, *part.shape)
        assert slab.row_bytes == part.block_bytes
        ends.append(slab.offset + slots * slab.row_bytes)
    assert layout.size % PAGE == 0
    assert layout.size >= ends[-1]


@given(LAYERS, EXPERTS, PARTS, st.integers(1, 2000))
def test_no_slab_starts_a_page_later_than_it_must(layers: int, experts: int, parts: list[Part], slots: int) -> None:
    layout = pool_layout(layers, experts, parts, slots)
    for before, slab in pairwise(layout.slabs):
        assert slab.offset - (before.offset + slots * before.row_bytes) < PAGE


@given(LAYERS, EXPERTS, PARTS, st.integers(0, 1 << 28))
def test_most_slots_is_the_inverse_of_the_size(layers: int, experts: int, parts: list[Part], size: int) -> None:
    slots = most_slots(layers, experts, parts, size)
    assert 0 <= slots <= layers * experts
    assert slots == 0 or pool_layout(layers, experts, parts, slots).size <= size
    assert slots == layers * experts or pool_layout(layers, experts, parts, slots + 1).size > size


@given(LAYERS, EXPERTS, PARTS, st.data())
def test_the_size_of_a_pool_holds_its_slots(layers: int, experts: int, parts: list[Part], data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, layers * experts))
    assert most_slots(layers, experts, parts, pool_layout(layers, experts, parts, slots).size) >= slots


@given(PARTS)
def test_the_slot_limit_keeps_every_slab_below_two_to_the_31(parts: list[Part]) -> None:
    def elements(slots: int) -> int:
        return max(slots * part.block_bytes // ITEM_BYTES[part.dtype] for part in parts)

    assert elements(slot_limit(parts)) <= SLAB_ELEMENTS < elements(slot_limit(parts) + 1)


def test_a_header_comes_back_as_it_was_written() -> None:
    page = memoryview(bytearray(PAGE))
    write_header(page, b"0123456789abcdef", 2**40)
    assert read_header(page) == (b"0123456789abcdef", 2**40)


@pytest.mark.parametrize("place", [0, 7, 8])
def test_a_segment_that_is_none_of_ours_is_noticed(place: int) -> None:
    page = memoryview(bytearray(PAGE))
    write_header(page, bytes(16), 1)
    page[place] ^= 1
    assert read_header(page) is None


# -- segments ----------------------------------------------------------------------------------------------------------


def _name() -> str:
    return f"/expertd-test-{os.getpid()}"


def _left_behind() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(_name()[1:])]


@pytest.fixture
def segment() -> Iterator[Segment]:
    made = create(_name(), 2 * PAGE)
    yield made
    made.close()


def test_a_new_segment_is_zeroed_and_of_its_size(segment: Segment) -> None:
    assert segment.size == len(segment.mapping) == 2 * PAGE
    assert segment.mapping[:] == bytes(2 * PAGE)


def test_no_name_of_a_segment_stays(segment: Segment) -> None:
    assert _left_behind() == []
    with pytest.raises(FileNotFoundError):
        _posixshmem.shm_open(_name(), os.O_RDONLY, mode=0o600)


def test_what_the_creator_writes_is_seen_through_the_handed_out_descriptor(segment: Segment) -> None:
    seen = map_readonly(os.dup(segment.readonly), segment.size)
    segment.mapping[PAGE] = 7
    assert seen[PAGE] == 7
    seen.close()


def test_a_mapping_that_was_handed_over_refuses_writes(segment: Segment) -> None:
    seen = map_readonly(os.dup(segment.readonly), segment.size)
    with pytest.raises(TypeError):
        seen[0] = 1
    assert memoryview(seen).readonly
    seen.close()


def test_the_descriptor_itself_allows_no_writing(segment: Segment) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(segment.readonly, b"x", 0)
    with pytest.raises(OSError, match=r"."):
        os.ftruncate(segment.readonly, 0)


def test_a_mapping_outlives_the_creators_hold() -> None:
    made = create(_name(), PAGE)
    made.mapping[3] = 9
    seen = map_readonly(os.dup(made.readonly), PAGE)
    made.close()
    assert seen[3] == 9
    seen.close()


def test_a_segment_that_is_being_filled_may_be_closed() -> None:
    made = create(_name(), PAGE)
    view = memoryview(made.mapping)
    made.close()
    view[0] = 1


def test_a_name_that_a_killed_daemon_left_is_taken_over() -> None:
    left = _posixshmem.shm_open(_name(), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode=0o600)
    os.ftruncate(left, PAGE)
    made = create(_name(), 2 * PAGE)
    try:
        assert os.fstat(made.readonly).st_size == 2 * PAGE
        assert os.fstat(made.readonly).st_ino != os.fstat(left).st_ino
        assert _left_behind() == []
    finally:
        made.close()
        os.close(left)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="only Linux reserves the pages")
def test_too_little_shared_memory_is_an_error_and_leaves_nothing() -> None:
    open_before = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(SegmentFailed, match="lower the budget"):
        create(_name(), 1 << 50)
    assert _left_behind() == []
    assert len(list(Path("/dev/fd").iterdir())) == open_before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="only Linux sets room aside for segments")
def test_what_nobody_could_go_on_without_is_created_beside_a_full_dev_shm(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, size: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith("/dev/shm"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, size)

    monkeypatch.setattr("expertd.protocol.segments.os.posix_fallocate", full)
    open_before = len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(SegmentFailed, match="No space left on device"):
        create(_name(), 2 * PAGE)
    made = create(_name(), 2 * PAGE, beyond=True)
    made.mapping[PAGE] = 7
    with map_readonly(os.dup(made.readonly), 2 * PAGE) as seen:
        assert (seen[PAGE], seen[PAGE + 1]) == (7, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(made.readonly, b"x")
    made.close()
    assert _left_behind() == []
    assert len(list(Path("/dev/fd").iterdir())) == open_before


def test_mapping_more_than_a_segment_has_is_refused_and_closes_the_descriptor(segment: Segment) -> None:
    descriptor = os.dup(segment.readonly)
    with pytest.raises(SegmentFailed, match=f"has {2 * PAGE} bytes where {3 * PAGE} were announced"):
        map_readonly(descriptor, 3 * PAGE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_is_no_memory_is_refused() -> None:
    end, other = os.pipe()
    os.close(other)
    with pytest.raises(SegmentFailed):
        map_readonly(end, PAGE)


@settings(max_examples=20)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200))
def test_the_name_of_any_home_is_short_and_its_own(path: str) -> None:
    name = segment_name(Path(path))
    assert name.startswith("/expertd-")
    assert len(name) <= 31
    assert name != segment_name(Path(path) / "other")


def test_a_tilde_that_stands_for_nothing_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~/models") == Path.home() / "models"
    assert expanded("/m") == expanded(Path("/m")) == Path("/m")
    with pytest.raises(PathInvalid, match=r"^'~nobody-here/x': there is no user 'nobody-here' here; write"):
        expanded("~nobody-here/x")
    monkeypatch.setenv("EXPERTD_HOME", "~nobody-here")
    with pytest.raises(PathInvalid, match="'nobody-here'"):
        Home.current()
    with pytest.raises(PathInvalid):
        find_model("~nobody-here/model")
