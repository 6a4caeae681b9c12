"""Training scores tokens under the truncated distribution that they were sampled from, with the gradient of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.objectives.logprobs import TokenHead, token_logprobs_from_logits
from nemo_rl.objectives.truncation import Truncation, truncated_logits

RULES = [
    Truncation(top_p=0.8),
    Truncation(top_k=7),
    Truncation(min_p=0.1),
    Truncation(top_p=0.8, top_k=50, min_p=0.05),
    Truncation(top_p=0.0),
]


def kept(logits: Tensor, rule: Truncation) -> list[int]:
    """The tokens that stay, one after the other as the rules are written; no two logits are equal."""
    probability = logits.double().softmax(-1)
    order = logits.argsort(descending=True).tolist()[: rule.top_k or None]
    total = float(probability[order].sum())
    nucleus: list[int] = []
    mass = 0.0
    for token in order:
        if not nucleus or mass < rule.top_p:
            nucleus.append(token)
            mass += float(probability[token]) / total
    return [token for token in nucleus if probability[token] >= rule.min_p * probability[order[0]]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.05, 4.0])  # flat: thousands of tokens stay; peaked: a few
def test_a_large_vocabulary_is_truncated_by_the_rules(rule: Truncation, scale: float) -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    found = truncated_logits(logits, top_p=rule.top_p, top_k=rule.top_k, min_p=rule.min_p)
    for row, whole in zip(found, logits, strict=True):
        stay = sorted(kept(whole, rule))
        assert row.isfinite().nonzero()[:, 0].tolist() == stay
        assert torch.equal(row[stay], whole[stay])


def test_tokens_as_likely_as_the_last_that_stays_stay_with_it() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1]]).log()
    for rule in (Truncation(top_k=2), Truncation(top_p=0.5), Truncation(min_p=0.5)):
        found = truncated_logits(logits, top_p=rule.top_p, top_k=rule.top_k, min_p=rule.min_p)
        assert found.isfinite().tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk_size", [3, 256])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_head_scores_and_differentiates_the_truncated_distribution(
    rule: Truncation, chunk_size: int, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 16, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(90, 16, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(90, (20,), generator=generator)  # most of them are truncated away
    logits = F.linear(hidden, weight)
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) / 0.7
    rows = []
    for row, token in zip(logits, target.tolist(), strict=True):
        stay = sorted({*kept(row.detach(), rule), token})
        rows.append(row[stay].log_softmax(0)[stay.index(token)])
    expected = torch.stack(rows)
    head = TokenHead(temperature=0.7, chunk_size=chunk_size, softcap=softcap, truncation=rule)
    logprobs, entropy = head(hidden, weight, torch.arange(20), target)
    torch.testing.assert_close(logprobs, expected)
    assert logprobs.isfinite().all() and entropy.isfinite().all()
    coefficients = torch.linspace(-1, 1, 20, dtype=torch.float64)
    gradients = torch.autograd.grad((logprobs * coefficients).sum(), [hidden, weight])
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * coefficients).sum(), [hidden, weight]))


def test_the_entropy_is_that_of_the_tokens_that_stay() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    _, entropy = token_logprobs_from_logits(logits, torch.tensor([0]), truncation=Truncation(top_k=2))
    torch.testing.assert_close(entropy[0], torch.distributions.Categorical(torch.tensor([2 / 3, 1 / 3])).entropy())
