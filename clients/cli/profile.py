"""``expertd profile ...``: which experts a kind of work uses, recorded, looked at, and chosen for a model.

What a profile is: ``expertd.protocol.profiles``; how one is made: ``expertd.clients.profiles``.  Having its experts
brought in is ``expertd warm``, having those stay that everything uses ``expertd pin``.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expertd.clients.cli.group import Group
from expertd.clients.cli.parameters import (
    budget_option,
    complete_model,
    complete_profile,
    json_option,
    model_folder_option,
)
from expertd.clients.cli.signals import ENDS, Stop
from expertd.protocol.errors import CheckpointError, ProfileInvalid
from expertd.protocol.model_names import find_model, shown_name, shown_path
from expertd.protocol.paths import Home
from expertd.protocol.profiles import (
    EVERYWHERE,
    Profile,
    profile_names,
    profile_path,
    profiles_in_use,
    read_profile,
    remove_profile,
    use_profile,
    write_profile,
)

if TYPE_CHECKING:
    from expertd.protocol.traces import Trace

TRACE_END_S = 60.0
"""Longest wait for the daemon's answer, which itself waits for the sessions."""

_file = click.Path(path_type=Path)
_replace = click.option("--replace", is_flag=True, help="Take the place of a profile of that name.")


@click.group(cls=Group)
def profile() -> None:
    """Record which experts a kind of work uses, and have them there beforehand."""


@profile.command()
@click.argument("name")
@click.argument("model", required=False, shell_complete=complete_model)
@click.option(
    "--prompts", type=_file, metavar="FILE", help="Answer these: one a line, or .jsonl with 'prompt' or 'messages'."
)
@click.option("--trace", "traces", type=_file, multiple=True, metavar="FILE", help="Count a trace; repeatable.")
@click.option("--seconds", type=click.FloatRange(min=0), metavar="SECONDS", help="Watch live traffic for so long.")
@click.option(
    "--max-tokens", default=128, show_default=True, type=click.IntRange(min=1), metavar="TOKENS", help="Longest answer."
)
@click.option("--raw", is_flag=True, help="Continue prompts as they are, without the model's chat template.")
@_replace
@model_folder_option
@budget_option
def record(
    name: str, model: str | None, prompts: Path | None, traces: tuple[Path, ...], seconds: float | None,
    max_tokens: int, raw: bool, replace: bool, budget: str | None,
) -> None:  # fmt: skip
    """Make the profile NAME of what MODEL uses.

    MODEL is a checkpoint's folder or name; without it, it is the one that is loaded.

    Without --prompts or --trace it watches the live traffic of every process that uses the model, until Ctrl-C (or
    SIGTERM).  Only if it is killed outright does the daemon go on recording; 'expertd trace stop' ends that.
    """
    if (prompts is not None) + bool(traces) + (seconds is not None) > 1:
        raise click.UsageError("give one of --prompts, --trace and --seconds")
    home = Home.current()
    if profile_path(home, name).exists() and not replace:
        raise ProfileInvalid(f"there is a profile {name!r} already; give --replace, or choose another name")
    folder = _only_one_loaded(home) if model is None else find_model(model)
    experts = experts_of(home, folder)
    from expertd.clients.profiles.counting import profile_of
    from expertd.protocol.traces import read_trace

    if prompts is not None:
        found, source = _answered(folder, prompts, max_tokens, raw, budget)
    elif traces:
        found = [read_trace(path) for path in traces]
        source = ", ".join(path.name for path in traces)
    else:
        found, source = _watched(home, folder, seconds)
    made = profile_of(found, shown_name(folder), source, time.time(), experts)
    write_profile(home, name, made, replace=replace)
    for line in _told(name, made):
        click.echo(line)
    click.echo(f"bring it in with: expertd warm {model or folder} --profile {name}")


@profile.command("list")
@json_option()
def list_(as_json: bool) -> None:
    """List the profiles, and the models that use them."""
    home = Home.current()
    used = profiles_in_use(home)
    rows: list[dict[str, Any]] = []
    for name in profile_names(home):
        users = sorted(folder for folder, chosen in used.items() if chosen == name)
        try:
            rows.append({**_summary(name, read_profile(home, name)), "used_by": users, "error": None})
        except ProfileInvalid as error:
            rows.append({"name": name, "used_by": users, "error": error.message})
    if as_json:
        click.echo(json.dumps({"profiles": rows}, indent=2))
        return
    if not rows:
        click.echo("no profile yet; make one with: expertd profile record NAME MODEL")
    for row in rows:
        if row["error"] is not None:
            click.echo(f"{row['name']}: {row['error']}")
            continue
        click.echo(f"{row['name']}: {row['blocks_used']} of {row['blocks']} experts of {row['model']}, {row['source']}")
        for folder in row["used_by"]:
            click.echo(f"  used by {shown_path(folder)}")


@profile.command()
@click.argument("name", shell_complete=complete_profile)
@json_option()
def show(name: str, as_json: bool) -> None:
    """Show what a profile counts, layer by layer."""
    home = Home.current()
    found = read_profile(home, name)
    layers: list[dict[str, Any]] = [
        {
            "layer": layer,
            "experts": count,
            "used": sum(map(bool, uses)),
            "hottest_quarter": round(sum(sorted(uses)[-max(1, count // 4) :]) / max(1, sum(uses)), 4),
            "everywhere": [expert for expert, seen in enumerate(seen) if seen and seen >= EVERYWHERE * found.prompts],
        }
        for layer, (count, uses, seen) in enumerate(zip(found.experts, found.uses, found.seen, strict=True))
    ]
    if as_json:
        click.echo(json.dumps({**_summary(name, found), "by_layer": layers}, indent=2))
        return
    for line in (*_told(name, found), "", "layer  used  uses of the hottest quarter  in use everywhere"):
        click.echo(line)
    for row in layers:
        click.echo(
            f"{row['layer']:>5}  {row['used']:>4}  {100 * row['hottest_quarter']:>23.1f} %  "
            f"{len(row['everywhere']):>17}"
        )


@profile.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("name", required=False, shell_complete=complete_profile)
@click.option("--none", "ends", is_flag=True, help="Use no profile any more.")
@model_folder_option
def use(model: str, name: str | None, ends: bool) -> None:
    """Have MODEL use the profile NAME from now on.

    'expertd warm MODEL' brings it in, and so does a daemon to which the model comes with room to spare; what was there
    before a restart goes first.  What runs is not touched.
    """
    if (name is None) != ends:
        raise click.UsageError("give the NAME of a profile, or --none")
    home = Home.current()
    try:
        folder = find_model(model)
    except CheckpointError:
        if model in profile_names(home):
            raise click.UsageError(f"{model} is a profile; the model comes first: profile use MODEL {model}") from None
        raise
    if name is None:
        use_profile(home, str(folder), None)
        click.echo(f"{shown_name(folder)} uses no profile")
        return
    fitting(read_profile(home, name), name, experts_of(home, folder), folder)
    use_profile(home, str(folder), name)
    click.echo(f"{shown_name(folder)} uses the profile {name}; bring it in now with: expertd warm {model}")


@profile.command("import")
@click.argument("file", type=_file)
@click.argument("name")
@click.option("--model", required=True, shell_complete=complete_model, metavar="MODEL", help="What it is a profile of.")
@_replace
def import_(file: Path, name: str, model: str, replace: bool) -> None:
    """Take a profile of flash-moe (its JSON) in FILE over as NAME."""
    from expertd.clients.planning.shape import read_shape
    from expertd.clients.profiles.flash_moe import read_flash_moe

    home, folder = Home.current(), find_model(model)
    layers = read_shape(folder, home.packed).manifest.layers
    paths, experts = [layer.path for layer in layers], [layer.experts for layer in layers]
    made = read_flash_moe(file, shown_name(folder), time.time(), paths, experts)
    write_profile(home, name, made, replace=replace)
    for line in _told(name, made):
        click.echo(line)


@profile.command()
@click.argument("name", shell_complete=complete_profile)
def remove(name: str) -> None:
    """Remove a profile; models that use it use none from then on."""
    users = remove_profile(Home.current(), name)
    click.echo(f"the profile {name} is removed")
    for folder in users:
        click.echo(f"{shown_path(folder)} uses no profile any more")


def fitting(found: Profile, name: str, experts: list[int], folder: Path) -> Profile:
    """``found`` if it is one for the model in ``folder``, whose MoE layers have so many ``experts``.

    Raises:
        ProfileInvalid: it is not.
    """
    if (problem := found.misfit(experts)) is not None:
        raise ProfileInvalid(f"the profile {name} is none for {shown_name(folder)}: {problem}")
    return found


def experts_of(home: Home, folder: Path) -> list[int]:
    """How many experts each MoE layer of the model has, without loading it."""
    from expertd.clients.planning.shape import read_shape

    return [layer.experts for layer in read_shape(folder, home.packed).manifest.layers]


def _only_one_loaded(home: Home) -> Path:
    """The folder of the model that the daemon holds.

    Raises:
        click.UsageError: it holds none, or several.
    """
    from expertd.protocol.messages import AskStatus, Status
    from expertd.protocol.rendezvous import connect

    with connect(home, "cli") as connection:
        folders = [Path(model.path) for model in connection.ask(AskStatus(), Status).models]
    if len(folders) != 1:
        loaded = ", ".join(map(shown_name, folders)) or "none"
        raise click.UsageError(f"say which MODEL; what is loaded: {loaded}")
    return folders[0]


def _answered(folder: Path, prompts: Path, max_tokens: int, raw: bool, budget: str | None) -> tuple[list[Trace], str]:
    """Answer the prompts; the trace of that."""
    from expertd.clients.traces.prompts import read_prompts
    from expertd.protocol.traces import read_trace
    from expertd.worker.answers import answer_all, encode_prompt
    from expertd.worker.load import load, unload
    from expertd.worker.recording import recording

    texts = read_prompts(prompts)
    loaded, tokenizer = load(folder, budget=budget)
    encoded = [encode_prompt(tokenizer, prompt, raw=raw) for prompt in texts]
    with tempfile.TemporaryDirectory(prefix="expertd-profile-") as scratch:
        output = Path(scratch) / "trace.npz"
        with (
            recording(loaded, output, scores=False) as recorder,
            click.progressbar(length=len(encoded), label="prompts", show_pos=True, file=sys.stderr) as bar,
        ):
            for _ in answer_all(loaded, tokenizer, encoded, max_tokens):
                bar.update(1)
                recorder.check()
        unload(loaded)
        return [read_trace(output)], f"{len(texts)} prompts of {prompts.name}"


def _watched(home: Home, folder: Path, seconds: float | None) -> tuple[list[Trace], str]:
    """Watch what uses the model, until Ctrl-C or for so long; the traces of that."""
    from expertd.protocol.messages import StartTrace, StopTrace, TraceStarted, TraceStopped
    from expertd.protocol.rendezvous import connect
    from expertd.protocol.traces import read_trace

    began, stop = time.monotonic(), Stop()
    # Whatever ends this, the daemon has to be told, or it would record for good.
    with tempfile.TemporaryDirectory(prefix="expertd-profile-") as scratch, stop.on(*ENDS):
        with connect(home, "cli") as connection:
            connection.ask(StartTrace(folder=scratch), TraceStarted)
            try:
                end = "" if seconds is not None else "; Ctrl-C ends it"
                click.echo(f"watching what uses {shown_name(folder)}{end}", err=True)
                while not stop.wanted and (seconds is None or time.monotonic() < began + seconds):
                    time.sleep(0.1)
            finally:
                ended = connection.ask(StopTrace(), TraceStopped, timeout_s=TRACE_END_S).ended
        paths = [Path(each.path) for each in ended if each.tokens and Path(each.path).exists()]
        found = [trace for trace in map(read_trace, paths) if trace.info.model == shown_name(folder)]
    return found, f"{round(time.monotonic() - began)} s of live traffic"


def _summary(name: str, found: Profile) -> dict[str, Any]:
    return {
        "name": name,
        "model": found.model,
        "made_at": found.made_at,
        "source": found.source,
        "tokens": found.tokens,
        "prompts": found.prompts,
        "layers": len(found.experts),
        "blocks": sum(found.experts),
        "blocks_used": len(found.blocks),
        "blocks_everywhere": len(found.everywhere),
    }


def _told(name: str, found: Profile) -> list[str]:
    made = time.strftime("%d %b %Y %H:%M", time.localtime(found.made_at))
    tokens = f"{found.tokens:,} tokens, " if found.tokens else ""
    return [
        f"profile {name} of {found.model}, made {made} of {found.source}",
        f"{tokens}{found.prompts:,} prompts or sequences; {len(found.blocks)} of {sum(found.experts)} experts used, "
        f"{len(found.everywhere)} of them in half of the prompts or more",
    ]
