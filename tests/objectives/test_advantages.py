"""Group baselines and advantages: known answers, exact zeros, groups by id, samples that count nowhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.objectives.advantages import group_advantages, group_baseline


def test_leave_one_out_of_two_groups_of_three() -> None:
    rewards = torch.arange(1.0, 7.0)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    baseline, std = group_baseline(rewards, groups, leave_one_out=True)
    torch.testing.assert_close(baseline, torch.tensor([2.5, 2, 1.5, 5.5, 5, 4.5], dtype=torch.float64))
    expected = torch.tensor([0.5**0.5, 2**0.5, 0.5**0.5], dtype=torch.float64).repeat(2)
    torch.testing.assert_close(std, expected)
    advantages = group_advantages(rewards, groups, leave_one_out=True, normalize=True)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, ((rewards - baseline) / (std + 1e-6)).float())
    torch.testing.assert_close(
        group_advantages(rewards, groups, leave_one_out=True, normalize=False), torch.tensor([-1.5, 0, 1.5]).repeat(2)
    )


def test_mean_baseline_of_two_groups_of_three() -> None:
    rewards = torch.arange(1.0, 7.0)
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    baseline, std = group_baseline(rewards, groups, leave_one_out=False)
    torch.testing.assert_close(baseline, torch.tensor([2.0, 2, 2, 5, 5, 5], dtype=torch.float64))
    torch.testing.assert_close(std, torch.ones(6, dtype=torch.float64))
    advantages = group_advantages(rewards, groups, leave_one_out=False)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0, 1]).repeat(2) / (1 + 1e-6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_peers_have_no_deviation_to_divide_by(dtype: torch.dtype) -> None:
    """A one-pass or float32 deviation of seven times 0.95 is not 0, and the advantage explodes."""
    rewards = torch.tensor([0.0] + [0.95] * 7, dtype=dtype)
    groups = torch.zeros(8, dtype=torch.int64)
    _, std = group_baseline(rewards, groups, leave_one_out=True)
    assert std[0] == 0.0
    assert (std[1:] > 0.3).all()
    advantages = group_advantages(rewards, groups, leave_one_out=True, normalize=True)
    torch.testing.assert_close(advantages[0], torch.tensor(-0.95))
    assert advantages.abs().max() < 1


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_equal_rewards_give_exactly_no_advantage(leave_one_out: bool) -> None:
    rewards = torch.full((7,), 0.1, dtype=torch.float64)
    assert not group_advantages(rewards, torch.zeros(7, dtype=torch.int64), leave_one_out=leave_one_out).any()


def test_the_only_winner_of_a_group_is_rewarded_and_kept() -> None:
    """Its peers are all equal, so a decision by their deviation would drop it."""
    rewards, groups = torch.tensor([1.0, 0, 0, 0]), torch.zeros(4, dtype=torch.int64)
    assert group_advantages(rewards, groups)[0] == 1.0


def test_samples_that_are_not_valid_count_nowhere() -> None:
    rewards = torch.tensor([1.0, 100.0, 2.0, 3.0, 5.0, -100.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    valid = torch.tensor([True, False, True, True, True, False])
    advantages = group_advantages(rewards, groups, valid=valid, normalize=False)
    torch.testing.assert_close(advantages, torch.tensor([-1.5, 0, 0, 1.5, 0, 0]))
    baseline, std = group_baseline(rewards, groups, valid=valid)
    assert baseline[4] == 5 and std[4] == 0, "the only valid sample of a group is its own baseline"


def test_duplicate_prompts_are_separate_groups() -> None:
    """Groups have ids: two samplings of one prompt are not compared with each other."""
    rewards = torch.tensor([0.0, 1.0, 10.0, 11.0])
    advantages = group_advantages(rewards, torch.tensor([3, 3, 8, 8]), normalize=False)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]))


@given(
    rewards=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16),
    leave_one_out=st.booleans(),
    data=st.data(),
)
def test_order_of_the_samples_does_not_matter(rewards: list[float], leave_one_out: bool, data: st.DataObject) -> None:
    values = torch.tensor(rewards)
    groups = torch.arange(len(rewards)) % 3
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    advantages = group_advantages(values, groups, leave_one_out=leave_one_out)
    shuffled = group_advantages(values[order], groups[order], leave_one_out=leave_one_out)
    torch.testing.assert_close(shuffled, advantages[order], rtol=1e-5, atol=1e-6)
