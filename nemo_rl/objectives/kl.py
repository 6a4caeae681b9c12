"""Estimates of KL(policy || reference) from the log-probabilities of sampled tokens."""

from typing import Literal, assert_never

import torch
from torch import Tensor

type KLKind = Literal["k1", "k2", "k3"]


def kl_penalty(
    policy_logprobs: Tensor,
    reference_logprobs: Tensor,
    *,
    kind: KLKind = "k3",
    input_clamp: float | None = 20.0,
    output_clamp: float | None = 10.0,
) -> Tensor:
    """Estimate KL(policy || reference) at every token, the token having been sampled from the policy.

    With d = reference - policy: k1 = -d (unbiased), k2 = d^2 / 2 (low variance), k3 = exp(d) - 1 - d (unbiased and
    never negative); Schulman, "Approximating KL Divergence", 2020.

    Args:
        policy_logprobs: [M], with gradient.
        reference_logprobs: [M].
        kind: the estimator.
        input_clamp: d is clamped to plus or minus this; None leaves it.
        output_clamp: the estimate is clamped to plus or minus this; None leaves it.

    Returns:
        [M], to be added to a loss or subtracted from a reward; without gradient where a clamp binds.
    """
    difference = _clamp(reference_logprobs - policy_logprobs, input_clamp)
    match kind:
        case "k1":
            estimate = -difference
        case "k2":
            estimate = difference.square() / 2
        case "k3":
            estimate = torch.expm1(difference) - difference
        case _:
            assert_never(kind)
    return _clamp(estimate, output_clamp)


def _clamp(values: Tensor, limit: float | None) -> Tensor:
    return values if limit is None else values.clamp(-limit, limit)
