"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a finding is to be taken: ``problem`` keeps expertd, or a part of it, from working."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One sentence, what to do about it (empty: nothing), and lines that explain it."""

    verdict: Verdict
    text: str
    todo: str = ""
    why: tuple[str, ...] = ()


def ok(text: str, why: tuple[str, ...] = ()) -> Finding:
    """All is well."""
    return Finding(Verdict.OK, text, "", why)


def note(text: str, todo: str = "", why: tuple[str, ...] = ()) -> Finding:
    """Good to know."""
    return Finding(Verdict.NOTE, text, todo, why)


def problem(text: str, todo: str) -> Finding:
    """Something will not work."""
    return Finding(Verdict.PROBLEM, text, todo)
