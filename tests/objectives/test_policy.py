"""Policy losses and their diagnostics: known answers, signs, gradients, and the objective on a batch."""

import math
import pickle

import pytest
import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.metrics import Metrics, scalars
from nemo_rl.objectives.logprobs import TokenOutputs
from nemo_rl.objectives.policy import (
    ClippedPolicyObjective,
    cispo_loss,
    clipped_policy_loss,
    ratio_metrics,
    reinforce_loss,
    rollout_metrics,
)

ADVANTAGES = torch.tensor([1.0, -1.0, 2.0])
OLD = torch.full((3,), -1.0)
POLICY = OLD + torch.tensor([0.5, 1.0, 1.5]).log()


def batch(**columns: Tensor) -> TokenBatch:
    """One sequence whose tokens all carry loss."""
    count = len(next(iter(columns.values())))
    return TokenBatch(
        token_ids=torch.zeros(count, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, count]),
        group_ids=torch.zeros(1, dtype=torch.int64),
        token_columns=columns,
    )


def outputs(policy: Tensor) -> TokenOutputs:
    return TokenOutputs(policy_logprobs=policy, entropy=torch.full_like(policy, 0.5, requires_grad=False))


def test_clipped_loss_of_the_worked_example() -> None:
    loss = clipped_policy_loss(POLICY, OLD, ADVANTAGES)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 1.0, -2.4]))
    torch.testing.assert_close(loss.mean(), torch.tensor(-0.63333), rtol=0, atol=1e-5)


def test_on_policy_loss_and_its_gradient() -> None:
    policy = POLICY.clone().requires_grad_()
    loss = clipped_policy_loss(policy, policy.detach(), ADVANTAGES)
    torch.testing.assert_close(loss.mean().detach(), torch.tensor(-0.66667), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    torch.testing.assert_close(gradient, -ADVANTAGES)


def test_reinforce_loss_of_the_worked_example() -> None:
    loss = reinforce_loss(torch.tensor([-0.5, -1.0, -1.5]), ADVANTAGES)
    torch.testing.assert_close(loss.mean(), torch.tensor(0.83333), rtol=0, atol=1e-5)


def test_dual_clip_of_the_worked_example() -> None:
    policy = OLD + torch.tensor([0.5, 1.0, 10.0]).log()
    loss = clipped_policy_loss(policy, OLD, torch.tensor([1.0, -1.0, -4.0]), dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([-0.5, 1.0, 12.0]))
    torch.testing.assert_close(loss.mean(), torch.tensor(4.16667), rtol=0, atol=1e-5)


def test_clipping_cuts_the_gradient_only_where_the_move_was_an_improvement() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    policy = ratio.log().requires_grad_()
    (gradient,) = torch.autograd.grad(clipped_policy_loss(policy, torch.zeros(4), advantages).sum(), policy)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 0.0, 0.0, 1.5]))


def test_asymmetric_clip_bounds() -> None:
    policy = torch.tensor([0.7, 0.85, 1.25, 1.4]).log()
    advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    loss = clipped_policy_loss(policy, torch.zeros(4), advantages, clip_min=0.2, clip_max=0.28)
    torch.testing.assert_close(loss, torch.tensor([0.8, 0.85, -1.25, -1.28]))


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    policy = POLICY.clone().requires_grad_()
    loss = cispo_loss(policy, OLD, ADVANTAGES)
    weight = torch.tensor([0.8, 1.0, 1.2])
    torch.testing.assert_close(loss.detach(), -ADVANTAGES * weight * POLICY)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), policy)[0], -ADVANTAGES * weight)


def test_ratio_metrics_count_the_tokens_that_lose_their_gradient() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0])
    advantages = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0])
    figures = scalars(ratio_metrics(ratio.log(), torch.zeros(5), advantages, clip_min=0.2, clip_max=0.2))
    divergence = (2 * (0.5 - 1 - math.log(0.5)) + 2 * (1.5 - 1 - math.log(1.5))) / 5
    assert figures == pytest.approx(
        {"clip_share_low": 0.2, "clip_share_high": 0.4, "policy_kl": divergence, "ratio_min": 0.5, "ratio_max": 1.5},
        abs=1e-6,
    )


def test_rollout_metrics_compare_trainer_and_sampler() -> None:
    weight = torch.tensor([0.5, 2.0])
    figures = scalars(rollout_metrics(weight.log() - 1, torch.tensor([-1.0, -1.0])))
    assert figures == pytest.approx(
        {
            "token_mult_prob_error": 2.0,
            "rollout_kl": (2.5 - 2 - math.log(0.5) - math.log(2)) / 2,
            "importance_weight_mean": 1.25,
            "importance_weight_min": 0.5,
            "importance_weight_max": 2.0,
            "importance_weight_ess": 2.5**2 / (2 * 4.25),
        },
        abs=1e-6,
    )


def test_objective_adds_the_weighted_kl_and_reports_its_parts() -> None:
    policy = POLICY.clone().requires_grad_()
    reference = POLICY - 1
    tokens = batch(advantages=ADVANTAGES, old_logprobs=OLD, reference_logprobs=reference, rollout_logprobs=OLD)
    loss, metrics = ClippedPolicyObjective(kl_weight=0.1, kl_type="k1")(outputs(policy), tokens)
    torch.testing.assert_close(loss.detach(), torch.tensor([-0.5, 1.0, -2.4]) + 0.1)
    assert loss.requires_grad
    figures = scalars(metrics)
    assert figures["policy_loss"] == pytest.approx(-0.63333, abs=1e-5)
    assert figures["reference_kl"] == pytest.approx(1.0, abs=1e-6)
    assert figures["entropy"] == 0.5
    assert figures["clip_share_high"] == pytest.approx(1 / 3)
    assert figures["token_mult_prob_error"] == 1.0


def test_the_kl_term_has_the_sign_that_pulls_to_the_reference() -> None:
    policy = torch.tensor([-1.0], requires_grad=True)
    tokens = batch(advantages=torch.zeros(1), old_logprobs=policy.detach(), reference_logprobs=torch.tensor([-2.0]))
    loss, _ = ClippedPolicyObjective(kl_weight=0.1)(outputs(policy), tokens)
    loss.sum().backward()
    assert policy.grad is not None and policy.grad > 0, "descent must lower a log-probability above the reference's"


def test_zero_advantages_do_not_act_as_a_mask() -> None:
    """Tokens without advantage still carry their KL: the advantages say nothing about which tokens count."""
    tokens = batch(advantages=torch.tensor([0.0, 1.0]), reference_logprobs=torch.tensor([-3.0, -3.0]))
    loss, metrics = ClippedPolicyObjective(kl_weight=1.0, kl_type="k1", on_policy=True)(
        outputs(torch.tensor([-1.0, -1.0])), tokens
    )
    torch.testing.assert_close(loss, torch.tensor([2.0, 1.0]))
    assert scalars(metrics)["reference_kl"] == 2.0


def test_on_policy_objective_needs_no_old_log_probabilities() -> None:
    policy = POLICY.clone().requires_grad_()
    loss, metrics = ClippedPolicyObjective(on_policy=True)(outputs(policy), batch(advantages=ADVANTAGES))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), policy)[0], -ADVANTAGES)
    assert scalars(metrics)["ratio_max"] == 1.0
    with pytest.raises(DataError, match="'old_logprobs'"):
        ClippedPolicyObjective()(outputs(policy), batch(advantages=ADVANTAGES))


def test_empty_micro_batch_gives_an_empty_loss_and_no_metrics() -> None:
    empty = torch.empty(0, requires_grad=True)
    nothing = torch.empty(0)
    tokens = batch(advantages=nothing, old_logprobs=nothing, rollout_logprobs=nothing)
    loss, metrics = ClippedPolicyObjective()(outputs(empty), tokens)
    assert loss.shape == (0,) and loss.requires_grad
    expected: Metrics = {}
    assert metrics == expected


def test_objective_pickles_and_rejects_a_dual_clip_that_would_flip_the_loss() -> None:
    objective = ClippedPolicyObjective(ratio_clip_c=3.0, kl_weight=0.01)
    assert pickle.loads(pickle.dumps(objective)) == objective
    with pytest.raises(ConfigError, match="ratio_clip_c"):
        ClippedPolicyObjective(ratio_clip_c=1.0)
