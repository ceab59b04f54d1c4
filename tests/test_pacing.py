"""When reading that nobody waits for may go on: the rate, pauses after trouble, heat.  Pure: time is given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.daemon.pacing import HEAT_S, LEAST_BURST, Pacing, TokenBucket

MIB = 1 << 20


@given(
    rate=st.integers(1, 10**9),
    burst=st.integers(1, 10**8),
    steps=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10**8)), max_size=40),
)
def test_a_bucket_never_gives_more_than_its_rate_and_its_burst(
    rate: int, burst: int, steps: list[tuple[float, int]]
) -> None:
    bucket, now, given_out, largest = TokenBucket(rate, burst), 1000.0, 0, 0
    for pause, size in steps:
        now += pause
        if bucket.wait_s(size, now) == 0:
            bucket.take(size, now)
            given_out, largest = given_out + size, max(largest, size)
        assert given_out <= rate * (now - 1000.0) * (1 + 1e-9) + max(burst, largest) + 1


@given(rate=st.integers(1, 10**9), burst=st.integers(1, 10**8), sizes=st.lists(st.integers(1, 10**8), max_size=20))
def test_who_waits_as_long_as_he_is_told_gets_it(rate: int, burst: int, sizes: list[int]) -> None:
    bucket, now = TokenBucket(rate, burst), 0.0
    for size in sizes:
        now += bucket.wait_s(size, now)
        assert bucket.wait_s(size, now) <= 1e-6 * (1 + now), "but for what floats are short of"
        bucket.take(size, now)


def test_what_is_larger_than_the_burst_is_given_from_a_full_bucket_and_paid_back() -> None:
    bucket = TokenBucket(100, 50)
    assert bucket.wait_s(250, 0.0) == 0
    bucket.take(250, 0.0)
    assert bucket.wait_s(50, 0.0) == pytest.approx(2.5)
    assert bucket.wait_s(50, 2.5) == 0


def test_a_pause_fills_no_more_than_the_burst() -> None:
    bucket = TokenBucket(100, 50)
    bucket.take(50, 0.0)
    bucket.take(50, 1000.0)
    assert bucket.wait_s(50, 1000.0) == pytest.approx(0.5)


def test_without_a_rate_nothing_waits() -> None:
    pacing = Pacing()
    for _ in range(100):
        assert pacing.wait_s(1 << 40, 5.0) == 0
        pacing.began(1 << 40, 5.0)


def test_a_rate_bounds_what_begins() -> None:
    pacing = Pacing(MIB)
    pacing.began(LEAST_BURST, 0.0)
    assert pacing.wait_s(MIB, 0.0) == pytest.approx(1.0)
    assert pacing.wait_s(MIB, 1.0) == 0


def test_an_error_makes_a_pause_that_doubles_up_to_a_minute_and_a_success_ends_it() -> None:
    pacing, pauses = Pacing(), []
    for now in range(0, 1000, 100):
        pacing.ended(False, float(now))
        pauses.append(pacing.wait_s(1, float(now)))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    pacing.ended(True, 1000.0)
    assert pacing.wait_s(1, 1000.0) == 0
    pacing.ended(False, 1000.0)
    assert pacing.wait_s(1, 1000.0) == 1


def test_while_it_is_hot_nothing_begins_and_it_is_measured_now_and_then() -> None:
    pacing = Pacing()
    assert pacing.asks_heat(100.0)
    assert not pacing.asks_heat(100.0), "one measurement at a time"
    assert pacing.measured(True)
    assert pacing.wait_s(1, 101.0) == pytest.approx(HEAT_S - 1)
    assert not pacing.asks_heat(101.0)
    assert pacing.asks_heat(100.0 + HEAT_S)
    assert not pacing.measured(True), "nothing has changed"
    assert pacing.wait_s(1, 100.0 + HEAT_S) > 0
    assert pacing.asks_heat(100.0 + 2 * HEAT_S)
    assert pacing.measured(False)
    assert pacing.wait_s(1, 100.0 + 2 * HEAT_S) == 0


def test_the_longest_of_several_waits_counts() -> None:
    pacing = Pacing(MIB)
    pacing.began(LEAST_BURST, 0.0)
    pacing.ended(False, 0.0)
    assert pacing.wait_s(3 * MIB, 0.0) == pytest.approx(3.0)
    assert pacing.wait_s(MIB // 2, 0.0) == pytest.approx(1.0)
