"""Preference losses: known answers, gradients, and objectives whose token losses add up to the mean over pairs."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import ConfigError, DataError
from nemo_rl.metrics import merge, scalars
from nemo_rl.objectives.logprobs import TokenOutputs
from nemo_rl.objectives.preference import (
    KTOObjective,
    PairLoss,
    PreferenceObjective,
    RewardModelObjective,
    bradley_terry_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_kl,
    odds_ratio_loss,
    pair_metrics,
    simpo_loss,
)
from nemo_rl.objectives.value import ScalarOutputs
from nemo_rl.objectives.weights import loss_weights

ZEROS = torch.zeros(2)


def pairs(lengths: list[int], seed: int = 0, **columns: Tensor) -> tuple[Tensor, TokenBatch]:
    """Policy log-probabilities [M] and a batch of pairs, chosen answer first in even and last in odd ones."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    count, num = int(sizes.sum()), len(lengths)
    policy, reference = -torch.rand(2, count, generator=generator, dtype=torch.float64) * 3
    cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    weights = loss_weights(torch.ones(count, dtype=torch.bool), cu_seqlens, reduction="sequence_mean")
    tokens = TokenBatch(
        token_ids=torch.zeros(count, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        group_ids=torch.arange(num) // 2,
        token_columns={"reference_logprobs": reference, "loss_weights": weights.double(), "policy": policy},
        sequence_columns={"chosen": torch.tensor([True, False, False, True])[torch.arange(num) % 4], **columns},
    )
    return policy, tokens


def outputs(policy: Tensor) -> TokenOutputs:
    return TokenOutputs(policy_logprobs=policy, entropy=torch.zeros_like(policy, requires_grad=False))


def total(token_loss: Tensor, tokens: TokenBatch) -> Tensor:
    return (tokens.token_columns["loss_weights"] * token_loss).sum()


def test_equal_policies_cost_ln_2() -> None:
    for loss in (dpo_loss(ZEROS, ZEROS), bradley_terry_loss(ZEROS, ZEROS), odds_ratio_loss(ZEROS - 1, ZEROS - 1)):
        assert loss.tolist() == [pytest.approx(math.log(2), abs=1e-7)] * 2
    policy, tokens = pairs([5, 900, 3, 1])
    tokens = tokens.with_columns(reference_logprobs=policy)
    token_loss, metrics = PreferenceObjective()(outputs(policy), tokens)
    assert float(total(token_loss, tokens)) == pytest.approx(math.log(2), abs=1e-6)
    assert scalars(metrics) == pytest.approx(
        {"preference_loss": math.log(2), "accuracy": 0.5, "margin": 0, "chosen_reward": 0, "rejected_reward": 0}
    )


def test_pair_losses_worked_out_by_hand() -> None:
    """Ratio difference 2, beta .5: logits 1."""
    chosen, rejected = torch.tensor([1.5]), torch.tensor([-0.5])
    softplus = math.log1p(math.exp(-1))
    assert dpo_loss(chosen, rejected, beta=0.5).item() == pytest.approx(softplus)
    smoothed = 0.9 * softplus + 0.1 * math.log1p(math.exp(1))
    assert dpo_loss(chosen, rejected, beta=0.5, label_smoothing=0.1).item() == pytest.approx(smoothed)
    assert ipo_loss(chosen, rejected, beta=0.5).item() == pytest.approx((2 - 1) ** 2)
    assert hinge_loss(chosen, rejected, beta=0.2).item() == pytest.approx(0.6)
    assert hinge_loss(chosen, rejected, beta=0.5).item() == 0
    assert simpo_loss(chosen, rejected, beta=2.0, margin=3.0).item() == pytest.approx(math.log1p(math.exp(-1)))
    assert bradley_terry_loss(chosen, rejected, margins=torch.tensor([1.0])).item() == pytest.approx(softplus)


def test_odds_ratio_of_probabilities_worked_out_by_hand() -> None:
    """p = .8 and .5 have the odds 4 and 1, so the loss is -log(4 / 5)."""
    chosen, rejected = torch.tensor([0.8]).log(), torch.tensor([0.5]).log()
    assert odds_ratio_loss(chosen, rejected).item() == pytest.approx(-math.log(0.8), abs=1e-6)
    certain = torch.zeros(1, requires_grad=True)
    loss = odds_ratio_loss(certain, rejected)
    assert loss.isfinite() and torch.autograd.grad(loss, certain)[0].isfinite()


def test_smoothed_labels_have_their_optimum_at_the_label_confidence() -> None:
    """The cDPO note's point: the gradient is sigmoid(logit) - (1 - eps), so confidence stops at 1 - eps."""
    logit = torch.tensor([math.log(0.9 / 0.1), 0.3], requires_grad=True)
    loss = dpo_loss(logit, torch.zeros(2), beta=1.0, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), logit)
    torch.testing.assert_close(gradient, torch.tensor([0.0, float(torch.tensor(0.3).sigmoid()) - 0.9]))


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_ipo_stops_at_the_policy_that_its_paper_works_out_for_two_answers(tau: float) -> None:
    """Azar et al., 5.4: a uniform reference and a sure preference give sigmoid(1 / (2 tau)), where DPO's goes to 1."""
    reached: dict[str, float] = {}
    for loss, rate in ((ipo_loss, 0.1), (dpo_loss, 100.0)):
        policy = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        for _ in range(200):
            ratios = policy.log_softmax(0) - math.log(0.5)
            (gradient,) = torch.autograd.grad(loss(ratios[:1], ratios[1:], beta=tau).sum(), policy)
            policy = (policy - rate * gradient).detach().requires_grad_()
        reached[loss.__name__] = policy.softmax(0)[0].item()
    assert reached["ipo_loss"] == pytest.approx(1 / (1 + math.exp(-0.5 / tau)), abs=1e-9)
    assert reached["dpo_loss"] > 0.999


def test_gradients_weigh_a_pair_as_the_papers_say() -> None:
    """DPO: beta sigmoid(beta (r - c)) (Rafailov et al., section 4); ORPO: 1 / (1 + odds ratio) (Hong et al., 4.3)."""
    chosen, rejected = torch.tensor([0.2], requires_grad=True), torch.tensor([1.2], requires_grad=True)
    weight = 0.5 / (1 + math.exp(-0.5))
    found = torch.autograd.grad(dpo_loss(chosen, rejected, beta=0.5).sum(), (chosen, rejected))
    assert [gradient.item() for gradient in found] == [pytest.approx(-weight), pytest.approx(weight)]
    chosen, rejected = (torch.tensor([p]).log().requires_grad_() for p in (0.8, 0.5))  # odds 4 and 1
    found = torch.autograd.grad(odds_ratio_loss(chosen, rejected).sum(), (chosen, rejected))
    per_log_odds = [gradient.item() * (1 - p) for gradient, p in zip(found, (0.8, 0.5), strict=True)]
    assert per_log_odds == [pytest.approx(-1 / 5, abs=1e-6), pytest.approx(1 / 5, abs=1e-6)]


def test_kto_gains_and_losses_around_the_reference_point() -> None:
    ratios = torch.tensor([1.0, 1.0, 3.0], requires_grad=True)
    desirable = torch.tensor([True, False, True])
    loss = kto_loss(ratios, desirable, torch.tensor(1.0), beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    sigmoid = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(loss.detach(), torch.tensor([1.0, 1.5, 2 * (1 - sigmoid)]))
    (gradient,) = torch.autograd.grad(loss.sum(), ratios)
    expected = torch.tensor([-2 * 0.25 * 0.5, 3 * 0.25 * 0.5, -2 * sigmoid * (1 - sigmoid) * 0.5])
    torch.testing.assert_close(gradient, expected)
    point = kto_reference_kl(torch.tensor([1.0, 2.0], requires_grad=True))
    assert point == 1.5 and not point.requires_grad
    assert kto_reference_kl(torch.tensor([-1.0, -2.0])) == 0, "an estimate below 0 is no divergence"


@given(difference=st.floats(-50, 50), beta=st.floats(0.01, 2), smoothing=st.floats(0, 0.49))
def test_swapping_a_pair_swaps_its_label(difference: float, beta: float, smoothing: float) -> None:
    chosen, rejected = torch.tensor([difference], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    swapped = dpo_loss(rejected, chosen, beta=beta, label_smoothing=1 - smoothing)
    torch.testing.assert_close(dpo_loss(chosen, rejected, beta=beta, label_smoothing=smoothing), swapped)
    torch.testing.assert_close(  # losses of the two labels differ by the logit
        dpo_loss(rejected, chosen, beta=beta) - dpo_loss(chosen, rejected, beta=beta), beta * (chosen - rejected)
    )


def test_metrics_count_a_tie_as_half() -> None:
    figures = scalars(pair_metrics(torch.tensor([2.0, 0, 1, 1]), torch.tensor([1.0, 3, 0, 1])))
    assert figures == {"accuracy": 0.625, "margin": -0.25, "chosen_reward": 1.0, "rejected_reward": 1.25}


@pytest.mark.parametrize("kind", ["dpo", "ipo", "hinge", "simpo", "orpo"])
@pytest.mark.parametrize("average", [False, True])
def test_token_losses_add_up_to_the_mean_over_pairs(kind: PairLoss, average: bool) -> None:
    """Value and gradient, with the SFT term, against the papers' formulas over a loop of pairs."""
    policy, tokens = pairs([4, 2, 1, 6, 3, 3])
    policy.requires_grad_()
    objective = PreferenceObjective(
        kind=kind,
        beta=0.2,
        margin=0.3 if kind == "simpo" else 0.0,
        label_smoothing=0.1 if kind == "dpo" else 0.0,
        average_logprobs=average,
        preference_weight=0.7,
        sft_weight=0.4,
        sft_average_logprobs=average,
    )
    token_loss, metrics = objective(outputs(policy), tokens)
    assert token_loss.shape == policy.shape
    losses, scores, sizes = [], [], tokens.lengths.tolist()
    for pair in range(3):
        first, second = 2 * pair, 2 * pair + 1
        chosen, rejected = (first, second) if tokens.sequence_columns["chosen"][first] else (second, first)
        rows = [x.split(sizes) for x in (policy, tokens.token_columns["reference_logprobs"])]
        mean = average or kind in ("simpo", "orpo")
        lp_c, lp_r, ref_c, ref_r = (row[i].mean() if mean else row[i].sum() for row in rows for i in (chosen, rejected))
        logit = 0.2 * ((lp_c - ref_c) - (lp_r - ref_r))
        odds = [lp.exp() / (1 - lp.exp()) for lp in (lp_c, lp_r)]
        preference = {
            "dpo": -0.9 * logit.sigmoid().log() - 0.1 * (1 - logit.sigmoid()).log(),
            "ipo": (logit / 0.2 - 2.5) ** 2,
            "hinge": (1 - logit).clamp(min=0),
            "simpo": -(0.2 * (lp_c - lp_r) - 0.3).sigmoid().log(),
            "orpo": -(odds[0] / odds[1]).log().sigmoid().log(),
        }[kind]
        scores.append((lp_c - lp_r if kind in ("simpo", "orpo") else logit / 0.2).item())
        nll = -(rows[0][chosen].mean() if average else rows[0][chosen].sum())
        losses.append(0.7 * preference + 0.4 * nll)
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(total(token_loss, tokens), expected, rtol=1e-6, atol=1e-7)
    (mine,), (plain,) = torch.autograd.grad(total(token_loss, tokens), policy), torch.autograd.grad(expected, policy)
    torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-8)
    figures = scalars(metrics)
    assert 0.7 * figures["preference_loss"] + 0.4 * figures["sft_loss"] == pytest.approx(expected.item())
    assert figures["chosen_reward"] - figures["rejected_reward"] == pytest.approx(figures["margin"])
    assert figures["margin"] == pytest.approx(0.2 * sum(scores) / 3)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=8, max_size=8), cut=st.integers(1, 3), seed=st.integers(0, 99))
def test_micro_batches_of_whole_pairs_change_nothing(lengths: list[int], cut: int, seed: int) -> None:
    policy, tokens = pairs(lengths, seed)
    objective = PreferenceObjective(beta=0.3, sft_weight=0.1)
    policy.requires_grad_()
    whole_loss, whole = objective(outputs(policy), tokens)
    parts, losses = [], []
    for chosen in (range(2 * cut), range(2 * cut, 8)):
        part = tokens.select(list(chosen))
        token_loss, metrics = objective(outputs(policy[tokens.token_index(list(chosen))]), part)
        losses.append(total(token_loss, part))
        parts.append(metrics)
    mine, expected = torch.stack(losses).sum(), total(whole_loss, tokens)
    torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(torch.autograd.grad(mine, policy), torch.autograd.grad(expected, policy))
    assert scalars(merge(parts)) == pytest.approx(scalars(whole))


def test_kto_objective_is_the_mean_over_answers() -> None:
    policy, tokens = pairs([4, 2, 1, 6], reference_kl=torch.full((4,), 0.4, dtype=torch.float64))
    token_loss, metrics = KTOObjective(beta=0.2, desirable_weight=2.0)(outputs(policy), tokens)
    gains = torch.stack([x.sum() for x in (policy - tokens.token_columns["reference_logprobs"]).split([4, 2, 1, 6])])
    desirable = tokens.sequence_columns["chosen"]
    values = torch.where(desirable, 2 * (1 - (0.2 * (gains - 0.4)).sigmoid()), 1 - (0.2 * (0.4 - gains)).sigmoid())
    torch.testing.assert_close(total(token_loss, tokens), values.mean(), rtol=1e-6, atol=1e-7)
    figures = scalars(metrics)
    assert figures["chosen_reward"] == pytest.approx(float(0.2 * gains[desirable].mean()))
    assert figures["rejected_reward"] == pytest.approx(float(0.2 * gains[~desirable].mean()))
    assert figures["reference_kl"] == pytest.approx(0.4)


def test_a_reward_model_is_judged_by_its_last_token() -> None:
    _, tokens = pairs([2, 1, 1, 2])  # chosen: the first and the last sequence
    values = torch.tensor([9.0, 2.0, 1.0, 0.5, 9.0, 1.5], dtype=torch.float64)
    token_loss, metrics = RewardModelObjective()(ScalarOutputs(values), tokens)
    expected = torch.tensor([1.0, 1.0]).sigmoid().log().neg().mean()
    torch.testing.assert_close(total(token_loss, tokens).float(), expected)
    figures = scalars(metrics)
    assert figures["accuracy"] == 1 and figures["margin"] == 1 and figures["chosen_reward"] == 1.75


@pytest.mark.parametrize("kept", [[0], [0, 1, 2], [0, 3], []])
def test_torn_pairs_are_refused(kept: list[int]) -> None:
    policy, tokens = pairs([2, 2, 2, 2])
    part = tokens.select(kept)
    if not kept:
        loss, metrics = PreferenceObjective()(outputs(policy[:0]), part)
        assert loss.shape == (0,) and not metrics
        return
    with pytest.raises(DataError, match="whole pairs"):
        PreferenceObjective()(outputs(policy[: part.num_tokens]), part)


def test_pairs_with_an_empty_answer_or_without_marks_are_refused() -> None:
    policy, tokens = pairs([2, 2])
    with pytest.raises(DataError, match="empty answer"):
        PreferenceObjective()(outputs(policy[:2]), tokens.at(torch.tensor([0, 1])))
    both = tokens.with_sequence_columns(chosen=torch.tensor([True, True]))
    with pytest.raises(DataError, match="whole pairs"):
        PreferenceObjective()(outputs(policy), both)
    policy, tokens = pairs([2, 2, 2, 2])
    with pytest.raises(DataError, match="whole pairs"):
        PreferenceObjective()(outputs(policy), replace(tokens, group_ids=torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(DataError, match="'reference_kl'"):
        KTOObjective()(outputs(policy), tokens)


def test_objectives_pickle_and_refuse_what_makes_no_sense() -> None:
    for objective in (PreferenceObjective(kind="ipo"), KTOObjective(beta=0.2), RewardModelObjective(margin_scale=0.5)):
        assert pickle.loads(pickle.dumps(objective)) == objective
    assert PreferenceObjective().needs_reference and not PreferenceObjective(kind="simpo").needs_reference
    with pytest.raises(ConfigError, match="label_smoothing"):
        PreferenceObjective(label_smoothing=0.5)
    with pytest.raises(ConfigError, match="beta"):
        PreferenceObjective(beta=0)
