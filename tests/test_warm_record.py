"""The record of what was worth keeping: its file, when it is written, and what the core makes of one."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from expertd.daemon import warm_record
from expertd.daemon.core import events, warmth
from expertd.daemon.core.state import Model
from expertd.daemon.core.topics import MOST
from expertd.daemon.policy import Block
from expertd.daemon.remembering import AT_LEAST_S, RESTS_S, WORKING_S, Remembering, recall, record_of
from expertd.daemon.warm_record import KEPT, RecordDamaged, Records, WarmRecord, decode, encode, forget, read, write
from expertd.protocol.paths import Home
from expertd.protocol.profiles import Profile, write_profile
from tests.test_core import Daemon, manifest
from tests.test_core_warmth import resident, wide

WIDE = manifest(experts=16)
BLOCKS = [(1, 9), (0, 3), (1, 0), (0, 15)]
RATES = {"rates": np.arange(6, dtype=np.float32).reshape(2, 3)}


def record(model: str = WIDE.key, blocks: list[Block] = BLOCKS, at: float = 1000.0) -> WarmRecord:
    return WarmRecord.of(model, "/m", at, "Forecast", blocks, RATES)


def used(slots: int = 8) -> tuple[Daemon, Model]:
    """A model of which layer 0 uses experts 1 and 2 all the time, layer 1 experts 3 and 4, and others once."""
    daemon, model = wide(slots)
    sequence = 0
    for other in (5, 6, *[None] * 6):
        for layer, experts in ((0, (1, 2)), (1, (3, 4))):
            sequence += 1
            daemon.get(1, sequence, layer, *experts, *([] if other is None else [other]))
    return daemon, model


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was() -> None:
    found = decode(encode(record()))
    assert found.blocks == BLOCKS
    assert (found.model, found.folder, found.at, found.policy) == (WIDE.key, "/m", 1000.0, "Forecast")
    assert found.statistics["rates"].dtype == np.float32
    assert np.array_equal(found.statistics["rates"], RATES["rates"])


def test_whatever_byte_is_damaged_it_is_told() -> None:
    whole = encode(record())
    for place in range(len(whole)):
        spoilt = bytearray(whole)
        spoilt[place] ^= 0x20
        with pytest.raises(RecordDamaged):
            decode(bytes(spoilt))
    for length in range(0, len(whole), 7):
        with pytest.raises(RecordDamaged):
            decode(whole[:length])


@pytest.mark.parametrize("at", [-1.0, 1e12, float("nan"), float("inf")])
def test_a_date_that_is_none_is_told(at: float) -> None:
    with pytest.raises(RecordDamaged, match="its date is none"):
        decode(encode(record(at=at)))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"order": warm_record._Array("<f4", (2, 2), bytes(16))},
        {"order": warm_record._Array("<i4", (2, 2), bytes(15))},
        {"order": warm_record._Array("<i4", (4,), bytes(16))},
        {"order": warm_record._Array("O", (2, 2), bytes(32))},
        {"arrays": {"rates": warm_record._Array("no type", (2, 2), bytes(32))}},
        {"arrays": {"rates": warm_record._Array("<f4", (-1, 2), bytes(32))}},
    ],
)
def test_arrays_that_are_none_are_told_however_good_the_checksum(spoilt: dict[str, object]) -> None:
    known = {name: getattr(record(), name) for name in WarmRecord.__struct_fields__}
    with pytest.raises(RecordDamaged):
        decode(encode(WarmRecord(**{**known, **spoilt})))  # type: ignore[arg-type]


def test_it_is_private_and_takes_the_place_of_the_one_before(home: Home) -> None:
    write(home, record(at=1.0))
    write(home, record(at=2.0))
    found = read(home, WIDE.key)
    assert found is not None and found.at == 2.0
    assert [path.name for path in home.warmth.iterdir()] == [f"{WIDE.key}.warm"]
    assert stat.S_IMODE(home.warm_record(WIDE.key).stat().st_mode) == 0o600
    assert stat.S_IMODE(home.warmth.stat().st_mode) == 0o700


def test_a_damaged_record_is_not_used_and_the_log_says_so(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    write(home, record())
    path = home.warm_record(WIDE.key)
    path.write_bytes(path.read_bytes()[:-3])
    assert read(home, WIDE.key) is None
    assert "the record of what was warm is not used: its checksum does not fit" in caplog.text
    assert recall(home, WIDE, "Forecast") is None


def test_a_record_under_the_name_of_another_model_is_not_used(home: Home) -> None:
    write(home, record("other"))
    home.warm_record("other").rename(home.warm_record(WIDE.key))
    assert read(home, WIDE.key) is None


def test_a_home_that_cannot_be_written_costs_a_warning_only(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.warmth.write_text("in the way")
    write(home, record())
    assert "could not be recorded" in caplog.text
    assert read(home, WIDE.key) is None


def test_a_record_can_be_forgotten(home: Home) -> None:
    write(home, record())
    forget(home, WIDE.key)
    forget(home, WIDE.key)
    assert read(home, WIDE.key) is None


def test_the_newest_records_are_kept(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_record, "KEPT", 3)
    for number in range(5):
        write(home, record(f"model{number}"))
    assert len(list(home.warmth.iterdir())) == 3 < KEPT
    assert read(home, "model4") is not None


def test_what_a_process_left_that_was_killed_while_it_wrote_goes_in_the_end(home: Home) -> None:
    write(home, record())
    for name, seconds in (("old", 2 * warm_record.ABANDONED_S), ("young", 0)):
        path = home.warmth / f"{name}.new"
        path.touch()
        os.utime(path, (time.time() - seconds,) * 2)
    write(home, record())
    assert sorted(path.name for path in home.warmth.iterdir()) == [f"{WIDE.key}.warm", "young.new"]


class SlowWrites:
    """``write``, as long as it takes: each waits to be let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.through = threading.Semaphore(0), threading.Semaphore(0)
        self.at_once = self.most_at_once = 0
        monkeypatch.setattr(warm_record, "write", self._write)

    def _write(self, home: Home, what: WarmRecord) -> None:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.begun.release()
        assert self.through.acquire(timeout=10)
        write(home, what)
        self.at_once -= 1

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=10)


def test_the_last_record_waits_for_one_that_is_being_written(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowWrites(monkeypatch)

    async def body() -> None:
        records = Records(home)
        first = asyncio.ensure_future(records.write([record(at=1.0)]))
        await slow.has_begun()
        first.cancel()  # as the daemon's tasks are when it ends
        last = asyncio.ensure_future(records.write([record(at=2.0)]))
        slow.through.release(2)
        await last

    asyncio.run(body())
    assert slow.most_at_once == 1
    found = read(home, WIDE.key)
    assert found is not None and found.at == 2.0


def test_a_record_that_is_forgotten_while_it_is_written_does_not_come_back(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowWrites(monkeypatch)

    async def body() -> None:
        records = Records(home)
        writing = asyncio.ensure_future(records.write([record(), record("other")]))
        await slow.has_begun()
        records.forget(WIDE.key)
        slow.through.release(2)
        await writing

    asyncio.run(body())
    assert [path.name for path in home.warmth.iterdir()] == ["other.warm"]


# -- when --------------------------------------------------------------------------------------------------------------


def test_it_is_recorded_when_a_model_rests_and_not_again_until_something_has_changed() -> None:
    daemon, model = used()
    remembering = Remembering()
    assert remembering.due([model], 0.0) == []
    assert remembering.due([model], AT_LEAST_S - 0.1) == []
    assert remembering.due([model], AT_LEAST_S) == [model]
    assert [m for at in range(6, 100) for m in remembering.due([model], float(at))] == []
    assert remembering.changed([model]) == []
    daemon.get(1, 100, 0, 1)
    assert remembering.changed([model]) == [model]
    assert remembering.due([model], 100.0) == []  # it has just been used
    assert remembering.due([model], 100.0 + RESTS_S) == [model]


def test_a_model_that_works_without_a_pause_is_recorded_now_and_then() -> None:
    daemon, model = used()
    remembering = Remembering()
    recorded = []
    for second in range(300):
        daemon.get(1, 100 + second, 0, 1, 2)
        recorded += [second for _ in remembering.due([model], float(second))]
    assert len(recorded) == 299 // round(WORKING_S)
    assert min(np.diff(recorded)) >= WORKING_S


def test_the_end_of_a_session_is_recorded_soon_but_never_twice_in_a_few_seconds() -> None:
    daemon, model = used()
    remembering = Remembering()
    remembering.due([model], 0.0)
    recorded = []
    for second in range(1, 41):
        daemon.attach(second + 1, WIDE)
        daemon.get(second + 1, 1, 0, 1, 2)
        daemon.feed(events.Ended(second))
        recorded += [second for _ in remembering.due([model], float(second))]
    assert recorded == list(range(5, 41, round(AT_LEAST_S)))


def test_nothing_is_recorded_of_a_model_of_which_nothing_is_there() -> None:
    _, model = wide(4)
    assert record_of(model, 1.0) is None


# -- what becomes of it ------------------------------------------------------------------------------------------------


def again(left: events.Recall, slots: int) -> tuple[Daemon, Model]:
    """A core that a model comes to of which something was left; all that is read has arrived."""
    daemon = Daemon(slots)
    created = daemon.ask(1, WIDE)
    daemon.feed(left)
    for create in created:
        daemon.feed(events.PoolCreated(create.segment))  # type: ignore[union-attr]
    (model,) = daemon.core.models.values()
    daemon.finish()
    return daemon, model


def left_by(model: Model) -> events.Recall:
    kept = record_of(model, 7.0)
    assert kept is not None
    return events.Recall(model.key, tuple(kept.blocks), kept.statistics, kept.at)


def test_what_was_used_most_is_recorded_first() -> None:
    _, model = used()
    assert set(left_by(model).blocks[:4]) == {(0, 1), (0, 2), (1, 3), (1, 4)}
    assert set(left_by(model).blocks) == resident(model)


def test_all_of_it_comes_back_and_the_policy_goes_on_from_what_it_knew() -> None:
    _, before = used()
    _, model = again(left_by(before), 8)
    assert resident(model) == resident(before)
    assert model.misses == model.evictions == 0
    assert model.policy.ranked() == before.policy.ranked()
    assert model.recalled is not None and len(model.recalled.back) == len(model.recalled.blocks) == 8


def test_with_a_smaller_budget_the_first_come_back() -> None:
    _, before = used()
    _, model = again(left_by(before), 4)
    assert resident(model) == {(0, 1), (0, 2), (1, 3), (1, 4)}
    assert warmth.wished(model) == 0


def test_with_room_for_all_the_rest_follows_in_its_natural_places() -> None:
    _, before = used()
    daemon, model = again(left_by(before), 32)
    assert len(resident(model)) == 32
    order = [block for block in daemon.reads_begun() if block in resident(before)]
    assert order == daemon.reads_begun()[: len(order)]


def test_blocks_that_the_model_does_not_have_are_passed_over() -> None:
    left = events.Recall(WIDE.key, ((0, 16), (2, 0), (-1, 3), (1, 5), (1, 5)), {}, 7.0)
    _, model = again(left, 8)
    assert resident(model) == {(1, 5)}


def test_demand_goes_first_and_nothing_of_it_is_evicted() -> None:
    _, before = used()
    daemon = Daemon(8)
    created = daemon.ask(1, WIDE)
    daemon.feed(left_by(before))
    daemon.feed(events.PoolCreated(created[0].segment))  # type: ignore[union-attr]
    daemon.get(1, 1, 0, 10, 11, 12)
    daemon.finish()
    (model,) = daemon.core.models.values()
    assert {(0, 10), (0, 11), (0, 12)} <= resident(model)
    assert len(resident(model)) == 8
    assert model.evictions == 0


def test_what_is_not_back_yet_stays_recorded() -> None:
    _, before = used()
    left = left_by(before)
    daemon = Daemon(8)
    created = daemon.ask(1, WIDE)
    daemon.feed(left)
    daemon.feed(events.PoolCreated(created[0].segment))  # type: ignore[union-attr]
    (model,) = daemon.core.models.values()
    for _ in range(3):
        daemon.done(*next(iter(daemon.reads)))
    assert len(resident(model)) == 3
    assert left_by(model).blocks == left.blocks


def test_a_pool_that_begins_smaller_than_it_becomes_brings_all_in() -> None:
    """Another model has the memory at first, and gives half of it."""
    _, before = used(14)
    other = manifest("other", experts=16)
    daemon = Daemon(budget=30 * 16384)
    daemon.attach(2, other)
    created = daemon.ask(1, WIDE)
    daemon.feed(left_by(before))
    out = list(created)
    while out:
        what = out.pop(0)
        if type(what).__name__ == "CreatePool":
            out += daemon.feed(events.PoolCreated(what.segment))  # type: ignore[union-attr]
        elif type(what).__name__ == "StartCopy":
            out += daemon.feed(events.ReadDone(what.segment, what.slot, 0))  # type: ignore[union-attr]
        elif type(what).__name__ == "Move":
            for known in daemon.core.models.values():
                for pool in list(known.old):
                    for number in list(pool.holders):
                        out += daemon.feed(events.Released(number, pool.segment))
        elif type(what).__name__ == "StartRead" and (what.layer, what.expert) in daemon.reads:  # type: ignore[union-attr]
            out += daemon.done(what.layer, what.expert)  # type: ignore[union-attr]
    model = daemon.core.models[WIDE.key]
    assert model.moves >= 1
    assert resident(model) == resident(before)


def test_statistics_of_another_policy_are_left_alone(home: Home) -> None:
    write(home, record())
    same, other = recall(home, WIDE, "Forecast"), recall(home, WIDE, "LRU")
    assert same is not None and other is not None
    assert (len(same.statistics), len(other.statistics)) == (1, 0)
    assert list(other.blocks) == BLOCKS


def test_every_profile_that_fits_is_a_topic_whether_it_is_in_use_or_not(home: Home) -> None:
    def profile(made_at: float, experts: int = 16) -> Profile:
        uses = [[int(made_at)] + [0] * (experts - 1)] * 2
        return Profile(
            model="m", made_at=made_at, source="", tokens=1, prompts=1, experts=[experts] * 2, uses=uses, seen=uses
        )

    for number in range(1, MOST + 3):
        write_profile(home, f"p{number}", profile(number))
    write_profile(home, "other", profile(99, experts=8))
    (home.profiles / "damaged.json").write_text("{")
    found = recall(home, WIDE, "Forecast")
    assert found is not None
    assert (found.blocks, found.chances, len(found.topics)) == ((), None, MOST)
    assert found.topics[0].shape == (2, 16)
    assert found.topics[0][0, 0] == 2, "a token uses two experts of a layer"


def test_a_record_of_other_files_is_not_found(home: Home) -> None:
    write(home, record())
    assert recall(home, manifest("moved", experts=16), "Forecast") is None


def test_the_folder_of_records_need_not_exist(home: Home) -> None:
    assert not Path(home.warmth).exists()
    assert read(home, WIDE.key) is None
