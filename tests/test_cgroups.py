"""What memory cgroups leave a process, read from files that look like the kernel's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from expertd.protocol.cgroups import (
    Events,
    Room,
    cgroup_room,
    memory_cgroups,
    memory_folders,
    parse_counts,
    parse_limit,
    text_of,
)
from tests.fake_machine import GB, MB, V1_MOUNTS, V1_UNLIMITED, V2_MOUNTS, Machine

Limit = Callable[..., None]


@pytest.fixture(params=["v1", "v2"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Machine, Limit]:
    """A machine with a process in the cgroup /apps/expertd of either version, and what sets a limit there."""
    machine: Machine = getattr(Machine(tmp_path), f"in_{request.param}")()
    return machine, getattr(machine, request.param)


def events(machine: Machine) -> Events | None:
    """Those of the process's own cgroup."""
    proc = machine.root / "proc/self"
    return memory_cgroups((proc / "cgroup").read_text(), (proc / "mountinfo").read_text(), machine.root)[0].events()


def test_counts_are_read_and_other_lines_skipped() -> None:
    assert parse_counts("max 3\noom_kill 0\n\nnonsense\nhalf x\na b c\n") == {"max": 3, "oom_kill": 0}


@pytest.mark.parametrize(
    ("text", "limit"),
    [("2000000000\n", 2 * GB), (f"{V1_UNLIMITED}\n", None), ("max\n", None), ("", None), ("-1\n", None), ("0\n", 0)],
)
def test_limits(text: str, limit: int | None) -> None:
    assert parse_limit(text) == limit


V2_ELSEWHERE = "30 23 0:26 / /mnt/c\\040g rw - cgroup2 cgroup2 rw\n"
CONTAINER = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "present", "found"),
    [
        ("0::/a/b\n", V2_MOUNTS, "/sys/fs/cgroup/a/b", [(2, ["/a/b", "/a", ""])]),
        ("0::/\n", V2_MOUNTS, "/sys/fs/cgroup", [(2, [""])]),
        ("0::/not/shown\n", V2_MOUNTS, "/sys/fs/cgroup", [(2, [""])]),
        ("0::/../outside\n", V2_MOUNTS, "/sys/fs/cgroup", [(2, [""])]),
        ("4:memory:/docker/abc/x\n", CONTAINER, "/sys/fs/cgroup/memory/x", [(1, ["/memory/x", "/memory"])]),
        ("4:memory:/docker/abcd\n", CONTAINER, "/sys/fs/cgroup/memory", [(1, ["/memory"])]),
        ("4:cpu,memory:/a\n3:cpuset:/b\n", V1_MOUNTS, "/sys/fs/cgroup/memory/a", [(1, ["/memory/a", "/memory"])]),
        ("3:cpuset:/b\n", V1_MOUNTS, "/sys/fs/cgroup/memory", []),
        ("0::/a\n", "", "/sys/fs/cgroup", []),
        ("", V2_MOUNTS, "/sys/fs/cgroup", []),
        ("nonsense\n", "nonsense - x\n", "/sys/fs/cgroup", []),
    ],
)
def test_the_folders_of_a_cgroup(cgroup: str, mounts: str, present: str, found: list[tuple[int, list[str]]]) -> None:
    wanted = [(version, [f"/sys/fs/cgroup{folder}" for folder in folders]) for version, folders in found]
    assert memory_folders(cgroup, mounts, lambda folder: (present + "/").startswith(folder + "/")) == wanted


def test_a_mount_point_with_a_space_and_one_of_two_mounts() -> None:
    def exists(folder: str) -> bool:
        return folder in ("/mnt/c g", "/mnt/c g/a", "/sys/fs/cgroup")

    assert memory_folders("0::/a\n", V2_ELSEWHERE, exists) == [(2, ["/mnt/c g/a", "/mnt/c g"])]
    assert memory_folders("0::/a\n", V2_MOUNTS + V2_ELSEWHERE, exists) == [(2, ["/mnt/c g/a", "/mnt/c g"])]


def test_unlimited_cgroups_have_no_room_to_tell_of(either: tuple[Machine, Limit]) -> None:
    assert cgroup_room(either[0].root) is None


def test_of_its_own_limit_a_cgroup_has_left_what_is_not_used_or_can_be_dropped(either: tuple[Machine, Limit]) -> None:
    machine, limit = either
    limit("/apps/expertd", 2 * GB, 1950 * MB)
    assert cgroup_room(machine.root) == Room(2 * GB, 50 * MB)
    limit("/apps/expertd", 2 * GB, 1950 * MB, 1500 * MB)
    assert cgroup_room(machine.root) == Room(2 * GB, 1550 * MB)
    limit("/apps/expertd", GB, 1950 * MB)
    assert cgroup_room(machine.root) == Room(GB, -950 * MB)


def test_the_lowest_limit_and_the_least_that_is_left_may_be_of_two_cgroups(either: tuple[Machine, Limit]) -> None:
    machine, limit = either
    limit("/apps", 4 * GB, 3700 * MB)
    limit("/apps/expertd", 2 * GB, 500 * MB)
    assert cgroup_room(machine.root) == Room(2 * GB, 300 * MB)


def test_v1_tells_of_a_limit_above_that_a_container_does_not_see(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.membership("4:memory:/docker/abc\n", V1_MOUNTS)
    machine.v1("", V1_UNLIMITED, 950 * MB)
    stat = f"hierarchical_memory_limit {GB}\ntotal_inactive_file 0\ntotal_active_file 0\n"
    machine.write("/sys/fs/cgroup/memory/memory.stat", stat)
    assert cgroup_room(machine.root) == Room(GB, 50 * MB)


def test_of_max_and_high_the_lower_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path).in_v2()
    machine.v2("/apps/expertd", 4 * GB, 500 * MB, throttle=GB)
    assert cgroup_room(machine.root) == Room(GB, 500 * MB)
    machine.v2("/apps/expertd", GB, 500 * MB, throttle=4 * GB)
    assert cgroup_room(machine.root) == Room(GB, 500 * MB)


def test_events_are_counted_by_both_versions(tmp_path: Path) -> None:
    v1, v2 = Machine(tmp_path / "1").in_v1(), Machine(tmp_path / "2").in_v2()
    v1.v1("/apps/expertd", V1_UNLIMITED, GB, failcnt=7, kills=2)
    assert events(v1) == Events(hits=7, kills=2)
    v2.v2("/apps/expertd", "max", GB, max=7, high=5, oom=1, oom_kill=2)
    assert events(v2) == Events(hits=7, high=5, kills=3)
    v2.remove("/sys/fs/cgroup/apps/expertd/memory.events.local")
    assert events(v2) is None


def test_the_own_cgroup_is_first_and_those_above_have_their_path_as_name(either: tuple[Machine, Limit]) -> None:
    proc = either[0].root / "proc/self"
    found = memory_cgroups((proc / "cgroup").read_text(), (proc / "mountinfo").read_text(), either[0].root)
    names = [(cgroup.name, cgroup.own) for cgroup in found]
    assert names[:2] == [("the cgroup", True), ("the cgroup /apps", False)]
    assert names[2:] in ([], [("the cgroup /", False)]), "v2's root cgroup has no memory files"


def test_a_system_without_the_files_has_no_room_to_tell_of(tmp_path: Path) -> None:
    assert text_of(tmp_path) is None
    assert cgroup_room(tmp_path / "nothing") is None


@pytest.mark.parametrize("gone", ["proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup"])
def test_what_cannot_be_read_is_as_if_it_were_not_there(either: tuple[Machine, Limit], gone: str) -> None:
    machine, limit = either
    limit("/apps/expertd", 2 * GB, GB)
    (machine.root / gone).rename(machine.root / "elsewhere")
    assert cgroup_room(machine.root) is None


def test_files_of_nonsense_do_no_harm(either: tuple[Machine, Limit]) -> None:
    machine, limit = either
    limit("/apps/expertd", 2 * GB, GB)
    mountinfo = machine.root / "proc/self/mountinfo"
    mountinfo.write_text(mountinfo.read_text() + "30 23 0:26 / /a\\000b rw - cgroup2 cgroup2 rw,memory\n")
    assert cgroup_room(machine.root) == Room(2 * GB, GB)
    for file in sorted(machine.root.rglob("memory.*")):
        file.write_bytes(b"\xff\x00 max\n")
    assert cgroup_room(machine.root) is None
    for file in sorted(machine.root.rglob("*")):
        if file.is_file():
            file.write_bytes(b"\xff\x00 max\n")
    assert cgroup_room(machine.root) is None
