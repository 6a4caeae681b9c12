"""Mixtures of experts, and the tokens of several ranks."""

import torch
from torch import Tensor, nn

from nemo_rl.data.batch import TokenBatch
from tiny_streams import group_batch

MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")
"""Families whose experts can be divided, each with 8 of them in its tiny model."""


def rank_batch(rank: int) -> TokenBatch:
    """The sequences of one of at most four ranks: other ones on each, and fewer on higher ranks."""
    return group_batch(128, seed=rank).select(range(12 - 3 * rank))


def weighted(logprobs: Tensor, rank: int) -> Tensor:
    """What is differentiated: a sum over a rank's loss tokens with weights of its own."""
    return (logprobs * torch.randn(len(logprobs), generator=torch.Generator().manual_seed(100 + rank))).sum()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient; fails where there is none."""
    found = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    missing = {name for name, _ in module.named_parameters()} - found.keys()
    assert not missing, f"no gradient: {missing}"
    return found


def assert_close(got: Tensor, expected: Tensor, name: str, tolerance: float = 1e-5) -> None:
    """Relative to the expected tensor's norm."""
    assert got.shape == expected.shape, name
    assert (got - expected).norm() <= tolerance * expected.norm(), (
        f"{name}: {(got - expected).norm() / expected.norm()}"
    )
