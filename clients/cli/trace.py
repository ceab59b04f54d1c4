"""``expertd trace record | start | stop | show | recover``: what routers choose, recorded and looked at."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from expertd.clients.cli.group import INTERRUPTED, Group
from expertd.clients.cli.parameters import budget_option, complete_model, json_option, model_folder_option
from expertd.clients.terminal.fit import folded, width_of
from expertd.protocol.messages import StartTrace, StopTrace, TraceStarted, TraceStopped
from expertd.protocol.model_names import find_model
from expertd.protocol.paths import Home, expanded
from expertd.protocol.rendezvous import connect
from expertd.protocol.sizes import show_size
from expertd.protocol.traces import Trace, TraceInfo, check_new, part_of, read_trace
from expertd.protocol.traces import recover as recover_trace

FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.75)
STOP_S = 60.0
"""Longest wait for the daemon's answer, which itself waits for the sessions."""

_file = click.Path(path_type=Path)


@click.group(cls=Group)
def trace() -> None:
    """Record which experts a model's routers choose, and look at it."""


@trace.command()
@click.argument("model", shell_complete=complete_model)
@click.option(
    "--prompts",
    required=True,
    type=_file,
    metavar="FILE",
    help="A prompt a line, or .jsonl with 'prompt' or 'messages'.",
)
@click.option("-o", "--output", required=True, type=_file, metavar="OUT.npz", help="Where the trace goes.")
@click.option(
    "--max-tokens", default=256, show_default=True, type=click.IntRange(min=1), metavar="TOKENS", help="Longest answer."
)
@click.option(
    "--temperature", default=0.0, show_default=True, type=click.FloatRange(min=0), metavar="NUMBER", help="0 is greedy."
)
@click.option("--seed", default=0, show_default=True, metavar="NUMBER", help="Of the sampling, where it is not greedy.")
@click.option(
    "--parallel", default=1, show_default=True, type=click.IntRange(1, 32), metavar="NUMBER", help="Answers at a time."
)
@click.option("--raw", is_flag=True, help="Continue prompts as they are, without the model's chat template.")
@click.option("--scores/--no-scores", default=True, show_default=True, help="Keep the router's scores, too.")
@model_folder_option
@budget_option
def record(
    model: str, prompts: Path, output: Path, max_tokens: int, temperature: float, seed: int, parallel: int, raw: bool,
    scores: bool, budget: str | None,
) -> None:  # fmt: skip
    """Generate answers to prompts with MODEL (a checkpoint's folder or name), and record its routing.

    Ctrl-C ends it early; what was recorded until then is kept, and told.
    """
    from expertd.clients.traces.prompts import read_prompts
    from expertd.worker.answers import answer_all, encode_prompt
    from expertd.worker.load import load, unload
    from expertd.worker.recording import recording

    check_new(output)
    folder = find_model(model)
    texts = read_prompts(prompts)
    loaded, tokenizer = load(folder, budget=budget)
    encoded = [encode_prompt(tokenizer, prompt, raw=raw) for prompt in texts]
    interrupted = False
    with recording(loaded, output, scores=scores) as recorder:
        try:
            with click.progressbar(length=len(encoded), label="prompts", show_pos=True, file=sys.stderr) as bar:
                for _ in answer_all(loaded, tokenizer, encoded, max_tokens, temperature, seed, parallel):
                    bar.update(1)
                    recorder.check()
        except KeyboardInterrupt:
            interrupted = True
    unload(loaded)
    _tell(output, recorder.info)
    if interrupted:
        click.echo("expertd: interrupted; the trace has what was computed until then", err=True)
        sys.exit(INTERRUPTED)


def _tell(path: Path, info: TraceInfo) -> None:
    for line in folded(_told(path, info), width_of(sys.stdout)):
        click.echo(line)


def _told(path: Path, info: TraceInfo) -> str:
    if not info.tokens:
        return "nothing was recorded"
    size = path.stat().st_size
    return (
        f"{path}: {info.tokens:,} tokens ({info.decode_tokens:,} decoded) of {info.sequences} sequences, "
        f"{show_size(size)}, {size / info.tokens:.0f} bytes a token"
    )


@trace.command()
@click.option("-o", "--output", type=_file, metavar="FOLDER", help="Where the traces go.  [default: here]")
def start(output: Path | None) -> None:
    """Record the live traffic of every process that uses the daemon, one trace each, until 'expertd trace stop'.

    Exits with 3 if no daemon runs in this home.
    """
    folder = expanded(output or Path()).resolve()
    if not folder.is_dir():
        raise click.BadParameter(f"{folder} is no folder; create it first", param_hint="--output")
    with connect(Home.current(), "cli") as connection:
        answer = connection.ask(StartTrace(folder=str(folder)), TraceStarted)
    click.echo(
        f"recording into {folder} of {answer.sessions} sessions, and those that come; end it with: expertd trace stop"
    )


@trace.command()
def stop() -> None:
    """End the recording of live traffic, and tell what was recorded.

    Exits with 1 if a recording failed or has not ended, with 3 if no daemon runs in this home.
    """
    with connect(Home.current(), "cli") as connection:
        answer = connection.ask(StopTrace(), TraceStopped, timeout_s=STOP_S)
    failed = bool(answer.unfinished)
    for ended in answer.ended:
        if ended.error and part_of(Path(ended.path)).exists():
            click.echo(f"{ended.path}: {ended.error}; 'expertd trace recover {ended.path}' makes a trace of the rest")
        elif ended.error:
            click.echo(f"{ended.path}: {ended.error}")
        else:
            click.echo(f"{ended.path}: " + (f"{ended.tokens:,} tokens" if ended.tokens else "no traffic, no file"))
        failed = failed or bool(ended.error)
    for path in answer.unfinished:
        click.echo(f"{path}: its process does not answer; the file is finished when it does")
    if not answer.ended and not answer.unfinished:
        click.echo("nothing was recorded")
    if failed:
        raise SystemExit(1)


@trace.command()
@click.argument("path", type=_file, metavar="OUT.npz")
def recover(path: Path) -> None:
    """Make a trace of what a recorder that was killed, or had no room, has left."""
    _tell(path, recover_trace(path))


@trace.command()
@click.argument("path", type=_file, metavar="OUT.npz")
@click.option("--against", type=_file, metavar="OTHER.npz", help="Compare each layer's hottest quarter with another's.")
@click.option("--picture", type=_file, metavar="FILE", help="Draw it, too (.png or .svg; needs matplotlib).")
@click.option(
    "--replay", default=5000, show_default=True, type=click.IntRange(min=0), metavar="TOKENS",
    help="Replay so many tokens through caches (about a second for 100,000 choices and size).",
)  # fmt: skip
@json_option()
def show(path: Path, against: Path | None, picture: Path | None, replay: int, as_json: bool) -> None:
    """Show what a trace tells: reuse from token to token, hot experts, and what caches would hit."""
    from expertd.clients.traces.picture import draw
    from expertd.clients.traces.replay import hit_rates

    found = read_trace(path)
    other = read_trace(against) if against is not None else None
    rates = hit_rates(found, FRACTIONS, replay) if replay else []
    shown = _summary(found, other, rates)
    if picture is not None:
        draw(found, rates, picture)
    if as_json:
        click.echo(json.dumps(shown, indent=2))
        return
    for line in _table(path, found, shown, min(replay, found.info.tokens)):
        click.echo(line)
    if picture is not None:
        click.echo(f"\npicture: {picture}")


def _summary(found: Trace, other: Trace | None, rates: list[dict[str, float]]) -> dict[str, Any]:
    """The object that ``show --json`` prints."""
    from expertd.clients.traces.statistics import hottest_share, jaccard, reuse, uses
    from expertd.protocol.errors import TraceInvalid

    counts = uses(found)
    again = [None if math.isnan(share) else round(float(share), 4) for share in reuse(found)]
    layers: list[dict[str, Any]] = [
        {"layer": layer, "reuse": again[layer], "hottest_quarter": round(share, 4), "unused": int((row == 0).sum())}
        for layer, (share, row) in enumerate(zip(hottest_share(counts), counts, strict=True))
    ]
    if other is not None:
        if (other.info.layers, other.info.experts) != (found.info.layers, found.info.experts):
            raise TraceInvalid("the two traces are of models with different layers or experts, so they do not compare")
        for layer, share in enumerate(jaccard(counts, uses(other))):
            layers[layer]["jaccard"] = round(share, 4)
    info = msgspec.to_builtins(found.info)
    hits = [{name: round(value, 5) for name, value in rate.items()} for rate in rates]
    return {**info, "finished": found.finished, "by_layer": layers, "hits": hits}


def _table(path: Path, found: Trace, shown: dict[str, Any], replayed: int) -> list[str]:
    info = found.info
    lines = [
        f"trace     {path}" + ("" if found.finished else "  (not finished: what its recorder has written so far)"),
        f"model     {info.model or 'not named'}: {info.layers} layers x {info.experts} experts, {info.top_k} a token",
        f"tokens    {info.tokens:,} ({info.decode_tokens:,} decoded) of {info.sequences} sequences, "
        f"in {len(set(found.forward.tolist())):,} forward passes",
        "",
        "layer  used again by the next token  uses of the hottest quarter  never used"
        + ("  hottest quarter in common" if "jaccard" in shown["by_layer"][0] else ""),
    ]
    for row in shown["by_layer"]:
        again = "-" if row["reuse"] is None else f"{100 * row['reuse']:.1f} %"
        line = f"{row['layer']:>5}  {again:>28}  {100 * row['hottest_quarter']:>24.1f} %  {row['unused']:>10}"
        if "jaccard" in row:
            line += f"  {row['jaccard']:>25.2f}"
        lines.append(line)
    if shown["hits"]:
        lines += ["", f"what one pool would hit in the first {replayed:,} tokens, from cold", ""]
        lines.append("cached share    blocks       LRU  the optimum (Belady)")
        for rate in shown["hits"]:
            lines.append(
                f"{100 * rate['fraction']:>10.0f} %  {rate['blocks']:>8}  {100 * rate['lru']:>6.1f} %  "
                f"{100 * rate['belady']:>18.1f} %"
            )
    return lines
