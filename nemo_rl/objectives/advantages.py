"""Advantages of sampled answers relative to the other answers to the same task."""

from collections.abc import Iterator

import torch
from torch import Tensor

_EPSILON = 1e-6


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    leave_one_out: bool = True,
    normalize: bool = True,
    valid: Tensor | None = None,
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

    Returns:
        float32 [B]; 0 for samples that are not valid or have no valid peer.
    """
    baseline, std = group_baseline(rewards, group_ids, leave_one_out=leave_one_out, valid=valid)
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


def spread(rewards: Tensor, group_ids: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Tell which groups have rewards that differ, so that there is something to learn from.

    Args:
        rewards: float [B].
        group_ids: int64 [B].
        valid: bool [B] or None.

    Returns:
        bool [number of groups], in ascending order of group id; `torch.unique(group_ids, return_inverse=True)[1]` leads
        from samples to it.
    """
    ids, group = torch.unique(group_ids, return_inverse=True)
    kept = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    highest = rewards.new_full(ids.shape, -torch.inf).scatter_reduce(0, group[kept], rewards[kept], "amax")
    lowest = rewards.new_full(ids.shape, torch.inf).scatter_reduce(0, group[kept], rewards[kept], "amin")
    return highest > lowest


def _groups(group_ids: Tensor, valid: Tensor | None) -> Iterator[Tensor]:
    """Yield the indices of the valid samples of each group."""
    kept = torch.arange(len(group_ids), device=group_ids.device)
    if valid is not None:
        kept = kept[valid]
    ordered, order = torch.sort(group_ids[kept], stable=True)
    sizes: list[int] = torch.unique_consecutive(ordered, return_counts=True)[1].tolist()
    yield from kept[order].split(sizes)
