"""Which steps lead from what is found to what is wished.  Pure: no file is touched and no command run.

Each plan begins with what is there now, so it does not matter where the last one failed.  A plan without steps means
that all is as it should be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from expertd.launchd.agent import Agent
from expertd.launchd.manager import Found, Manager
from expertd.launchd.steps import GiveWay, RemoveFile, Step, WriteFile
from expertd.protocol.paths import Home
from expertd.protocol.service import Service, encode_service


@dataclass(frozen=True)
class Situation:
    """What was found.

    Attributes:
        found: each agent's state, by its name.
        record: the home's, if it has one.
        counted: names of the agents whose bad ends are counted.
        stranger: process id of a daemon that owns the home and is not the service's.
    """

    found: Mapping[str, Found] = field(default_factory=dict)
    record: Service | None = None
    counted: frozenset[str] = frozenset()
    stranger: int | None = None

    def of(self, agent: Agent) -> Found:
        return self.found.get(agent.name, Found())

    def installed(self, agent: Agent) -> bool:
        """Whether anything of the agent is there."""
        found = self.of(agent)
        return found.definition is not None or found.loaded or found.runs


def install(
    manager: Manager, home: Home, wanted: Sequence[Agent], unwanted: Sequence[Agent], now: Situation, record: Service
) -> list[Step]:
    """Have the ``wanted`` agents run as they are described, and those of another version anew; remove the others."""
    # The record comes before the agents, because a gateway that finds no daemon reads it; the version comes last,
    # because it says that nothing is left to do.
    begun = msgspec.structs.replace(record, version=now.record.version if now.record else "")
    steps = [*_record(home, now.record, begun), *_give_way(now)]
    for agent in unwanted:
        steps += _remove(manager, home, agent, now)
    for agent in wanted:
        found, definition = now.of(agent), manager.render(agent)
        if not (found.loaded and found.definition == definition):
            steps += _end(manager, agent, found)
            steps.append(WriteFile(manager.file(agent), definition))
            steps += manager.files_changed() + _forget(home, agent, now) + manager.load(agent)
        elif not found.runs:
            steps += _forget(home, agent, now) + manager.start(agent, found)
        elif now.record is None or now.record.version != record.version:
            steps += manager.restart(agent, found)
    return steps + _record(home, begun, record)


def uninstall(manager: Manager, home: Home, agents: Sequence[Agent], now: Situation) -> list[Step]:
    """Leave nothing of the ``agents``, the dependent ones first."""
    steps: list[Step] = []
    # First, so that nobody who finds no daemon has the manager start one that is about to go.
    if now.record is not None:
        steps.append(RemoveFile(home.service))
    for agent in reversed(agents):
        steps += _remove(manager, home, agent, now)
    return steps


def start(manager: Manager, home: Home, agents: Sequence[Agent], now: Situation) -> list[Step]:
    """Have those of the ``agents`` that are installed run."""
    steps = _give_way(now)
    for agent in agents:
        if now.installed(agent) and not now.of(agent).runs:
            steps += _forget(home, agent, now) + manager.start(agent, now.of(agent))
    return steps + _stopped(home, now, False)


def stop(manager: Manager, home: Home, agents: Sequence[Agent], now: Situation) -> list[Step]:
    """Have those of the ``agents`` that run end, the dependent ones first."""
    steps = _stopped(home, now, True)
    for agent in reversed(agents):
        if now.of(agent).runs:
            steps += manager.stop(agent)
    return steps


def restart(manager: Manager, home: Home, agents: Sequence[Agent], now: Situation) -> list[Step]:
    """Have those of the ``agents`` that are installed run, and anew if they did."""
    steps = _give_way(now)
    for agent in agents:
        if now.installed(agent):
            steps += _forget(home, agent, now) + manager.restart(agent, now.of(agent))
    return steps + _stopped(home, now, False)


def _give_way(now: Situation) -> list[Step]:
    return [] if now.stranger is None else [GiveWay(now.stranger)]


def _forget(home: Home, agent: Agent, now: Situation) -> list[Step]:
    return [RemoveFile(home.service_starts(agent.name))] if agent.name in now.counted else []


def _end(manager: Manager, agent: Agent, found: Found) -> list[Step]:
    if found.loaded:
        return manager.unload(agent)
    return manager.stop(agent) if found.runs else []


def _remove(manager: Manager, home: Home, agent: Agent, now: Situation) -> list[Step]:
    found = now.of(agent)
    steps = _end(manager, agent, found)
    if found.definition is not None:
        steps += [RemoveFile(manager.file(agent)), *manager.files_changed()]
    steps += _forget(home, agent, now)
    if agent.log != home.daemon_log and now.installed(agent):  # daemons on demand go on writing into that
        steps.append(RemoveFile(agent.log))
    return steps


def _stopped(home: Home, now: Situation, stopped: bool) -> list[Step]:
    return [] if now.record is None else _record(home, now.record, msgspec.structs.replace(now.record, stopped=stopped))


def _record(home: Home, before: Service | None, record: Service) -> list[Step]:
    return [] if before == record else [WriteFile(home.service, encode_service(record))]
