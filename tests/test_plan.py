"""The reckoning of a plan, without I/O but for headers: shapes, hits, seconds of a token, and which budget is best."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from msgspec.structs import replace

from benchmarks.plan import DEMO, prompts
from expertd.clients.planning.hits import Misses, anchored, fitted, measured, replayed
from expertd.clients.planning.rows import Memory, Plan, budgets, make_plan
from expertd.clients.planning.shape import KvCache, Shape, kv_cache, read_shape
from expertd.clients.planning.speed import (
    FETCH_S,
    ON_THE_WAY,
    Computing,
    Disk,
    disk_of,
    estimated,
    fetch_seconds,
    token_seconds,
)
from expertd.clients.traces.replay import events_of, lru
from expertd.daemon.policy import LRU, Forecast
from expertd.protocol.errors import CheckpointError, ConfigMissing, DenseModel, DerivedExperts
from expertd.protocol.layout import base_layout
from expertd.protocol.manifest import Layer, Manifest, Part
from expertd.protocol.messages import ModelStatus, SessionStatus
from expertd.protocol.packed import header_of, layout_of, store_name
from expertd.protocol.traces import DECODE, PREFILL, Trace, TraceInfo, read_trace
from expertd.worker.kv_memory import cache_bytes, caches_of
from expertd.worker.manifest import load_lazily
from tools.factory import Cell, cells, write_checkpoint

DEV_TRACE = Path(__file__).parents[2] / "shared" / "traces" / "gpt_oss_20b_dev.npz"


def _one_of_each_form() -> list[Cell]:
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells():
        if cell.names != "derived":
            found.setdefault((cell.family, cell.names), cell)
    return list(found.values())


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", _one_of_each_form(), ids=str)
def test_names_and_config_tell_what_a_worker_finds_out_by_loading(cell: Cell, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", **cell._asdict())
    loaded = load_lazily(folder)
    shape = read_shape(folder)
    assert shape.manifest == replace(loaded.manifest, base=()), "base weights are the worker's to name"
    assert shape.base_segment >= base_layout(loaded.manifest.base)[1]
    everything = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    assert shape.base_bytes + shape.expert_bytes == everything
    assert shape.kv is not None
    least = shape.kv.bytes(4096)
    assert least <= cache_bytes(caches_of(loaded.model), 4096) <= 1.1 * least, "states of fixed size are left out"


def test_the_shape_of_a_derived_model_is_its_store_s(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "gpt_oss", names="derived").resolve()
    with pytest.raises(DerivedExperts, match=f"expertd pack {folder}"):
        read_shape(folder, tmp_path / "packed")
    loaded = load_lazily(folder)
    (tmp_path / "packed").mkdir()
    layout = layout_of(header_of(loaded.manifest))
    (tmp_path / "packed" / store_name(loaded.manifest.key)).write_bytes(layout.encoded)
    found = read_shape(folder, tmp_path / "packed")
    assert found.store == tmp_path / "packed" / store_name(loaded.manifest.key)
    assert found.expert_bytes == sum(layer.experts * layer.block_bytes for layer in loaded.manifest.layers)
    assert [layer.shape_key for layer in found.manifest.layers] == [layer.shape_key for layer in loaded.manifest.layers]
    assert found.top_k == 4


def _changed(folder: Path, source: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another config; None takes a key away."""
    folder.mkdir()
    for path in source.glob("*.safetensors"):
        (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def test_a_config_that_does_not_tell_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not tell how many experts a token uses"):
        read_shape(_changed(tmp_path / "a", checkpoints["stacked"], num_experts_per_tok=None))
    with pytest.raises(ConfigMissing, match="names no model_type"):
        read_shape(_changed(tmp_path / "b", checkpoints["stacked"], model_type=None))
    shape = read_shape(_changed(tmp_path / "c", checkpoints["stacked"], num_hidden_layers=None))
    assert shape.kv is None and shape.blocks == 48


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"model.layers.0.mlp.gate_proj.weight": mx.zeros((4, 4))})
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(DenseModel, match="dense model"):
        read_shape(tmp_path)


def test_a_window_bounds_the_kv_cache() -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}
    assert kv_cache(config, 2) == KvCache(4 * 2 * 2 * 64 * 2)
    some = {**config, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 128}
    found = kv_cache(some, 2)
    assert found == KvCache(2 * 512, 2 * 512, 128)
    assert found.bytes(100) == 4 * 512 * 100
    assert found.bytes(1000) == 2 * 512 * 1000 + 2 * 512 * 128
    assert kv_cache({"num_hidden_layers": 4}, 2) is None


# -- hits --------------------------------------------------------------------------------------------------------------


def _trace(experts: list[list[list[int]]], phase: int = DECODE) -> Trace:
    chosen = np.array(experts, np.uint8)
    count, layers, top_k = chosen.shape
    numbers = np.arange(count, dtype=np.uint32)
    info = TraceInfo(model="m", layers=layers, experts=8, top_k=top_k, tokens=count)
    zeros = np.zeros(count, np.uint32)
    phases = np.full(count, phase, np.uint8)
    forward = zeros if phase == PREFILL else numbers
    return Trace(info, chosen, None, None, zeros, numbers, forward, phases)


def test_a_replay_counts_single_tokens_once_the_pool_is_full() -> None:
    # One layer, one expert a token, room for two: 0 and 1 fill it; then hit, miss (2 for 0 or 1), hit.
    trace = _trace([[[0]], [[1]], [[1]], [[2]], [[2]]])
    assert replayed(trace, lambda: LRU(1, 8, 1))(2) == Misses(1 / 3, 1 / 3)


def test_a_replay_counts_events_and_lookups_apart() -> None:
    trace = _trace([[[0, 1]], [[2, 3]], [[0, 4]], [[0, 5]]])
    # Room for four: full after two tokens; then one of two misses in each event.
    assert replayed(trace, lambda: LRU(1, 8, 2))(4) == Misses(0.5, 1.0)


def test_prompts_pass_through_a_replay_and_do_not_count() -> None:
    prompt = _trace([[[0]], [[1]], [[2]]], PREFILL)
    assert replayed(prompt, lambda: LRU(1, 8, 1))(2) == Misses(0.0, 0.0)


def test_all_resident_misses_nothing() -> None:
    trace = _trace([[[token % 8, (token * 3 + 1) % 8]] for token in range(200)])
    assert replayed(trace, lambda: Forecast(1, 8, 2))(8) == Misses(0.0, 0.0)
    assert fitted(8, 2)(8) == Misses(0.0, 0.0)


def test_a_replay_by_lru_hits_what_the_traces_own_does() -> None:
    if not DEV_TRACE.exists():
        pytest.skip("the recorded trace of gpt-oss-20b is not here")
    trace = read_trace(DEV_TRACE)
    tokens = 1000
    part = Trace(
        trace.info, trace.experts[:tokens], None, None, trace.seq_id[:tokens], trace.pos[:tokens],
        trace.forward[:tokens], trace.phase[:tokens],
    )  # fmt: skip
    events = events_of(part)
    hits = lru(events, 384)
    lookups = sum(map(len, events))
    filled = 384
    found = replayed(part, lambda: LRU(24, 32, 4))(384)
    # From cold LRU misses the fillings too, which the replay leaves out.
    assert found.lookups == pytest.approx((lookups - hits - filled) / (lookups - filled), abs=0.01)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_fitted_curve_is_near_recorded_routing(share: float) -> None:
    if not DEV_TRACE.exists():
        pytest.skip("the recorded trace of gpt-oss-20b is not here")
    trace = read_trace(DEV_TRACE)
    odd = np.flatnonzero(trace.seq_id % 2)[:3000]
    part = Trace(
        trace.info, trace.experts[odd], None, None, trace.seq_id[odd], trace.pos[odd], trace.forward[odd],
        trace.phase[odd],
    )  # fmt: skip
    slots = round(share * 768)
    found, guessed = replayed(part, lambda: Forecast(24, 32, 4))(slots), fitted(768, 4)(slots)
    assert guessed.lookups == pytest.approx(found.lookups, abs=0.1)
    assert guessed.events == pytest.approx(found.events, abs=0.15)


def test_the_fitted_curve_falls() -> None:
    curve = fitted(1000, 8)
    rates = [curve(slots) for slots in range(0, 1001, 50)]
    assert rates[0] == Misses(1.0, 1.0)
    for more, less in itertools.pairwise(rates):
        assert less.lookups < more.lookups and less.events <= more.events
        assert less.lookups <= less.events <= 1


def _status(**counts: int) -> ModelStatus:
    usual = {
        "moe_layers": 6, "experts": 32, "top_k": 4, "block_bytes": 1, "blocks": 192, "slots": 96,
        "resident_blocks": 96, "hits": 0, "misses": 0, "bytes_read": 0, "evictions": 0, "pool_bytes": 1,
    }  # fmt: skip
    return ModelStatus(id="m", path="/m", family="f", sessions=[], **{**usual, **counts})


def test_a_daemon_s_count_leaves_out_the_filling_of_its_cache() -> None:
    assert measured(_status(hits=90_000, misses=10_096)) == pytest.approx(0.1)
    assert measured(_status(hits=900, misses=196)) is None, "too few"
    assert measured(_status(hits=90_000, misses=192, slots=192)) is None, "all is resident"


def test_a_measured_point_moves_the_whole_curve() -> None:
    curve = fitted(192, 4)
    moved = anchored(curve, 96, 0.2)
    assert moved(96).lookups == pytest.approx(0.2)
    assert moved(192) == Misses(0.0, 0.0)
    for slots in (24, 48, 96, 144):
        assert curve(slots).lookups < moved(slots).lookups < 1
        assert moved(slots).events <= 1
    assert anchored(curve, 192, 0.2) is curve, "where nothing misses nothing can be scaled"


# -- speed -------------------------------------------------------------------------------------------------------------


def test_a_disk_is_the_line_through_what_was_measured() -> None:
    disk = disk_of({1: 0.003, 4: 0.009})
    assert (disk.fixed_s, disk.block_s) == pytest.approx((0.001, 0.002))
    assert disk.seconds(2) == pytest.approx(0.005)
    assert disk_of({1: 0.003}) == Disk(0.0, 0.003)
    assert disk_of({1: 0.004, 4: 0.003}).block_s == 0.0, "more blocks are never quicker"


def test_a_token_takes_its_computing_and_its_waiting() -> None:
    computing, disk = Computing(0.010, 0.012, 0.001), Disk(0.002, 0.003)
    assert token_seconds(Misses(0, 0), 6, 4, computing, disk) == 0.010
    # 6 events, half of them miss: 3 Fetches of 1 + 0.5 + 2 ms; 24 lookups, a quarter misses: 6 blocks of 3 ms.
    assert token_seconds(Misses(0.25, 0.5), 6, 4, computing, disk, 0.0005) == pytest.approx(0.012 + 0.0105 + 0.018)


def test_computing_is_estimated_from_what_a_token_touches() -> None:
    found = estimated(6_000_000_000, 100e9)
    assert found.estimated and found.complete_s == found.partial_s == pytest.approx(0.1)


def test_what_a_fetch_costs_beside_reading_is_measured_by_the_daemon() -> None:
    def session(fetches: int) -> SessionStatus:
        return SessionStatus(
            id=1, pid=1, mode="shm", waiting=False, fetches=fetches, left_behind=False, held_bytes=0,
            waited_s=3.0, read_wait_s=2.5,
        )  # fmt: skip

    model = _status()
    assert fetch_seconds(model) is None
    assert fetch_seconds(replace(model, sessions=[session(1000)])) == pytest.approx(ON_THE_WAY * 0.0005)
    assert fetch_seconds(replace(model, sessions=[session(100)])) is None


# -- the plan ----------------------------------------------------------------------------------------------------------


def _shape(blocks: int = 64, block_bytes: int = 1000) -> Shape:
    part = Part("gate_proj.weight", "U8", (block_bytes,), ("t",), (0,))
    layers = tuple(Layer(f"layers.{n}", blocks // 2, 4, (part,)) for n in range(2))
    return Shape(Manifest("/m", "f", (), layers), 5000, 5000, 5000, None)


SIZES = (16_000, 32_000, 48_000, 64_000)
SSD = Disk(0.001, 0.001)


def _plan(room: int, disk: Disk = SSD, sizes: tuple[int, ...] = SIZES) -> Plan:
    return make_plan(
        _shape(), sizes, lambda size: size // 1000, room, fitted(64, 4), Computing(0.01, 0.01), disk, FETCH_S
    )


def test_more_memory_hits_more_and_is_faster() -> None:
    plan = _plan(10**9)
    assert [row.slots for row in plan.rows] == [16, 32, 48, 64]
    assert [row.hits for row in plan.rows] == sorted(row.hits for row in plan.rows)
    assert [row.tokens_s for row in plan.rows] == sorted(row.tokens_s for row in plan.rows)
    assert plan.rows[-1].hits == 1.0 and plan.rows[-1].tokens_s == pytest.approx(100)


def test_the_best_is_everything_where_that_fits_and_pays() -> None:
    plan = _plan(10**9)
    assert (plan.best, plan.why) == (3, "all experts fit, so nothing is read any more")


def test_the_best_leaves_others_what_they_need() -> None:
    plan = _plan(50_000)
    assert [row.fits for row in plan.rows] == [True, True, True, False]
    assert plan.best == 2 and plan.why.startswith("the fastest that leaves the system")


def test_the_best_is_the_smallest_that_is_nearly_as_fast() -> None:
    plan = _plan(10**9, Disk(0.0, 1e-6), (32_000, 48_000, 56_000))
    assert plan.best is not None and plan.best < 2
    assert "% faster only" in plan.why


def test_no_room_is_said() -> None:
    plan = _plan(1000)
    assert plan.best is None and plan.why.startswith("nothing fits: ")


def test_memory_is_what_is_left() -> None:
    assert Memory(100, 20, 10, 5, 3).room == 62
    assert Memory(100, 80, 30, 5, 3).room == 0


def test_budgets_are_shares_of_everything_and_all_the_room() -> None:
    assert budgets(10, 1000, 5000)[-1] == 1000 and len(budgets(10, 1000, 5000)) == 8
    found = budgets(10, 1000, 430)
    assert 430 in found and found == sorted(found)
    assert min(budgets(300, 1000, 5000)) == 300
    assert not any(math.isclose(size, 500) for size in budgets(10, 1000, 495)), "two that are as good as equal"


def test_the_benchmark_measures_on_prompts_that_its_trace_has_not_seen() -> None:
    known, unknown = ([*itertools.islice(prompts(half), 60)] for half in (0, 1))
    texts = [path.read_text(encoding="utf-8") for path in sorted((DEMO / "held_out").glob("*.txt"))]
    assert all(any(piece in text[: len(text) // 2] for text in texts) for piece in known)
    assert not set(known) & set(unknown)
