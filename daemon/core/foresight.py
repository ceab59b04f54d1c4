"""Whether reading ahead pays: how much of what sessions announce is really used.  Pure.

A read that serves the event that it was announced for saves up to a read's time; one that does not may cost as much.
So announcements are acted on where at least WORTH of the blocks that were absent are used by their event.  A predictor
without knowledge names as many blocks of the same layer (``shuffled``): one that is hardly better foresees nothing, and
what it gets right is luck.  What is not acted on is tried now and then: announced, counted, and not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from random import Random

WORTH = 0.5
"""The break-even point where a wasted read costs as much as a useful one saves (docs/decisions.md)."""
BETTER = 1.5
"""So many times as much of it has to be used as of what a predictor without knowledge names, unless that pays too."""
EVIDENCE = 64
"""Blocks that have to be judged before it is decided."""
REMEMBERED = 2048
"""When so many are judged, they count half."""
TRIAL, TRIALS = 8, 128
"""Of so many sweeps through the model, in that many it is seen whether announcements pay that are not acted on."""


class Kind(IntEnum):
    """Kinds of announcements: of an event of many tokens, and of one a layer or two ahead."""

    PROMPT = 0
    NEXT = 1
    SECOND = 2


@dataclass
class Gate:
    """What is known of one kind; ``open``: it is read ahead.

    Attributes:
        announced: blocks, since the model came.
        judged, used, shuffled: lately: blocks whose events have passed, those that these used, and those that they
            used of as many that were named without knowledge.
        useful_bytes, wasted_bytes: read because of announcements, since the model came.
    """

    open: bool
    announced: int = 0
    judged: float = 0.0
    used: float = 0.0
    shuffled: float = 0.0
    useful_bytes: int = 0
    wasted_bytes: int = 0

    @property
    def useful_part(self) -> float:
        """The part of what was announced that was used, lately; 0 if nothing is known."""
        return self.used / max(1.0, self.judged)

    @property
    def shuffled_part(self) -> float:
        """The same of a predictor without knowledge."""
        return self.shuffled / max(1.0, self.judged)

    def judge(self, announced: int, used: int, shuffled: int) -> None:
        """An event has passed."""
        self.judged += announced
        self.used += used
        self.shuffled += shuffled
        if self.judged >= EVIDENCE:
            luck = self.shuffled_part
            self.open = self.useful_part >= WORTH and (luck >= WORTH or self.useful_part >= BETTER * luck)
        if self.judged >= REMEMBERED:
            self.judged, self.used, self.shuffled = self.judged / 2, self.used / 2, self.shuffled / 2


@dataclass
class Foresight:
    """The gates of one model of so many ``layers``.

    Those of prompts begin open: in a prompt nearly every expert of a layer is used.
    """

    layers: int
    gates: dict[Kind, Gate] = field(default_factory=lambda: {kind: Gate(kind is Kind.PROMPT) for kind in Kind})
    _events: int = 0
    _random: Random = field(default_factory=lambda: Random(1))

    def ran(self, events: int) -> None:
        """So many events of the model have run."""
        self._events += events

    @property
    def wanted(self) -> int:
        """How many layers ahead sessions should announce what single tokens will need."""
        on_trial = self._events // self.layers % TRIALS < TRIAL
        return max([0, *(int(kind) for kind in (Kind.NEXT, Kind.SECOND) if on_trial or self.gates[kind].open)])

    @property
    def reads_for_tokens(self) -> bool:
        """Whether anything is read ahead for single tokens."""
        return self.gates[Kind.NEXT].open or self.gates[Kind.SECOND].open

    def without_knowledge(self, absent: Sequence[int], count: int) -> set[int]:
        """``count`` of the ``absent`` experts of a layer, none of them likelier than another."""
        return set(self._random.sample(absent, count))
