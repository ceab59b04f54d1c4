"""How an event is divided into groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.worker.groups import GROUPS, plan_groups


def plan(experts: int, resident: set[int], room: int, overlap: bool) -> list[list[int]]:
    wanted = np.arange(experts)
    here = np.array([expert in resident for expert in range(experts)])
    return [group.tolist() for group in plan_groups(wanted, here, room, overlap)]


def test_what_is_resident_comes_first_and_the_rest_in_some_groups() -> None:
    assert plan(8, {2, 5}, room=100, overlap=True) == [[2, 5], [0, 1], [3, 4], [6], [7]]


def test_a_group_leaves_room_to_read_the_next_beside_it() -> None:
    groups = plan(64, set(range(20)), room=16, overlap=True)
    assert max(map(len, groups)) == 8


def test_without_overlap_there_are_as_few_groups_as_fit() -> None:
    assert plan(6, {3}, room=6, overlap=False) == [[0, 1, 2, 3, 4, 5]]
    assert plan(6, {3}, room=4, overlap=False) == [[3, 0, 1, 2], [4, 5]]


@pytest.mark.parametrize("absent", [1, 2, 3])
def test_there_is_no_empty_group(absent: int) -> None:
    groups = plan(10, set(range(10 - absent)), room=100, overlap=True)
    assert [len(group) for group in groups] == [10 - absent] + [1] * absent


@given(st.integers(1, 200), st.sets(st.integers(0, 199)), st.integers(1, 300), st.booleans())
def test_every_expert_is_in_one_group_that_fits_and_resident_ones_come_before_absent_ones(
    experts: int, resident: set[int], room: int, overlap: bool
) -> None:
    groups = plan(experts, resident, room, overlap)
    flat = [expert for group in groups for expert in group]
    assert sorted(flat) == list(range(experts))
    assert all(0 < len(group) <= room for group in groups)
    if overlap or experts > room:
        here = [expert in resident for expert in flat]
        assert here == sorted(here, reverse=True)
    if overlap and experts > 1:
        absent = sum(expert not in resident for expert in flat)
        assert sum(group[0] not in resident for group in groups) >= min(absent, GROUPS)
