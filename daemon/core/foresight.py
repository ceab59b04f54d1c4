"""Whether reading ahead pays: how much of what sessions announce is used, and whether they wait less for it.  Pure.

A read that serves the event that it was announced for saves up to a read's time; one that does not may cost as much.
So announcements are acted on only where at least WORTH of the blocks that were absent are used by their event.  A
predictor without knowledge names as many blocks of the same layer (``shuffled``): one that is hardly better foresees
nothing, and what it gets right is luck.  What is not acted on is tried now and then: announced, counted, and not read.

For single tokens that is not enough: where the disk is busy anyway, what is read in vain delays what is needed.  So
there windows with and without reading ahead take turns, and it is kept only if sessions wait less with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import gcd

WORTH = 0.4
"""Of what is read ahead so much has to be used: less would cost more than it can save, however idle the disk is."""
WORTH_LASTING = 0.75
"""The same of what has to be used within several tokens: what goes for it would have been used in them, too."""
BETTER = 1.5
"""So many times as much of it has to be used as of what a predictor without knowledge names, unless that pays too."""
EVIDENCE = 64
"""Blocks that have to be judged before it is decided."""
REMEMBERED = 2048
"""When so many are judged, they count half."""
TRIAL, TRIALS = 8, 128
"""Of so many sweeps through the model, in that many it is seen whether announcements pay that are not acted on."""
WINDOW = 16
"""Sweeps through the model with, and then without, reading ahead for single tokens."""
PAIRS = 6
"""So many windows of each kind decide."""
HOLD = 1024
"""So many sweeps a decision holds; then it is looked at again."""
LESS = 0.95
"""With reading ahead sessions may wait at most so many times what they wait without."""


class Kind(IntEnum):
    """Kinds of announcements: of an event of many tokens, of one a layer or two ahead, and of what a topic will use.

    The last is made by no session, but by ``turns``.
    """

    PROMPT = 0
    NEXT = 1
    SECOND = 2
    TOPIC = 3


@dataclass
class Gate:
    """What is known of one kind of announcements; ``worth``: enough of them is used.

    Attributes:
        lasting: they are not of one event, but of several tokens.
        announced: blocks, since the model came.
        judged, used, shuffled: lately: blocks whose events have passed, those that these used, and those that they
            used of as many that were named without knowledge.
        useful_bytes, wasted_bytes: read because of announcements, since the model came.
    """

    worth: bool
    lasting: bool = False
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
            luck, enough = self.shuffled_part, WORTH_LASTING if self.lasting else WORTH
            self.worth = self.useful_part >= enough and (luck >= enough or self.useful_part >= BETTER * luck)
        if self.judged >= REMEMBERED:
            self.judged, self.used, self.shuffled = self.judged / 2, self.used / 2, self.shuffled / 2


@dataclass
class Comparison:
    """Windows with and without take turns; the rest of the time what was found to be better is done.

    Attributes:
        on: whether it is with now.
        better: with over without, in what was waited, as it was found last; None if it has not been found yet.
    """

    on: bool = True
    better: float | None = None
    _ran: int = 0
    _waited: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})
    _holding: bool = False

    def waited(self, seconds: float) -> None:
        """Sessions have waited so long."""
        if not self._holding:
            self._waited[self.on] += seconds

    def ran(self, sweeps: int) -> None:
        """So many sweeps through the model have run."""
        self._ran += sweeps
        if self._holding:
            if self._ran >= HOLD:
                self._holding, self._ran, self.on = False, 0, True
                self._waited = {True: 0.0, False: 0.0}
        elif self._ran >= 2 * PAIRS * WINDOW:
            self.better = self._waited[True] / self._waited[False] if self._waited[False] else None
            self._holding, self._ran = True, 0
            self.on = self.better is None or self.better <= LESS
        else:
            self.on = self._ran // WINDOW % 2 == 0


@dataclass
class Foresight:
    """What is known of one model of so many ``layers``.

    Prompts are read ahead for from the beginning: nearly every expert of a layer is used in one.
    """

    layers: int
    gates: dict[Kind, Gate] = field(
        default_factory=lambda: {kind: Gate(kind is Kind.PROMPT, lasting=kind is Kind.TOPIC) for kind in Kind}
    )
    comparison: Comparison = field(default_factory=Comparison)
    _events: int = 0
    _guesses: int = 0

    def ran(self, events: int) -> None:
        """So many events of the model have run."""
        before, self._events = self._events // self.layers, self._events + events
        if self._tokens_are_worth:
            self.comparison.ran(self._events // self.layers - before)

    def reads(self, kind: Kind) -> bool:
        """Whether what is announced is read now."""
        return self.gates[kind].worth and (kind not in (Kind.NEXT, Kind.SECOND) or self.comparison.on)

    @property
    def wanted(self) -> int:
        """How many layers ahead sessions should announce what single tokens will need."""
        on_trial = self._events // self.layers % TRIALS < TRIAL
        return max([0, *(int(kind) for kind in (Kind.NEXT, Kind.SECOND) if on_trial or self.reads(kind))])

    @property
    def _tokens_are_worth(self) -> bool:
        return self.gates[Kind.NEXT].worth or self.gates[Kind.SECOND].worth

    def without_knowledge(self, absent: Sequence[int], count: int) -> set[int]:
        """``count`` of the ``absent`` experts of a layer, none of them likelier than another."""
        self._guesses += 1
        number = len(absent)
        step = next((step for step in range(max(1, round(0.618 * number)), 0, -1) if gcd(step, number) == 1), 1)
        return {absent[(7919 * self._guesses + step * place) % number] for place in range(count)}
