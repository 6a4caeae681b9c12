"""Advantages of sampled answers relative to the other answers to the same task, or of the batch."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.value import generalized_advantages

_EPSILON = 1e-6


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    leave_one_out: bool = True,
    normalize: bool = True,
    valid: Tensor | None = None,
    spread_of: Tensor | None = None,
) -> Tensor:
    """Compare each reward with its group: A = (r - b) / (std + 1e-6), or r - b where std is 0 or `normalize` is off.

    GRPO (Shao et al., "DeepSeekMath", 2024) takes b = mean of the group, RLOO (Ahmadian et al., "Back to Basics", 2024)
    b = mean of the others.

    Args:
        rewards: float [B].
        group_ids: int64 [B], equal within a group.
        leave_one_out: whether baseline and deviation leave the sample itself out.
        normalize: whether to divide by the deviation.
        valid: bool [B], false for samples that count nowhere; None keeps all.
        spread_of: float [B], the rewards whose deviation is divided by, where `rewards` hold penalties of a KL term or
            of length besides: with them, answers of equal reward differ by next to nothing, and dividing by that would
            blow the advantage up. None: `rewards` themselves.

    Returns:
        float32 [B]; 0 for samples that are not valid or have no valid peer.
    """
    baseline, std = group_baseline(rewards, group_ids, leave_one_out=leave_one_out, valid=valid)
    if spread_of is not None:
        _, std = group_baseline(spread_of, group_ids, leave_one_out=leave_one_out, valid=valid)
    advantages = rewards.double() - baseline
    if normalize:
        advantages = torch.where(std > 0, advantages / (std + _EPSILON), advantages)
    return advantages.float()


def group_baseline(
    rewards: Tensor, group_ids: Tensor, *, leave_one_out: bool = True, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (Bessel's correction) of each sample's peers.

    The peers are the valid samples of its group, with `leave_one_out` without itself. Centred, two passes, float64, and
    equal peers are recognised as such: a rounding error taken for a deviation would be divided by.

    Args:
        rewards: float [B].
        group_ids: int64 [B].
        leave_one_out: whether a sample is its own peer.
        valid: bool [B] or None.

    Returns:
        baseline float64 [B] and deviation float64 [B]; for samples that are not valid or alone, their own reward and 0.
    """
    values = rewards.double()
    baseline, std = values.clone(), torch.zeros_like(values)
    for members in _groups(group_ids, valid):
        size = len(members)
        if size < 2:
            continue
        peers = values[members].expand(size, size)
        if leave_one_out:
            others = ~torch.eye(size, dtype=torch.bool, device=values.device)
            peers = peers[others].view(size, size - 1)
        mean = peers.mean(1)
        deviation = ((peers - mean[:, None]).square().sum(1) / max(1, peers.shape[1] - 1)).sqrt()
        uniform = peers.amax(1) == peers.amin(1)
        baseline[members] = torch.where(uniform, peers[:, 0], mean)
        std[members] = torch.where(uniform, 0.0, deviation)
    return baseline, std


def normalize_over_batch(values: Tensor, mask: Tensor) -> Tensor:
    """Centre and scale what counts in the global batch: (x - mean) / (std + 1e-6), or 0 where all are equal.

    Args:
        values: float [N] or [B].
        mask: bool, of the same shape: what counts.

    Returns:
        float32 of the same shape, 0 where `mask` is false.
    """
    normalized = torch.zeros_like(values, dtype=torch.float32)
    kept = values[mask].double()
    if len(kept) and kept.amax() > kept.amin():
        normalized[mask] = ((kept - kept.mean()) / (kept.std() + _EPSILON)).float()
    return normalized


def reinforce_plus_plus_advantages(
    rewards: Tensor, loss_mask: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0
) -> Tensor:
    """Rewards to come, normalised over the loss tokens of the global batch (Hu et al., "REINFORCE++", 2025).

    REINFORCE++-baseline compares within the group first: its rewards are those of
    `group_advantages(..., leave_one_out=False, normalize=False)`.

    Args:
        rewards: float [N], per token: `rewards.token_rewards` minus the weighted KL to the reference.
        loss_mask: bool [N].
        cu_seqlens: int64 [B+1].
        gamma: discount per token.

    Returns:
        float32 [N], 0 off the loss tokens.
    """
    no_values = torch.zeros_like(rewards)
    to_come, _ = generalized_advantages(rewards, no_values, loss_mask, cu_seqlens, gamma=gamma, gae_lambda=1.0)
    return normalize_over_batch(to_come, loss_mask)


def decoupled_advantages(
    rewards: Mapping[str, Tensor],
    group_ids: Tensor,
    *,
    weights: Mapping[str, float] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Normalise each named reward within its group, add them up by weight, normalise over the batch.

    GDPO (Liu et al., "Group reward-Decoupled Normalization Policy Optimization", 2026): summed first, rewards of
    different scale drown each other, and different combinations of them get one advantage.

    Args:
        rewards: float [B] under each name.
        group_ids: int64 [B].
        weights: of the names; None weighs all 1.
        valid: bool [B] or None.

    Returns:
        float32 [B]; 0 for samples that are not valid.

    Raises:
        ConfigError: the weights name other rewards than there are.
    """
    weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
    if weights.keys() != rewards.keys():
        raise ConfigError(
            f"the reward weights name {sorted(weights)}, but the environment gives {sorted(rewards)}; weigh each once"
        )
    valid = torch.ones_like(group_ids, dtype=torch.bool) if valid is None else valid
    total = torch.zeros(len(group_ids), device=group_ids.device)
    for name, values in rewards.items():
        total += weights[name] * group_advantages(values, group_ids, leave_one_out=False, valid=valid)
    return normalize_over_batch(total, valid)


def _groups(group_ids: Tensor, valid: Tensor | None) -> Iterator[Tensor]:
    """Yield the indices of the valid samples of each group."""
    kept = torch.arange(len(group_ids), device=group_ids.device)
    if valid is not None:
        kept = kept[valid]
    ordered, order = torch.sort(group_ids[kept], stable=True)
    sizes: list[int] = torch.unique_consecutive(ordered, return_counts=True)[1].tolist()
    yield from kept[order].split(sizes)
