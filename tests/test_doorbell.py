"""A thread that waits is woken by a ring, and by another file at a path."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expertd.worker.doorbell import Doorbell
from tests.conftest import DEADLINE_S


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    made = Doorbell()
    yield made
    made.close()


def wakes(bell: Doorbell, door: Path | None, act: Callable[[], object]) -> bool:
    """Whether somebody who waits for ever wakes when that happens, and not before."""
    waits = threading.Thread(target=bell.wait, args=(3 * DEADLINE_S, door))
    waits.start()
    waits.join(0.3)
    assert waits.is_alive(), "it did not wait"
    act()
    waits.join(DEADLINE_S)
    woken = not waits.is_alive()
    bell.ring()
    waits.join()
    return woken


def test_a_ring_wakes(bell: Doorbell, tmp_path: Path) -> None:
    assert wakes(bell, None, bell.ring)
    bell.answer()
    assert wakes(bell, tmp_path / "door", bell.ring)


def test_another_file_wakes(bell: Doorbell, tmp_path: Path) -> None:
    """One that comes, that takes the place of one that was left, or that goes."""
    door, next_door = tmp_path / "door", tmp_path / "next"
    assert wakes(bell, door, door.touch)
    bell.answer()
    next_door.touch()
    assert wakes(bell, door, lambda: next_door.replace(door))
    bell.answer()
    assert wakes(bell, door, door.unlink)
