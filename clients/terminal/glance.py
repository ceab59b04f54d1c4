"""A daemon's state at a glance: one calm screen in plain words, for somebody who has read nothing about expertd.

Pure: lines from a ``Status`` and the names of programs.  All other figures are in
``expertd.clients.terminal.figures``.
"""

from __future__ import annotations

from expertd.clients.terminal.fit import wrapped
from expertd.protocol.shown import show_size, shown_name

TYPE_CHECKING = False  # see terminal.fit
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from expertd.protocol.messages import ModelStatus, SessionStatus, Status

LABEL = 11
"""Columns before what is told."""
SHORT_BAR, LONG_BAR = 16, 64
USERS = 3
"""So many programs of a model are named; of more, the first ones."""
BLOCKS = "█░"
PLAIN_BLOCKS = "#."
"""For a terminal that has no others."""


def glance(
    found: Status, programs: Mapping[int, str], width: int, blocks: str = BLOCKS, user_home: str = ""
) -> list[str]:
    """The lines for a terminal of ``width`` columns.

    Args:
        programs: names by process ids, as far as they are known.
        blocks: the characters of the full and the empty part of a bar.
        user_home: the user's own folder, which is shown as ``~``.
    """
    troubles = [line for trouble in _troubles(found, programs) for line in wrapped(f"! {trouble}", width, indent=2)]
    up = duration(found.daemon.uptime_s)
    state = f"expertd has been running for {up}; " + ("it needs a look:" if troubles else "all is well.")
    held = 100 * found.used_bytes / max(1, found.budget_bytes)
    used = f"{show_size(found.used_bytes)} of {show_size(found.budget_bytes)} that it may take"
    lines = [state, *troubles, "", _row("memory", bar(held, _bar_width(width), blocks), used)]
    lines += [f"{'':{LABEL}}{line}" for note in _notes(found) for line in wrapped(note, width - LABEL)]
    for model in found.models:
        lines += ["", *_model(model, programs, width, blocks, user_home)]
    if not found.models:
        lines += ["", "No model has been used yet.  Try: expertd chat MODEL"]
    return [*lines, "", "More: expertd status --verbose    Live: expertd top"]


def bar(percent: float, width: int, blocks: str = BLOCKS) -> str:
    """A bar of ``width`` characters; what is more than nothing fills one at least."""
    full = min(width, max(1 if percent > 0 else 0, round(width * percent / 100)))
    return blocks[0] * full + blocks[1] * (width - full)


def duration(seconds: float) -> str:
    """Two units at most: ``3 d 4 h``, ``2 h 13 min``, ``45 s``."""
    whole = round(seconds)
    for size, unit, next_size, next_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // next_size
            return f"{whole // size} {unit}" + (f" {rest} {next_unit}" if rest else "")
    return f"{whole} s"


def percent(part: float, whole: float) -> str:
    """``part`` of ``whole``, never rounded to 0 or 100 % if it is neither."""
    share = 100 * part / max(1, whole)
    if 0 < share < 0.1 or 99.9 < share < 100:
        return "less than 0.1 %" if share < 1 else "more than 99.9 %"
    return f"{share:.0f} %" if share in (0, 100) else f"{share:.1f} %"


def _bar_width(width: int) -> int:
    return min(LONG_BAR, max(SHORT_BAR, width - 64))


def _row(label: str, *parts: str) -> str:
    return f"{label:{LABEL}}{'  '.join(parts)}"


def _model(
    model: ModelStatus, programs: Mapping[int, str], width: int, blocks: str, user_home: str
) -> list[str]:
    looked = model.hits + model.misses
    resident = 100 * model.resident_blocks / max(1, model.blocks)
    hits = 100 * model.hits / max(1, looked)
    long = _bar_width(width)
    held = percent(model.resident_blocks, model.blocks)
    there = f"{held} of its experts are in memory, {show_size(model.pool_bytes)}"
    found = f"{percent(model.hits, looked)} were there when they were needed" if looked else "not used yet"
    name, parent = shown_name(model.path), model.path.rpartition("/")[0] + "/"
    if user_home and parent.startswith(f"{user_home}/"):
        parent = f"~{parent.removeprefix(user_home)}"
    where = "" if "/" in name else _shortened(f"  {parent}", width - len(name))  # an id says all
    return [
        name + where,
        _row("  held", bar(resident, long, blocks), there),
        *_base(model),
        _row("  found", bar(hits, long, blocks), found),
        _row("  disk", f"{show_size(model.bytes_read + model.base_read)} read so far"),
        *_kept(model),
        *_users(model.sessions, programs, width),
    ]


def _kept(model: ModelStatus) -> list[str]:
    """What is brought in, or stays, whoever uses it."""
    kept = []
    left = model.recalled
    if left is not None and left.blocks:
        whence = "from before the restart" if left.recorded_at or left.adopted else "of its profile"
        kept.append(f"{left.back} of {left.blocks} experts {whence} are back")
    if model.warming and model.sessions:  # without anybody nothing is read
        kept.append(f"{model.warming} on their way")
    if model.pinned:
        kept.append(f"{model.pinned} pinned")
    return [_row("  kept", ", ".join(kept))] if kept else []


def _base(model: ModelStatus) -> list[str]:
    """Where its other weights are, as far as the daemon knows."""
    if model.base_bytes:
        return [_row("  shared", f"{show_size(model.base_bytes)} of other weights, once for all programs")]
    if model.base_problem:
        return [_row("  shared", "not its other weights, each program holds its own; --verbose says why")]
    return []


def _users(sessions: Sequence[SessionStatus], programs: Mapping[int, str], width: int) -> list[str]:
    if not sessions:
        return [_row("  used by", "no program now; it stays in memory until that is needed")]
    shown = sessions if len(sessions) <= USERS else sessions[: USERS - 1]
    users = [_shortened(_user(session, programs), width - LABEL) for session in shown]
    if len(shown) < len(sessions):
        users.append(f"and {len(sessions) - len(shown)} more programs")
    return [_row("" if number else "  used by", user) for number, user in enumerate(users)]


def _user(session: SessionStatus, programs: Mapping[int, str]) -> str:
    name = named(session.pid, programs)
    tokens = session.decode_tokens + session.prompt_tokens
    done = f", {tokens:,} tokens" if tokens else ""
    if session.left_behind:
        return f"{name}, does not answer"
    return f"{name}{done}"


def named(pid: int, programs: Mapping[int, str]) -> str:
    """A process as people know it."""
    return f"{programs[pid]} (process {pid})" if pid in programs else f"process {pid}"


def _troubles(found: Status, programs: Mapping[int, str]) -> list[str]:
    """What a person should know, and what to do about it."""
    troubles = []
    if found.pressure != "normal":
        level = "very short" if found.pressure == "critical" else "short"
        troubles.append(
            f"The machine is {level} of memory, so expertd takes {show_size(found.limit_bytes)} at most for now "
            f"({found.pressure_figure}).  Answers are slower; closing other programs helps."
        )
    troubles += [
        f"{named(session.pid, programs)} does not answer and holds {show_size(session.held_bytes)}: continue it "
        f"(kill -CONT {session.pid}) or end it."
        for model in found.models
        for session in model.sessions
        if session.left_behind
    ]
    return troubles


def _notes(found: Status) -> list[str]:
    """What is as somebody wanted it, or passes by itself."""
    notes = []
    if found.pressure == "normal" and found.limit_bytes < found.budget_bytes:
        limit = show_size(found.limit_bytes)
        notes.append(f"{limit} for now: the machine was short of memory; expertd takes more again step by step")
    if found.simulated_ssd:
        notes.append(f"the disk is slowed down to {found.simulated_ssd} (--simulate-ssd)")
    if found.tracing:
        notes.append(f"routing is recorded into {found.tracing}; end that with: expertd trace stop")
    return notes


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(1, width - 3)]}..."
