"""Group relative policy optimisation (Shao et al., DeepSeekMath, 2024) and its family, one visible loop."""

from nemo_rl.algorithms.policy_batch import (
    minibatches,
    policy_batch,
    policy_objective,
    with_advantages,
    with_old_logprobs,
    with_reference_logprobs,
)
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource, step_groups
from nemo_rl.config.schema.algorithms import GRPOConfig
from nemo_rl.data.loader import TaskLoader
from nemo_rl.metrics import Sum, merge, prefixed
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.workers.handles import Policy


def train_grpo(config: GRPOConfig, run: Run, policy: Policy, source: RolloutSource, loader: TaskLoader) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: sample groups -> rewards -> advantages -> minibatches whose every token knows its weight in the loss -> old
    and reference log-probabilities, only where rewards or loss need them -> one optimizer step per minibatch, perhaps
    in several passes -> publish the weights.
    """
    objective = grpo_objective(config)
    run.begin(source.validate)
    for step in run.steps(loader):
        with run.phase("generate"):
            collected = step_groups(config, source, loader, step)
        batch, metrics = policy_batch(
            config.grpo, collected.groups, max_new_tokens=source.sampling.max_new_tokens, version=step - 1
        )
        if config.loss_fn.kl_in_reward:
            with run.phase("logprobs"):
                batch = with_reference_logprobs(policy, with_old_logprobs(policy, batch))
        batch, advantage_metrics = with_advantages(config, batch)
        parts = minibatches(config, batch)
        if not objective.on_policy:
            with run.phase("logprobs"):
                parts = [with_old_logprobs(policy, part) for part in parts]
        if objective.kl_weight > 0:
            with run.phase("logprobs"):
                parts = [with_reference_logprobs(policy, part) for part in parts]
        updates = parts * config.grpo.num_epochs_per_step
        with run.phase("train"):
            trained = merge(policy.train(part, objective) for part in updates)
            policy.publish(step)
        metrics |= collected.metrics | advantage_metrics | trained
        metrics |= {"optimizer_steps": Sum(len(updates)), "num_skipped": Sum(loader.num_skipped)}
        advantages = batch.sequence_columns["advantages"].tolist()
        run.end_step(step, prefixed("train", metrics), collected, advantages)
        run.keep(step, policy, loader, validate=source.validate)


def grpo_objective(config: GRPOConfig) -> ClippedPolicyObjective:
    """Build the objective of the `loss_fn` section."""
    unneeded = config.num_updates_per_step == 1 or not config.loss_fn.needs_old_logprobs
    return policy_objective(config.loss_fn, on_policy=unneeded)
