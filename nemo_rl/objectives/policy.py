"""Policy-gradient losses per token, their diagnostics, and the objective that a training backend runs.

Nothing here divides or sums a loss: `objectives/weights.py` has fixed every token's weight before. rho is the
probability ratio exp(policy_logprobs - old_logprobs), A the advantage.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError
from nemo_rl.metrics import EffectiveShare, Max, Mean, Metrics, Min
from nemo_rl.objectives.corrections import Correction, importance_weights
from nemo_rl.objectives.jagged import per_token, sequence_means, token_column
from nemo_rl.objectives.kl import KLKind, kl_penalty
from nemo_rl.objectives.logprobs import Reads, TokenOutputs

type PolicyLoss = Literal["clipped", "cispo", "reinforce"]

_MAX_LOG_WEIGHT = 20.0
"""Keeps a weight in the loss finite in float32."""


def clipped_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_min: float = 0.2,
    clip_max: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's loss max(-A rho, -A clip(rho, 1 - clip_min, 1 + clip_max)) for every token (Schulman et al., 2017).

    With `old_logprobs = policy_logprobs.detach()` it is the on-policy gradient -A exp(lp - sg(lp)).

    Args:
        policy_logprobs: [M], with gradient.
        old_logprobs: [M].
        advantages: [M].
        clip_min: how far rho may fall below 1.
        clip_max: how far rho may rise above 1; a larger one than `clip_min` is DAPO's clip-higher (Yu et al., 2025).
        dual_clip: bound c > 1 for A < 0: the loss is at most -A c (Ye et al., "Mastering Complex Control", 2020).

    Returns:
        [M].
    """
    ratio = torch.exp(policy_logprobs - old_logprobs)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_min, 1 + clip_max))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)


def reinforce_loss(policy_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Plain policy gradient, -A lp for every token [M] (Williams, 1992)."""
    return -advantages * policy_logprobs


def cispo_loss(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_min: float = 0.2, clip_max: float = 0.2
) -> Tensor:
    """REINFORCE with a clipped weight, -A sg(clip(rho)) lp [M]: no token loses its gradient (MiniMax-M1, 2025)."""
    ratio = torch.exp(policy_logprobs.detach() - old_logprobs).clamp(1 - clip_min, 1 + clip_max)
    return -advantages * ratio * policy_logprobs


def sequence_level_logprobs(policy_logprobs: Tensor, old_logprobs: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Replace the old log-probabilities so that every token's ratio is its sequence's geometric mean of rho.

    exp(lp - result) = exp(mean over the sequence of (lp - old)) in value, with the gradient of the token's own lp.
    With it in place of `old_logprobs` the clipped loss, reduced per sequence, is GSPO's in its token form (Zheng et
    al., "Group Sequence Policy Optimization", 2025).

    Args:
        policy_logprobs: [M].
        old_logprobs: [M].
        cu_seqlens: int64 [B+1], borders of whole sequences in M.

    Returns:
        [M], without gradient.
    """
    policy = policy_logprobs.detach()
    return policy - per_token(sequence_means(policy - old_logprobs, cu_seqlens), cu_seqlens)


@torch.no_grad()
def ratio_metrics(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_min: float, clip_max: float
) -> Metrics:
    """Describe how far the policy has moved within the step.

    `clip_share_low` and `clip_share_high` are the shares of tokens that lose their gradient at the lower and upper
    bound, `ratio_min` and `ratio_max` the extremes of rho, `policy_kl` the k3 estimate of KL(old || policy).
    Inputs are [M].
    """
    log_ratio = policy_logprobs - old_logprobs
    ratio = log_ratio.exp()
    shares = {
        "clip_share_low": (advantages < 0) & (ratio < 1 - clip_min),
        "clip_share_high": (advantages > 0) & (ratio > 1 + clip_max),
        "policy_kl": torch.expm1(log_ratio) - log_ratio,
    }
    return token_means(shares) | _extremes("ratio", ratio)


@torch.no_grad()
def rollout_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Metrics:
    """Describe how far the trainer's probabilities are from the sampler's for the same weights.

    `token_mult_prob_error` = mean exp|roll - old| (above 1.05 is suspicious), `rollout_kl` the k3 estimate of
    KL(roll || old), and of the importance weights w = exp(old - roll), before any clamp, mean, extremes and effective
    sample size as a share of the tokens. Inputs are [M].
    """
    log_weight = old_logprobs - rollout_logprobs
    weight = log_weight.exp()
    means = token_means(
        {
            "token_mult_prob_error": log_weight.abs().exp(),
            "rollout_kl": torch.expm1(log_weight) - log_weight,
            "importance_weight_mean": weight,
            "importance_weight_square": weight.double().square(),
        }
    )
    square = means.pop("importance_weight_square", None)
    if not isinstance(square, Mean):
        return means
    mean = means["importance_weight_mean"]
    assert isinstance(mean, Mean)
    share = EffectiveShare(mean.total, square.total, mean.count)
    return means | {"importance_weight_ess": share} | _extremes("importance_weight", weight)


@torch.no_grad()
def token_means(columns: Mapping[str, Tensor]) -> Metrics:
    """Average named per-token columns [M] over loss tokens: exact however the tokens are cut into micro-batches.

    One transfer from the device for all of them; nothing for an empty micro-batch.
    """
    totals: list[float] = torch.stack([column.double().sum() for column in columns.values()]).tolist()
    count = len(next(iter(columns.values())))
    return {name: Mean(total, count) for name, total in zip(columns, totals, strict=True)} if count else {}


def _extremes(name: str, values: Tensor) -> Metrics:
    if not len(values):
        return {}
    lowest, highest = torch.stack(values.aminmax()).tolist()
    return {f"{name}_min": Min(lowest), f"{name}_max": Max(highest)}


@dataclass(frozen=True, slots=True)
class ClippedPolicyObjective:
    """The objective of GRPO and its kin: a policy loss plus `kl_weight` times the KL to the reference.

    Columns read: `advantages`; `old_logprobs` unless `on_policy`; `reference_logprobs` if `kl_weight` is above 0;
    `rollout_logprobs` for the correction and `kl_reweighted`, and for diagnostics where there are any.

    Attributes:
        ratio_clip_min: see `clipped_policy_loss`.
        ratio_clip_max: see `clipped_policy_loss`.
        ratio_clip_c: dual clip, above 1, or None.
        kl_weight: beta; 0 leaves the term (and the reference) out.
        kl_type: the estimator, see `kl_penalty`.
        kl_input_clamp: see `kl_penalty`.
        kl_output_clamp: see `kl_penalty`.
        kl_reweighted: the KL term times exp(policy - roll) without gradient, as its tokens come from the sampler.
        on_policy: the old log-probabilities are the current ones: the batch is trained on in a single step, or the loss
            has no ratio (the figures of ratio and sampler then speak of the current weights).
        policy_loss: `clipped_policy_loss`, `cispo_loss` or `reinforce_loss`.
        sequence_level_ratio: GSPO's ratio, see `sequence_level_logprobs`.
        correction: how the policy loss is weighed for a sampler that differs from the trainer, see
            `importance_weights`; None for not at all.
        correction_low: see `importance_weights`.
        correction_high: see `importance_weights`.
    """

    reads: ClassVar[Reads] = "logprobs"

    ratio_clip_min: float = 0.2
    ratio_clip_max: float = 0.2
    ratio_clip_c: float | None = None
    kl_weight: float = 0.0
    kl_type: KLKind = "k3"
    kl_input_clamp: float | None = 20.0
    kl_output_clamp: float | None = 10.0
    kl_reweighted: bool = False
    on_policy: bool = False
    policy_loss: PolicyLoss = "clipped"
    sequence_level_ratio: bool = False
    correction: Correction | None = None
    correction_low: float = 0.0
    correction_high: float = 2.0

    def __post_init__(self) -> None:
        if self.ratio_clip_c is not None and self.ratio_clip_c <= 1:
            raise ConfigError(
                f"loss_fn.ratio_clip_c is {self.ratio_clip_c}; it must be above 1, or null for no dual clip"
            )

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of every loss token, float32 [M], and the metrics of the micro-batch."""
        policy = outputs.policy_logprobs
        old = policy.detach() if self.on_policy else token_column(tokens, "old_logprobs")
        base = sequence_level_logprobs(policy, old, tokens.cu_seqlens) if self.sequence_level_ratio else old
        advantages = token_column(tokens, "advantages")
        loss = self._policy_loss(policy, base, advantages)
        correction: Metrics = {}
        if self.correction is not None:
            weight, correction = importance_weights(
                old,
                token_column(tokens, "rollout_logprobs"),
                tokens.cu_seqlens,
                kind=self.correction,
                low=self.correction_low,
                high=self.correction_high,
            )
            loss = loss * weight
        means = {"policy_loss": loss, "entropy": outputs.entropy}
        if self.kl_weight > 0:
            kl = kl_penalty(
                policy,
                token_column(tokens, "reference_logprobs"),
                kind=self.kl_type,
                input_clamp=self.kl_input_clamp,
                output_clamp=self.kl_output_clamp,
            )
            if self.kl_reweighted:
                log_weight = policy.detach() - token_column(tokens, "rollout_logprobs")
                kl = kl * log_weight.clamp(max=_MAX_LOG_WEIGHT).exp()
            loss = loss + self.kl_weight * kl
            means["reference_kl"] = kl
        metrics = token_means(means) | correction
        bounds = (math.inf, math.inf) if self.policy_loss == "reinforce" else (self.ratio_clip_min, self.ratio_clip_max)
        metrics |= ratio_metrics(policy, base, advantages, clip_min=bounds[0], clip_max=bounds[1])
        if "rollout_logprobs" in tokens.token_columns:
            metrics |= rollout_metrics(old, tokens.token_columns["rollout_logprobs"])
        return loss, metrics

    def _policy_loss(self, policy: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        low, high = self.ratio_clip_min, self.ratio_clip_max
        match self.policy_loss:
            case "clipped":
                return clipped_policy_loss(
                    policy, old, advantages, clip_min=low, clip_max=high, dual_clip=self.ratio_clip_c
                )
            case "cispo":
                return cispo_loss(policy, old, advantages, clip_min=low, clip_max=high)
            case "reinforce":
                return reinforce_loss(policy, advantages)
