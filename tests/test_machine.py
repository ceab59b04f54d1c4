"""The default budget, for machines from a small container to a large workstation, and with its reasons."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.daemon.machine import FLOOR, SYSTEM_LEAST, Machine, default_budget, this_machine

MB = 1_000_000
GB = 1000 * MB


@pytest.mark.parametrize(
    ("total", "available", "limit", "size"),
    [
        (64 * GB, 60 * GB, None, 32 * GB),
        (64 * GB, 20 * GB, None, 20 * GB - 6400 * MB - 8 * GB),
        (16 * GB, 12 * GB, None, 8 * GB),
        (16 * GB, 10 * GB, None, 6 * GB),
        (16 * GB, 4 * GB, None, FLOOR),
        (8 * GB, 5 * GB, None, 2 * GB),
        (2 * GB, 2 * GB, None, FLOOR),
        (64 * GB, 16 * GB, 16 * GB, 8 * GB),
        (64 * GB, 9 * GB, 16 * GB, 5 * GB),
        (64 * GB, GB, GB, FLOOR),
        (64 * GB, 60 * GB, 128 * GB, 32 * GB),
        (0, 0, None, FLOOR),
    ],
)
def test_the_budget_of_a_machine(total: int, available: int, limit: int | None, size: int) -> None:
    assert default_budget(Machine(total, available, limit)).size == size


def test_the_reasons_are_lines_with_sizes() -> None:
    assert default_budget(Machine(16 * GB, 10 * GB, None)).why == [
        "total: 16.0 GB",
        "available: 10.0 GB",
        "reserve for the system: 2.0 GB (the larger of 2.0 GB and 10 %)",
        "reserve for the page cache: 2.0 GB (1/8; without it a bigger cache is slower, mlx-lm#1438)",
        "what remains: 6.0 GB",
        "base weights and apps: at least half stays theirs, so at most 8.0 GB for experts",
        "budget: 6.0 GB, what remains of the available memory",
    ]


def test_half_of_the_memory_is_named_where_it_decides() -> None:
    assert default_budget(Machine(64 * GB, 60 * GB, None)).why[-1] == "budget: 32.0 GB, half of the memory"


def test_a_cgroup_s_limit_is_named_where_it_is_lower_than_the_total() -> None:
    line = "limit of the memory cgroup: 16.0 GB, which counts in place of the total"
    assert line in default_budget(Machine(64 * GB, 16 * GB, 16 * GB)).why
    assert not any("cgroup" in why for why in default_budget(Machine(64 * GB, 60 * GB, 128 * GB)).why)


def test_the_floor_is_named_where_it_decides() -> None:
    assert default_budget(Machine(8 * GB, 3 * GB, None)).why[-1] == (
        "budget: 256 MB, the least that is of use, though only 0 B can be spared"
    )


@given(st.integers(0, 2000 * GB), st.floats(0, 1), st.none() | st.integers(0, 2000 * GB))
def test_whatever_the_machine_the_reserves_hold_or_the_floor_does(total: int, part: float, limit: int | None) -> None:
    available = int(total * part)
    memory = total if limit is None else min(total, limit)
    size = default_budget(Machine(total, available, limit)).size
    assert size >= FLOOR
    if size > FLOOR:
        assert size <= memory // 2
        assert size <= available - SYSTEM_LEAST - memory // 8
        assert size <= available - memory // 10 - memory // 8


def test_this_very_machine() -> None:
    machine = this_machine()
    assert machine.total == psutil.virtual_memory().total
    assert 0 <= machine.available <= machine.total
    assert machine.limit is None or machine.limit > 0
    assert default_budget(machine).size >= FLOOR


def test_a_cgroup_leaves_less_than_the_machine_has(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/box/memory.max": "100000000\n",
        "sys/fs/cgroup/box/memory.current": "70000000\n",
        "sys/fs/cgroup/box/memory.stat": "inactive_file 10000000\nactive_file 5000000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    machine = this_machine(tmp_path)
    assert machine.limit == 100 * MB
    assert machine.available == 45 * MB


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert this_machine(tmp_path).limit is None
