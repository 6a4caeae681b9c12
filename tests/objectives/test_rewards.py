"""Reward shaping, scaling and the KL penalty: known answers."""

import pytest
import torch

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.rewards import overlong_penalty, penalized_rewards, scale_rewards, token_rewards


def test_overlong_shaping_of_the_worked_example() -> None:
    rewards = torch.tensor([1, 0.8, 0.6, 0.4])
    shaped = rewards + overlong_penalty(torch.tensor([10, 22, 25, 30]), max_length=25, buffer=5, penalty=0.5)
    torch.testing.assert_close(shaped, torch.tensor([1, 0.6, 0.1, -0.6]))


@pytest.mark.parametrize("buffer", [0, 26])
def test_overlong_buffer_must_fit(buffer: int) -> None:
    with pytest.raises(ConfigError, match=f"buffer is {buffer}"):
        overlong_penalty(torch.tensor([1]), max_length=25, buffer=buffer)


def test_scaling_clamps_at_both_ends() -> None:
    rewards = torch.tensor([-2.0, -1, 0, 3, 5])
    torch.testing.assert_close(scale_rewards(rewards, source=(-1, 3)), torch.tensor([0, 0, 0.25, 1, 1]))
    torch.testing.assert_close(
        scale_rewards(rewards, source=(-1, 3), target=(1.0, -1.0)), torch.tensor([1, 1, 0.5, -1, -1])
    )
    with pytest.raises(ConfigError, match="below"):
        scale_rewards(rewards, source=(1, 1))


def test_kl_is_subtracted_once_per_loss_token() -> None:
    mask = torch.tensor([False, True, True, False, True])
    kl, cu_seqlens = torch.tensor([9.0, 0.5, 1.5, torch.nan, -1]), torch.tensor([0, 4, 5])
    rewards = torch.tensor([1.0, 2.0])
    penalized = penalized_rewards(rewards, kl, mask, cu_seqlens, weight=0.1)
    torch.testing.assert_close(penalized, torch.tensor([0.8, 2.1]))
    per_token = token_rewards(rewards, mask, cu_seqlens) - 0.1 * torch.where(mask, kl, 0.0)
    torch.testing.assert_close(per_token, torch.tensor([0, -0.05, 0.85, 0, 2.1]))
