"""From judged groups to the minibatches of a policy-gradient step: everything a recipe asks for becomes a column."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_rl.config.schema.algorithms import (
    DecoupledAdvantages,
    GroupAdvantages,
    GRPOConfig,
    ReinforcePlusPlusAdvantages,
    RewardedLoopConfig,
)
from nemo_rl.config.schema.loss import LossConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import RolloutGroup
from nemo_rl.metrics import Max, Mean, Metrics, Min, Sum
from nemo_rl.objectives.advantages import (
    decoupled_advantages,
    group_advantages,
    reinforce_plus_plus_advantages,
)
from nemo_rl.objectives.jagged import sequence_means, sequence_sums
from nemo_rl.objectives.kl import kl_penalty
from nemo_rl.objectives.policy import ClippedPolicyObjective, token_means
from nemo_rl.objectives.rewards import overlong_penalty, penalized_rewards, scale_rewards, token_rewards
from nemo_rl.objectives.weights import loss_weights
from nemo_rl.workers.handles import Policy


def policy_objective(loss: LossConfig, *, on_policy: bool) -> ClippedPolicyObjective:
    """Build the objective of a section `loss_fn`.

    Args:
        loss: the section.
        on_policy: whether the old log-probabilities are taken for the current ones: a batch is trained on in one
            optimizer step, so that nothing has moved, or the loss has no ratio.
    """
    corrected = loss.correction
    return ClippedPolicyObjective(
        ratio_clip_min=loss.ratio_clip_min,
        ratio_clip_max=loss.ratio_clip_max,
        ratio_clip_c=loss.ratio_clip_c,
        kl_weight=loss.reference_policy_kl_penalty if loss.kl_in_loss else 0.0,
        kl_type=loss.reference_policy_kl_type,
        kl_input_clamp=loss.kl_input_clamp_value,
        kl_output_clamp=loss.kl_output_clamp_value,
        kl_reweighted=loss.use_on_policy_kl_approximation,
        on_policy=on_policy,
        policy_loss=loss.policy_loss,
        sequence_level_ratio=loss.ratio_level == "sequence",
        correction=corrected and corrected.type,
        correction_low=corrected.low if corrected else 0.0,
        correction_high=corrected.high if corrected else 2.0,
    )


def with_old_logprobs(policy: Policy, batch: TokenBatch) -> TokenBatch:
    """Add the column `old_logprobs`, of the weights as they are, unless it is there."""
    if "old_logprobs" in batch.token_columns:
        return batch
    return batch.with_columns(old_logprobs=policy.logprobs(batch))


def with_reference_logprobs(policy: Policy, batch: TokenBatch) -> TokenBatch:
    """Add the column `reference_logprobs`, of the weights that the run started from."""
    with policy.reference():
        return batch.with_columns(reference_logprobs=policy.logprobs(batch))


def policy_batch(
    loop: RewardedLoopConfig, groups: Sequence[RolloutGroup], *, max_new_tokens: int, version: int
) -> tuple[TokenBatch, Metrics]:
    """Lay the groups out as a batch and shape their rewards.

    Sequence columns: `rewards` float32 [B] as shaped, `scaled_rewards` float32 [B] without the penalty for length,
    `rewards/NAME` float32 [B] as the environment named them (0 where an answer has none of that name), and `valid` bool
    [B].

    Args:
        loop: scaling, shaping and filtering.
        groups: judged groups, at least one.
        max_new_tokens: longest answer.
        version: of the weights that are about to be trained.

    Returns:
        The batch, and figures of the shaped rewards, tokens and staleness.
    """
    batch = TokenBatch.from_rollouts(groups)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    names = dict.fromkeys(name for rollout in rollouts for name in rollout.rewards)
    named = {f"rewards/{name}": torch.tensor([one.rewards.get(name, 0.0) for one in rollouts]) for name in names}
    truncated = batch.sequence_columns["truncated"]
    valid = ~truncated if loop.overlong_filtering else truncated.new_ones(truncated.shape)
    scaled = scaled_rewards(loop, batch)
    rewards = scaled + length_penalties(loop, batch, max_new_tokens=max_new_tokens)
    staleness = [version - rollout.policy_version for rollout in rollouts]
    metrics: Metrics = {
        **_spread("shaped_reward", rewards),
        "staleness/mean": Mean(sum(staleness), len(staleness)),
        "staleness/max": Max(max(staleness)),
        "share_filtered": Mean(float((~valid).sum()), len(valid)),
        "tokens_collected": Sum(batch.num_tokens),
    }
    return batch.with_sequence_columns(rewards=rewards, scaled_rewards=scaled, valid=valid, **named), metrics


def scaled_rewards(loop: RewardedLoopConfig, batch: TokenBatch) -> Tensor:
    """The column `rewards`, scaled as the loop asks for: float32 [B]."""
    rewards, scaling = batch.sequence_columns["rewards"], loop.reward_scaling
    if scaling is None:
        return rewards
    source, target = (scaling.source_min, scaling.source_max), (scaling.target_min, scaling.target_max)
    return scale_rewards(rewards, source=source, target=target)


def length_penalties(loop: RewardedLoopConfig, batch: TokenBatch, *, max_new_tokens: int) -> Tensor:
    """What the loop adds to the rewards of overlong answers, at most 0: float32 [B]."""
    shaping = loop.reward_shaping
    if shaping is None:
        return torch.zeros(batch.num_sequences)
    return overlong_penalty(
        sequence_sums(batch.token_columns["loss_mask"].long(), batch.cu_seqlens),
        max_length=shaping.max_response_length or max_new_tokens,
        buffer=shaping.overlong_buffer_length,
        penalty=shaping.overlong_buffer_penalty,
    )


def with_advantages(config: GRPOConfig, batch: TokenBatch) -> tuple[TokenBatch, Metrics]:
    """Add the token column `advantages` float32 [N], 0 off the loss tokens, and its means as sequence column [B].

    A KL term in the reward is subtracted before, from the columns `old_logprobs` and `reference_logprobs`.

    Returns:
        The batch, and figures of the advantages and of that KL term.
    """
    mask = batch.token_columns["loss_mask"] & batch.per_token(batch.sequence_columns["valid"])
    kl, metrics = _kl_in_reward(config.loss_fn, batch)
    advantages = torch.where(mask, _advantages(config, batch, kl, mask), 0.0)
    low, high = config.grpo.advantage_clip_low, config.grpo.advantage_clip_high
    if low is not None or high is not None:
        clipped = advantages.clamp(low, high)
        metrics |= token_means({"advantages/share_clipped": (clipped != advantages)[mask]})
        advantages = torch.where(mask, clipped, 0.0)
    per_answer = batch.with_columns(advantages=advantages).at(mask.nonzero()[:, 0])
    means = sequence_means(per_answer.token_columns["advantages"], per_answer.cu_seqlens)
    metrics |= _spread("advantages", means)
    return batch.with_columns(advantages=advantages).with_sequence_columns(advantages=means), metrics


def _advantages(config: GRPOConfig, batch: TokenBatch, kl: Tensor | None, mask: Tensor) -> Tensor:
    """The advantages of every token, float [N], of any value off `mask`."""
    rewards, valid = batch.sequence_columns["rewards"], batch.sequence_columns["valid"]
    settings, weight = config.grpo.adv_estimator, config.loss_fn.reference_policy_kl_penalty
    match settings:
        case GroupAdvantages():
            if kl is not None:
                rewards = penalized_rewards(rewards, kl, mask, batch.cu_seqlens, weight=weight)
            leave_one_out, normalize = settings.use_leave_one_out_baseline, settings.normalize_rewards
            return batch.per_token(
                group_advantages(
                    rewards,
                    batch.group_ids,
                    leave_one_out=leave_one_out,
                    normalize=normalize,
                    valid=valid,
                    spread_of=batch.sequence_columns["scaled_rewards"],
                )
            )
        case ReinforcePlusPlusAdvantages():
            if settings.minus_baseline:
                rewards = group_advantages(rewards, batch.group_ids, leave_one_out=False, normalize=False, valid=valid)
            tokens = token_rewards(rewards, mask, batch.cu_seqlens)
            tokens = tokens if kl is None else tokens - weight * kl
            return reinforce_plus_plus_advantages(tokens, mask, batch.cu_seqlens)
        case DecoupledAdvantages():
            named = {
                name.removeprefix("rewards/"): column
                for name, column in batch.sequence_columns.items()
                if name.startswith("rewards/")
            }
            return batch.per_token(
                decoupled_advantages(named, batch.group_ids, weights=settings.reward_weights, valid=valid)
            )


def _kl_in_reward(loss: LossConfig, batch: TokenBatch) -> tuple[Tensor | None, Metrics]:
    """The estimates of KL(old || reference) float32 [N], 0 off the loss tokens; None where the reward has none."""
    if not loss.kl_in_reward:
        return None, {}
    mask = batch.token_columns["loss_mask"]
    estimate = kl_penalty(
        batch.token_columns["old_logprobs"],
        batch.token_columns["reference_logprobs"],
        kind=loss.reference_policy_kl_type,
        input_clamp=loss.kl_input_clamp_value,
        output_clamp=loss.kl_output_clamp_value,
    )
    return torch.where(mask, estimate, 0.0), token_means({"reference_kl": estimate[mask]})


def _spread(name: str, values: Tensor) -> Metrics:
    return {
        f"{name}/mean": Mean(float(values.sum()), len(values)),
        f"{name}/min": Min(float(values.min())),
        f"{name}/max": Max(float(values.max())),
    }


def minibatches(config: GRPOConfig, batch: TokenBatch) -> list[TokenBatch]:
    """Cut into the batches of one optimizer step each, with the per-token column `loss_weights`.

    Sequences that cannot move a weight (not valid; or of advantage zero, when the loss has no KL term) are left out of
    the batches, but not of the numbers that the loss is normalised by.
    """
    skip_zero = config.grpo.skip_uniform_groups and not config.loss_fn.kl_in_loss
    cut: list[TokenBatch] = []
    for part in batch.minibatches(config.policy.train_global_batch_size):
        valid = useful = part.sequence_columns["valid"]
        if skip_zero:
            moves = part.token_columns["advantages"].ne(0).float()
            useful = valid & sequence_sums(moves, part.cu_seqlens).gt(0)
        if not useful.any():
            continue
        weights = loss_weights(
            part.token_columns["loss_mask"],
            part.cu_seqlens,
            reduction=config.loss_fn.reduction,
            valid=valid,
            max_response_length=config.policy.generation.max_new_tokens,
        )
        cut.append(part.with_columns(loss_weights=weights).select(useful.nonzero()[:, 0]))
    return cut
