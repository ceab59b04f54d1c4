"""What is told of the daemon's reads: percentiles to within 10 %, depths, bytes, and the way from a Fetch to a read."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from expertd.daemon.devices import BUCKETS, Devices, Histogram


@given(st.lists(st.floats(1.0, 1e8), min_size=1), st.sampled_from([1, 50, 95, 99, 100]))
def test_percentiles_are_within_10_percent(times: list[float], percent: int) -> None:
    histogram = Histogram()
    for us in times:
        histogram.add(us)
    exact = sorted(times)[max(1, math.ceil(len(times) * percent / 100)) - 1]
    assert abs(histogram.percentile(percent) - exact) <= 0.1 * exact


def test_a_histogram_takes_any_time_and_no_more_memory() -> None:
    histogram = Histogram()
    for us in (0.0, -1.0, 1e-9, 1e30):
        histogram.add(us)
    assert histogram.count == 4
    assert len(histogram._counts) == BUCKETS


def test_without_reads_there_is_nothing() -> None:
    found = Devices().statistics()
    assert (found.devices, found.fetch_to_read_p50_us, found.fetch_to_read_p99_us) == ((), 0.0, 0.0)


def test_each_device_counts_its_own_reads() -> None:
    devices = Devices()
    for device, size, took_s in ((7, 100, 0.001), (9, 50, 0.1), (7, 300, 0.001)):
        devices.begin(device)
        devices.end(device, size, took_s)
    first, second = devices.statistics().devices
    assert (first.number, first.reads, first.bytes) == (7, 2, 400)
    assert (second.number, second.reads, second.bytes) == (9, 1, 50)
    assert 900 <= first.p50_us <= 1100
    assert 90_000 <= second.p99_us <= 110_000


def test_a_depth_counts_the_reads_under_way_when_one_begins() -> None:
    devices = Devices()
    devices.begin(7)
    devices.begin(7)
    devices.begin(7)
    for _ in range(3):
        devices.end(7, 1, 0.001)
    devices.begin(7)
    (found,) = devices.statistics().devices
    assert (found.depth_mean, found.depth_max) == ((1 + 2 + 3 + 1) / 4, 3)


def test_a_read_that_failed_has_no_bytes_and_no_time() -> None:
    devices = Devices()
    devices.begin(7)
    devices.end(7, 0, None)
    (found,) = devices.statistics().devices
    assert (found.reads, found.bytes, found.p50_us, found.depth_max) == (0, 0, 0.0, 1)


def test_the_way_from_a_fetch_to_its_first_read_is_told() -> None:
    devices = Devices()
    for _ in range(99):
        devices.fetched(50e-6)
    devices.fetched(0.5)
    found = devices.statistics()
    assert 45 <= found.fetch_to_read_p50_us <= 55
    assert 45 <= found.fetch_to_read_p99_us <= 55
