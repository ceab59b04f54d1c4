"""What counts as waiting, and what as waiting for reads: a table, moment by moment, and real reads that take long."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import expertd
from expertd.daemon.waits import Place, Waited, Waits
from expertd.protocol.messages import SessionStatus
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tests.conftest import wait_for
from tools.stage import ask_status, budget_for, end

SEGMENT, LAYER = 7, 2
READ_S = 0.02
SLOW_DAEMON = f"""
import asyncio, os, sys, time
from expertd.daemon.server import Server
from expertd.protocol.paths import Home

def slowly(descriptor, buffers, offset):
    time.sleep({READ_S})
    return os.preadv(descriptor, buffers, offset)

asyncio.run(Server(Home.current(), int(sys.argv[1]), read=slowly).run())
"""


def place(expert: int, segment: int = SEGMENT, layer: int = LAYER) -> Place:
    return Place(segment, layer, expert)


def fetch(waits: Waits, now: float, *experts: int, session: int = 1, sequence: int = 1) -> None:
    waits.fetched(session, sequence, SEGMENT, LAYER, experts, now)


def test_a_fetch_that_is_answered_without_a_read_waited_for_no_read() -> None:
    waits = Waits()
    fetch(waits, 10.0, 1, 2)
    waits.answered(1, 10.5)
    assert waits.all(99.0) == {1: Waited(0.5, 0.0)}


@pytest.mark.parametrize(
    ("reads", "expected"),
    [
        ([(1, 11.0, 12.0)], 1.0),
        ([(1, 11.0, 13.0), (2, 12.0, 14.0)], 3.0),
        ([(1, 11.0, 14.0), (2, 12.0, 13.0)], 3.0),
        ([(1, 11.0, 12.0), (2, 14.0, 15.0)], 2.0),
        ([(1, 11.0, 12.0), (2, 12.0, 13.0)], 2.0),
        ([(1, 8.0, 12.0)], 2.0),
        ([(1, 8.0, 9.0), (2, 14.0, 15.0)], 1.0),
        ([(3, 11.0, 15.0)], 0.0),
    ],
    ids=["one", "overlap", "inside", "apart", "adjoining", "began before", "over before", "another block"],
)
def test_of_the_reads_of_its_blocks_the_union_counts(reads: list[tuple[int, float, float]], expected: float) -> None:
    waits = Waits()
    moments = [(10.0, 1, None), *((at, 0, e) for e, at, _ in reads), *((at, 2, e) for e, _, at in reads)]
    for now, kind, expert in sorted(moments, key=lambda moment: moment[:2]):
        if expert is None:
            fetch(waits, now, 1, 2)
        elif kind == 0:
            waits.read_began(place(expert), now)
        else:
            waits.read_ended(place(expert), now)
    waits.answered(1, 16.0)
    assert waits.all(99.0) == {1: Waited(6.0, expected)}


@pytest.mark.parametrize("elsewhere", [place(1, segment=8), place(1, layer=3)])
def test_reads_of_other_layers_and_segments_do_not_count(elsewhere: Place) -> None:
    waits = Waits()
    fetch(waits, 0.0, 1)
    waits.read_began(elsewhere, 0.0)
    waits.read_ended(elsewhere, 2.0)
    waits.answered(1, 3.0)
    assert waits.all(3.0) == {1: Waited(3.0, 0.0)}


def test_one_read_counts_for_all_that_wait_for_it() -> None:
    waits = Waits()
    fetch(waits, 0.0, 1, session=1)
    waits.read_began(place(1), 1.0)
    fetch(waits, 2.0, 1, session=2)
    waits.read_ended(place(1), 4.0)
    assert waits.all(4.0) == {1: Waited(4.0, 3.0), 2: Waited(2.0, 2.0)}


def test_what_lasts_counts_up_to_now() -> None:
    waits = Waits()
    fetch(waits, 0.0, 1)
    waits.read_began(place(1), 1.0)
    assert [waits.all(now)[1] for now in (1.0, 2.0, 3.0)] == [(1.0, 0.0), (2.0, 1.0), (3.0, 2.0)]


def test_a_fetch_that_comes_again_is_the_same() -> None:
    waits = Waits()
    fetch(waits, 0.0, 1)
    waits.read_began(place(1), 0.0)
    fetch(waits, 2.0, 1)
    waits.read_ended(place(1), 3.0)
    waits.answered(1, 3.0)
    fetch(waits, 4.0, 1)
    waits.answered(1, 5.0)
    assert waits.all(6.0) == {1: Waited(3.0, 3.0)}


def test_who_goes_on_to_another_fetch_waits_for_that_one() -> None:
    waits = Waits()
    fetch(waits, 0.0, 1, sequence=1)
    waits.read_began(place(1), 0.0)
    fetch(waits, 1.0, 2, sequence=2)
    waits.read_ended(place(1), 5.0)
    waits.answered(1, 5.0)
    assert waits.all(9.0) == {1: Waited(5.0, 1.0)}


def test_an_end_that_is_told_late_counts_when_it_was() -> None:
    waits = Waits()
    waits.read_began(place(1), 0.0)
    fetch(waits, 2.0, 1)
    waits.read_ended(place(1), 1.0)
    waits.answered(1, 3.0)
    assert waits.all(3.0) == {1: Waited(1.0, 0.0)}


@given(
    st.lists(
        st.tuples(st.sampled_from(["fetch", "answer", "begin", "end", "over"]), st.integers(0, 3), st.integers(0, 3))
    )
)
def test_whatever_happens_nothing_is_left_and_no_more_was_read_than_waited(steps: list[tuple[str, int, int]]) -> None:
    waits = Waits()
    reading: set[int] = set()
    for now, (what, session, expert) in enumerate(steps):
        match what:
            case "fetch":
                fetch(waits, now, expert, (expert + 1) % 4, session=session, sequence=now + 1)
            case "answer":
                waits.answered(session, now)
            case "begin" if expert not in reading:
                waits.read_began(place(expert), now)
                reading.add(expert)
            case "end" if expert in reading:
                waits.read_ended(place(expert), now)
                reading.discard(expert)
            case "over":
                before = waits.all(now).get(session, Waited())
                assert waits.ended(session, now) == before
        assert all(0 <= waited.read_s <= waited.all_s <= now for waited in waits.all(now).values())
    for expert in reading:
        waits.read_ended(place(expert), len(steps))
    for session in range(4):
        waits.ended(session, len(steps))
    assert not waits.all(len(steps))
    assert not waits._reads


@pytest.fixture
def slow_daemon(home: Home, checkpoints: dict[str, Path]) -> Iterator[None]:
    """A daemon with half of the blocks' slots, of which each read takes READ_S at least."""
    manifest = load_lazily(checkpoints["stacked"]).manifest
    slots = sum(layer.experts for layer in manifest.layers) // 2
    command = [sys.executable, "-c", SLOW_DAEMON, str(budget_for(manifest, slots))]
    with home.daemon_log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(home.daemon_socket.exists)
        yield
    finally:
        end(process)


def session_here(home: Home) -> SessionStatus:
    """This process's only session, as the daemon tells it."""
    (found,) = [s for model in ask_status(home).models for s in model.sessions if s.pid == os.getpid()]
    return found


def test_a_daemon_tells_how_long_its_sessions_waited_for_reads(
    home: Home, slow_daemon: None, checkpoints: dict[str, Path]
) -> None:
    model, _ = expertd.load(checkpoints["stacked"])
    began = time.monotonic()
    mx.eval(model(mx.array([[5]])))
    took = time.monotonic() - began
    first = session_here(home)
    assert first.fetches == 3
    assert first.fetches * READ_S <= first.read_wait_s <= first.waited_s <= took
    assert first.read_wait_s > 0.8 * first.waited_s, "there was nothing else to wait for"
    mx.eval(model(mx.array([[5]])))
    again = session_here(home)
    assert (again.fetches, again.waited_s, again.read_wait_s) == (3, first.waited_s, first.read_wait_s)
    expertd.unload(model)
    wait_for(lambda: not ask_status(home).models[0].sessions)
    (left,) = ask_status(home).models
    assert (left.waited_s, left.read_wait_s) == (first.waited_s, first.read_wait_s), "the model remembers"
