"""Memory pressure as the platforms tell it, from files that look like the kernel's, and from scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expertd.daemon.pressure import Content, Level, Reading, system_source
from expertd.daemon.pressure.linux import (
    LEFT,
    LEFT_AFTER_HIT,
    RECENT_S,
    SWAP_GROWTH,
    SWAP_S,
    LinuxSource,
    Meminfo,
    Stalls,
    judge_machine,
    judge_room,
    judge_stalls,
    parse_meminfo,
    parse_stalls,
)
from expertd.daemon.pressure.macos import PRESSURE, MacSource, macos_source, sysctl_int
from expertd.daemon.pressure.scripted import ScriptedSource, parse_script
from expertd.protocol.cgroups import Room
from expertd.protocol.errors import DaemonStartFailed, ExpertdError
from tests.fake_machine import GB, KIB, MB, V1_MOUNTS, V1_UNLIMITED, V2_MOUNTS, Clock, Machine

NORMAL, WARNING, CRITICAL = Level.NORMAL, Level.WARNING, Level.CRITICAL


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def in_v1(machine: Machine) -> Machine:
    return machine.in_v1()


@pytest.fixture
def in_v2(machine: Machine) -> Machine:
    return machine.in_v2()


def test_levels_are_ordered_and_have_words() -> None:
    assert NORMAL < WARNING < CRITICAL
    assert [level.word for level in Level] == ["normal", "warning", "critical"]


def test_this_system_has_a_source_that_can_be_read_again_and_again() -> None:
    source = system_source()
    for _ in range(20):
        reading = source.read()
        assert reading.level in Level
        assert reading.figure


@pytest.mark.parametrize("platform", ["darwin", "linux", "freebsd14"])
def test_every_system_has_a_source(platform: str) -> None:
    assert system_source(platform).read().figure


def test_a_system_that_reports_nothing_is_content() -> None:
    assert system_source("freebsd14").read() == Reading(NORMAL, "this system reports no memory pressure")


@pytest.mark.parametrize(
    ("value", "level", "figure"),
    [
        (1, NORMAL, "the kernel reports memory pressure level 1 (normal)"),
        (2, WARNING, "the kernel reports memory pressure level 2 (warning)"),
        (4, CRITICAL, "the kernel reports memory pressure level 4 (critical)"),
        (3, NORMAL, "the kernel reports memory pressure level 3 (unknown, taken as normal)"),
        (0, NORMAL, "the kernel reports memory pressure level 0 (unknown, taken as normal)"),
    ],
)
def test_the_mac_kernel_s_level_is_taken_over(value: int, level: Level, figure: str) -> None:
    assert MacSource({PRESSURE: value}.__getitem__).read() == Reading(level, figure)


def test_a_mac_kernel_that_reports_nothing_is_content() -> None:
    def fails(name: str) -> int:
        raise OSError(2, f"No such file or directory: sysctl {name}")

    source = macos_source(fails)
    assert isinstance(source, Content)
    assert source.read().level is NORMAL
    assert source.read().figure.startswith("the kernel does not report its memory pressure (")


def test_a_mac_kernel_that_stops_to_report_is_normal_and_says_so() -> None:
    answers: list[int | OSError] = [4, 4, OSError("gone"), 2]

    def sysctl(name: str) -> int:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    source = macos_source(sysctl)
    assert source.read().level is CRITICAL
    assert source.read() == Reading(NORMAL, "the kernel no longer reports its memory pressure (gone)")
    assert source.read().level is WARNING


def test_the_real_sysctl_answers_or_raises_os_error() -> None:
    if sys.platform == "darwin":
        assert sysctl_int(PRESSURE) in (1, 2, 4)
        with pytest.raises(OSError, match=r"no\.such\.name"):
            sysctl_int("no.such.name")
    else:
        with pytest.raises(OSError, match="no sysctlbyname"):
            sysctl_int(PRESSURE)


def test_meminfo_is_in_kib_and_swap_may_be_missing() -> None:
    text = "MemTotal:  1000 kB\nMemFree:  1 kB\nMemAvailable:   400 kB\n"
    assert parse_meminfo(text) == Meminfo(1000 * KIB, 400 * KIB, 0)
    swap = "SwapCached:  5 kB\nSwapTotal: 50 kB\nSwapFree: 20 kB\nHugePages_Total:  0\n"
    assert parse_meminfo(text + swap) == Meminfo(1000 * KIB, 400 * KIB, 30 * KIB)


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "MemAvailable: 5 kB\n", "MemTotal: 0 kB\nMemAvailable: 5 kB"])
def test_meminfo_without_what_counts_is_none(text: str) -> None:
    assert parse_meminfo(text) is None


def test_stalls() -> None:
    some = "some avg10=3.10 avg60=2.00 avg300=1.00 total=12345\n"
    assert parse_stalls(some + "full avg10=0.50 avg60=0.00 avg300=0.00 total=1\n") == Stalls(3.1, 0.5)
    assert parse_stalls(some) == Stalls(3.1, 0.0)
    assert parse_stalls("") is None


@pytest.mark.parametrize(
    ("limit", "left", "level"),
    [
        (GB, GB, NORMAL),
        (GB, 150 * MB, NORMAL),
        (GB, 149 * MB, WARNING),
        (GB, 60 * MB, WARNING),
        (GB, 59 * MB, CRITICAL),
        (GB, 0, CRITICAL),
        (GB, -5 * MB, CRITICAL),
        (64 * GB, 2001 * MB, NORMAL),
        (64 * GB, 1999 * MB, WARNING),
        (64 * GB, 769 * MB, WARNING),
        (64 * GB, 767 * MB, CRITICAL),
    ],
)
def test_what_is_left_of_a_limit(limit: int, left: int, level: Level) -> None:
    assert LEFT.level(left, limit) is level
    assert judge_room(Room(limit, left), "the cgroup").level is level
    assert judge_machine(Meminfo(limit, left, 0), 0).level is level


@pytest.mark.parametrize(
    ("left", "hit", "high", "level"),
    [
        (500 * MB, True, True, NORMAL),
        (201 * MB, True, False, NORMAL),
        (199 * MB, True, False, WARNING),
        (199 * MB, False, True, WARNING),
        (101 * MB, True, False, WARNING),
        (99 * MB, True, False, CRITICAL),
        (99 * MB, False, True, WARNING),
        (99 * MB, True, True, CRITICAL),
        (59 * MB, False, True, CRITICAL),
    ],
)
def test_a_hit_counts_only_where_little_is_left_without_cache(left: int, hit: bool, high: bool, level: Level) -> None:
    assert judge_room(Room(GB, left), "the cgroup", hit, high).level is level


def test_thresholds_after_a_hit_are_wider() -> None:
    for limit in (100 * MB, GB, 16 * GB, 512 * GB):
        assert 0 < LEFT.critical(limit) < LEFT_AFTER_HIT.critical(limit) < LEFT_AFTER_HIT.warning(limit)
        assert LEFT.warning(limit) < LEFT_AFTER_HIT.warning(limit)


@pytest.mark.parametrize(
    ("some", "full", "level", "figure"),
    [
        (0.0, 0.0, NORMAL, "0.0 % of the last 10 s were lost waiting for memory (PSI some avg10)"),
        (9.9, 9.9, NORMAL, "9.9 % of the last 10 s were lost waiting for memory (PSI some avg10)"),
        (10.0, 0.0, WARNING, "10.0 % of the last 10 s were lost waiting for memory (PSI some avg10)"),
        (99.0, 9.9, WARNING, "99.0 % of the last 10 s were lost waiting for memory (PSI some avg10)"),
        (40.0, 10.0, CRITICAL, "10.0 % of the last 10 s were lost waiting for memory (PSI full avg10)"),
    ],
)
def test_stalls_by_their_share(some: float, full: float, level: Level, figure: str) -> None:
    finding = judge_stalls(Stalls(some, full), None)
    assert finding is not None
    assert finding.reading == Reading(level, figure)


def test_a_machine_with_plenty_is_normal_and_tells_how_much(machine: Machine) -> None:
    assert machine.source().read() == Reading(NORMAL, "15.0 GB of the machine's 16.0 GB are available")


def test_a_machine_that_runs_out(machine: Machine) -> None:
    source = machine.source()
    machine.memory(16 * GB, 1500 * MB)
    assert source.read() == Reading(WARNING, "1.5 GB of the machine's 16.0 GB are available")
    machine.memory(16 * GB, 500 * MB)
    assert source.read() == Reading(CRITICAL, "500 MB of the machine's 16.0 GB are available")
    machine.memory(16 * GB, 9 * GB)
    assert source.read().level is NORMAL


def test_stalls_count_unless_most_of_the_memory_is_left(machine: Machine) -> None:
    source = machine.source()
    machine.stalls(30.0, 0.0)
    assert source.read().level is NORMAL, "another cgroup is at its own limit"
    machine.memory(16 * GB, 5 * GB)
    assert source.read() == Reading(
        WARNING, "30.0 % of the last 10 s were lost waiting for memory (PSI some avg10)"
    )
    machine.stalls(30.0, 12.0)
    assert source.read().level is CRITICAL


def test_at_normal_the_figure_nearest_to_its_threshold_is_told(machine: Machine) -> None:
    machine.memory(16 * GB, 5 * GB)
    machine.stalls(9.0, 0.0)
    source = machine.source()
    assert source.read() == Reading(NORMAL, "9.0 % of the last 10 s were lost waiting for memory (PSI some avg10)")
    machine.stalls(0.1, 0.0)
    assert source.read() == Reading(NORMAL, "5.0 GB of the machine's 16.0 GB are available")


def test_swap_that_grows_quickly_is_a_warning_until_it_stops(machine: Machine) -> None:
    def use(swap: int) -> Level:
        machine.memory(16 * GB, 6 * GB, 8 * GB, 8 * GB - swap)
        machine.clock.now += 1.0
        return source.read().level

    machine.memory(16 * GB, 6 * GB, 8 * GB, 6 * GB)
    source = machine.source()
    assert use(2 * GB) is NORMAL, "what was swapped before is no growth"
    assert use(2 * GB + 200 * MB) is NORMAL
    assert use(2 * GB + SWAP_GROWTH + MB) is WARNING
    assert source.read().figure.startswith("swap grew by 257 MB in 5 s")
    for _ in range(int(SWAP_S) - 2):
        assert use(2 * GB + SWAP_GROWTH + MB) is WARNING
    use(2 * GB + SWAP_GROWTH + MB)
    assert use(2 * GB + SWAP_GROWTH + MB) is NORMAL
    assert use(GB) is NORMAL
    assert [use(GB + step * 10 * MB) for step in range(20)] == [NORMAL] * 20, "slow growth"


def test_swap_that_grows_while_most_of_the_memory_is_free_says_nothing(machine: Machine) -> None:
    machine.memory(16 * GB, 12 * GB, 8 * GB, 8 * GB)
    source = machine.source()
    machine.memory(16 * GB, 12 * GB, 8 * GB, 6 * GB)
    assert source.read().level is NORMAL


def test_files_that_vanish_are_normal_and_named(machine: Machine) -> None:
    machine.memory(16 * GB, 500 * MB)
    machine.stalls(1.0, 0.0)
    source = machine.source()
    assert source.read().level is CRITICAL
    machine.remove("/proc/meminfo")
    assert source.read() == Reading(
        NORMAL,
        "1.0 % of the last 10 s were lost waiting for memory (PSI some avg10); /proc/meminfo can no longer be read",
    )
    machine.remove("/proc/pressure/memory")
    assert source.read() == Reading(NORMAL, "/proc/meminfo and /proc/pressure/memory can no longer be read")
    machine.memory(16 * GB, 500 * MB)
    assert source.read().level is CRITICAL


def test_cgroups_are_not_forgotten_while_nobody_can_read_which_they_are(in_v2: Machine) -> None:
    in_v2.v2("/apps/expertd", 2 * GB, GB)
    source = in_v2.source()
    in_v2.v2("/apps/expertd", 2 * GB, GB, oom_kill=1)
    in_v2.remove("/proc/self/cgroup")
    killed = "the out-of-memory killer came to the cgroup less than 5 s ago"
    assert source.read().figure == killed
    in_v2.membership("0::/apps/expertd\n", V2_MOUNTS)
    assert source.read().figure == killed


def test_a_move_while_nobody_can_read_where_cgroups_are_mounted_is_noticed_later(in_v2: Machine) -> None:
    in_v2.v2("/apps/expertd", 2 * GB, 1950 * MB)
    source = in_v2.source()
    in_v2.write("/proc/self/cgroup", "0::/apps\n")
    in_v2.remove("/proc/self/mountinfo")
    assert source.read().level is CRITICAL
    in_v2.membership("0::/apps\n", V2_MOUNTS)
    assert source.read().level is NORMAL


def test_a_system_without_any_of_the_files_reports_nothing(tmp_path: Path) -> None:
    source = LinuxSource(tmp_path / "nothing")
    assert source.read() == Reading(NORMAL, "this system reports no memory pressure")


def test_files_of_nonsense_do_no_harm(in_v2: Machine) -> None:
    in_v2.v2("/apps/expertd", 2 * GB, GB)
    source = in_v2.source()
    for file in sorted(in_v2.root.rglob("*")):
        if file.is_file():
            file.write_bytes(b"\xff\x00 some avg10=x\nmax\n")
    assert source.read().level is NORMAL


def test_unlimited_cgroups_say_nothing(in_v1: Machine) -> None:
    assert "machine's" in in_v1.source().read().figure


def test_unlimited_cgroups_of_v2_say_nothing(in_v2: Machine) -> None:
    assert "machine's" in in_v2.source().read().figure


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_cgroup_s_own_limit(version: str, request: pytest.FixtureRequest) -> None:
    machine: Machine = request.getfixturevalue(f"in_{version}")
    limit: Callable[..., None] = getattr(machine, version)
    source = machine.source()
    limit("/apps/expertd", 2 * GB, 1800 * MB)
    assert source.read() == Reading(WARNING, "the cgroup has 200 MB left of its limit of 2.0 GB")
    limit("/apps/expertd", 2 * GB, 1950 * MB)
    assert source.read() == Reading(CRITICAL, "the cgroup has 50.0 MB left of its limit of 2.0 GB")
    limit("/apps/expertd", 2 * GB, 1950 * MB, 1500 * MB)
    assert source.read() == Reading(NORMAL, "the cgroup has 1.6 GB left of its limit of 2.0 GB")


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_parent_s_limit_counts_too_with_all_that_it_holds(version: str, request: pytest.FixtureRequest) -> None:
    machine: Machine = request.getfixturevalue(f"in_{version}")
    limit: Callable[..., None] = getattr(machine, version)
    limit("/apps", 4 * GB, 3700 * MB)
    limit("/apps/expertd", 2 * GB, 500 * MB)
    assert machine.source().read() == Reading(
        WARNING, "the cgroup /apps has 300 MB left of its limit of 4.0 GB"
    )


def test_v1_tells_of_a_limit_above_that_a_container_does_not_see(machine: Machine) -> None:
    machine.membership("4:memory:/docker/abc\n", V1_MOUNTS)
    machine.v1("", V1_UNLIMITED, 950 * MB)
    stat = machine.root / "sys/fs/cgroup/memory/memory.stat"
    stat.write_text(f"hierarchical_memory_limit {GB}\ntotal_inactive_file 0\ntotal_active_file 0\n")
    assert machine.source().read() == Reading(CRITICAL, "the cgroup has 50.0 MB left of its limit of 1.0 GB")


def test_a_container_s_cgroup_is_the_root_of_its_namespace(machine: Machine) -> None:
    machine.membership("0::/\n", V2_MOUNTS)
    machine.v2("", GB, 900 * MB)
    assert machine.source().read() == Reading(WARNING, "the cgroup has 100 MB left of its limit of 1.0 GB")


def test_v1_s_failcnt_counts_only_if_little_is_left_without_cache(in_v1: Machine) -> None:
    in_v1.v1("/apps/expertd", 2 * GB, 2 * GB, 1500 * MB)
    source = in_v1.source()
    in_v1.v1("/apps/expertd", 2 * GB, 2 * GB, 1500 * MB, failcnt=500)
    assert source.read().level is NORMAL, "a program reads large files"
    in_v1.v1("/apps/expertd", 2 * GB, 2 * GB, 350 * MB, failcnt=501)
    assert source.read() == Reading(WARNING, "the cgroup has 350 MB left of its limit of 2.0 GB and has just hit it")
    in_v1.v1("/apps/expertd", 2 * GB, 2 * GB, 150 * MB, failcnt=501)
    assert source.read().level is CRITICAL
    in_v1.clock.now += RECENT_S
    assert source.read() == Reading(WARNING, "the cgroup has 150 MB left of its limit of 2.0 GB")


def test_v2_s_events_max_and_high(in_v2: Machine) -> None:
    in_v2.v2("/apps/expertd", 2 * GB, 2 * GB, 1500 * MB, max=7, high=7)
    source = in_v2.source()
    assert source.read().level is NORMAL, "what happened before does not count"
    in_v2.v2("/apps/expertd", 2 * GB, 2 * GB, 1500 * MB, max=900, high=900)
    assert source.read().level is NORMAL, "a program reads large files"
    in_v2.clock.now += RECENT_S
    in_v2.v2("/apps/expertd", 2 * GB, 2 * GB, 150 * MB, max=900, high=901)
    assert source.read().level is WARNING
    in_v2.v2("/apps/expertd", 2 * GB, 2 * GB, 150 * MB, max=901, high=901)
    assert source.read().level is CRITICAL
    in_v2.clock.now += RECENT_S
    in_v2.v2("/apps/expertd", 2 * GB, GB, 150 * MB, max=901, high=901)
    assert source.read().level is NORMAL


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_kill_is_critical_for_some_seconds_whatever_is_left(version: str, request: pytest.FixtureRequest) -> None:
    machine: Machine = request.getfixturevalue(f"in_{version}")
    source = machine.source()
    if version == "v1":
        machine.v1("/apps/expertd", V1_UNLIMITED, GB, kills=1)
    else:
        machine.v2("/apps/expertd", "max", GB, oom_kill=1)
    assert source.read() == Reading(CRITICAL, "the out-of-memory killer came to the cgroup less than 5 s ago")
    machine.clock.now += RECENT_S - 0.1
    assert source.read().level is CRITICAL
    machine.clock.now += 0.2
    assert source.read().level is NORMAL


def test_an_old_kernel_has_events_but_no_local_ones(in_v2: Machine) -> None:
    folder = in_v2.root / "sys/fs/cgroup/apps/expertd"
    (folder / "memory.events.local").rename(folder / "memory.events")
    source = in_v2.source()
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 1\noom 1\noom_kill 0\n")
    assert source.read().level is CRITICAL


def test_stalls_of_a_cgroup_count_if_it_has_a_limit(in_v2: Machine) -> None:
    in_v2.v2("/apps/expertd", 2 * GB, 1200 * MB)
    source = in_v2.source()
    in_v2.stalls(60.0, 40.0, "/sys/fs/cgroup/apps/expertd/memory.pressure")
    assert source.read() == Reading(
        CRITICAL, "40.0 % of the last 10 s were lost waiting for memory in the cgroup (PSI full avg10)"
    )
    in_v2.v2("/apps/expertd", 2 * GB, 1200 * MB, 800 * MB)
    assert source.read().level is NORMAL, "stalls with most of the limit left are those of reading files"


def test_a_cgroup_that_vanishes_counts_no_more(in_v2: Machine) -> None:
    in_v2.v2("/apps/expertd", 2 * GB, 1990 * MB)
    source = in_v2.source()
    assert source.read().level is CRITICAL
    for file in (in_v2.root / "sys/fs/cgroup/apps/expertd").iterdir():
        file.unlink()
    assert source.read().level is NORMAL


def test_a_process_that_is_moved_to_another_cgroup_is_followed(in_v2: Machine) -> None:
    source = in_v2.source()
    in_v2.v2("/tight", GB, 990 * MB)
    assert source.read().level is NORMAL
    in_v2.membership("0::/tight\n", V2_MOUNTS)
    assert source.read() == Reading(CRITICAL, "the cgroup has 10.0 MB left of its limit of 1.0 GB")


def test_a_limit_that_is_set_later_is_noticed(in_v1: Machine) -> None:
    source = in_v1.source()
    assert source.read().level is NORMAL
    in_v1.v1("/apps", GB, 990 * MB)
    assert source.read().level is CRITICAL


SCRIPT = """\
# a big program comes and goes
0    normal
10   warning   a big program starts  # and this is a comment
20.5 critical

25   normal
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "pressure.txt"
    path.write_text(SCRIPT)
    return path


def test_a_script_is_followed_in_time_and_its_last_line_holds(script: Path) -> None:
    clock = Clock()
    source = ScriptedSource(script, clock)
    seen: dict[float, Reading] = {}
    for second in (0, 9.9, 10, 20, 20.5, 24, 25, 10_000):
        clock.now = 1000.0 + second
        seen[second] = source.read()
    levels = [NORMAL, NORMAL, WARNING, WARNING, CRITICAL, CRITICAL, NORMAL, NORMAL]
    assert [reading.level for reading in seen.values()] == levels
    assert seen[10].figure == "a big program starts"
    assert seen[20.5].figure == "the script says critical from 20.5 s on"


def test_before_the_first_line_it_is_normal(script: Path) -> None:
    script.write_text("5 critical\n")
    clock = Clock()
    source = ScriptedSource(script, clock)
    assert source.read() == Reading(NORMAL, "the script begins at 5 s")
    clock.now += 5
    assert source.read().level is CRITICAL


def test_of_several_lines_for_one_moment_the_last_counts(script: Path) -> None:
    script.write_text("0 warning\n0 critical\n")
    assert ScriptedSource(script, Clock()).read().level is CRITICAL


def test_an_edit_counts_at_once_with_time_from_the_start(script: Path) -> None:
    clock = Clock()
    source = ScriptedSource(script, clock)
    clock.now += 30
    assert source.read().level is NORMAL
    script.write_text("0 normal\n29 critical until further notice\n")
    assert source.read() == Reading(CRITICAL, "until further notice")
    other = script.with_name("other.txt")
    other.write_text("0 normal\n29 warning  until further notice\n")
    other.replace(script)
    assert source.read().level is WARNING


@pytest.mark.parametrize("content", ["0 warning\n31 crit", "", "nonsense", "5 normal\n1 warning\n", None])
def test_a_bad_edit_keeps_the_former_script(script: Path, content: str | None) -> None:
    clock = Clock()
    source = ScriptedSource(script, clock)
    clock.now += 22
    if content is None:
        script.unlink()
    else:
        script.write_text(content)
    assert source.read().level is CRITICAL
    script.write_text("0 warning\n")
    assert source.read().level is WARNING


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 normal\n7 loud\n", "s.txt, line 2: '7 loud' is no step of pressure; write SECONDS normal|warning|critical"),
        ("0 NORMAL\n", "s.txt, line 1: '0 NORMAL' is no step of pressure"),
        ("7\n", "s.txt, line 1: '7' is no step of pressure"),
        ("# x\nsoon warning\n", "s.txt, line 2: 'soon' is no number of seconds"),
        ("-1 warning\n", "s.txt, line 1: '-1' is no number of seconds"),
        ("nan warning\n", "s.txt, line 1: 'nan' is no number of seconds"),
        ("inf warning\n", "s.txt, line 1: 'inf' is no number of seconds"),
        ("5 warning\n4.5 normal\n", "s.txt, line 2: 4.5 s is earlier than the 5 s before it"),
        ("", "s.txt has no step of pressure; write at least one line SECONDS"),
        ("# nothing\n\n", "s.txt has no step of pressure"),
    ],
)
def test_a_bad_script_names_the_line_and_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(DaemonStartFailed) as caught:
        parse_script(text, "s.txt")
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (b"#" * (1 << 20) + b"\n0 normal\n", "it is no file of at most 1 MiB"),
    ],
)
def test_a_file_that_cannot_be_read_at_the_start_is_an_error(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    path = tmp_path / "script"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExpertdError) as caught:
        ScriptedSource(path)
    assert str(path) in caught.value.message
    assert f"({reason})" in caught.value.message


def test_a_folder_is_no_script(tmp_path: Path) -> None:
    with pytest.raises(ExpertdError, match="it is no file"):
        ScriptedSource(tmp_path)
