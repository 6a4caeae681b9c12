"""Rewards before they become advantages: shaping, scaling, and the KL penalty inside the reward."""

import torch
from torch import Tensor

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.jagged import sequence_sums


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """DAPO's soft punishment, min(-penalty (length - (max_length - buffer)) / buffer, 0) (Yu et al., 2025).

    Add it to the rewards: 0 up to `max_length - buffer` tokens, from there down to -penalty at `max_length`.

    Args:
        lengths: int64 [B], response tokens.
        max_length: tokens.
        buffer: tokens, how many before `max_length` the punishment starts.
        penalty: at `max_length`.

    Returns:
        float32 [B], at most 0.

    Raises:
        ConfigError: the buffer is not between 1 and `max_length`.
    """
    if not 1 <= buffer <= max_length:
        raise ConfigError(
            f"the overlong buffer is {buffer} tokens; it must be between 1 and the response length, {max_length}"
        )
    excess = lengths - (max_length - buffer)
    return (-penalty * excess.float() / buffer).clamp(max=0)


def scale_rewards(rewards: Tensor, *, source: tuple[float, float], target: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Map rewards [B] linearly from [source[0], source[1]] to [target[0], target[1]], clamped at both ends.

    Raises:
        ConfigError: the source is no interval.
    """
    low, high = source
    if not low < high:
        raise ConfigError(f"rewards cannot be scaled from [{low}, {high}]; the lower end must be below the upper one")
    share = (rewards.clamp(low, high) - low) / (high - low)
    return target[0] + share * (target[1] - target[0])


def token_rewards(rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Put each sequence's reward [B] on its last loss token: float32 [N], 0 elsewhere (no loss token, no reward).

    Args:
        rewards: float [B].
        loss_mask: bool [N].
        cu_seqlens: int64 [B+1].
    """
    where = loss_mask.nonzero()[:, 0]
    counts = torch.nn.functional.pad(loss_mask.cumsum(0), (1, 0))[cu_seqlens]
    present = counts.diff() > 0
    placed = torch.zeros(len(loss_mask), device=rewards.device)
    placed[where[counts[1:][present] - 1]] = rewards[present].float()
    return placed


def penalized_rewards(rewards: Tensor, kl: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, *, weight: float) -> Tensor:
    """Subtract the KL to the reference from the rewards of sequences: r - weight * sum of kl over loss tokens.

    For a penalty where it arises, subtract `weight * kl` from `token_rewards` instead. The gradient of a KL in the
    reward is that of the KL itself only with the estimator k1 (see `kl.kl_penalty`).

    Args:
        rewards: float [B].
        kl: float [N], per-token estimates, read on loss tokens only.
        loss_mask: bool [N].
        cu_seqlens: int64 [B+1].
        weight: beta.

    Returns:
        float32 [B].
    """
    return (rewards - weight * sequence_sums(torch.where(loss_mask, kl, 0.0), cu_seqlens)).float()
