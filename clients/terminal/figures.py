"""Every figure of a daemon's state, for who wants to know: ``expertd status --verbose``, ``--layers``, ``--journal``.

Pure: lines from a ``Status``.  The screen that is shown by default is ``expertd.clients.terminal.glance``.
"""

from __future__ import annotations

import time

from expertd.clients.terminal.fit import beside
from expertd.protocol.shown import show_size, shown_path

TYPE_CHECKING = False  # see terminal.fit
if TYPE_CHECKING:
    from expertd.protocol.messages import AheadStatus, ModelStatus, SessionStatus, Status


LABEL = 10
"""Columns before what is told; two more within a model."""


def table(
    found: Status, *, width: int | None = None, layers: bool = False, journal: bool = False
) -> list[str]:
    """Every figure, as lines of ``width`` columns (None: one a fact); on demand each MoE layer, or the journal."""
    minutes, seconds = divmod(round(found.daemon.uptime_s), 60)
    lines = [
        f"daemon    process {found.daemon.pid}, up {minutes} min {seconds} s, home {found.home}",
        f"budget    {show_size(found.budget_bytes)}, in use {show_size(found.used_bytes)}, pressure {found.pressure}",
    ]
    if found.limit_bytes < found.budget_bytes:
        why = "growing again" if found.pressure == "normal" else found.pressure_figure
        lines.append(f"limit     {show_size(found.limit_bytes)} because of memory pressure: {why}")
    if found.simulated_ssd:
        lines.append(f"disk      slowed down to {found.simulated_ssd} (--simulate-ssd)")
    lines += _reads(found)
    if found.frames_dropped:
        lines.append(f"dropped   {found.frames_dropped} messages that were not understood; the daemon's log names them")
    if found.tracing:
        lines.append(f"tracing   into {found.tracing}; end it with: expertd trace stop")
    lines = _fitted(lines, LABEL, width)
    if journal:
        lines += _journal(found, width)
    if not found.models:
        lines.append("models    none yet")
    for model in found.models:
        lines += ["", *_fitted(_model(model), LABEL + 2, width)]
        if layers:
            lines += _layers(model)
    return lines


def _fitted(lines: list[str], label: int, width: int | None) -> list[str]:
    return [piece for line in lines for piece in beside(line[:label], line[label:], width)]


def _reads(found: Status) -> list[str]:
    lines = [
        f"reads     {device.name}: {device.reads} reads, {show_size(device.bytes)}, half of them within "
        f"{_time(device.p50_us)}, 99 % within {_time(device.p99_us)}, {device.depth_mean:.1f} at once"
        for device in found.devices
    ]
    if found.fetch_to_read_us is not None and found.fetch_to_read_us.p50:
        begin, most = _time(found.fetch_to_read_us.p50), _time(found.fetch_to_read_us.p99)
        lines.append(f"fetches   begin to read after {begin}, 99 % within {most}")
    return lines


def _time(us: int) -> str:
    return f"{us} us" if us < 1000 else f"{us / 1000:.1f} ms"


def _journal(found: Status, width: int | None) -> list[str]:
    if not found.journal:
        return ["journal   nothing has changed"]
    lines = ["journal   changes of the limit, the newest last"]
    for entry in found.journal:
        at = time.strftime("%d %b %H:%M:%S", time.localtime(entry.at))
        change = f"{show_size(entry.before_bytes)} -> {show_size(entry.after_bytes)}"
        lines += beside(f"  {at}  {entry.pressure:8}  ", f"{change}: {entry.why}", width)
    return lines


def _model(model: ModelStatus) -> list[str]:
    looked = model.hits + model.misses
    rate = f"{100 * model.hits / looked:.1f} % hits" if looked else "no lookup yet"
    share = 100 * model.resident_blocks / model.blocks
    lines = [
        f"model     {shown_path(model.path)} ({model.family})",
        f"  experts   {model.moe_layers} layers x {model.experts}, {model.top_k} a token, "
        f"{show_size(model.block_bytes)} each",
        f"  resident  {model.resident_blocks} of {model.blocks} blocks ({share:.0f} %), room for {model.slots}, "
        f"{show_size(model.pool_bytes)}",
        f"  lookups   {rate} ({model.hits} hits, {model.misses} misses), {model.evictions} evictions, "
        f"{show_size(model.bytes_read)} read",
    ]
    lines += [f"  ahead     {_ahead(kind)}" for kind in model.ahead if kind.announced or kind.turns]
    if model.base_bytes:
        lines.append(f"  base      {show_size(model.base_bytes)} in shared memory, {show_size(model.base_read)} read")
    elif model.base_problem:
        lines.append(f"  base      not shared: {model.base_problem}")
    if model.packed:
        lines.append(f"  packed    {model.packed}")
    if model.moves:
        lines.append(
            f"  moves     {model.moves} new generations of pools, {model.blocks_copied} blocks copied for them"
        )
    lines += _kept(model)
    lines += [f"  session   {_session(session)}" for session in model.sessions]
    if not model.sessions:
        lines.append("  session   none")
    return lines


def _kept(model: ModelStatus) -> list[str]:
    lines = []
    left = model.recalled
    if left is not None:
        at = time.strftime("%d %b %H:%M:%S", time.localtime(left.recorded_at))
        whence = f"the record of {at}" if left.recorded_at else "the daemon before" if left.adopted else "its profile"
        unread = f", {left.adopted} of them without a read" if left.adopted else ""
        lines.append(f"  again     {left.back} of {left.blocks} blocks from {whence}{unread}")
    if model.warming:
        lines.append(f"  warming   {model.warming} blocks are still to be brought in")
    if model.pinned:
        lines.append(f"  pinned    {model.pinned} blocks")
    return lines


def _ahead(kind: AheadStatus) -> str:
    name = f"{kind.kind} ({kind.turns} changes):" if kind.turns else f"{kind.kind}:"
    found = f"{name:18} {100 * kind.useful:.0f} % used (shuffled {100 * kind.shuffled:.0f} %)"
    if kind.useful_bytes or kind.wasted_bytes:
        found += f", {show_size(kind.useful_bytes)} useful, {show_size(kind.wasted_bytes)} wasted"
    return found + ("" if kind.reading else ", off now")


def _layers(model: ModelStatus) -> list[str]:
    if not model.layers:
        return ["  layers    unknown to this daemon, which is older than this command"]
    rows = [["layer", "pool", "pool slots", "resident", "hits", "misses", "evictions", "bytes read"]]
    for number, layer in enumerate(model.layers):
        share = 100 * layer.bytes_read / max(1, model.bytes_read)
        counts = (layer.pool, layer.pool_slots, layer.resident_blocks, layer.hits, layer.misses, layer.evictions)
        rows.append([str(number), *map(str, counts), f"{share:.1f} %"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(map(str.rjust, row, widths)) for row in rows]


def _session(session: SessionStatus) -> str:
    if session.left_behind:
        return (
            f"process {session.pid} does not answer and holds {show_size(session.held_bytes)}; "
            f"continue it (kill -CONT {session.pid}) or end it"
        )
    waits = ", waits for a read" if session.waiting else ""
    tokens = f", {session.decode_tokens} + {session.prompt_tokens} tokens (answers + prompts)"
    counted = tokens if session.decode_tokens or session.prompt_tokens else ""
    return f"process {session.pid}, mode {session.mode}, {session.fetches} fetches{counted}{waits}"
