"""Group relative policy optimisation (Shao et al., DeepSeekMath, 2024), one visible loop."""

from nemo_rl.algorithms.policy_batch import minibatches, policy_batch
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.loader import TaskLoader
from nemo_rl.metrics import Sum, merge, prefixed
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.workers.handles import Policy


def train_grpo(config: GRPOConfig, run: Run, policy: Policy, source: RolloutSource, loader: TaskLoader) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: sample groups -> rewards -> advantages -> minibatches whose every token knows its weight in the loss -> old
    and reference log-probabilities, only where the loss needs them -> one optimizer step per minibatch -> publish the
    weights.
    """
    objective = grpo_objective(config)
    run.begin(source.validate)
    for step in run.steps(loader):
        with run.phase("generate"):
            collected = source.groups(next(loader), step)
        batch, batch_metrics = policy_batch(config, collected.groups, version=step - 1)
        parts = minibatches(config, batch)
        if not objective.on_policy:
            with run.phase("logprobs"):
                parts = [part.with_columns(old_logprobs=policy.logprobs(part)) for part in parts]
        if objective.kl_weight > 0:
            with run.phase("logprobs"), policy.reference():
                parts = [part.with_columns(reference_logprobs=policy.logprobs(part)) for part in parts]
        with run.phase("train"):
            trained = merge(policy.train(part, objective) for part in parts)
            policy.publish(step)
        metrics = collected.metrics | batch_metrics | trained
        metrics |= {"optimizer_steps": Sum(len(parts)), "num_skipped": Sum(loader.num_skipped)}
        advantages = batch.sequence_columns["advantages"].tolist()
        run.end_step(step, prefixed("train", metrics), collected, advantages)
        run.keep(step, policy, loader, validate=source.validate)


def grpo_objective(config: GRPOConfig) -> ClippedPolicyObjective:
    """Build the objective of the `loss_fn` section; with one optimizer step a batch nothing has moved yet: rho is 1."""
    loss = config.loss_fn
    return ClippedPolicyObjective(
        ratio_clip_min=loss.ratio_clip_min,
        ratio_clip_max=loss.ratio_clip_max,
        ratio_clip_c=loss.ratio_clip_c,
        kl_weight=loss.reference_policy_kl_penalty,
        kl_type=loss.reference_policy_kl_type,
        kl_input_clamp=loss.kl_input_clamp_value,
        kl_output_clamp=loss.kl_output_clamp_value,
        on_policy=config.num_rollouts_per_step == config.policy.train_global_batch_size,
    )
