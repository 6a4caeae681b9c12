"""Draws follow the distribution they claim to come from, row by row, whatever stands in the rows beside."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_rl.data.types import SamplingParams
from nemo_rl.errors import BackendError
from nemo_rl.generation.sampling import Sampler, uniforms

DRAWS = 20_000
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -4.0, 1.9, 0.0, -1.2])


def params(**changes: float) -> SamplingParams:
    return SamplingParams(max_new_tokens=1, **changes)


def truncated(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The distribution in float64, token by token as the documentation of `SamplingParams` says it."""
    probability = (logits.double() / sampling.temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda token: -probability[token])
    kept = order[: sampling.top_k or len(order)]
    total = sum(probability[token] for token in kept)
    nucleus: list[int] = []
    for token in kept:
        if not nucleus or sum(probability[t] for t in nucleus) / total < sampling.top_p:
            nucleus.append(token)
    nucleus = [token for token in nucleus if probability[token] >= sampling.min_p * probability[order[0]]]
    result = torch.zeros_like(probability)
    result[nucleus] = probability[nucleus]
    return result / result.sum()


def draw(logits: Tensor, sampling: SamplingParams, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`count` draws from one row of logits."""
    tokens, logprobs = Sampler([sampling])(logits[None].clone(), uniforms(seed, count)[None])
    return tokens[0], logprobs[0]


SETTINGS = [
    params(),
    params(temperature=0.6),
    params(temperature=1.7),
    params(top_k=3),
    params(top_p=0.75),
    params(min_p=0.3),
    params(temperature=1.3, top_k=6, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("sampling", SETTINGS)
def test_frequencies_and_logprobs_are_those_of_the_truncated_distribution(sampling: SamplingParams) -> None:
    expected = truncated(LOGITS, sampling)
    tokens, logprobs = draw(LOGITS, sampling, DRAWS)
    torch.testing.assert_close(logprobs, expected.log().float()[tokens], rtol=0, atol=1e-5)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).double()
    assert not counts[expected == 0].any()
    kept = expected > 0
    chi_square = float(((counts - DRAWS * expected)[kept] ** 2 / (DRAWS * expected[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]).log()
    numbers = torch.tensor([[0.05, 0.25, 0.55, 0.95]] * 2)
    tokens, _ = Sampler([params()] * 2)(logits, numbers)
    assert tokens.tolist() == [[0, 1, 2, 3], [0, 0, 1, 3]]


def test_the_ends_of_the_unit_interval_give_legal_tokens() -> None:
    just_below_one = math.nextafter(1.0, 0.0, steps=2**29)  # the largest float32 below 1
    logits = torch.full((2, 1000), -1.0)
    logits[:, [0, -1]] = -torch.inf
    tokens, logprobs = Sampler([params()] * 2)(logits, torch.tensor([[0.0], [just_below_one]]))
    assert tokens.tolist() == [[1], [998]]
    assert logprobs.isfinite().all()


@pytest.mark.parametrize("truncation", [{"top_p": 0.0}, {"top_p": 0.5}, {"min_p": 1.0}, {"top_k": 1}])
def test_the_best_token_always_stays(truncation: dict[str, float]) -> None:
    peaked = torch.tensor([0.0, 30.0, 0.0, 0.0])
    tokens, logprobs = draw(peaked, params(**truncation), 200)
    assert (tokens == 1).all()
    assert (logprobs == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [params(), params(temperature=0.0), params(top_k=3), params(temperature=0.5)])
def test_logits_that_are_not_finite_are_refused(sampling: SamplingParams, bad: float) -> None:
    logits = LOGITS.clone()
    logits[3] = bad
    for row in (logits, torch.full_like(LOGITS, -math.inf)):
        with pytest.raises(BackendError, match="logits that are not finite"):
            Sampler([params(), sampling])(torch.stack([LOGITS, row]), uniforms(0, 2)[:, None])


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    for top_p, kept in ((0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1, 2}), (0.95, {0, 1, 2, 3})):
        tokens, _ = draw(logits, params(top_p=top_p), 2000)
        assert set(tokens.tolist()) == kept


def test_temperature_0_takes_the_best_token_with_certainty() -> None:
    tokens, logprobs = draw(LOGITS, params(temperature=0.0, top_k=4), 5)
    assert (tokens.tolist(), logprobs.tolist()) == ([2] * 5, [0.0] * 5)


RANDOM_PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_p=st.sampled_from([0.3, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 5]),
    min_p=st.sampled_from([0.0, 0.2]),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(RANDOM_PARAMS, min_size=1, max_size=6), seed=st.integers(0, 999))
def test_a_row_does_not_know_its_neighbours(rows: list[SamplingParams], seed: int) -> None:
    logits = torch.randn(len(rows), 40, generator=torch.Generator().manual_seed(seed)) * 3
    uniform = uniforms(seed, 3 * len(rows)).view(-1, 3)
    tokens, logprobs = Sampler(rows)(logits.clone(), uniform)
    for i, sampling in enumerate(rows):
        token, logprob = Sampler([sampling])(logits[i : i + 1].clone(), uniform[i : i + 1])
        assert torch.equal(token[0], tokens[i])
        torch.testing.assert_close(logprob[0], logprobs[i], rtol=0, atol=1e-6)


def test_random_numbers_are_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    first = uniforms(7, 50)
    torch.manual_seed(2)
    assert torch.equal(uniforms(7, 50), first)
    assert not torch.equal(uniforms(8, 50), first)
    assert torch.equal(uniforms(7, 1000)[:50], first)  # a larger token budget changes no draw
