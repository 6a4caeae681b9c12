"""Values: advantages by generalised advantage estimation, the critic's loss and objective."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import BackendError
from nemo_rl.metrics import Metrics
from nemo_rl.objectives.jagged import token_column
from nemo_rl.objectives.logprobs import Reads, TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective, token_means


@dataclass(frozen=True, slots=True)
class ScalarOutputs:
    """What a scalar head (a value or reward model) says about the M loss tokens of a micro-batch.

    Attributes:
        values: float32 [M], with gradient.
    """

    values: Tensor


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """GAE over the loss tokens of every sequence (Schulman et al., "High-Dimensional Continuous Control", 2016).

    A_t = delta_t + gamma lambda A_t', delta_t = r_t + gamma V_t' - V_t, where t' is the sequence's next loss token and
    both terms end with the last one. Tokens without loss (a tool's answer) are skipped: they are no steps of the
    policy, so nothing is discounted across them.

    Args:
        rewards: float [N], per token, 0 off the loss tokens; see `rewards.token_rewards`.
        values: float [N], V before each token, read on loss tokens only.
        loss_mask: bool [N].
        cu_seqlens: int64 [B+1].
        gamma: discount per token.
        gae_lambda: 0 trusts the values, 1 the rewards.

    Returns:
        advantages float32 [N] and returns (advantage + value) float32 [N]; 0 off the loss tokens.
    """
    where = loss_mask.nonzero()[:, 0]
    r, v = rewards[where].double(), values[where].double()
    ends = torch.nn.functional.pad(loss_mask.cumsum(0), (1, 0))[cu_seqlens]
    lengths, last = ends.diff(), ends[1:] - 1
    has_next = torch.ones_like(loss_mask[where]).index_fill(0, last[lengths > 0], False)
    delta = r - v + gamma * torch.where(has_next, v.roll(-1), 0.0)
    advantages = delta.clone()
    for step in range(1, int(lengths.max()) if len(lengths) else 0):  # all sequences at once, from their ends
        token = (last - step)[lengths > step]
        advantages[token] += gamma * gae_lambda * advantages[token + 1]
    dense = torch.zeros(2, len(loss_mask), device=rewards.device)
    dense[:, where] = torch.stack([advantages, advantages + v]).float()
    return dense[0], dense[1]


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2) -> Tensor:
    """PPO's critic loss 0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) for every token.

    As in the code that accompanies Schulman et al., 2017.

    Args:
        values: [M], with gradient.
        old_values: [M], before the step's first update.
        returns: [M].
        clip: how far a value may move and still learn; None for no bound.

    Returns:
        [M].
    """
    loss = (values - returns).square()
    if clip is not None:
        bounded = torch.clamp(values, old_values - clip, old_values + clip)
        loss = torch.maximum(loss, (bounded - returns).square())
    return 0.5 * loss


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R): 1 for a perfect critic, 0 for one that knows the mean, below for worse: [M], [M] -> [].

    It is no mean, so take it over all loss tokens of the global batch at once. NaN if the returns are all equal.
    """
    returns = returns.detach().double()
    spread = returns.var(correction=0)
    unexplained = (returns - values.detach().double()).var(correction=0)
    return torch.where(spread > 0, 1 - unexplained / spread, torch.nan)


@dataclass(frozen=True, slots=True)
class ValueObjective:
    """PPO's critic: `weight` times the clipped value loss of every token.

    Token columns read: `old_values` and `returns`.

    Attributes:
        clip: see `value_loss`.
        weight: of the loss; `value_loss` in the metrics is without it.
    """

    reads: ClassVar[Reads] = "values"

    clip: float | None = 0.2
    weight: float = 1.0

    def __call__(self, outputs: ScalarOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of every loss token, float32 [M], and the metrics of the micro-batch."""
        values, old = outputs.values, token_column(tokens, "old_values")
        loss = value_loss(values, old, token_column(tokens, "returns"), clip=self.clip)
        means = {"value_loss": loss, "value": values}
        if self.clip is not None:
            means["value_clip_share"] = (values - old).abs() > self.clip
        return self.weight * loss, token_means(means)


@dataclass(frozen=True, slots=True)
class ValueHeadObjective(ValueObjective):
    """The same loss for the value head alone: the trunk that it shares with the policy does not learn."""

    reads: ClassVar[Reads] = "head_values"


@dataclass(frozen=True, slots=True)
class ActorCriticObjective:
    """PPO with the critic on the policy's trunk: policy loss plus weighted value loss, in one pass.

    The objective of Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 9, without its entropy
    bonus. Token columns read: those of both parts.

    Attributes:
        policy: the policy's part.
        value: the critic's part, with its weight.
    """

    reads: ClassVar[Reads] = "logprobs"

    policy: ClippedPolicyObjective
    value: ValueObjective

    def __call__(self, outputs: TokenOutputs, tokens: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the loss of every loss token, float32 [M], and the metrics of the micro-batch.

        Raises:
            BackendError: the model has no value head.
        """
        if outputs.values is None:
            raise BackendError(
                "the objective reads values beside log-probabilities, and the model has no value head; train one with "
                "the head language_and_value"
            )
        policy_loss, policy_metrics = self.policy(outputs, tokens)
        critic_loss, critic_metrics = self.value(ScalarOutputs(outputs.values), tokens)
        return policy_loss + critic_loss, policy_metrics | critic_metrics
