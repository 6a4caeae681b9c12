"""Proximal policy optimisation (Schulman et al., 2017) for language models, one visible loop."""

from nemo_rl.algorithms.actor_critic import ActorCritic
from nemo_rl.algorithms.ppo_batch import rollout_batch, with_advantages
from nemo_rl.algorithms.run import Run
from nemo_rl.algorithms.sampling import RolloutSource
from nemo_rl.config.schema.ppo import PPOConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.loader import TaskLoader
from nemo_rl.metrics import Sum, prefixed
from nemo_rl.workers.handles import Policy


def train_ppo(
    config: PPOConfig, run: Run, policy: Policy, actor_critic: ActorCritic, source: RolloutSource, loader: TaskLoader
) -> None:
    """Train until the run ends: its steps or epochs are used up, its time is over or it is interrupted.

    A step: sample groups -> rewards -> values of every sampled token, and its log-probabilities where they are needed
    -> rewards of tokens, minus the KL term if it is one -> generalised advantages over the sampled tokens, whitened ->
    passes of critic and policy over minibatches -> publish the weights. In the first steps the critic may learn alone.
    """
    for step in run.steps(loader):
        with_policy = step > config.ppo.policy_training_start_step
        with run.phase("generate"):
            collected = source.groups(next(loader), step)
        batch, metrics = rollout_batch(config, collected.groups, version=step - 1)
        with run.phase("logprobs"):
            batch = batch.with_columns(old_values=actor_critic.values(batch))
            batch = with_logprobs(config, policy, batch, with_policy=with_policy)
        batch, advantage_metrics = with_advantages(config, batch)
        with run.phase("train"):
            trained = actor_critic.train(batch, with_policy=with_policy)
            policy.publish(step)
        metrics |= collected.metrics | advantage_metrics | trained | {"num_skipped": Sum(loader.num_skipped)}
        advantages = batch.sequence_columns["advantages"].tolist()
        run.end_step(step, prefixed("train", metrics), collected, advantages)
        run.keep(step, policy, loader, validate=source.validate)


def with_logprobs(config: PPOConfig, policy: Policy, batch: TokenBatch, *, with_policy: bool) -> TokenBatch:
    """Add the log-probabilities that rewards or losses read, each computed once for all passes over the batch.

    `old_logprobs` where the policy takes several optimizer steps or the reward has a KL term; `reference_logprobs`
    where reward or loss have one.
    """
    loss = config.loss_fn
    if loss.kl_in_reward or (with_policy and not config.on_policy):
        batch = batch.with_columns(old_logprobs=policy.logprobs(batch))
    if loss.kl_in_reward or (with_policy and loss.kl_in_loss):
        with policy.reference():
            batch = batch.with_columns(reference_logprobs=policy.logprobs(batch))
    return batch
