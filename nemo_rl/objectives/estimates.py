"""Figures of an evaluation with their uncertainty: pass@k, avg@n, cons@k, standard errors, paired differences.

Samples of one prompt are not independent of each other, so every standard error is over prompts.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rl.errors import ConfigError, DataError

_CHUNK = 1 << 22
"""Random numbers drawn at a time by the bootstrap."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        value: the mean.
        standard_error: of the mean over prompts; NaN for a single prompt.
        num_prompts: how many.
    """

    value: float
    standard_error: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better the second of two runs on the same prompts is.

    Attributes:
        value: mean of second - first.
        standard_error: of that mean over prompts.
        low: lower end of the confidence interval.
        high: upper end.
    """

    value: float
    standard_error: float
    low: float
    high: float


def pass_at_k(num_correct: Tensor, num_samples: Tensor | int, *, k: int) -> Tensor:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples hold a correct one, without bias (Chen et al., 2021).

    Args:
        num_correct: int64 [P], c of every prompt.
        num_samples: n, int64 [P] or one number for all.
        k: samples that may be tried.

    Returns:
        float64 [P].

    Raises:
        ConfigError: k is not between 1 and n.
    """
    samples = torch.as_tensor(num_samples, device=num_correct.device).expand_as(num_correct)
    _check_k(k, int(samples.min()) if len(samples) else k)
    wrong = (samples - num_correct).double()
    draws = torch.arange(k, dtype=torch.float64, device=wrong.device)
    all_wrong = (wrong[:, None] - draws) / (samples[:, None] - draws)  # 0 at the draw that finds no wrong one left
    return 1 - all_wrong.prod(1)


def average_at_n(num_correct: Tensor, num_samples: Tensor | int) -> Tensor:
    """Mean score of the n samples of every prompt: [P] -> float64 [P]."""
    return num_correct.double() / num_samples


def consensus_at_k(answers: Sequence[Hashable | None], scores: Sequence[float], *, k: int) -> float:
    """The chance that the most frequent answer among k of n samples is right (Wang et al., "Self-Consistency", 2023).

    It is the exact mean over all choices of k samples; a tie counts by the share of right answers among those ahead.
    All right samples are one answer, however it is spelled.

    Args:
        answers: of the n samples, equal where they say the same; None has no vote, unless it is judged right.
        scores: of the n samples, 1 for a right one and 0 for a wrong one.
        k: samples that vote.

    Raises:
        ConfigError: k is not between 1 and n.
        DataError: there is not one score for each answer.
    """
    num_samples = len(answers)
    if num_samples != len(scores):
        raise DataError(f"there are {num_samples} answers and {len(scores)} scores; give one score for each answer")
    _check_k(k, num_samples)
    num_right = sum(map(bool, scores))
    wrong = Counter(answer for answer, score in zip(answers, scores, strict=True) if not score and answer is not None)
    # Every sample votes or not by a coin of its own with chance k/n; given that k do, all choices are equally likely.
    chances = {size: _heads(size, k / num_samples, k) for size in {num_samples, num_right, *wrong.values()}}
    led = 0.0
    for votes in range(1, min(num_right, k) + 1):
        rivals = [size for size in wrong.values() if size >= votes]
        ways = torch.zeros(len(rivals) + 1, k + 1, dtype=torch.float64)  # by rivals with as many votes, by all votes
        ways[0] = _heads(num_samples - num_right - sum(rivals), k / num_samples, k)
        for size in rivals:
            shifted = torch.cat([torch.zeros(k), chances[size][:votes], torch.zeros(k + 1 - votes)])
            before, ways = ways, ways @ shifted.unfold(0, k + 1, 1).flip(0)
            ways[1:, votes:] += chances[size][votes] * before[:-1, : k + 1 - votes]
        shares = ways[:, k - votes] / torch.arange(1, len(rivals) + 2)
        led += float(chances[num_right][votes] * shares.sum())
    return led / float(chances[num_samples][k])


def mean_estimate(values: Tensor) -> Estimate:
    """Mean and standard error of one figure per prompt, [P].

    Raises:
        DataError: there is no prompt.
    """
    if not len(values):
        raise DataError("an estimate needs at least one prompt, and none was given; check the filters of the data set")
    values = values.double()
    return Estimate(float(values.mean()), _standard_error(values), len(values))


def paired_difference(
    first: Tensor,
    second: Tensor,
    *,
    confidence: float = 0.95,
    num_resamples: int | None = None,
    seed: int = 0,
) -> Difference:
    """Compare two runs prompt by prompt, which removes the spread between prompts (Miller, 2024).

    Args:
        first: [P], one figure per prompt.
        second: [P], of the same prompts in the same order.
        confidence: probability that the interval should hold the true difference.
        num_resamples: draw as many bootstrap samples of the prompts and take the interval's ends from their quantiles
            (Efron, 1979); None takes them from Student's t distribution.
        seed: of the bootstrap.

    Raises:
        DataError: the runs have different numbers of prompts, or fewer than two.
    """
    if first.shape != second.shape or len(first) < 2:
        raise DataError(
            f"a paired comparison got {len(first)} and {len(second)} prompts; give the same prompts of both runs, at "
            "least two"
        )
    differences = (second.double() - first.double()).cpu()
    mean, error = float(differences.mean()), _standard_error(differences)
    if num_resamples is None:
        reach = student_reach(confidence, len(differences) - 1) * error
        return Difference(mean, error, mean - reach, mean + reach)
    means = _bootstrap_means(differences, num_resamples, seed)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = means.quantile(ends).tolist()
    return Difference(mean, error, low, high)


def student_reach(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = `confidence` for Student's T with `freedom` degrees of freedom.

    With t = sqrt(freedom) tan(angle) the probability is a finite sum (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4),
    which is solved for the angle by bisection.

    >>> round(student_reach(0.95, 4), 4), round(student_reach(0.95, 1), 4)
    (2.7764, 12.7062)
    """
    low, high = 0.0, math.pi / 2
    for _ in range(54):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_within(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


def _student_within(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) tan(angle))."""
    odd = freedom % 2
    powers = range(1 + odd, freedom - 1, 2)  # each term of the sum is the one before, times cos^2 power / (power + 1)
    cosine, total = math.cos(angle), 0.0
    term = cosine if odd else 1.0
    for power in powers:
        total += term
        term *= cosine**2 * power / (power + 1)
    if freedom > 1:
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def _bootstrap_means(values: Tensor, num_resamples: int, seed: int) -> Tensor:
    """Means of `num_resamples` samples with replacement, float64 [num_resamples]."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK // len(values))
    sizes = [min(rows, num_resamples - start) for start in range(0, num_resamples, rows)]
    draws = (torch.randint(len(values), (size, len(values)), generator=generator) for size in sizes)
    return torch.cat([values[draw].mean(1) for draw in draws])


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _heads(size: int, chance: float, most: int) -> Tensor:
    """The chance of 0, 1, ... `most` heads among `size` coins, float64 [most + 1]."""
    heads = torch.arange(most + 1, dtype=torch.float64)
    tails = (size - heads).clamp(min=0)
    ways = torch.lgamma(heads + tails + 1) - torch.lgamma(heads + 1) - torch.lgamma(tails + 1)
    head, tail = torch.tensor([chance, 1 - chance], dtype=torch.float64)
    return torch.where(heads <= size, (ways + heads.xlogy(head) + tails.xlogy(tail)).exp(), 0.0)


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ConfigError(
            f"k is {k}, but a prompt has {num_samples} samples; k must be at least 1 and at most "
            "eval.num_tests_per_prompt"
        )
