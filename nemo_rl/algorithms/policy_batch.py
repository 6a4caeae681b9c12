"""From judged groups to the minibatches of a policy-gradient step."""

from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import RolloutGroup
from nemo_rl.metrics import Max, Mean, Metrics, Min, Sum
from nemo_rl.objectives.advantages import group_advantages
from nemo_rl.objectives.weights import loss_weights


def policy_batch(config: GRPOConfig, groups: list[RolloutGroup], *, version: int) -> tuple[TokenBatch, Metrics]:
    """Lay the groups out as a batch with the sequence columns `advantages` float32 [B] and `valid` bool [B].

    Args:
        config: of the run.
        groups: judged groups, at least one.
        version: of the weights that are about to be trained.

    Returns:
        The batch, and figures of the advantages, tokens and staleness.
    """
    batch = TokenBatch.from_rollouts(groups)
    truncated = batch.sequence_columns["truncated"]
    valid = ~truncated if config.grpo.overlong_filtering else truncated.new_ones(truncated.shape)
    advantages = group_advantages(
        batch.sequence_columns["rewards"],
        batch.group_ids,
        leave_one_out=config.grpo.use_leave_one_out_baseline,
        normalize=config.grpo.normalize_rewards,
        valid=valid,
    )
    staleness = [version - rollout.policy_version for group in groups for rollout in group.rollouts]
    metrics: Metrics = {
        "advantages/mean": Mean(float(advantages.sum()), len(advantages)),
        "advantages/min": Min(float(advantages.min())),
        "advantages/max": Max(float(advantages.max())),
        "staleness/mean": Mean(sum(staleness), len(staleness)),
        "staleness/max": Max(max(staleness)),
        "share_filtered": Mean(float((~valid).sum()), len(valid)),
        "tokens_collected": Sum(batch.num_tokens),
        "tokens_sampled": Sum(float(batch.token_columns["loss_mask"].sum())),
    }
    return batch.with_sequence_columns(advantages=advantages, valid=valid), metrics


def minibatches(config: GRPOConfig, batch: TokenBatch) -> list[TokenBatch]:
    """Cut into the batches of one optimizer step each, with the per-token columns `advantages` and `loss_weights`.

    Sequences that cannot move a weight (not valid; or of advantage zero, when the loss has no KL term) are left out of
    the batches, but not of the numbers that the loss is normalised by.
    """
    skip_zero = config.grpo.skip_uniform_groups and config.loss_fn.reference_policy_kl_penalty == 0
    cut: list[TokenBatch] = []
    for part in batch.minibatches(config.policy.train_global_batch_size):
        valid, advantages = part.sequence_columns["valid"], part.sequence_columns["advantages"]
        useful = valid & (advantages != 0) if skip_zero else valid
        if not useful.any():
            continue
        weights = loss_weights(
            part.token_columns["loss_mask"],
            part.cu_seqlens,
            reduction=config.loss_fn.reduction,
            valid=valid,
            max_response_length=config.policy.generation.max_new_tokens,
        )
        part = part.with_columns(loss_weights=weights, advantages=part.per_token(advantages))
        cut.append(part.select(useful.nonzero()[:, 0]))
    return cut
