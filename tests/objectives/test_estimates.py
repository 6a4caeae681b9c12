"""Evaluation figures: pass@k against enumeration, votes with ties, standard errors, confidence intervals that cover."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_rl.errors import ConfigError, DataError
from nemo_rl.objectives.estimates import (
    average_at_n,
    consensus_at_k,
    mean_estimate,
    paired_difference,
    pass_at_k,
    student_reach,
)


def test_pass_at_k_of_ten_samples() -> None:
    """c = 0, 1, 3, 10 of 10: 1 - C(10 - c, 5) / C(10, 5) = 0, .5, 11/12, 1."""
    estimates = pass_at_k(torch.tensor([0, 1, 3, 10]), 10, k=5)
    torch.testing.assert_close(estimates, torch.tensor([0, 0.5, 11 / 12, 1], dtype=torch.float64))


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_choices_with_a_correct_sample(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    choices = [any(choice) for choice in combinations(correct, k)]
    estimate = pass_at_k(torch.tensor([sum(correct)]), torch.tensor([len(correct)]), k=k)
    assert estimate.item() == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_is_exact_where_binomials_overflow() -> None:
    estimate = pass_at_k(torch.tensor([1]), 4000, k=1000).item()
    assert estimate == pytest.approx(0.25)


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_samples(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k is {k}, but a prompt has 4 samples"):
        pass_at_k(torch.tensor([1, 2]), torch.tensor([8, 4]), k=k)
    with pytest.raises(ConfigError, match=f"k is {k}"):
        consensus_at_k(["a"] * 4, [1] * 4, k=k)


def test_average_at_n() -> None:
    assert average_at_n(torch.tensor([1, 4]), torch.tensor([2, 5])).tolist() == [0.5, 0.8]


@pytest.mark.parametrize(
    ("answers", "score"),
    [
        (["7", "7", "8", "9"], 1.0),
        (["7", "8", "8", "9"], 0.0),
        (["7", "7", "8", "8"], 0.5),
        (["7", "8", "9", "6"], 0.25),
        ([None, None, None, "7"], 1.0),
        ([None, None, None, None], 0.0),
    ],
)
def test_majority_with_tie_shares(answers: list[str | None], score: float) -> None:
    right = [1.0 if answer == "7" else 0.0 for answer in answers]
    assert consensus_at_k(answers, right, k=4) == score


def _vote(choice: Sequence[tuple[int | None, bool]]) -> float:
    """The share of right answers among those ahead, counted out."""
    votes = Counter("right" if right else answer for answer, right in choice if right or answer is not None)
    ahead = [answer for answer, number in votes.items() if number == max(votes.values())]
    return float("right" in ahead) / len(ahead) if ahead else 0.0


@settings(deadline=None)
@given(st.lists(st.tuples(st.none() | st.integers(0, 3), st.booleans()), min_size=1, max_size=8), st.data())
def test_consensus_is_the_mean_vote_of_all_choices(samples: list[tuple[int | None, bool]], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(samples)))
    votes = [_vote(choice) for choice in combinations(samples, k)]
    answers, right = [answer for answer, _ in samples], [float(score) for _, score in samples]
    assert consensus_at_k(answers, right, k=k) == pytest.approx(fmean(votes))


def test_right_answers_are_one_vote_however_they_are_spelled() -> None:
    answers, right = ["\\frac{1}{2}", "1/2", "0.50", "3", "3"], [1, 1, 1, 0, 0]
    assert consensus_at_k(answers, right, k=5) == 1
    assert consensus_at_k(answers, right, k=4) == pytest.approx((2 * 1 + 3 * 0.5) / 5), "without a 3, or two to two"
    with pytest.raises(DataError, match="5 answers and 4 scores"):
        consensus_at_k(answers, right[:-1], k=3)


def test_votes_of_many_samples_are_counted_without_trying_every_choice() -> None:
    """Of 300 samples 60% are right: nearly every majority of 100 is."""
    assert consensus_at_k([0] * 180 + [1] * 120, [1] * 180 + [0] * 120, k=100) == pytest.approx(0.99, abs=0.01)


def test_standard_error_is_over_prompts() -> None:
    estimate = mean_estimate(torch.tensor([1.0, 0, 1, 1]))
    assert estimate.value == 0.75 and estimate.num_prompts == 4
    assert estimate.standard_error == pytest.approx(0.5 / 2)
    assert math.isnan(mean_estimate(torch.tensor([1.0])).standard_error)
    with pytest.raises(DataError, match="at least one prompt"):
        mean_estimate(torch.tensor([]))


def test_paired_difference_of_students_distribution() -> None:
    first, second = torch.tensor([0.0, 1, 0, 1]), torch.tensor([1.0, 1, 0, 1])
    difference = paired_difference(first, second)
    assert difference.value == 0.25 and difference.standard_error == pytest.approx(0.25)
    assert difference.low == pytest.approx(0.25 - 3.182446 * 0.25)
    assert difference.high == pytest.approx(0.25 + 3.182446 * 0.25)
    with pytest.raises(DataError, match="got 4 and 3 prompts"):
        paired_difference(first, second[:3])


@pytest.mark.parametrize(
    ("confidence", "freedom", "reach"),
    [
        (0.95, 1, 12.706205),
        (0.95, 2, 4.302653),
        (0.95, 3, 3.182446),
        (0.95, 4, 2.776445),
        (0.95, 9, 2.262157),
        (0.99, 30, 2.749996),
        (0.9, 101, 1.660081),
        (0.95, 100_000, 1.959988),
    ],
)
def test_the_reach_of_students_distribution_is_that_of_the_tables(
    confidence: float, freedom: int, reach: float
) -> None:
    assert student_reach(confidence, freedom) == pytest.approx(reach, abs=2e-6)


def test_pairing_removes_the_spread_between_prompts() -> None:
    hard = torch.linspace(0, 1, 50)
    difference = paired_difference(hard, hard + 0.02)
    assert difference.low == pytest.approx(0.02, abs=1e-6) and difference.high == pytest.approx(0.02, abs=1e-6)


def test_bootstrap_agrees_with_students_interval_and_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 400, generator=generator)
    student = paired_difference(first, second)
    drawn = paired_difference(first, second, num_resamples=4000, seed=1)
    assert (drawn.value, drawn.standard_error) == (student.value, student.standard_error)
    assert drawn.low == pytest.approx(student.low, abs=4e-3) and drawn.high == pytest.approx(student.high, abs=4e-3)
    assert drawn == paired_difference(first, second, num_resamples=4000, seed=1)
    narrow = paired_difference(first, second, confidence=0.5)
    assert student.low < narrow.low < narrow.high < student.high


@pytest.mark.parametrize("num_resamples", [None, 300])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(num_resamples: int | None) -> None:
    """200 experiments of 100 prompts whose true difference is .1: 90% intervals hold it 90% of the time, +- 6%."""
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for _ in range(200):
        first, second = torch.rand(2, 100, generator=generator)
        difference = paired_difference(first, second + 0.1, confidence=0.9, num_resamples=num_resamples)
        hits += difference.low <= 0.1 <= difference.high
    assert 168 <= hits <= 192
