"""The short form of ``benchmarks quality``: a worker's answers are plain mlx-lm's, to the last bit, at any budget."""

from __future__ import annotations

from benchmarks import quality


def test_a_worker_is_as_good_as_plain_mlx_lm() -> None:
    figures = quality.run(quick=True)
    assert figures["bit_equal"] is True
    assert figures["greedy_agreement"] == 1.0
    assert figures["perplexity_plain"] == figures["perplexity_25"] == figures["perplexity_50"] > 1
    assert figures["passkey_plain"] == figures["passkey_25"] == figures["passkey_50"]


def test_an_answer_that_differs_is_seen() -> None:
    one, other = (quality.Quality(answers=answers) for answers in ([[1, 2, 3], [4, 5]], [[1, 2, 9], [4, 5, 6]]))
    assert one.agreement(one) == 1.0
    assert one.agreement(other) == other.agreement(one) == (2 + 2) / 6
