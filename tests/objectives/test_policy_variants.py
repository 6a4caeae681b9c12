"""GSPO, CISPO, REINFORCE and importance correction inside the policy objective."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import DataError
from nemo_rl.metrics import merge, scalars
from nemo_rl.objectives.jagged import per_token, sequence_means, sequence_sums
from nemo_rl.objectives.logprobs import TokenOutputs
from nemo_rl.objectives.policy import ClippedPolicyObjective, sequence_level_logprobs
from nemo_rl.objectives.supervised import SupervisedObjective
from nemo_rl.objectives.weights import loss_weights

CU_SEQLENS = torch.tensor([0, 3, 4, 4, 9])
MEANS = torch.tensor([0.5, 1.0, 0.0, 1.5], dtype=torch.float64)
"""The third sequence has no loss token."""


def tokens_of(cu_seqlens: Tensor, **columns: Tensor) -> TokenBatch:
    count = int(cu_seqlens[-1])
    weights = loss_weights(torch.ones(count, dtype=torch.bool), cu_seqlens, reduction="sequence_mean").double()
    groups = torch.arange(len(cu_seqlens) - 1)
    ids = torch.zeros(count, dtype=torch.int64)
    return TokenBatch(ids, cu_seqlens, groups, {"loss_weights": weights, **columns})


def draw(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(policy: Tensor) -> TokenOutputs:
    return TokenOutputs(policy, torch.zeros_like(policy, requires_grad=False))


def test_sums_means_and_back() -> None:
    values = torch.arange(9.0)
    assert sequence_sums(values, CU_SEQLENS).tolist() == [3, 3, 0, 30]
    assert sequence_means(values, CU_SEQLENS).tolist() == [1, 3, 0, 6]
    assert per_token(torch.tensor([1, 2, 3, 4]), CU_SEQLENS).tolist() == [1, 1, 1, 2, 4, 4, 4, 4, 4]
    assert sequence_sums(values[:0], torch.tensor([0])).shape == (0,)


def test_long_sums_keep_their_digits() -> None:
    """A float32 running sum of 100,000 equal terms is off in the fifth digit."""
    total = sequence_sums(torch.full((100_000,), 0.1), torch.tensor([0, 100_000]))
    assert total.dtype == torch.float32 and total.item() == pytest.approx(10_000, rel=1e-7)


def test_gspo_gives_every_token_its_sequences_ratio_and_its_own_gradient() -> None:
    policy = draw(9, 1).requires_grad_()
    old = policy.detach() - per_token(MEANS.clamp(min=0.1).log(), CU_SEQLENS)
    wobble = torch.tensor([0.3, -0.3, 0, 0, 0.1, 0.2, -0.3, 0, 0])  # within a sequence it cancels
    base = sequence_level_logprobs(policy, old + wobble, CU_SEQLENS)
    assert not base.requires_grad
    ratio = (policy - base).exp()
    torch.testing.assert_close(ratio.detach(), per_token(MEANS, CU_SEQLENS))
    torch.testing.assert_close(torch.autograd.grad(ratio.sum(), policy)[0], ratio.detach())


def test_gspo_loss_is_the_papers_on_whole_sequences() -> None:
    policy, advantages = draw(9, 1).requires_grad_(), draw(4, 2)
    old = policy.detach() + 0.4 * draw(9, 3)
    tokens = tokens_of(CU_SEQLENS, old_logprobs=old, advantages=per_token(advantages, CU_SEQLENS))
    objective = ClippedPolicyObjective(ratio_clip_min=0.1, ratio_clip_max=0.1, sequence_level_ratio=True)
    token_loss, metrics = objective(outputs(policy), tokens)
    mine = (tokens.token_columns["loss_weights"] * token_loss).sum()
    plain = []
    for i in (0, 1, 3):
        here = slice(int(CU_SEQLENS[i]), int(CU_SEQLENS[i + 1]))
        s = (policy[here] - old[here]).mean().exp()
        plain.append(-torch.min(s * advantages[i], s.clamp(0.9, 1.1) * advantages[i]))
    expected = torch.stack(plain).mean()
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        torch.autograd.grad(mine, policy), torch.autograd.grad(expected, policy), rtol=1e-6, atol=1e-8
    )
    ratios = sequence_means(policy - old, CU_SEQLENS).exp()
    assert scalars(metrics)["ratio_max"] == pytest.approx(ratios.max().item())


def test_the_losses_worked_out_by_hand() -> None:
    """Ratios .5, 1, 1.5 with advantages 1, -1, 2 at lp = log ratio - 1, bounds .4 and .3."""
    policy = (torch.tensor([0.5, 1.0, 1.5]).log() - 1).requires_grad_()
    cu_seqlens = torch.tensor([0, 3])
    tokens = tokens_of(cu_seqlens, old_logprobs=torch.full((3,), -1.0), advantages=torch.tensor([1.0, -1, 2]))
    for kind, weight in (("cispo", [0.6, 1, 1.3]), ("reinforce", [1, 1, 1])):
        loss, _ = ClippedPolicyObjective(policy_loss=kind, ratio_clip_min=0.4, ratio_clip_max=0.3)(
            outputs(policy), tokens
        )
        expected = torch.tensor(weight) * torch.tensor([-1.0, 1, -2])
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), policy)[0], expected)
        torch.testing.assert_close(loss.detach(), expected * policy.detach())


def test_correction_multiplies_the_policy_loss_but_not_the_kl() -> None:
    policy, old = torch.full((2,), -1.0), torch.full((2,), -1.0)
    tokens = tokens_of(
        torch.tensor([0, 2]),
        old_logprobs=old,
        advantages=torch.ones(2),
        rollout_logprobs=old - torch.tensor([3.0, 0.5]).log(),
        reference_logprobs=old - 1,
    )
    objective = ClippedPolicyObjective(
        correction="token", correction_low=0.6, correction_high=2.5, kl_weight=0.1, kl_type="k1"
    )
    loss, metrics = objective(outputs(policy), tokens)
    torch.testing.assert_close(loss, torch.tensor([-2.5 + 0.1, -0.6 + 0.1]))
    figures = scalars(metrics)
    assert figures["correction_weight_max"] == pytest.approx(3) and figures["correction_share_clamped"] == 1
    bare = tokens_of(torch.tensor([0, 2]), old_logprobs=old, advantages=torch.ones(2))
    with pytest.raises(DataError, match="'rollout_logprobs'"):
        objective(outputs(policy), bare)


def test_the_kl_in_the_loss_is_reweighted_by_how_much_likelier_the_token_is_now() -> None:
    """Twice, half and e^30 times as likely as for the sampler, one nat (k1) above the reference: fixed weights."""
    policy = torch.full((3,), -1.0, dtype=torch.float64).requires_grad_()
    log_weight = torch.tensor([math.log(2), -math.log(2), 30.0], dtype=torch.float64)
    tokens = tokens_of(
        torch.tensor([0, 3]),
        advantages=torch.zeros(3, dtype=torch.float64),
        rollout_logprobs=policy.detach() - log_weight,
        reference_logprobs=policy.detach() - 1,
    )
    weight = {False: [1.0, 1.0, 1.0], True: [2.0, 0.5, math.exp(20)]}  # bounded, or one token would be the whole loss
    for reweighted, expected in weight.items():
        objective = ClippedPolicyObjective(on_policy=True, kl_weight=0.1, kl_type="k1", kl_reweighted=reweighted)
        loss, metrics = objective(outputs(policy), tokens)
        wanted = 0.1 * torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(loss.detach(), wanted)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), policy)[0], wanted)
        assert scalars(metrics)["reference_kl"] == pytest.approx(sum(expected) / 3)


@settings(max_examples=40, deadline=None)
@given(
    correction=st.sampled_from([None, "token", "sequence", "icepop", "sequence_mask"]),
    policy_loss=st.sampled_from(["clipped", "cispo", "reinforce"]),
    sequence_level=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_cut_between_sequences_gives_the_same_loss_gradient_and_metrics(
    correction: str | None, policy_loss: str, sequence_level: bool, seed: int
) -> None:
    policy = draw(9, seed).requires_grad_()
    old = policy.detach() + 0.3 * draw(9, seed + 1)
    columns = {"old_logprobs": old, "advantages": draw(9, seed + 2), "rollout_logprobs": old + 0.3 * draw(9, seed + 3)}
    tokens = tokens_of(CU_SEQLENS, **columns)
    objective = ClippedPolicyObjective(
        policy_loss=policy_loss, sequence_level_ratio=sequence_level, correction=correction, correction_low=0.7
    )
    totals, figures = [], []
    for cut in ([[0, 1, 2, 3]], [[3], [1, 2, 0]]):
        parts = [(tokens.select(part), policy[tokens.token_index(part)]) for part in cut]
        results = [(part, *objective(outputs(lp), part)) for part, lp in parts]
        losses = [(part.token_columns["loss_weights"] * loss).sum() for part, loss, _ in results]
        totals.append(torch.stack(losses).sum())
        figures.append(scalars(merge(metrics for *_, metrics in results)))
    torch.testing.assert_close(totals[1], totals[0])
    torch.testing.assert_close(torch.autograd.grad(totals[1], policy), torch.autograd.grad(totals[0], policy))
    assert figures[1] == pytest.approx(figures[0])


def test_supervised_objective_is_the_negative_log_likelihood() -> None:
    policy = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss, metrics = SupervisedObjective()(outputs(policy), tokens_of(torch.tensor([0, 2])))
    torch.testing.assert_close(loss.detach(), torch.tensor([math.log(2), math.log(4)]))
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), policy)[0], torch.tensor([-1.0, -1.0]))
    expected = {"nll": 1.5 * math.log(2), "token_probability": 0.375, "entropy": 0.0}
    assert scalars(metrics) == pytest.approx(expected)


def test_variants_pickle() -> None:
    for objective in (ClippedPolicyObjective(policy_loss="cispo", correction="icepop"), SupervisedObjective()):
        assert pickle.loads(pickle.dumps(objective)) == objective
