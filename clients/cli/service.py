"""``expertd service``: have launchd or systemd keep the daemon, and a gateway if it is wished.

What is done is decided in ``expertd.launchd``.  Exit status: 0; 1 where a step failed; 2 where there is no service
manager; 3 where no service is installed, and of ``status`` also where something that is installed does not run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from expertd.clients.cli.parameters import json_option
from expertd.clients.cli.serve import alias_option, named_models, pin_option
from expertd.protocol.config import KEYS, read_config, variable
from expertd.protocol.connection import Connection, package_version
from expertd.protocol.errors import DaemonNotRunning, ProtocolMismatch, ServiceFailed, ServiceNotInstalled
from expertd.protocol.paths import Home, expanded, lasting
from expertd.protocol.quick_deaths import why_refused
from expertd.protocol.rendezvous import last_words
from expertd.protocol.service import FORMAT, Gateway, Service, read_service

if TYPE_CHECKING:
    from expertd.launchd.agent import Agent
    from expertd.launchd.installer import Installer
    from expertd.launchd.manager import Manager
    from expertd.launchd.plans import Situation
    from expertd.launchd.steps import Step

HOST, PORT = "127.0.0.1", 8080
ANSWER_S = 20.0
"""So long a daemon has to answer that the manager has started."""
LOOK_S = 0.25

dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")


@click.group()
def service() -> None:
    """Have launchd (or systemd) keep the daemon: it is there from login on, and comes back if it fails.

    Without a service, a daemon starts when the first program needs it, and ends when it has been idle for a while.
    """


@service.command()
@click.option("--gateway/--no-gateway", default=None, help="Keep 'expertd serve MODEL...' too, or do not any more.")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--port", type=click.IntRange(1, 65535), metavar="PORT", help=f"The gateway's.  [default: {PORT}]")
@click.option("--host", metavar="ADDRESS", help=f"Address that the gateway listens on.  [default: {HOST}]")
@alias_option
@pin_option
@dry_run_option
def install(
    gateway: bool | None,
    models: tuple[str, ...],
    port: int | None,
    host: str | None,
    aliases: tuple[str, ...],
    pins: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Install the service, or bring one that is installed up to date.

    \b
    expertd service install                     the daemon
    expertd service install --gateway MODEL...  an OpenAI API over models too

    What is not named stays as it is.  EXPERTD_HOME, the hub's cache (HF_HOME and so on) and [serve] of config.toml are
    taken over as they are now; what the daemon should be started with is read from config.toml at each start: see
    'expertd config show'.
    """
    home = Home.current()
    if not dry_run:
        home.prepare()
    read_config(home)  # a mistake is better told now than by a log
    before = read_service(home)
    wished = _gateway(before.gateway if before else None, gateway, models, port, host, aliases, pins)
    site = _Site.current(home, wished)
    record = Service(FORMAT, site.manager.name, package_version(), site.start_command, gateway=wished)

    def plan(situation: Situation) -> list[Step]:
        from expertd.launchd.plans import install

        return install(site.manager, home, site.wanted, site.unwanted, situation, record)

    _note_variables()
    _carry_out(site, plan, dry_run)
    if not dry_run:
        _tell_result(site, "installed")
        if site.manager.name == "systemd":
            click.echo("to keep it without a login too: loginctl enable-linger")


@service.command()
@dry_run_option
def uninstall(dry_run: bool) -> None:
    """End the service and remove all that belongs to it.

    Models, packed stores, config.toml and the daemon's log stay.
    """

    def plan(situation: Situation) -> list[Step]:
        from expertd.launchd.plans import uninstall

        return uninstall(site.manager, home, site.all, situation)

    home = Home.current()
    home.check()
    site = _Site.current(home, None)
    _carry_out(site, plan, dry_run, nothing="nothing to do: no service is installed")


@service.command()
@dry_run_option
def start(dry_run: bool) -> None:
    """Start what is installed.

    A daemon that was given up because it died too often gets a new chance.
    """
    from expertd.launchd import plans

    _change(plans.start, dry_run)


@service.command()
@dry_run_option
def stop(dry_run: bool) -> None:
    """End what is installed, until started again.

    That is by 'expertd service start' or the next login; until then daemons start on demand.
    """
    from expertd.launchd import plans

    _change(plans.stop, dry_run, starts=False)


@service.command()
@dry_run_option
def restart(dry_run: bool) -> None:
    """End what is installed in order, and start it again."""
    from expertd.launchd import plans

    _change(plans.restart, dry_run)


@service.command()
@json_option()
def status(as_json: bool) -> None:
    """Tell whether the service is installed and runs.  Exits with 3 if it is not or does not."""
    home = Home.current()
    home.check()
    record = read_service(home)
    site = _Site.current(home, record.gateway if record else None)
    found = as_object(site, site.installer.look(site.all))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for line in table(found):
            click.echo(line)
    if not found["installed"] or not all(agent["pid"] for agent in found["agents"]):
        sys.exit(ServiceNotInstalled.exit_status)


@service.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option(
    "-n", "--lines", type=click.IntRange(0), default=40, show_default=True, metavar="N", help="Show the last N events."
)
@click.option("--gateway", is_flag=True, help="The gateway's log, not the daemon's.")
@json_option("Print one JSON object for each event.")
def logs(follow: bool, lines: int, gateway: bool, as_json: bool) -> None:
    """Show the end of the daemon's log.

    It is what 'expertd logs --daemon' shows, or with --gateway 'expertd logs --gateway'.
    """
    from expertd.clients.cli.logs import DAEMON, GATEWAYS, show_logs

    home = Home.current()
    home.check()
    if not show_logs(home.log, GATEWAYS if gateway else DAEMON, lines, follow, as_json) and lines:
        name = "gateway" if gateway else "daemon"
        raise ServiceNotInstalled(f"there is no log of a {name} yet in {home.log}; it begins when one is started")


# -- one home's service ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """A home, its service manager, and the agents that it has or may have had."""

    home: Home
    manager: Manager
    installer: Installer
    wanted: tuple[Agent, ...]
    unwanted: tuple[Agent, ...]

    @classmethod
    def current(cls, home: Home, gateway: Gateway | None) -> _Site:
        """The home with a daemon and ``gateway``.

        Raises:
            ServiceManagerMissing: there is no manager, or it does not answer.
        """
        from expertd.launchd import manager as managers
        from expertd.launchd.agent import daemon_agent, gateway_agent
        from expertd.launchd.installer import Installer

        manager = managers.system_manager()
        installer = Installer(home, manager)
        installer.check()
        python = lasting(sys.executable)
        daemon = daemon_agent(home, python, os.environ)
        served = gateway_agent(home, python, os.environ, gateway or Gateway((), HOST, PORT))
        wanted = (daemon, served) if gateway is not None else (daemon,)
        return cls(home, manager, installer, wanted, () if gateway is not None else (served,))

    @property
    def all(self) -> tuple[Agent, ...]:
        return self.wanted + self.unwanted

    @property
    def start_command(self) -> tuple[str, ...]:
        return self.manager.start_command(self.wanted[0])


def _change(plan: Callable[..., list[Step]], dry_run: bool, *, starts: bool = True) -> None:
    home = Home.current()
    home.check()
    record = read_service(home)
    site = _Site.current(home, record.gateway if record else None)
    situation = site.installer.look(site.all)
    if not any(situation.installed(agent) for agent in site.all):
        raise ServiceNotInstalled("no service is installed; install it with: expertd service install")
    _carry_out(site, lambda now: plan(site.manager, home, site.all, now), dry_run)
    if not dry_run and starts:
        _tell_result(site, "started")
    elif not dry_run:
        click.echo("stopped; until 'expertd service start' or the next login daemons start on demand")


def _carry_out(
    site: _Site, plan: Callable[[Situation], list[Step]], dry_run: bool, nothing: str = "nothing to do"
) -> None:
    steps = plan(site.installer.look(site.all))
    if not steps:
        click.echo(nothing)
    if dry_run:
        for step in steps:
            click.echo(str(step))
        return
    site.installer.carry_out(steps, click.echo)


def _tell_result(site: _Site, done: str) -> None:
    """Say that the daemon answers.

    Raises:
        ServiceFailed: it does not.
    """
    pid = _await_daemon(site)
    ours = site.installer.find(site.wanted[0]).pid
    place = f"process {pid}" if pid == ours else f"process {ours or 'none yet'}, which waits for process {pid} to end"
    click.echo(f"{done}: {site.manager.name} keeps the daemon ({place})")
    record = read_service(site.home)
    if record is not None and record.gateway is not None and len(site.wanted) > 1:
        models = record.gateway.models
        when = f"as soon as it has loaded {Path(models[0]).name}" if len(models) == 1 else "in a moment"
        click.echo(f"the gateway answers at {_url(record.gateway)} {when}")


def _await_daemon(site: _Site) -> int:
    """Process id of the daemon that answers in the home."""
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            with Connection(site.home.daemon_socket, "cli", handshake_s=1.0) as connection:
                return connection.daemon.pid
        except ProtocolMismatch as error:
            raise ServiceFailed(f"another daemon stays in the service's place: {error.message}") from error
        except DaemonNotRunning:
            if time.monotonic() > deadline:
                break
            time.sleep(LOOK_S)
    raise ServiceFailed(
        "the service is installed, but its daemon does not answer (its last words: "
        f"{last_words(site.home)}); put that right, then: expertd service start"
    )


def _gateway(
    before: Gateway | None,
    wished: bool | None,
    models: tuple[str, ...],
    port: int | None,
    host: str | None,
    aliases: tuple[str, ...],
    pins: tuple[str, ...],
) -> Gateway | None:
    """The gateway that is wished, where ``before`` is the one that there is."""
    from expertd.clients.gateway.keys import check_exposure

    if models and not wished:
        raise click.UsageError("name the models of a gateway after --gateway")
    if wished and not models and before is None:
        raise click.UsageError("--gateway needs the model that it should serve: --gateway MODEL")
    if wished is False or (before is None and not wished):
        if port is not None or host is not None or aliases or pins:
            raise click.UsageError(
                "--port, --host, --alias and --pin are a gateway's: use them with --gateway MODEL"
            )
        return None
    config = read_config(Home.current(), environment={})  # a variable of this shell is none of the service's
    had = before or Gateway((), config.serve_host.value, config.serve_port.value or PORT)
    if models:
        named_models(models, aliases, pins)
        # Other models have other names: what was said of the former ones is not taken over.
        had = Gateway(tuple(map(_lasting_name, models)), had.host, had.port, tuple(map(_lasting_alias, aliases)),
                      tuple(map(_lasting_name, pins)))  # fmt: skip
    elif aliases or pins:
        raise click.UsageError("--alias and --pin are of models: name these after --gateway, too")
    wished_gateway = msgspec.structs.replace(had, host=host or had.host, port=port or had.port)
    check_exposure(wished_gateway.host, config.serve_api_key_file.value is not None)
    return wished_gateway


def _lasting_alias(alias: str) -> str:
    name, equals, model = alias.partition("=")
    return f"{name}={_lasting_name(model)}" if equals else name


def _lasting_name(model: str) -> str:
    """What a service should call ``model``: an id of the hub as it is, to find the newest; a folder in full."""
    path = expanded(model)
    return str(path.absolute()) if path.exists() else model


def _note_variables() -> None:
    """Say which settings of this shell the service does not get."""
    lost = [variable(name) for name, key in KEYS.items() if key.section != "generate" and os.environ.get(key.variable)]
    if lost:
        click.echo(
            f"expertd: {', '.join(lost)}: set in this shell, not for the service; write it into config.toml", err=True
        )


# -- what is shown -----------------------------------------------------------------------------------------------------


def as_object(site: _Site, situation: Situation) -> dict[str, Any]:
    """The object that ``status --json`` prints.

    ``current``: whether the agent is installed as this version of expertd, called as it is now, would do it.
    ``last_status``: how its last process ended (a negative number: by that signal), null if that is not known.
    """
    agents = []
    for agent in site.all:
        if agent not in site.wanted and not situation.installed(agent):
            continue
        found = situation.of(agent)
        agents.append(
            {
                "name": agent.name,
                "label": site.manager.label(agent),
                "file": str(site.manager.file(agent)),
                "installed": found.definition is not None,
                "current": found.definition == site.manager.render(agent),
                "loaded": found.loaded,
                "pid": found.pid,
                "last_status": found.last_status,
                "given_up": why_refused(site.home, agent.name) or None,
                "log": str(agent.log),
            }
        )
    record = situation.record
    gateway = record.gateway if record else None
    return {
        "manager": site.manager.name,
        "installed": any(agent["installed"] for agent in agents),
        "version": record.version if record else None,
        "stopped": bool(record and record.stopped),
        "other_daemon": situation.stranger,
        "gateway": None if gateway is None else {"models": list(gateway.models), "url": _url(gateway)},
        "agents": agents,
    }


def table(found: dict[str, Any]) -> list[str]:
    """The same as lines for a person."""
    if not found["installed"]:
        lines = ["no service is installed; daemons start on demand", "install it with: expertd service install"]
        if found["other_daemon"]:
            lines.insert(1, f"one runs (process {found['other_daemon']})")
        return lines
    lines = [f"service   {found['manager']}, installed by expertd {found['version'] or '(unknown)'}"]
    for agent in found["agents"]:
        lines.append(f"{agent['name']:8}  {_state(agent, found)}")
        if agent["given_up"]:
            lines.append(f"          {agent['given_up']}")
        if agent["name"] == "gateway" and found["gateway"]:
            lines += [f"  url     {found['gateway']['url']}"]
            lines += [f"  model   {model}" for model in found["gateway"]["models"]]
        lines += [f"  file    {agent['file']}", f"  log     {agent['log']}"]
    if found["other_daemon"]:
        lines.append(
            f"note      the daemon that answers (process {found['other_daemon']}) is not the service's; when it ends, "
            "the service's takes over"
        )
    if not all(agent["current"] for agent in found["agents"]) or found["version"] != package_version():
        lines.append("note      installed by another version or from another place; renew it: expertd service install")
    return lines


def _state(agent: dict[str, Any], found: dict[str, Any]) -> str:
    if agent["pid"]:
        return f"runs (process {agent['pid']})"
    if not agent["installed"]:
        return "is not installed completely: expertd service install"
    last = agent["last_status"]
    how = "" if not last else f"; it ended by signal {-last}" if last < 0 else f"; it ended with status {last}"
    if found["stopped"]:
        return f"stopped{how}; start it with: expertd service start"
    return f"does not run{how}"


def _url(gateway: Gateway) -> str:
    host = f"[{gateway.host}]" if ":" in gateway.host else gateway.host
    return f"http://{host}:{gateway.port}/v1"
