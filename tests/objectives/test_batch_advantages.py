"""Advantages normalised over the batch: REINFORCE++, its baseline variant, GDPO."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.advantages import (
    decoupled_advantages,
    group_advantages,
    normalize_over_batch,
    reinforce_plus_plus_advantages,
)
from nemo_rl.objectives.rewards import token_rewards


@given(st.lists(st.tuples(st.floats(-9, 9, width=32), st.booleans()), max_size=20))
def test_what_counts_has_mean_0_and_deviation_1(samples: list[tuple[float, bool]]) -> None:
    values = torch.tensor([value for value, _ in samples])
    mask = torch.tensor([counts for _, counts in samples], dtype=torch.bool)
    normalized = normalize_over_batch(values, mask)
    assert normalized.dtype == torch.float32 and not normalized[~mask].any()
    kept = values[mask]
    if len(kept) and kept.max() - kept.min() > 0.1:
        assert normalized[mask].mean().abs() < 1e-4
        assert normalized[mask].std() == pytest.approx(1, abs=1e-3)
    elif not len(kept) or kept.max() == kept.min():
        assert not normalized.any()


def test_a_batch_of_many_tokens_is_normalised_without_comparing_them_pairwise() -> None:
    values = torch.arange(200_000.0)
    normalized = normalize_over_batch(values, torch.ones(200_000, dtype=torch.bool))
    torch.testing.assert_close(normalized.std(), torch.tensor(1.0))


def test_reinforce_plus_plus_sums_the_rewards_to_come() -> None:
    """Rewards to come: 3 - .5 - .1 = 2.4, 2.9 and, in the other sequence, 1."""
    rewards = torch.tensor([0.0, -0.5, 0.0, 2.9, 1.0])
    mask = torch.tensor([False, True, False, True, True])
    advantages = reinforce_plus_plus_advantages(rewards, mask, torch.tensor([0, 4, 5]))
    to_come = torch.tensor([2.4, 2.9, 1.0])
    torch.testing.assert_close(advantages[mask], (to_come - 2.1) / (to_come.std() + 1e-6))
    assert not advantages[~mask].any()


def test_reinforce_plus_plus_baseline_is_a_composition() -> None:
    rewards, groups = torch.tensor([1.0, 0, 5, 1]), torch.tensor([0, 0, 1, 1])
    centred = group_advantages(rewards, groups, leave_one_out=False, normalize=False)
    borders, mask = torch.tensor([0, 1, 3, 4, 5]), torch.ones(5, dtype=torch.bool)
    advantages = reinforce_plus_plus_advantages(token_rewards(centred, mask, borders), mask, borders)
    expected = torch.tensor([0.5, -0.5, -0.5, 2, -2])
    torch.testing.assert_close(advantages, (expected + 0.1) / (expected.std() + 1e-6))


def test_rewards_of_different_scale_weigh_the_same_in_gdpo() -> None:
    """The paper's point: normalised after the sum, (0, 1) and (0, 2) get one advantage; decoupled they do not."""
    groups = torch.tensor([0, 0, 1, 1])
    right, form = torch.tensor([0.0, 1, 0, 1]), torch.tensor([0.0, 0, 0, 1])
    coupled = group_advantages(right + form, groups, leave_one_out=False)
    assert coupled[1] == pytest.approx(coupled[3].item(), abs=1e-5)
    decoupled = decoupled_advantages({"right": right, "form": form}, groups)
    one = 0.5**0.5
    summed = torch.tensor([-one, one, -2 * one, 2 * one])
    torch.testing.assert_close(decoupled, summed / summed.std(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoupled_advantages({"right": right, "form": form * 1000}, groups), decoupled)


def test_gdpo_weights_and_samples_that_do_not_count() -> None:
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    right, form = torch.tensor([0.0, 1, 0, 9, 0, 3]), torch.tensor([1.0, 0, 1, 9, 0, 1])
    valid = torch.tensor([True, True, True, False, True, True])
    weights = {"right": 1.0, "form": 0.0}
    advantages = decoupled_advantages({"right": right, "form": form}, groups, weights=weights, valid=valid)
    assert advantages[3] == 0
    torch.testing.assert_close(advantages[valid], decoupled_advantages({"right": right[valid]}, groups[valid]))
    with pytest.raises(ConfigError, match="weigh each once"):
        decoupled_advantages({"right": right}, groups, weights={"rihgt": 1.0})
