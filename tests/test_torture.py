"""The short form of ``benchmarks torture``: under every kind of attack nothing is lost, leaked or wrong."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import torture
from benchmarks.torture.damage import KINDS, Checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="attacks and counts through /proc and prlimit")

MINUTES = 0.3


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """One run for all tests: four workers, some twenty attacks."""
    return torture.run(minutes=MINUTES, seed=3)


@pytest.mark.parametrize(
    "figure",
    [
        "wrong_tokens",
        "untyped_failures",
        "stuck",
        "failed_by_sleep",
        "unrecovered",
        "daemon_crashes",
        "leaked_segments",
        "leaked_processes",
        "leaked_descriptors",
    ],
)
def test_nothing_of_this_happens(figures: dict[str, Any], figure: str) -> None:
    if figures[figure] is None:
        pytest.skip("the daemon that was measured did not answer in the end")
    assert figures[figure] == 0


def test_there_was_something_to_survive(figures: dict[str, Any]) -> None:
    assert figures["kills"] >= 3
    assert figures["stops"] >= 1
    assert figures["right"] >= 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_damage_is_undone_to_the_last_trace(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    path.write_bytes(b"a" * 1000)
    other.write_bytes(b"b" * 1000)
    before = path.stat()
    undo = Checkpoint(path, other).damage(kind, random.Random(1))
    undo()
    after = path.stat()
    same = ("st_size", "st_mtime_ns", "st_ino", "st_mode")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert path.read_bytes() == b"a" * 1000
    assert sorted(tmp_path.iterdir()) == [path, other]
