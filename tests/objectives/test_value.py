"""Advantages by GAE over jagged sequences, the critic's loss and its objective."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import BackendError
from nemo_rl.metrics import scalars
from nemo_rl.objectives.logprobs import TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective
from nemo_rl.objectives.rewards import token_rewards
from nemo_rl.objectives.value import (
    ActorCriticObjective,
    ScalarOutputs,
    ValueObjective,
    explained_variance,
    generalized_advantages,
    value_loss,
)


def test_gae_of_the_worked_example() -> None:
    rewards, values = torch.tensor([0.0, 0, 5]), torch.tensor([1.0, 2, 3])
    mask, cu_seqlens = torch.ones(3, dtype=torch.bool), torch.tensor([0, 3])
    advantages, returns = generalized_advantages(rewards, values, mask, cu_seqlens, gamma=1.0, gae_lambda=0.0)
    assert advantages.tolist() == [1, 1, 2]
    assert returns.tolist() == [2, 3, 5]
    advantages, _ = generalized_advantages(rewards, values, mask, cu_seqlens, gamma=1.0, gae_lambda=1.0)
    assert advantages.tolist() == [4, 3, 2], "with lambda 1 the rewards to come minus the value"


def test_environment_tokens_are_skipped_and_values_carried() -> None:
    """What a tool says between two turns of the policy changes neither discount nor value."""
    plain = generalized_advantages(
        torch.tensor([0.5, 0, 5]),
        torch.tensor([1.0, 2, 3]),
        torch.ones(3, dtype=torch.bool),
        torch.tensor([0, 3]),
        gamma=0.9,
        gae_lambda=0.8,
    )
    mask = torch.tensor([False, True, False, False, True, True, False])
    spaced = generalized_advantages(
        torch.tensor([7.0, 0.5, 7, 7, 0, 5, 7]),
        torch.tensor([9.0, 1, 9, 9, 2, 3, 9]),
        mask,
        torch.tensor([0, 7]),
        gamma=0.9,
        gae_lambda=0.8,
    )
    for close, wide in zip(plain, spaced, strict=True):
        torch.testing.assert_close(wide[mask], close)
        assert not wide[~mask].any()


def plain_gae(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    advantages, following = [0.0] * len(r), 0.0
    for t in reversed(range(len(r))):
        following = r[t] + gamma * (v[t + 1] if t + 1 < len(r) else 0.0) - v[t] + gamma * lam * following
        advantages[t] = following
    return advantages


@settings(max_examples=50, deadline=None)
@given(
    masks=st.lists(st.lists(st.booleans(), max_size=8), max_size=6),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_jagged_gae_is_the_recursion_of_every_sequence(
    masks: list[list[bool]], gamma: float, gae_lambda: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor([m for sequence in masks for m in sequence], dtype=torch.bool)
    rewards, values = torch.randn(2, len(mask), generator=generator)
    cu_seqlens = torch.tensor([0] + [len(sequence) for sequence in masks]).cumsum(0)
    advantages, returns = generalized_advantages(rewards, values, mask, cu_seqlens, gamma=gamma, gae_lambda=gae_lambda)
    expected: list[float] = []
    for i in range(len(masks)):
        here = slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))
        kept = mask[here]
        expected += plain_gae(rewards[here][kept].tolist(), values[here][kept].tolist(), gamma, gae_lambda)
    torch.testing.assert_close(advantages[mask], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns[mask], advantages[mask] + values[mask], rtol=1e-5, atol=1e-5)


def test_rewards_stand_on_the_last_loss_token() -> None:
    mask = torch.tensor([False, True, True, False, False, True])
    placed = token_rewards(torch.tensor([2.0, 9.0, 3.0]), mask, torch.tensor([0, 4, 5, 6]))
    assert placed.tolist() == [0, 0, 2, 0, 0, 3], "a sequence without loss tokens earns nothing"


def test_value_loss_takes_the_worse_of_free_and_clipped() -> None:
    values = torch.tensor([1.5, 0.5, 1.1], requires_grad=True)
    loss = value_loss(values, torch.ones(3), torch.full((3,), 2.0), clip=0.2)
    torch.testing.assert_close(loss.detach(), 0.5 * torch.tensor([0.64, 2.25, 0.81]))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -1.5, -0.9]))
    torch.testing.assert_close(
        value_loss(values, torch.ones(3), torch.full((3,), 2.0), clip=None).detach(),
        0.5 * torch.tensor([0.25, 2.25, 0.81]),
    )


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2, 3, 4])
    assert explained_variance(returns + 5, returns) == 1
    assert explained_variance(torch.zeros(4), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, torch.ones(4)).isnan()


def tokens_with(**columns: Tensor) -> TokenBatch:
    count = len(columns["returns"])
    ids = torch.zeros(count, dtype=torch.int64)
    return TokenBatch(ids, torch.tensor([0, count]), torch.zeros(1, dtype=torch.int64), columns)


def test_value_objective_reports_its_parts() -> None:
    values = torch.tensor([1.5, 0.5, 1.1], requires_grad=True)
    tokens = tokens_with(old_values=torch.ones(3), returns=torch.full((3,), 2.0))
    loss, metrics = ValueObjective(clip=0.2)(ScalarOutputs(values), tokens)
    assert loss.requires_grad and loss.shape == (3,)
    figures = scalars(metrics)
    assert figures["value_loss"] == pytest.approx(0.5 * 3.7 / 3)
    assert figures["value_clip_share"] == pytest.approx(2 / 3)
    assert figures["value"] == pytest.approx(3.1 / 3)
    assert pickle.loads(pickle.dumps(ValueObjective(clip=None))) == ValueObjective(clip=None)


def test_a_weight_scales_the_loss_and_not_its_figure() -> None:
    tokens = tokens_with(old_values=torch.ones(3), returns=torch.full((3,), 2.0))
    outputs = ScalarOutputs(torch.tensor([1.5, 0.5, 1.1]))
    (plain, figures), (scaled, same) = (ValueObjective(weight=weight)(outputs, tokens) for weight in (1.0, 0.1))
    torch.testing.assert_close(scaled, 0.1 * plain)
    assert figures == same


def test_the_joint_objective_adds_the_worked_examples_of_both() -> None:
    """maths: advantages [1, -1, 2], rho [.5, 1, 1.5], eps .2 -> [-.5, 1, -2.4]; the critic's as above, times 0.5."""
    tokens = tokens_with(
        advantages=torch.tensor([1.0, -1, 2]),
        old_logprobs=torch.full((3,), -1.0),
        old_values=torch.ones(3),
        returns=torch.full((3,), 2.0),
    )
    logprobs = torch.tensor([-1.69315, -1, -0.59453])
    outputs = TokenOutputs(logprobs, torch.zeros(3), torch.tensor([1.5, 0.5, 1.1]))
    joint = ActorCriticObjective(ClippedPolicyObjective(), ValueObjective(clip=0.2, weight=0.5))
    loss, metrics = joint(outputs, tokens)
    expected = torch.tensor([-0.5, 1, -2.4]) + 0.25 * torch.tensor([0.64, 2.25, 0.81])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert {"policy_loss", "value_loss", "value_clip_share", "ratio_max"} <= metrics.keys()
    assert pickle.loads(pickle.dumps(joint)) == joint
    with pytest.raises(BackendError, match=r"the model has no value head"):
        joint(TokenOutputs(logprobs, torch.zeros(3)), tokens)
