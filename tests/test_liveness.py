"""Who is pinged and who counts as silent, tick by tick."""

from __future__ import annotations

from expertd.daemon.liveness import BUSY_TICKS, PING_TICKS, SILENT_TICKS, Liveness


def test_nobody_is_asked_of_whom_nothing_is_expected() -> None:
    assert Liveness().tick([], []) == ([], [])


def test_one_that_says_nothing_is_pinged_and_then_silent() -> None:
    liveness = Liveness()
    heard = [liveness.tick([7], []) for _ in range(SILENT_TICKS + 1)]
    assert [ping for ping, _ in heard].count([7]) == SILENT_TICKS // PING_TICKS
    assert [silent for _, silent in heard] == [[]] * SILENT_TICKS + [[7]]


def test_one_that_answers_is_not_silent_until_it_has_been_busy_for_long() -> None:
    liveness = Liveness()
    for _ in range(BUSY_TICKS):
        assert liveness.tick([7], [])[1] == []
        liveness.heard(7)
    assert liveness.tick([7], [])[1] == [7]


def test_one_that_answers_may_hold_an_old_generation_for_ever() -> None:
    liveness = Liveness()
    for _ in range(3 * BUSY_TICKS):
        assert liveness.tick([], [7])[1] == []
        liveness.heard(7)


def test_one_that_holds_and_says_nothing_is_silent() -> None:
    liveness = Liveness()
    assert [liveness.tick([], [7])[1] for _ in range(SILENT_TICKS + 1)][-1] == [7]


def test_who_has_answered_begins_anew_the_next_time() -> None:
    liveness = Liveness()
    for _ in range(SILENT_TICKS):
        liveness.tick([7], [])
    liveness.tick([], [])
    assert liveness.tick([7], []) == ([], [])


def test_hearing_a_stranger_changes_nothing() -> None:
    liveness = Liveness()
    liveness.heard(99)
    assert liveness.tick([], []) == ([], [])
