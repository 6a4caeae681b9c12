"""From judged groups to the minibatches of a PPO step."""

import torch
from torch import Tensor

from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import RolloutGroup
from nemo_rl.metrics import Max, Mean, Metrics, Min, Sum
from nemo_rl.objectives.advantages import normalize_over_batch
from nemo_rl.objectives.jagged import sequence_means
from nemo_rl.objectives.kl import kl_penalty
from nemo_rl.objectives.policy import token_means
from nemo_rl.objectives.rewards import token_rewards
from nemo_rl.objectives.value import explained_variance, generalized_advantages
from nemo_rl.objectives.weights import loss_weights


def rollout_batch(config: PPOConfig, groups: list[RolloutGroup], *, version: int) -> tuple[TokenBatch, Metrics]:
    """Lay the groups out as a batch, in which answers that are filtered out carry no loss.

    Args:
        config: of the run.
        groups: judged groups, at least one.
        version: of the weights that are about to be trained.

    Returns:
        The batch, with the sequence column `valid` bool [B], and figures of its tokens and staleness.
    """
    batch = TokenBatch.from_rollouts(groups)
    sampled, truncated = batch.token_columns["loss_mask"], batch.sequence_columns["truncated"]
    valid = ~truncated if config.ppo.overlong_filtering else torch.ones_like(truncated)
    staleness = [version - rollout.policy_version for group in groups for rollout in group.rollouts]
    metrics: Metrics = {
        "staleness/mean": Mean(sum(staleness), len(staleness)),
        "staleness/max": Max(max(staleness)),
        "share_filtered": Mean(float((~valid).sum()), len(valid)),
        "tokens_collected": Sum(batch.num_tokens),
        "tokens_sampled": Sum(float(sampled.sum())),
    }
    batch = batch.with_columns(loss_mask=sampled & batch.per_token(valid))
    return batch.with_sequence_columns(valid=valid), metrics


def with_advantages(config: PPOConfig, batch: TokenBatch) -> tuple[TokenBatch, Metrics]:
    """Estimate the advantage and the return of every loss token.

    Args:
        config: of the run.
        batch: with the sequence column `rewards` and the token column `old_values`; for a KL term in the reward, with
            `old_logprobs` and `reference_logprobs` too.

    Returns:
        The batch with the token columns `advantages` and `returns` float32 [N], and with the sequence column
        `advantages` float32 [B], the mean over an answer before whitening; and figures of these before whitening.
    """
    columns, estimator = batch.token_columns, config.ppo.adv_estimator
    mask, values = columns["loss_mask"], columns["old_values"]
    rewards, metrics = _rewards(config, batch)
    advantages, returns = generalized_advantages(
        rewards, values, mask, batch.cu_seqlens, gamma=estimator.gae_gamma, gae_lambda=estimator.gae_lambda
    )
    metrics |= _figures(values[mask], advantages[mask], returns[mask])
    answers = batch.with_columns(advantages=advantages).at(mask.nonzero()[:, 0])
    means = sequence_means(answers.token_columns["advantages"], answers.cu_seqlens)
    if estimator.normalize_advantages:
        advantages = normalize_over_batch(advantages, mask)
    return batch.with_columns(advantages=advantages, returns=returns).with_sequence_columns(advantages=means), metrics


def _rewards(config: PPOConfig, batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """Rewards of tokens, float32 [N]: that of an answer at its last one, and minus the KL term at each if asked for."""
    loss, mask = config.loss_fn, batch.token_columns["loss_mask"]
    rewards = token_rewards(batch.sequence_columns["rewards"], mask, batch.cu_seqlens)
    if not loss.kl_in_reward:
        return rewards, {}
    estimate = kl_penalty(
        batch.token_columns["old_logprobs"],
        batch.token_columns["reference_logprobs"],
        kind=loss.reference_policy_kl_type,
        input_clamp=loss.kl_input_clamp_value,
        output_clamp=loss.kl_output_clamp_value,
    )
    penalized = rewards - loss.reference_policy_kl_penalty * torch.where(mask, estimate, 0.0)
    return penalized, token_means({"reference_kl": estimate[mask]})


def _figures(values: Tensor, advantages: Tensor, returns: Tensor) -> Metrics:
    """What the critic said and what became of it, over the M loss tokens of the step; nothing where there is none."""
    if not len(values):
        return {}
    return {
        **token_means({"values/mean": values, "returns/mean": returns, "advantages/mean": advantages}),
        "advantages/min": Min(float(advantages.min())),
        "advantages/max": Max(float(advantages.max())),
        "explained_variance": Mean(float(explained_variance(values, returns))),
    }


def minibatches(config: PPOConfig, batch: TokenBatch, size: int) -> list[TokenBatch]:
    """Cut into the batches of one optimizer step each, with the per-token column `loss_weights`.

    Args:
        config: of the run.
        batch: of the step.
        size: rollouts of one optimizer step.

    Returns:
        At most `size` sequences each; none that has no loss token.
    """
    cut: list[TokenBatch] = []
    for part in batch.minibatches(size):
        if not part.token_columns["loss_mask"].any():
            continue
        weights = loss_weights(
            part.token_columns["loss_mask"],
            part.cu_seqlens,
            reduction=config.loss_fn.reduction,
            valid=part.sequence_columns["valid"],
            max_response_length=config.policy.generation.max_new_tokens,
        )
        cut.append(part.with_columns(loss_weights=weights))
    return cut
