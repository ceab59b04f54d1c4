"""Memory pressure in a worker: what a daemon says, buffers given back, the wired limit, caches that do not fit."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

import expertd
from benchmarks.pressure.cgroup import limited
from expertd.protocol.cgroups import cgroup_room
from expertd.protocol.errors import MemoryPressure
from expertd.protocol.messages import Delta, Finished, Generate, Pressure, Refused
from expertd.protocol.paths import Home
from expertd.worker.engine import Engine
from expertd.worker.kv_memory import CacheMemory, Growth, LayerCache, available_bytes, cache_bytes, measure
from expertd.worker.load import events_of, session_of
from expertd.worker.pressure import NORMAL, Buffers, Gauge
from expertd.worker.wired import HEADROOM, WiredLimit
from tests.conftest import StartDaemon, wait_for
from tests.fake_machine import MB, Machine
from tools.factory import FAMILIES, write_checkpoint
from tools.stage import end

WARNING = Pressure(level="warning", figure="a test says so")
CRITICAL = Pressure(level="critical", figure="a test says so")


class Script:
    """What the daemon takes for the machine's memory pressure."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.say("normal")

    def say(self, level: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(f"0 {level} a test says so\n")
        new.rename(self.path)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path / "pressure")


@pytest.fixture(scope="module")
def loaded(checkpoints: dict[str, Path]) -> tuple[Any, Any]:
    model, tokenizer = mlx_lm.load(str(checkpoints["stacked"]))
    return model, tokenizer


def hears(gauge: Gauge, level: str) -> Callable[[], bool]:
    """Whether ``gauge`` was told ``level`` last."""
    return lambda: gauge.newest.level == level


class Clear:
    """Counts how often buffers are given back, and from which threads."""

    def __init__(self) -> None:
        self.count = 0
        self.threads: set[int] = set()

    def __call__(self) -> None:
        self.count += 1
        self.threads.add(threading.get_ident())


def generate(request: int, text: str = "Tell me about the sea.", max_tokens: int | None = 4) -> Generate:
    return Generate(request=request, messages=[{"role": "user", "content": text}], max_tokens=max_tokens)


def ends(engine: Engine) -> dict[int, Finished | Refused]:
    """Run until all is done; how each request ended."""
    found: dict[int, Finished | Refused] = {}
    while engine.busy:
        found |= {event.request: event for event in engine.step() if not isinstance(event, Delta)}
    return found


# -- what the daemon says ----------------------------------------------------------------------------------------------


def test_a_session_hears_of_every_change(
    own_home: Home, start_daemon: StartDaemon, script: Script, checkpoints: dict[str, Path]
) -> None:
    start_daemon("64MiB", "--simulate-pressure", str(script.path))
    model, _ = expertd.load(checkpoints["stacked"])
    gauge = session_of(model).pressure
    heard: list[tuple[str, int]] = []
    gauge.on_change = lambda: heard.append((gauge.newest.level, threading.get_ident()))
    assert gauge.newest == NORMAL
    for level in ("warning", "critical", "normal"):
        script.say(level)
        wait_for(hears(gauge, level))
        assert gauge.newest.figure == "a test says so"
    expertd.unload(model)
    assert [level for level, _ in heard] == ["warning", "critical", "normal"]
    assert threading.get_ident() not in {thread for _, thread in heard}


def test_a_session_that_is_opened_under_pressure_hears_of_it(
    own_home: Home, start_daemon: StartDaemon, script: Script, checkpoints: dict[str, Path]
) -> None:
    script.say("warning")
    start_daemon("64MiB", "--simulate-pressure", str(script.path))
    model, _ = expertd.load(checkpoints["stacked"])
    wait_for(lambda: session_of(model).pressure.newest == WARNING)
    expertd.unload(model)


def test_what_a_daemon_said_ends_with_it(
    own_home: Home, start_daemon: StartDaemon, script: Script, checkpoints: dict[str, Path]
) -> None:
    daemon = start_daemon("64MiB", "--simulate-pressure", str(script.path))
    model, _ = expertd.load(checkpoints["stacked"])
    gauge = session_of(model).pressure
    script.say("critical")
    wait_for(lambda: gauge.newest == CRITICAL)
    end(daemon)
    wait_for(lambda: gauge.newest == NORMAL)
    script.say("warning")
    start_daemon("64MiB", "--simulate-pressure", str(script.path))
    wait_for(lambda: gauge.newest == WARNING)
    expertd.unload(model)


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_buffers_are_given_back_once_for_each_rise() -> None:
    gauge, clear = Gauge(), Clear()
    buffers = Buffers(gauge, clear)
    counts = []
    for told in (NORMAL, WARNING, WARNING, CRITICAL, WARNING, NORMAL, WARNING):
        gauge.take(told)
        for _ in range(3):
            buffers.relieve()
        counts.append(clear.count)
    assert counts == [0, 1, 1, 2, 2, 2, 3]


def test_a_rise_that_is_over_before_anybody_looks_costs_nothing() -> None:
    gauge, clear = Gauge(), Clear()
    gauge.take(CRITICAL)
    gauge.take(NORMAL)
    Buffers(gauge, clear).relieve()
    assert clear.count == 0


def test_a_forward_gives_buffers_back_on_its_own_thread(
    own_home: Home, start_daemon: StartDaemon, script: Script, checkpoints: dict[str, Path]
) -> None:
    start_daemon("64MiB", "--simulate-pressure", str(script.path))
    model, _ = expertd.load(checkpoints["stacked"])
    clear = events_of(model).buffers.clear = Clear()
    mx.eval(model(mx.array([[1, 2]])))
    assert clear.count == 0
    script.say("warning")
    wait_for(lambda: session_of(model).pressure.short)
    for _ in range(3):
        mx.eval(model(mx.array([[1, 2]])))
    assert (clear.count, clear.threads) == (1, {threading.get_ident()})
    expertd.unload(model)


@pytest.mark.parametrize(("told", "expected"), [(NORMAL, 1), (WARNING, 3)])
def test_requests_that_end_give_their_buffers_back_while_memory_is_short(
    loaded: tuple[Any, Any], told: Pressure, expected: int
) -> None:
    gauge, clear = Gauge(), Clear()
    gauge.take(told)
    engine = Engine(*loaded, buffers=Buffers(gauge, clear))
    for request in (1, 2, 3):
        engine.submit(generate(request, max_tokens=3 * request))
    ends(engine)
    assert clear.count == expected, "without pressure only the last one, with nobody left to use them"


def test_a_cancelled_request_gives_its_buffers_back(loaded: tuple[Any, Any]) -> None:
    clear = Clear()
    engine = Engine(*loaded, buffers=Buffers(Gauge(), clear))
    engine.submit(generate(1, max_tokens=1000))
    engine.step()
    engine.cancel(1)
    assert clear.count == 1


def test_loading_and_unloading_give_buffers_back(
    own_home: Home, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = Clear()
    monkeypatch.setattr(mx, "clear_cache", clear)
    model, _ = expertd.load(checkpoints["stacked"], budget="64MiB")
    assert clear.count == 1
    expertd.unload(model)
    assert clear.count == 2


# -- the wired limit ---------------------------------------------------------------------------------------------------


class FakeMetal:
    """As much of ``mlx.core`` on Metal as is asked."""

    def __init__(self, active: int, recommended: int, former: int = 0) -> None:
        self.metal = self
        self.active = active
        self.recommended = recommended
        self.limits = [former]
        self.refuses = False
        self.unused = 0

    def is_available(self) -> bool:
        return True

    def device_info(self) -> dict[str, int]:
        return {"max_recommended_working_set_size": self.recommended}

    def get_active_memory(self) -> int:
        return self.active

    def get_cache_memory(self) -> int:
        return self.unused

    def set_wired_limit(self, limit: int) -> int:
        if self.refuses:
            raise RuntimeError("larger than the system's limit")
        self.limits.append(limit)
        return self.limits[-2]


def test_the_wired_limit_covers_the_model_and_some_more() -> None:
    fake = FakeMetal(active=8 << 30, recommended=48 << 30, former=7)
    wired = WiredLimit(fake)
    wired.hold()
    fake.set_wired_limit(48 << 30)  # as mlx-lm's generators do
    fake.active *= 2
    wired.hold()
    wired.release()
    wired.release()
    need = (8 << 30) + HEADROOM
    assert fake.limits == [7, need, 48 << 30, need, 7]


def test_the_wired_limit_is_not_more_than_recommended() -> None:
    fake = FakeMetal(active=23 << 30, recommended=24 << 30)
    WiredLimit(fake).hold()
    assert fake.limits == [0, 24 << 30]


def test_a_wired_limit_that_is_refused_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeMetal(active=1, recommended=2)
    fake.refuses = True
    wired = WiredLimit(fake)
    wired.hold()
    wired.hold()
    wired.release()
    assert [record.message for record in caplog.records] == [
        "the wired limit could not be set (larger than the system's limit)"
    ]


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has Metal")
def test_without_metal_there_is_no_wired_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: pytest.fail("it was set"))
    wired = WiredLimit(mx)
    wired.hold()
    wired.release()


def test_an_engine_holds_the_limit_over_each_of_its_generators(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeMetal(active=5, recommended=48 << 30, former=7)
    module = sys.modules["mlx_lm.generate"]  # the package has a function of this name
    monkeypatch.setattr(module, "maybe_set_recommended_wired_limit", lambda: fake.set_wired_limit(48 << 30))
    monkeypatch.setattr(mx, "set_wired_limit", fake.set_wired_limit)
    engine = Engine(*loaded, wired=WiredLimit(fake))
    assert fake.limits[-1] == 5 + HEADROOM
    engine._fail(RuntimeError("the device is gone"))
    assert fake.limits[-1] == 5 + HEADROOM
    engine.close()
    assert fake.limits[-1] == 7


# -- caches that do not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_caches_need_is_measured_for_every_family(family: str, tmp_path: Path) -> None:
    model, _ = load_model(write_checkpoint(tmp_path / "model", family))
    layers = measure(model)
    for tokens in (1, 300):
        caches = make_prompt_cache(model)
        model(mx.array([[1] * tokens]), cache=caches)
        used = sum(cache.nbytes for cache in caches)
        windowed = any(layer.window is not None for layer in layers)
        assert cache_bytes(layers, tokens) == used or (windowed and 0.4 * used < cache_bytes(layers, tokens) < used)


def test_measuring_needs_no_expert_and_changes_nothing(own_home: Home, checkpoints: dict[str, Path]) -> None:
    plain, _ = mlx_lm.load(str(checkpoints["stacked"]))
    model, _ = expertd.load(checkpoints["stacked"], budget="64MiB")
    session = session_of(model)
    before = session.frames
    assert measure(model) == measure(plain)
    assert (session.frames, session.routing) == (before, [])
    tokens = mx.array([[3, 4, 5]])
    assert mx.array_equal(model(tokens), plain(tokens))
    expertd.unload(model)


def test_layers_with_a_window_or_a_state_stop_growing() -> None:
    layers = [LayerCache(1000), LayerCache(0, 10, 256), LayerCache(0, 10, 32, 128)]
    assert cache_bytes(layers, 0) == 0
    assert cache_bytes(layers, 1) == 1000 + 2560 + 320
    assert cache_bytes(layers, 257) == 1000 + 5120 + 1280
    assert cache_bytes(layers, 100_000) - cache_bytes(layers, 99_840) == 2560


def memory(available: int) -> CacheMemory:
    """Caches of 10 bytes a token, with so many bytes for them."""
    return CacheMemory([LayerCache(0, 10)], lambda: available)


@pytest.mark.parametrize(
    ("max_tokens", "param", "words"),
    [
        (50, "max_tokens", "the prompt has 100 tokens and max_tokens is 50, for which the KV cache needs 1.5 kB"),
        (901, "max_tokens", "needs 10.0 kB"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_figures(max_tokens: int, param: str, words: str) -> None:
    with pytest.raises(MemoryPressure) as caught:
        memory(1499).fits(100, max_tokens, [])
    assert words in caught.value.message
    assert "only 1.5 kB of memory are available" in caught.value.message
    assert "smaller max_tokens, close other apps" in caught.value.message
    assert caught.value.param == param


def test_a_prompt_that_does_not_fit_by_itself_is_at_fault() -> None:
    for max_tokens in (None, 10):
        with pytest.raises(MemoryPressure, match="a shorter prompt") as caught:
            memory(999).fits(100, max_tokens, [])
        assert caught.value.param == "messages"
    assert memory(1000).fits(100, None, []), "nobody knows how long an answer without max_tokens gets"


def test_what_others_may_still_grow_to_is_waited_for() -> None:
    assert memory(1500).fits(50, 50, [Growth(now=50, most=100)])
    assert not memory(1499).fits(50, 50, [Growth(now=50, most=100)])
    assert not memory(500).fits(50, 50, [Growth(now=100, most=100)]), "when the other has ended, it fits"
    with pytest.raises(MemoryPressure):
        memory(0).fits(50, 51, [Growth(now=100, most=100)])


def test_the_engine_refuses_before_the_prompt(loaded: tuple[Any, Any]) -> None:
    engine = Engine(*loaded, memory=memory(1000))
    engine.submit(generate(1, max_tokens=1000))
    engine.submit(generate(2, max_tokens=3))
    first, *_ = engine.step()
    assert isinstance(first, Refused)
    assert (first.request, first.code, first.param) == (1, "memory_pressure", "max_tokens")
    assert isinstance(ends(engine)[2], Finished)


def test_the_engine_lets_requests_wait_for_memory(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(generate(1).messages, add_generation_prompt=True)
    engine = Engine(model, tokenizer, memory=memory(10 * (len(prompt) + 8)))
    for request in (1, 2, 3):
        engine.submit(generate(request, max_tokens=8))
    most = 0
    finished: list[int] = []
    while engine.busy:
        finished += [event.request for event in engine.step() if isinstance(event, Finished)]
        most = max(most, len(engine._running))
    assert (finished, most) == ([1, 2, 3], 1)


def test_a_model_that_cannot_be_measured_is_served_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class Odd:
        def make_cache(self) -> Any:
            raise ValueError("no cache")

    assert CacheMemory.of(Odd()).fits(1 << 40, 1 << 40, [])
    assert "could not be measured (ValueError('no cache'))" in caplog.text


def test_what_is_available() -> None:
    fake = FakeMetal(active=0, recommended=10_000)
    fake.active, fake.unused = 9_000, 500
    assert available_bytes(fake) == 1000
    fake.active = 11_000
    assert available_bytes(fake) == 0
    assert available_bytes() > 0


def test_in_a_container_what_is_available_is_what_its_limit_leaves(tmp_path: Path) -> None:
    machine = Machine(tmp_path).in_v2()
    machine.v2("/apps/expertd", 50 * MB, 30 * MB, cache=10 * MB)
    fake = FakeMetal(active=0, recommended=1 << 60)
    assert available_bytes(fake, tmp_path) == 30 * MB
    fake.unused = 5 * MB
    assert available_bytes(fake, tmp_path) == 35 * MB
    caches = CacheMemory([LayerCache(0, 1000)], lambda: available_bytes(fake, tmp_path))
    assert caches.fits(35_000, None, [])
    with pytest.raises(MemoryPressure, match=r"only 35\.0 MB of memory are available"):
        caches.fits(36_000, None, [])
    machine.v2("/apps/expertd", 50 * MB, 60 * MB)
    assert available_bytes(fake, tmp_path) == 0


def test_without_a_descriptor_to_ask_with_no_request_is_refused() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        room, available = cgroup_room(), available_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert room is None
    assert available > 0


IN_A_CGROUP = """
from expertd.protocol.cgroups import cgroup_room
from expertd.worker.kv_memory import available_bytes
before = available_bytes()
held = b"x" * 200_000_000
print(cgroup_room().limit, before, available_bytes())
"""


def test_a_process_in_a_cgroup_sees_the_limit_and_what_it_has_taken_of_it() -> None:
    with contextlib.ExitStack() as stack:
        try:
            cgroup = stack.enter_context(limited(1 << 30))
        except (SystemExit, OSError) as error:  # no root, no Linux, or no memory controller to be had
            pytest.skip(f"no memory cgroup with a limit can be made here: {error}")
        done = subprocess.run(
            [sys.executable, "-c", IN_A_CGROUP], preexec_fn=cgroup.join, capture_output=True, text=True, check=True
        )
    limit, before, after = map(int, done.stdout.split())
    assert limit == 1 << 30
    assert 200 * MB < before < limit
    assert 180 * MB < before - after < 220 * MB
