"""What clients ask of a daemon, without one: the answers, what reaches the core, and what is refused.

Over a socket: ``test_client`` and ``test_pressure_daemon``.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from expertd.daemon.core import Core, events
from expertd.daemon.core.bases import Bases
from expertd.daemon.holders import Held, Holders
from expertd.daemon.machine import Machine
from expertd.daemon.memory_watch import MemoryWatch
from expertd.daemon.pressure import system_source
from expertd.daemon.steering import Steering
from expertd.daemon.tracing import Tracing
from expertd.protocol import messages
from expertd.protocol.errors import BlocksInvalid, BudgetTooSmall, MessageInvalid, ModelInUse, ModelNotLoaded
from expertd.protocol.layout import PAGE
from expertd.protocol.manifest import FileMark, Manifest
from expertd.protocol.routing import pack
from expertd.protocol.segments import create, mapped_by
from tests.core_runner import Runner
from tests.test_core import manifest

MB, GB = 10**6, 10**9
BUDGET = 700 * MB


def version(number: int, name: str = "m") -> Manifest:
    """A model whose one file was written for the ``number``-th time."""
    mark = FileMark("model.safetensors", 1, number, number, "")
    return msgspec.structs.replace(manifest(name), files=(mark,))


class Asked:
    """A core, and its hand; ``available`` is what the machine has left."""

    def __init__(self, tmp_path: Path, budget: int = BUDGET) -> None:
        self.runner = Runner(budget)
        self.core: Core = self.runner.core
        self.available = 4 * GB
        self.bases = Bases(1000)
        self.holders = Holders(tmp_path / "holders")
        self.memory = MemoryWatch(budget, system_source())
        self.tracing = Tracing()
        self.shared_out = 0
        self.told: list[tuple[int, messages.Message]] = []
        self.forgotten: list[str] = []
        self._steering = Steering(
            self.core, self.memory, self.bases, self.holders, self.tracing,
            feed=self.runner.feed, share_out=self._share_out, tell=lambda *told: self.told.append(told),
            forget=self.forgotten.append, machine=lambda: Machine(8 * GB, self.available, None),
        )  # fmt: skip
        self.opened, self.stop_trace = self._steering.opened, self._steering.stop_trace

    def _share_out(self) -> None:
        self.shared_out += 1

    def ask(self, message: messages.Message) -> messages.Message:
        return self._steering.answer(message)

    def load(self, session: int, model: Manifest) -> str:
        return self.runner.attach(session, model).key

    def end(self, session: int) -> None:
        self.runner.feed(events.Ended(session))


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


# -- the budget --------------------------------------------------------------------------------------------------------


def test_a_budget_is_the_governor_s_from_now_on_and_shared_out(asked: Asked) -> None:
    assert asked.ask(messages.SetBudget(budget=300 * MB)) == messages.BudgetSet(before=BUDGET, budget=300 * MB)
    assert (asked.memory.governor.budget, asked.memory.governor.limit, asked.shared_out) == (300 * MB, 300 * MB, 1)


def test_a_budget_below_what_the_models_in_use_need_changes_nothing(asked: Asked) -> None:
    asked.load(1, manifest())
    with pytest.raises(BudgetTooSmall, match=f"need at least {asked.core.smallest_budget} bytes"):
        asked.ask(messages.SetBudget(budget=PAGE))
    assert (asked.memory.governor.budget, asked.shared_out) == (BUDGET, 0)


def test_what_the_cache_holds_itself_is_not_taken_from_what_the_machine_can_spare(asked: Asked) -> None:
    spare = asked.ask(messages.SetBudget(budget=None))
    asked.load(1, manifest())
    asked.bases.add(manifest())
    taken = asked.core.used + asked.bases.used
    assert taken > 0
    asked.available -= taken
    assert asked.ask(messages.SetBudget(budget=None)) == messages.BudgetSet(before=1 * GB, budget=1 * GB)
    assert isinstance(spare, messages.BudgetSet)
    assert spare.budget == 1 * GB


def test_what_others_take_is(asked: Asked) -> None:
    asked.load(1, manifest())
    asked.available -= asked.core.used + 100 * MB
    assert asked.ask(messages.SetBudget(budget=None)) == messages.BudgetSet(before=BUDGET, budget=900 * MB)


def test_what_sessions_still_hold_of_a_daemon_before_is_the_cache_s_own(tmp_path: Path) -> None:
    before = Holders(tmp_path / "holders")
    before.changed({manifest().key: Held(50 * MB, (os.getpid(),))})
    before.write()
    others = sum((mapped_by(os.getpid()) or {}).values())  # what other modules' tests have left in this process
    with closing(create(f"/expertd-test-{os.getpid()}", 50 * MB)):
        asked = Asked(tmp_path)
        asked.available -= 50 * MB
        assert asked.ask(messages.SetBudget(budget=None)) == messages.BudgetSet(before=BUDGET, budget=1 * GB)
    if sys.platform == "linux":
        left = 950 * MB + min(others, 50 * MB)
        assert asked.ask(messages.SetBudget(budget=None)) == messages.BudgetSet(before=1 * GB, budget=left)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/m", "m"])
def test_a_model_has_the_names_of_its_folder_and_its_key(asked: Asked, name: str) -> None:
    key = asked.load(1, manifest())
    assert asked.ask(messages.Warm(model=name)) == asked.ask(messages.Warm(model=key))


def test_a_model_whose_files_were_replaced_goes_when_the_new_ones_come(asked: Asked) -> None:
    asked.load(1, version(1))
    asked.end(1)
    other = asked.load(2, version(1, "other"))
    asked.end(2)
    new = asked.load(3, version(2))
    assert list(asked.core.models) == [other, new]


def test_or_when_nobody_uses_it_any_more_and_its_name_means_the_new_one_until_then(asked: Asked) -> None:
    old, new = asked.load(1, version(1)), asked.load(2, version(2))
    assert list(asked.core.models) == [old, new]
    asked.ask(messages.Pin(model="m", blocks=pack(0, [1])))
    asked.ask(messages.Pin(model=old, blocks=pack(1, [0, 2])))
    assert [model.pinned for model in asked.core.models.values()] == [{(1, 0), (1, 2)}, {(0, 1)}]
    asked.end(1)
    assert list(asked.core.models) == [new]


def test_files_that_are_put_back_are_the_model_again(asked: Asked) -> None:
    old, new = asked.load(1, version(1)), asked.load(2, version(2))
    asked.load(3, version(1))
    assert [model.unwanted for model in asked.core.models.values()] == [False, True]
    asked.end(2)
    assert list(asked.core.models) == [old]
    assert old != new


def test_the_path_goes_before_the_name_of_another_folder(asked: Asked) -> None:
    first, second = asked.load(1, manifest("a/m")), asked.load(2, manifest("b/m"))
    for name, key in (("/a/m", first), ("/b/m", second), ("m", second)):
        asked.ask(messages.Pin(model=name, blocks=pack(0, [1])))
        assert [model.key for model in asked.core.models.values() if model.pinned] == [key]
        asked.ask(messages.Pin(model=name, pinned=False))


def test_the_model_that_was_unused_for_longest_is_the_first_to_go(asked: Asked) -> None:
    keys = [asked.load(number, manifest(f"m{number}")) for number in range(4)]
    assert asked.core.longest_idle is None
    for number in (2, 0, 3):
        asked.end(number)
    gone = []
    while (key := asked.core.longest_idle) is not None:
        asked.runner.feed(events.Unwanted(key))
        gone.append(keys.index(key))
    assert gone == [2, 0, 3]
    assert list(asked.core.models) == [keys[1]]


def test_of_what_is_not_there_it_tells_what_is(asked: Asked) -> None:
    asked.load(1, manifest())
    with pytest.raises(ModelNotLoaded, match="the daemon holds nothing of 'other'; what it holds: m"):
        asked.ask(messages.Warm(model="other"))


def test_a_model_in_use_stays_and_one_that_is_not_goes_with_its_record(asked: Asked) -> None:
    key = asked.load(1, manifest())
    asked.load(2, manifest())
    asked.runner.feed(events.Attach(3, 101, "shm", manifest()))  # of the first one's process
    with pytest.raises(ModelInUse, match="/m is used by process 101, 102; end that, or close the model there"):
        asked.ask(messages.Unload(model="m"))
    for session in (1, 2, 3):
        asked.end(session)
    held = asked.core.used
    assert asked.ask(messages.Unload(model="m")) == messages.Unloaded(path="/m", bytes=held)
    assert (asked.core.used, asked.core.models, asked.forgotten) == (0, {}, [key])


def test_blocks_that_a_model_has_not_are_refused(asked: Asked) -> None:
    asked.load(1, manifest())
    for message in (messages.Warm(model="m", blocks=pack(7, [0])), messages.Pin(model="m", blocks=pack(0, [99]))):
        with pytest.raises(BlocksInvalid):
            asked.ask(message)


def test_pins_are_counted(asked: Asked) -> None:
    asked.load(1, manifest())
    assert asked.ask(messages.Pin(model="m", blocks=pack(0, [1]))) == messages.Pinned(path="/m", blocks=1)
    assert asked.ask(messages.Pin(model="m", pinned=False)) == messages.Pinned(path="/m", blocks=0)


def test_what_is_for_nobody_here_is_refused(asked: Asked) -> None:
    with pytest.raises(MessageInvalid, match="a daemon takes no Welcome"):
        asked.ask(messages.Welcome(protocol=1, package="x", pid=1))


# -- traces ------------------------------------------------------------------------------------------------------------


def test_who_comes_later_is_traced_too_and_all_are_told_to_end(asked: Asked, tmp_path: Path) -> None:
    asked.load(1, manifest())
    assert asked.ask(messages.StartTrace(folder=str(tmp_path))) == messages.TraceStarted(sessions=1)
    asked.load(2, manifest())
    asked.opened(2)
    begun = [messages.Record(session=n, path=f"{tmp_path}/m-{100 + n}.npz") for n in (1, 2)]
    assert asked.told == [(record.session, record) for record in begun]
    asked.told.clear()
    for record in begun:
        asked.tracing.recorded(messages.Recorded(session=record.session, path=record.path, tokens=3, error=""))
    report = asyncio.run(asked.stop_trace())
    assert asked.told == [(n, messages.Record(session=n, path="")) for n in (1, 2)]
    assert ([one.path for one in report.ended], report.unfinished) == ([one.path for one in begun], [])
