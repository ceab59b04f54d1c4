"""What ``benchmarks pressure`` makes of what it sees: gaps less reads, changes of direction; and its cgroup."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.pressure import cgroup
from benchmarks.pressure.noise import most_in_a_minute, noise_figures, turns
from benchmarks.pressure.stalls import Gap, Reads, stall_s
from expertd.daemon.core.governor import Change
from expertd.daemon.pressure import Level


def sampled(*samples: tuple[float, float]) -> Reads:
    """A session whose reads were asked for at these times, and answered at once."""
    reads = Reads()
    for at, waited in samples:
        reads.add(at, at, waited)
    return reads


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(0.0, 5.0), (10.0, 5.0)], 0.0),
        ([(0.0, 0.0), (10.0, 10.0)], 4.0),
        ([(2.0, 1.0), (6.0, 3.0)], 2.0),
        ([(0.0, 0.0), (2.0, 0.0), (4.0, 1.0), (6.0, 1.0)], 1.0),
        ([(1.0, 0.0), (3.0, 1.0), (5.0, 1.0), (7.0, 2.0)], 0.0),
        ([(4.0, 3.0)], 0.0),
        ([(9.0, 3.0)], 0.0),
        ([], 0.0),
    ],
    ids=["none", "all the time", "sampled where it begins and ends", "in the middle", "perhaps outside", "seen once",
         "seen too late", "never seen"],
)  # fmt: skip
def test_reads_in_a_gap_are_those_that_cannot_have_been_outside(
    samples: list[tuple[float, float]], expected: float
) -> None:
    assert sampled(*samples).within(Gap(2.0, 6.0)) == expected


def test_a_stall_is_a_gap_less_its_reads() -> None:
    assert stall_s(Gap(1.0, 4.0), [sampled((0.0, 0.0), (1.0, 0.0), (4.0, 2.5), (9.0, 2.5))]) == 0.5
    assert stall_s(Gap(1.0, 4.0), []) == 3.0


def test_of_two_workers_the_one_that_read_longer_counts() -> None:
    assert stall_s(Gap(0.0, 4.0), [sampled((0.0, 0.0), (4.0, 3.0)), sampled((0.0, 7.0), (4.0, 8.0))]) == 1.0


@given(
    busy=st.lists(st.booleans(), min_size=40, max_size=40),
    late=st.lists(st.integers(0, 9), min_size=5, max_size=5),
    begin=st.integers(0, 39),
    length=st.integers(1, 40),
)
def test_a_stall_is_never_shorter_than_it_was_and_longer_by_the_time_between_two_samples_at_most(
    busy: list[bool], late: list[int], begin: int, length: int
) -> None:
    """Reads in units of time; asked for every ten of them, answered up to nine later, with the value of that moment."""
    so_far = [sum(busy[:now]) for now in range(41)]
    end = min(40, begin + length)
    reads = Reads()
    for number in range(5):
        asked = 10 * number
        told = min(40, asked + late[number])
        reads.add(asked, told, so_far[told])
    true = so_far[end] - so_far[begin]
    found = reads.within(Gap(begin, end))
    assert found <= true
    if not any(late):
        assert found >= true - 10


def change(at: float, before: int, after: int) -> Change:
    return Change(at, Level.NORMAL, "", before, after)


def test_a_turn_is_a_step_up_after_one_down_or_a_step_down_after_one_up() -> None:
    limits = [800, 700, 600, 700, 800, 50]
    changes = [change(10.0 * n, *pair) for n, pair in enumerate(pairwise(limits))]
    assert [turn.at for turn in turns(changes)] == [20.0, 40.0]


def test_a_minute_begins_anywhere_and_does_not_hold_its_end() -> None:
    at = [change(second, 2, 1) for second in (50.0, 70.0, 109.9, 110.0)]
    assert most_in_a_minute(at) == 3
    assert most_in_a_minute(at[:2]) == 2
    assert most_in_a_minute([]) == 0


def test_in_hours_of_noise_it_begins_to_grow_once_a_minute_at_most() -> None:
    figures = noise_figures(8)
    assert figures["upturns_per_minute_max"] == 1
    assert figures["turns_per_minute_max"] <= 2
    assert figures["turns_per_hour_max"] <= 20


def test_a_cgroup_that_cannot_be_removed_is_an_error_that_names_who_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "REMOVE_S", 0.2)
    with subprocess.Popen(["sleep", "60"]) as process:
        (tmp_path / "cgroup.procs").write_text(f"{process.pid}\n")
        with pytest.raises(RuntimeError, match=rf"cannot be removed .*; in it: process {process.pid} \(sleep 60\)"):
            cgroup._remove(tmp_path)
        process.terminate()
