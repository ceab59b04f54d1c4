"""What workers measure of a model's speed, and how it is kept."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step

import expertd
from expertd.protocol.checkpoint import FileMark
from expertd.protocol.pace import Pace, pace_path, read_pace, write_pace
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from expertd.worker.pace import ENOUGH, PaceMeter
from tests.conftest import StartDaemon, wait_for
from tools.stage import ask_status, budget_for

MARK = FileMark("model.safetensors", 1, 2, 3, "h")


def _run(meter: PaceMeter, gaps: list[tuple[float, float, int]], complete: bool = False) -> None:
    now = waited = 0.0
    fetches = 0
    meter.begin(True, complete, now, waited, fetches)
    for gap, wait, fetched in gaps:
        now, waited, fetches = now + gap, waited + wait, fetches + fetched
        meter.begin(True, complete, now, waited, fetches)


def test_a_token_s_time_is_from_call_to_call_without_what_was_waited() -> None:
    meter = PaceMeter()
    _run(meter, [(0.030, 0.020, 1)] * ENOUGH)
    assert meter.partial_us() == pytest.approx((10_000, 0))
    assert meter.complete_us() == 0
    _run(meter, [(0.005, 0.0, 0)] * ENOUGH, complete=True)
    assert meter.complete_us() == pytest.approx(5000)


def test_what_each_fetch_adds_is_told_apart() -> None:
    meter = PaceMeter()
    _run(meter, [(0.010 + 0.002 * n + 0.5, 0.5, n) for n in (0, 1, 2, 3)] * 8)
    assert meter.partial_us() == pytest.approx((10_000, 2_000))


def test_pauses_do_not_count() -> None:
    meter = PaceMeter()
    _run(meter, [(0.010, 0.0, 0)] * 40 + [(60.0, 0.0, 0)] * 5)
    assert meter.partial_us()[0] == pytest.approx(10_000)


def test_prompts_and_batches_do_not_count() -> None:
    meter = PaceMeter()
    for number in range(100):
        meter.begin(False, False, number, 0.0, 0)
        meter.begin(True, False, number + 0.5, 0.0, 0)
    assert meter.partial_us() == (0, 0)
    assert not meter.news()


def test_few_tokens_tell_nothing() -> None:
    meter = PaceMeter()
    _run(meter, [(0.010, 0.0, 0)] * (ENOUGH - 1))
    assert meter.partial_us() == (0, 0) and not meter.news()


def test_a_figure_that_was_not_measured_again_stays(home: Home) -> None:
    write_pace(home, Pace(folder="/m", files=(MARK,), complete_us=5))
    write_pace(home, Pace(folder="/m", files=(MARK,), partial_us=7, fetch_us=1))
    assert read_pace(home, "/m", (MARK,)) == Pace(
        folder="/m", files=(MARK,), complete_us=5, partial_us=7, fetch_us=1
    )
    assert [path.suffix for path in home.pace.iterdir()] == [".json"]


def test_a_pace_is_of_these_files_only(home: Home) -> None:
    write_pace(home, Pace(folder="/m", files=(MARK,), complete_us=5))
    assert read_pace(home, "/m", ()) is None
    assert read_pace(home, "/other", (MARK,)) is None
    pace_path(home, "/m").write_text("{")
    assert read_pace(home, "/m", (MARK,)) is None


def test_a_pace_that_cannot_be_written_disturbs_nobody(home: Home) -> None:
    home.pace.write_text("in the way")
    write_pace(home, Pace(folder="/m", files=(MARK,), complete_us=5))
    assert home.pace.read_text() == "in the way"


@pytest.mark.parametrize("complete", [True, False])
def test_a_worker_keeps_its_pace(
    checkpoints: dict[str, Path], home: Home, start_daemon: StartDaemon, complete: bool
) -> None:
    folder = checkpoints["stacked"]
    manifest = load_lazily(folder).manifest
    start_daemon(str(budget_for(manifest, 48 if complete else 16)))
    model, _ = expertd.load(folder)
    if complete:
        wait_for(lambda: ask_status(home).models[0].resident_blocks == 48)
    for _ in generate_step(mx.arange(3, 20), model, max_tokens=3 * ENOUGH):
        pass
    expertd.unload(model)
    found = read_pace(home, str(folder.resolve()), manifest.files)
    assert found is not None
    assert (found.complete_us if complete else found.partial_us) > 0
