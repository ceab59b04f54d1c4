"""Plans of the service, carried out in a world of nothing but a few sets: from every state, failing at every step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import pytest

from expertd.launchd import plans
from expertd.launchd.agent import Agent, daemon_agent, gateway_agent
from expertd.launchd.launchd import Launchd
from expertd.launchd.manager import Found, Manager
from expertd.launchd.plans import Situation
from expertd.launchd.steps import AwaitEnd, GiveWay, RemoveFile, Run, Step, WriteFile
from expertd.launchd.systemd import Systemd
from expertd.protocol.paths import Home
from expertd.protocol.service import FORMAT, Gateway, Service, encode_service, read_service

HOME = Home(Path("/home/me/.expertd"))
ENVIRONMENT = {"HOME": "/home/me"}
MANAGERS: list[Manager] = [Launchd(501, Path("/agents")), Systemd(Path("/units"))]
DAEMON = daemon_agent(HOME, "/python", ENVIRONMENT)
GATEWAY = gateway_agent(HOME, "/python", ENVIRONMENT, Gateway(("/m",), "127.0.0.1", 8080))
BOTH = (DAEMON, GATEWAY)


def record(manager: Manager, version: str = "2") -> Service:
    return Service(FORMAT, manager.name, version, manager.start_command(DAEMON))


@dataclass
class World:
    """What a service manager and a disk do with steps, as far as the plans rely on it."""

    manager: Manager
    files: dict[Path, bytes] = field(default_factory=dict)
    loaded: dict[str, bytes] = field(default_factory=dict)  # label: the definition that the manager has read
    runs: dict[str, bytes] = field(default_factory=dict)  # label: the definition that it was started with
    starts: int = 0
    stranger: int | None = None

    def look(self) -> Situation:
        found = {}
        for agent in BOTH:
            label, file = self.manager.label(agent), self.manager.file(agent)
            running = label in self.runs
            found[agent.name] = Found(label in self.loaded, running, 7 if running else None, None, self.files.get(file))
        counted = frozenset(agent.name for agent in BOTH if HOME.service_starts(agent.name) in self.files)
        return Situation(found, self._record(), counted, self.stranger)

    def _record(self) -> Service | None:
        content = self.files.get(HOME.service)
        return None if content is None else msgspec.json.decode(content, type=Service)

    def carry_out(self, steps: Sequence[Step], up_to: int | None = None) -> None:
        for step in steps[:up_to]:
            self._do(step)

    def _do(self, step: Step) -> None:
        match step:
            case WriteFile(path, content):
                self.files[path] = content
            case RemoveFile(path):
                self.files.pop(path, None)
            case GiveWay():
                self.stranger = None
            case AwaitEnd(agent):
                assert self.manager.label(agent) not in self.loaded, "it would wait in vain"
            case Run(command):
                self._run([word for word in command if word not in ("--user", "--now", "gui/501")])

    def _run(self, words: Sequence[str]) -> None:
        verb, label = words[1], words[-1].removeprefix("gui/501/").removeprefix("/agents/").removesuffix(".plist")
        if verb in ("bootstrap", "enable"):
            assert verb == "enable" or label not in self.loaded, "bootstrap of what is loaded fails"
            file = next(self.manager.file(agent) for agent in BOTH if self.manager.label(agent) == label)
            self.loaded[label] = self.files[file]
        if verb in ("bootout", "disable", "stop", "restart"):
            self.runs.pop(label, None)
        if verb in ("bootout", "disable"):
            del self.loaded[label]
        if verb in ("bootstrap", "enable", "start", "kickstart", "restart") and label not in self.runs:
            self.runs[label] = self.loaded[label]
            self.starts += 1

    def check_installed(self, *agents: Agent) -> None:
        for agent in agents:
            label, definition = self.manager.label(agent), self.manager.render(agent)
            assert self.files[self.manager.file(agent)] == self.loaded[label] == self.runs[label] == definition
        assert set(self.loaded) == set(self.runs) == {self.manager.label(agent) for agent in agents}
        assert self.stranger is None

    def check_empty(self) -> None:
        assert not self.loaded
        assert not self.runs
        assert set(self.files) <= {HOME.config}


def replace_stopped(one: Service) -> Service:
    return Service(one.format, one.manager, one.version, one.start, stopped=True)


def worlds(manager: Manager) -> list[World]:
    """Mixtures of the states that the two agents can be met in, with and without a record and a stranger."""
    made = []
    states = ("none", "file", "old file", "runs", "loaded", "runs old", "file gone")
    others = ("none", "loaded", "runs old", "file gone")
    around = ((None, None), ("1", 99), ("2", None))
    for daemon, gateway, (version, stranger) in itertools.product(states, others, around):
        world = World(manager, stranger=stranger)
        if version is not None:
            world.files[HOME.service] = encode_service(record(manager, version))
        for agent, state in zip(BOTH, (daemon, gateway), strict=True):
            label, file, definition = manager.label(agent), manager.file(agent), manager.render(agent)
            content = b"old" if "old" in state else definition
            if state not in ("none", "file gone"):
                world.files[file] = content
            if state in ("runs", "loaded", "runs old", "file gone"):
                world.loaded[label] = content
            if state in ("runs", "runs old", "file gone"):
                world.runs[label] = content
                world.files[HOME.service_starts(agent.name)] = b"{}"
        made.append(world)
    return made


def install(world: World, *wanted: Agent) -> list[Step]:
    unwanted = [agent for agent in BOTH if agent not in wanted]
    return plans.install(world.manager, HOME, wanted, unwanted, world.look(), record(world.manager))


def uninstall(world: World) -> list[Step]:
    return plans.uninstall(world.manager, HOME, BOTH, world.look())


by_manager = pytest.mark.parametrize("manager", MANAGERS, ids=lambda manager: manager.name)


@by_manager
@pytest.mark.parametrize("wanted", [(DAEMON,), BOTH], ids=["daemon", "both"])
def test_whatever_is_there_an_installation_leads_to_the_same(manager: Manager, wanted: tuple[Agent, ...]) -> None:
    for world in worlds(manager):
        world.carry_out(install(world, *wanted))
        world.check_installed(*wanted)
        assert install(world, *wanted) == [], "and a second one has nothing to do"


@by_manager
def test_wherever_an_installation_fails_the_next_one_goes_on_and_a_removal_leaves_nothing(manager: Manager) -> None:
    for before in worlds(manager):
        steps = install(before, *BOTH)
        for failed in range(len(steps)):
            world = deepcopy(before)
            world.carry_out(steps, failed)
            world.carry_out(install(world, *BOTH))
            world.check_installed(*BOTH)
            world = deepcopy(before)
            world.carry_out(steps, failed)
            world.carry_out(uninstall(world))
            world.check_empty()


@by_manager
def test_wherever_a_removal_fails_the_next_one_ends_it(manager: Manager) -> None:
    for before in worlds(manager):
        steps = uninstall(before)
        for failed in range(len(steps) + 1):
            world = deepcopy(before)
            world.carry_out(steps, failed)
            world.carry_out(uninstall(world))
            world.check_empty()
            assert uninstall(world) == []


@by_manager
def test_what_is_as_it_should_be_is_left_alone_unless_its_version_is_another(manager: Manager) -> None:
    world = World(manager)
    world.carry_out(install(world, *BOTH))
    assert world.starts == 2
    newer = record(manager, "3")
    steps = plans.install(manager, HOME, BOTH, (), world.look(), newer)
    world.carry_out(steps)
    assert world.starts == 4, "both run the new version"
    assert [step.path for step in steps if isinstance(step, WriteFile)] == [HOME.service]


Plan = Callable[[Manager, Home, Sequence[Agent], Situation], list[Step]]


@by_manager
@pytest.mark.parametrize("again", [plans.start, plans.restart], ids=["start", "restart"])
def test_stop_and_start(manager: Manager, again: Plan) -> None:
    world = World(manager)
    world.carry_out(install(world, *BOTH))
    world.carry_out(plans.stop(manager, HOME, BOTH, world.look()))
    assert not world.runs
    stopped = world.look()
    assert stopped.record is not None
    assert stopped.record.stopped, "clients are not to start it"
    assert plans.stop(manager, HOME, BOTH, stopped) == []
    world.carry_out(again(manager, HOME, BOTH, stopped))
    world.check_installed(*BOTH)
    assert plans.start(manager, HOME, BOTH, world.look()) == []


@by_manager
def test_what_is_between_two_starts_is_stopped_too(manager: Manager) -> None:
    world = World(manager)
    world.carry_out(install(world, DAEMON))
    throttled = world.look()
    failing = replace(throttled.found["daemon"], active=True, pid=None, last_status=1)
    steps = plans.stop(manager, HOME, BOTH, replace(throttled, found={**throttled.found, "daemon": failing}))
    assert steps[-len(manager.stop(DAEMON)) :] == manager.stop(DAEMON)


@by_manager
def test_a_start_forgets_deaths_and_sends_a_stranger_away_first(manager: Manager) -> None:
    world = World(manager)
    world.carry_out(install(world, DAEMON))
    world.runs.clear()
    world.files[HOME.service_starts("daemon")] = b"{}"
    world.stranger = 99
    steps = plans.start(manager, HOME, BOTH, world.look())
    assert steps[:2] == [GiveWay(99), RemoveFile(HOME.service_starts("daemon"))]
    assert len(steps) == 3


@by_manager
def test_the_gateway_ends_before_the_daemon_and_starts_after_it(manager: Manager) -> None:
    world = World(manager)
    first = [str(step) for step in install(world, *BOTH) if isinstance(step, Run)]
    assert ["gateway" in line for line in first if "daemon-reload" not in line] == [False, True]
    world.carry_out(install(world, *BOTH))
    last = [str(step) for step in uninstall(world) if isinstance(step, Run) and "daemon-reload" not in str(step)]
    assert ["gateway" in line for line in last] == sorted(["gateway" in line for line in last], reverse=True)


def test_a_record_is_read_as_it_was_written(home: Home) -> None:
    written = replace_stopped(record(MANAGERS[0]))
    assert read_service(home) is None
    home.service.write_bytes(encode_service(written))
    assert read_service(home) == written


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2, "manager": "x", "version": "", "start": ["x"]}',
                                     '{"format": 1, "manager": "x", "version": "", "start": []}', "\xff"])
def test_a_record_that_cannot_be_used_is_none(home: Home, content: str) -> None:
    home.service.write_bytes(content.encode("latin-1"))
    assert read_service(home) is None


