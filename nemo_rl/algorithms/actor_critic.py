"""Who learns in a PPO step: a policy with a critic on its trunk, or a policy and a critic of its own."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemo_rl.algorithms.ppo_batch import minibatches
from nemo_rl.config.schema.ppo import PPOConfig, SeparateValueConfig
from nemo_rl.data.batch import TokenBatch
from nemo_rl.metrics import Metrics, Sum, merge
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.value import ActorCriticObjective, ValueHeadObjective, ValueObjective
from nemo_rl.workers.handles import Learner, Policy

_CRITIC_FIGURES = ("value", "value_loss", "value_clip_share")
"""Metrics that only a critic has, so that their names say whose they are."""


class ActorCritic(Protocol):
    """A policy and the critic that judges its tokens."""

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: the value before each loss token."""
        ...

    def train(self, batch: TokenBatch, *, with_policy: bool) -> Metrics:
        """Make all passes over the rollouts of a step; without the policy, only the critic learns."""
        ...


@dataclass(frozen=True, slots=True)
class SharedActorCritic:
    """The critic is a head on the policy's trunk: one pass trains both."""

    config: PPOConfig
    policy: Policy

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: the value before each loss token."""
        return self.policy.values(batch)

    def train(self, batch: TokenBatch, *, with_policy: bool) -> Metrics:
        """Make all passes; without the policy the trunk keeps its weights, bit for bit, and the head alone learns."""
        value = value_objective(self.config)
        joint = ActorCriticObjective(policy_objective(self.config), value)
        objective = joint if with_policy else ValueHeadObjective(value.clip, value.weight)
        size, epochs = self.config.policy.train_global_batch_size, self.config.ppo.ppo_epochs
        parts = minibatches(self.config, batch, size) * epochs
        return merge(self.policy.train(part, objective) for part in parts) | {"optimizer_steps": Sum(len(parts))}


@dataclass(frozen=True, slots=True)
class SeparateActorCritic:
    """The critic is a model of its own; its figures but for `value`, `value_loss` and its clip are `critic/NAME`."""

    config: PPOConfig
    policy: Policy
    critic: Learner
    section: SeparateValueConfig

    def values(self, batch: TokenBatch) -> Tensor:
        """float32 [N]: the value before each loss token."""
        return self.critic.values(batch)

    def train(self, batch: TokenBatch, *, with_policy: bool) -> Metrics:
        """Make all passes of the critic, then all of the policy."""
        value, epochs = value_objective(self.config), self.config.ppo.critic_ppo_epochs or self.config.ppo.ppo_epochs
        parts = minibatches(self.config, batch, self.section.train_global_batch_size) * epochs
        figures = merge(self.critic.train(part, value) for part in parts) | {"optimizer_steps": Sum(len(parts))}
        metrics = {name if name in _CRITIC_FIGURES else f"critic/{name}": one for name, one in figures.items()}
        objective, size = policy_objective(self.config), self.config.policy.train_global_batch_size
        parts = minibatches(self.config, batch, size) * (self.config.ppo.ppo_epochs if with_policy else 0)
        metrics |= merge(self.policy.train(part, objective) for part in parts)
        return metrics | {"optimizer_steps": Sum(len(parts))}


def value_objective(config: PPOConfig) -> ValueObjective:
    """Build the critic's objective of the section `value_loss_fn`."""
    return ValueObjective(clip=config.value_loss_fn.cliprange, weight=config.value_loss_fn.scale)


def policy_objective(config: PPOConfig) -> ClippedPolicyObjective:
    """Build the policy's objective of the section `loss_fn`."""
    loss = config.loss_fn
    return ClippedPolicyObjective(
        ratio_clip_min=loss.ratio_clip_min,
        ratio_clip_max=loss.ratio_clip_max,
        ratio_clip_c=loss.ratio_clip_c,
        kl_weight=loss.reference_policy_kl_penalty if loss.kl_in_loss else 0.0,
        kl_type=loss.reference_policy_kl_type,
        kl_input_clamp=loss.kl_input_clamp_value,
        kl_output_clamp=loss.kl_output_clamp_value,
        on_policy=config.on_policy,
    )
