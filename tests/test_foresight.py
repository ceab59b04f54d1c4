"""When reading ahead pays: gates, trials, and windows with and without it."""

from __future__ import annotations

import pytest

from expertd.daemon.core.foresight import (
    BETTER,
    EVIDENCE,
    HOLD,
    PAIRS,
    REMEMBERED,
    TRIAL,
    TRIALS,
    WINDOW,
    WORTH,
    Comparison,
    Foresight,
    Gate,
    Kind,
)

ROUND = 2 * PAIRS * WINDOW


def test_a_gate_opens_when_enough_is_used_and_not_before_there_is_evidence() -> None:
    gate = Gate(worth=False)
    gate.judge(EVIDENCE - 1, EVIDENCE - 1, 0)
    assert not gate.worth
    gate.judge(1, 1, 0)
    assert gate.worth


def test_what_lasts_for_several_tokens_has_to_be_used_more() -> None:
    one, lasting = Gate(worth=False), Gate(worth=False, lasting=True)
    for gate in (one, lasting):
        gate.judge(EVIDENCE, EVIDENCE // 2, 0)
    assert (one.worth, lasting.worth) == (True, False)
    lasting.judge(EVIDENCE, EVIDENCE, 0)
    assert lasting.worth
    gates = Foresight(4).gates
    assert [kind for kind, gate in gates.items() if gate.lasting] == [Kind.TOPIC]


def test_a_gate_closes_when_too_little_is_used() -> None:
    gate = Gate(worth=True)
    gate.judge(EVIDENCE, round(EVIDENCE * WORTH) - 2, 0)
    assert not gate.worth


def test_what_a_shuffled_guess_gets_right_as_well_is_luck() -> None:
    gate = Gate(worth=True)
    used = round(EVIDENCE * WORTH) + 1
    gate.judge(EVIDENCE, used, round(used / BETTER) + 2)
    assert not gate.worth


def test_where_even_a_shuffled_guess_pays_it_pays() -> None:
    """In a prompt nearly every expert is used: no predictor can be much better than another."""
    gate = Gate(worth=True)
    gate.judge(EVIDENCE, EVIDENCE, EVIDENCE - 1)
    assert gate.worth


def test_what_was_judged_long_ago_counts_less() -> None:
    gate = Gate(worth=False)
    gate.judge(REMEMBERED, REMEMBERED, 0)
    for _ in range(8):
        gate.judge(REMEMBERED // 2, 0, 0)
    assert not gate.worth
    assert gate.judged < REMEMBERED


def compare(waited_with: float, waited_without: float) -> Comparison:
    """A whole round, with so many seconds waited for each sweep."""
    comparison = Comparison()
    for _ in range(ROUND):
        comparison.waited(waited_with if comparison.on else waited_without)
        comparison.ran(1)
    return comparison


@pytest.mark.parametrize(("waited_with", "kept"), [(0.5, True), (0.94, True), (0.97, False), (1.5, False)])
def test_reading_ahead_is_kept_where_sessions_wait_less(waited_with: float, kept: bool) -> None:
    comparison = compare(waited_with, 1.0)
    assert comparison.better == pytest.approx(waited_with)
    assert comparison.on is kept


def test_windows_with_and_without_take_turns_equally() -> None:
    comparison = Comparison()
    turns = []
    for _ in range(ROUND):
        turns.append(comparison.on)
        comparison.ran(1)
    assert sum(turns) == ROUND // 2
    assert turns[:WINDOW] == [True] * WINDOW
    assert turns[WINDOW : 2 * WINDOW] == [False] * WINDOW


def test_a_decision_holds_for_a_while_and_is_looked_at_again() -> None:
    comparison = compare(2.0, 1.0)
    for _ in range(HOLD - 1):
        comparison.waited(100.0)  # it does not count now
        comparison.ran(1)
        assert not comparison.on
    comparison.ran(1)
    assert comparison.on
    assert compare(2.0, 1.0).better == pytest.approx(2.0)


def test_where_nobody_ever_waited_nothing_is_decided_against_it() -> None:
    comparison = compare(0.0, 0.0)
    assert comparison.better is None
    assert comparison.on


def test_prompts_are_read_ahead_for_at_once_and_single_tokens_are_tried_now_and_then() -> None:
    foresight = Foresight(layers=4)
    assert foresight.reads(Kind.PROMPT)
    assert not foresight.reads(Kind.NEXT)
    wanted = []
    for _ in range(TRIALS):
        wanted.append(foresight.wanted)
        foresight.ran(4)
    assert wanted == [2] * TRIAL + [0] * (TRIALS - TRIAL)


def test_what_is_worth_it_is_announced_always_and_what_reaches_farther_only_if_it_is_too() -> None:
    foresight = Foresight(layers=4)
    foresight.ran(4 * TRIAL)
    foresight.gates[Kind.NEXT].worth = True
    assert foresight.wanted == 1
    foresight.gates[Kind.SECOND].worth = True
    assert foresight.wanted == 2


def test_the_comparison_decides_about_single_tokens_and_not_about_prompts() -> None:
    foresight = Foresight(layers=1)
    foresight.gates[Kind.NEXT].worth = True
    for _ in range(ROUND):
        foresight.comparison.waited(2.0 if foresight.comparison.on else 1.0)
        foresight.ran(1)
    assert not foresight.reads(Kind.NEXT)
    assert foresight.reads(Kind.PROMPT)


def test_a_guess_without_knowledge_names_as_many_absent_experts_and_not_always_the_same() -> None:
    foresight = Foresight(layers=1)
    absent = list(range(3, 60))
    guesses = [foresight.without_knowledge(absent, 5) for _ in range(20)]
    assert all(len(guess) == 5 and guess <= set(absent) for guess in guesses)
    assert len({frozenset(guess) for guess in guesses}) > 10
