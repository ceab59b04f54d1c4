"""When a model is given back because nobody uses it, and when the daemon ends because nobody is there."""

from __future__ import annotations

from expertd.daemon.idleness import Idleness


def test_a_model_is_given_back_when_nobody_used_it_for_its_time() -> None:
    idleness = Idleness(0.0, exit_s=None, keep_alive_s=10.0)
    assert idleness.unused(1.0, {"a": True, "b": False}) == []
    assert idleness.unused(11.0, {"a": True, "b": False}) == []
    assert idleness.unused(12.0, {"a": False, "b": False}) == ["b"]
    assert idleness.unused(21.0, {"a": False}) == []
    assert idleness.unused(22.0, {"a": False}) == ["a"]


def test_a_model_that_goes_and_comes_again_has_its_whole_time() -> None:
    idleness = Idleness(0.0, exit_s=None, keep_alive_s=10.0)
    idleness.unused(1.0, {"a": False})
    idleness.unused(9.0, {})
    assert idleness.unused(12.0, {"a": False}) == []


def test_without_a_time_models_stay() -> None:
    idleness = Idleness(0.0, exit_s=None, keep_alive_s=None)
    assert idleness.unused(1.0, {"a": False}) == idleness.unused(1e9, {"a": False}) == []


def test_a_daemon_ends_when_nobody_was_there_for_its_time() -> None:
    idleness = Idleness(0.0, exit_s=10.0, keep_alive_s=None)
    assert [idleness.over(now, busy) for now, busy in ((9.0, False), (12.0, True), (22.0, False), (23.0, False))] == [
        False, False, False, True
    ]  # fmt: skip


def test_without_a_time_it_stays() -> None:
    assert not Idleness(0.0, exit_s=None, keep_alive_s=None).over(1e9, False)
