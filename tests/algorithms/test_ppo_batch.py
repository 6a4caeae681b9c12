"""From judged groups to PPO's minibatches: what every token earns, is worth and weighs."""

import pytest
import torch
from torch import Tensor

from nemo_rl.algorithms.ppo_batch import minibatches, rollout_batch, with_advantages
from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.types import Rollout, RolloutGroup, StopReason, Task
from nemo_rl.metrics import scalars
from tiny_ppo import load_ppo  # pyright: ignore[reportImplicitRelativeImport]

PLAIN = ("ppo.adv_estimator.normalize_advantages=false", "ppo.adv_estimator.gae_lambda=0.0")
WORKED = torch.tensor([0.0, 1.0, 2.0, 0.0, 3.0])
"""Values of the worked example, gamma 1, lambda 0, reward 5, V = [1, 2, 3], around a token of the environment."""


def rollout(mask: list[int], reward: float, stop: StopReason = "stop", version: int = 0) -> Rollout:
    return Rollout(
        torch.arange(len(mask)), torch.tensor(mask).bool(), torch.zeros(len(mask)), {"r": reward}, stop, version
    )


def one_answer(mask: list[int], reward: float, stop: StopReason = "stop") -> list[RolloutGroup]:
    return [RolloutGroup(Task((), "math"), (rollout(mask, reward, stop),))]


def batch_of(groups: list[RolloutGroup], values: Tensor, *settings: str, **columns: Tensor) -> TokenBatch:
    batch, _ = rollout_batch(load_ppo(*settings), groups, version=0)
    return batch.with_columns(old_values=values, **columns)


@pytest.mark.parametrize("stop", ["stop", "length"])
def test_the_worked_example_whether_the_answer_ended_or_was_cut_off(stop: StopReason) -> None:
    """A cut-off answer is not bootstrapped: its last token earns the reward and no value follows it."""
    batch = batch_of(one_answer([0, 1, 1, 0, 1], 5.0, stop), WORKED)
    batch, metrics = with_advantages(load_ppo(*PLAIN), batch)
    assert batch.token_columns["advantages"].tolist() == [0, 1, 1, 0, 2]
    assert batch.token_columns["returns"].tolist() == [0, 2, 3, 0, 5]
    assert batch.sequence_columns["advantages"].tolist() == [pytest.approx(4 / 3)]
    figures = scalars(metrics)
    assert figures["values/mean"] == 2 and figures["returns/mean"] == pytest.approx(10 / 3)
    assert (figures["advantages/mean"], figures["advantages/min"]) == (pytest.approx(4 / 3), 1)
    assert figures["advantages/max"] == 2
    assert figures["explained_variance"] == pytest.approx(1 - (2 / 9) / (14 / 9))


def test_gamma_and_lambda_are_those_of_the_configuration() -> None:
    settings = ("ppo.adv_estimator.gae_gamma=0.5", "ppo.adv_estimator.gae_lambda=0.4")
    batch = batch_of(one_answer([0, 1, 1, 0, 1], 5.0), WORKED)
    batch, _ = with_advantages(load_ppo("ppo.adv_estimator.normalize_advantages=false", *settings), batch)
    last, middle = 2.0, -0.5 + 0.2 * 2.0
    expected = torch.tensor([0, 0.0 + 0.2 * middle, middle, 0, last])
    torch.testing.assert_close(batch.token_columns["advantages"], expected)


def test_a_kl_term_in_the_reward_is_paid_at_every_sampled_token() -> None:
    """k1 = old - reference: at values of 0 and lambda 0 the advantage of a token is its own reward."""
    kl = ("loss_fn.reference_policy_kl_penalty=0.5", "loss_fn.reference_policy_kl_type=k1")
    columns = {
        "old_logprobs": torch.tensor([0.0, -1.0, -2.0, 0.0, -1.0]),
        "reference_logprobs": torch.tensor([0.0, -1.5, -1.0, -9.0, -1.0]),
    }
    batch = batch_of(one_answer([0, 1, 1, 0, 1], 5.0), torch.zeros(5), **columns)
    in_reward, metrics = with_advantages(load_ppo(*PLAIN, *kl, "loss_fn.reference_policy_kl_place=reward"), batch)
    assert in_reward.token_columns["advantages"].tolist() == [0, -0.25, 0.5, 0, 5]
    assert scalars(metrics)["reference_kl"] == pytest.approx((0.5 - 1.0) / 3)
    in_loss, metrics = with_advantages(load_ppo(*PLAIN, *kl), batch)
    assert in_loss.token_columns["advantages"].tolist() == [0, 0, 0, 0, 5] and "reference_kl" not in metrics


def test_advantages_are_whitened_over_the_tokens_of_the_step_after_their_figures_are_taken() -> None:
    groups = one_answer([0, 1, 1], 4.0) + one_answer([0, 1], -1.0)
    batch, metrics = with_advantages(load_ppo("ppo.adv_estimator.gae_lambda=1.0"), batch_of(groups, torch.zeros(5)))
    whitened = batch.token_columns["advantages"]
    mask = batch.token_columns["loss_mask"]
    assert not whitened[~mask].any()
    assert float(whitened[mask].mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened[mask].std()) == pytest.approx(1, abs=1e-5)
    assert scalars(metrics)["advantages/max"] == 4 and batch.sequence_columns["advantages"].tolist() == [4, -1]
    assert batch.token_columns["returns"][mask].tolist() == [4, 4, -1]  # the critic's targets stay as they are


def test_filtered_answers_are_in_no_loss_and_no_figure() -> None:
    kept, cut = one_answer([0, 1, 1], 4.0), one_answer([0, 1, 1, 1], 9.0, "length")
    config = load_ppo("ppo.overlong_filtering=true", *PLAIN, "loss_fn.reduction=constant")
    batch, metrics = rollout_batch(config, kept + cut, version=2)
    assert scalars(metrics)["share_filtered"] == 0.5
    assert scalars(metrics)["staleness/mean"] == 2
    batch, figures = with_advantages(config, batch.with_columns(old_values=torch.ones(7)))
    assert not batch.token_columns["advantages"][3:].any()
    assert scalars(figures)["returns/mean"] == pytest.approx((1 + 4) / 2)
    (whole,) = minibatches(config, batch, 2)
    longest = config.policy.generation.max_new_tokens
    torch.testing.assert_close(whole.token_columns["loss_weights"], torch.tensor([0, 1, 1, 0, 0, 0, 0]) / longest)
    assert len(minibatches(config, batch, 1)) == 1  # the other has nothing to learn from


def test_a_step_whose_answers_are_all_filtered_has_no_figures_and_trains_nothing() -> None:
    config = load_ppo("ppo.overlong_filtering=true")
    batch, _ = rollout_batch(config, one_answer([0, 1, 1], 4.0, "length"), version=0)
    batch, figures = with_advantages(config, batch.with_columns(old_values=torch.ones(3)))
    assert figures == {} and minibatches(config, batch, 1) == []


def test_every_minibatch_weighs_its_own_tokens_to_one() -> None:
    groups = one_answer([0, 1, 1], 4.0) + one_answer([0, 1], -1.0) + one_answer([0, 1, 1, 1], 0.0)
    config = load_ppo()
    batch, _ = with_advantages(config, batch_of(groups, torch.zeros(9)))
    for size, count in ((3, 1), (2, 2), (1, 3)):
        parts = minibatches(config, batch, size)
        assert len(parts) == count
        for part in parts:
            assert float(part.token_columns["loss_weights"].sum()) == pytest.approx(1)
            assert part.token_columns.keys() >= {"advantages", "returns", "old_values"}
