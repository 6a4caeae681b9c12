"""Importance weights that correct for a sampler whose probabilities are not the trainer's."""

from typing import Literal

import torch
from torch import Tensor

from nemo_rl.errors import ConfigError
from nemo_rl.metrics import EffectiveShare, Max, Mean, Metrics
from nemo_rl.objectives.jagged import per_token, sequence_means, sequence_sums

type Correction = Literal["token", "sequence", "icepop", "sequence_mask"]

_MAX_LOG_WEIGHT = 300.0
"""Keeps the squares of weights in the metrics finite in float64."""


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    kind: Correction = "token",
    low: float = 0.0,
    high: float = 2.0,
) -> tuple[Tensor, Metrics]:
    """Weigh tokens by how much likelier they are for the trainer than for the sampler, w = exp(old - roll).

    `token`: w clamped to [low, high] (truncated importance sampling; Yao et al., "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training", 2025). `sequence`: the product of the sequence's w, clamped, for each of its
    tokens; unbiased, but its spread grows with length, so look at the metrics. `icepop`: w, but 0 outside [low, high]
    (Ling team, "Every Step Evolves", 2025). `sequence_mask`: w, but 0 in whole sequences whose geometric mean of w is
    outside.

    Args:
        old_logprobs: [M], of the training weights at the start of the step.
        rollout_logprobs: [M], from the sampler.
        cu_seqlens: int64 [B+1], borders of the sequences in M.
        kind: as above.
        low: lower bound of w.
        high: upper bound of w.

    Returns:
        weights [M] without gradient, to be multiplied with the policy loss, and metrics of what is compared with the
        bounds (each token's w, each sequence's product or geometric mean), taken before: `correction_weight_mean`,
        `_max`, `_ess` (effective sample size as a share), and the shares `correction_share_clamped` and
        `correction_share_dropped` of tokens whose weight the bounds changed.

    Raises:
        ConfigError: the bounds are no interval of weights.
    """
    if not 0 <= low < high:
        raise ConfigError(f"importance weights cannot be held in [{low}, {high}]; choose 0 <= low < high")
    log_weight = (old_logprobs - rollout_logprobs).double()
    weight = log_weight.exp()
    match kind:
        case "token" | "icepop":
            compared, tokens_compared = log_weight, weight
        case "sequence":
            compared = sequence_sums(log_weight, cu_seqlens)
            tokens_compared = per_token(compared, cu_seqlens).exp()
        case "sequence_mask":
            compared = sequence_means(log_weight, cu_seqlens)
            tokens_compared = per_token(compared, cu_seqlens).exp()
    if kind in ("sequence", "sequence_mask"):
        compared = compared[cu_seqlens.diff() > 0]
    outside = (tokens_compared < low) | (tokens_compared > high)
    drops = kind in ("icepop", "sequence_mask")
    corrected = torch.where(outside, 0.0, weight) if drops else tokens_compared.clamp(low, high)
    name = "correction_share_dropped" if drops else "correction_share_clamped"
    return corrected.to(old_logprobs.dtype), _metrics(compared, outside, name)


def _metrics(log_weight: Tensor, outside: Tensor, name: str) -> Metrics:
    if not len(log_weight):
        return {}
    weight = log_weight.clamp(max=_MAX_LOG_WEIGHT).exp()
    figures: list[float] = torch.stack(
        [weight.sum(), weight.square().sum(), weight.max(), outside.double().sum()]
    ).tolist()
    total, total_of_squares, largest, num_outside = figures
    return {
        "correction_weight_mean": Mean(total, len(weight)),
        "correction_weight_max": Max(largest),
        "correction_weight_ess": EffectiveShare(total, total_of_squares, len(weight)),
        name: Mean(num_outside, len(outside)),
    }
