"""The chunked head equals the plain formula, in value and in gradient, and holds far less memory."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.logprobs import TokenHead, select_hidden, token_logprobs, token_logprobs_from_logits

NUM_TOKENS, VOCABULARY, HIDDEN = 37, 101, 16


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCABULARY, (NUM_TOKENS,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_(), target


def plain(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(weight.dtype, torch.float32)) / temperature
    return torch.log_softmax(logits, -1).gather(-1, target[:, None]).squeeze(-1)


def weighted(logprobs: Tensor) -> Tensor:
    return (logprobs * torch.linspace(-1, 1, len(logprobs), dtype=logprobs.dtype)).sum()


@pytest.mark.parametrize("chunk_size", [1, 5, 37, 256])
@pytest.mark.parametrize("with_bias", [True, False])
def test_chunked_head_equals_the_plain_formula(chunk_size: int, with_bias: bool) -> None:
    hidden, weight, bias, target = make()
    inputs = [hidden, weight, bias] if with_bias else [hidden, weight]
    used_bias = bias if with_bias else None
    expected = plain(hidden, weight, target, 0.7, used_bias)
    actual, entropy = token_logprobs(hidden, weight, target, temperature=0.7, chunk_size=chunk_size, bias=used_bias)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    distribution = torch.distributions.Categorical(logits=F.linear(hidden, weight, used_bias) / 0.7)
    torch.testing.assert_close(entropy, distribution.entropy().detach(), rtol=1e-11, atol=1e-11)
    assert actual.requires_grad and not entropy.requires_grad
    gradients = torch.autograd.grad(weighted(actual), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(weighted(expected), inputs), rtol=1e-11, atol=1e-11)


def test_gradcheck_of_the_chunked_head() -> None:
    hidden, weight, bias, target = make()
    hidden, target = hidden[:7].detach().requires_grad_(), target[:7]

    def score(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logprobs(hidden, weight, target, temperature=1.3, chunk_size=3, bias=bias)[0]

    assert torch.autograd.gradcheck(score, (hidden, weight, bias))


def test_float32_results_and_frozen_head() -> None:
    hidden, weight, _, target = make(torch.float32)
    expected = torch.autograd.grad(weighted(plain(hidden, weight, target, 1.0, None)), hidden)
    weight.requires_grad_(False)
    logprobs, entropy = token_logprobs(hidden, weight, target, chunk_size=8)
    assert logprobs.dtype == entropy.dtype == torch.float32
    weighted(logprobs).backward()
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-4, atol=1e-5)
    assert weight.grad is None


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_as_close_to_the_truth_as_the_plain_formula(autocast: bool) -> None:
    """Both round the logits to bfloat16; many chunks must not add up rounding errors of the weight's gradient."""
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden, weight, _, target = make(dtype)
    hidden64, weight64 = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact = torch.autograd.grad(weighted(plain(hidden64, weight64, target, 0.9, None)), [hidden64, weight64])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        reference = plain(hidden, weight, target, 0.9, None)
        logprobs, _ = token_logprobs(hidden, weight, target, temperature=0.9, chunk_size=4)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, reference, rtol=0, atol=0.05)
    ours = torch.autograd.grad(weighted(logprobs), [hidden, weight])
    theirs = torch.autograd.grad(weighted(reference), [hidden, weight])
    for mine, yours, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, true) <= 1.2 * relative_error(yours, true) < 0.02


def test_a_token_that_is_almost_certain_keeps_its_digits() -> None:
    """log p near 0 is the difference of two large logits; the highest one must be subtracted first."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[60.0], [48.0]])
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([0]))
    torch.testing.assert_close(logprobs.double(), -torch.log1p(torch.tensor([-12.0]).double().exp()), rtol=2e-2, atol=0)


def test_no_grad_and_skipped_entropy() -> None:
    hidden, weight, _, target = make(torch.float32)
    with torch.no_grad():
        logprobs, entropy = token_logprobs(hidden, weight, target, chunk_size=8, with_entropy=False)
    assert not logprobs.requires_grad
    assert entropy.isnan().all()
    torch.testing.assert_close(logprobs, token_logprobs(hidden, weight, target)[0].detach())


def test_an_empty_micro_batch_gives_zero_gradients() -> None:
    hidden, weight, _, target = make(torch.float32)
    for softcap in (None, 30.0):
        logprobs, entropy = TokenHead(softcap=softcap)(hidden, weight, torch.empty(0, dtype=torch.int64), target[:0])
        assert logprobs.shape == entropy.shape == (0,)
        gradients = torch.autograd.grad(logprobs.sum(), [hidden, weight])
        assert [int(gradient.count_nonzero()) for gradient in gradients] == [0, 0]


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_training_log_probabilities_of_greedy_samples_are_an_error(temperature: float) -> None:
    hidden, weight, _, target = make()
    with pytest.raises(ConfigError, match="above 0"):
        token_logprobs(hidden, weight, target, temperature=temperature)
    with pytest.raises(ConfigError, match="above 0"):
        token_logprobs_from_logits(hidden @ weight.T, target, temperature=temperature)
    with pytest.raises(ConfigError, match="above 0"):
        TokenHead(temperature=temperature)
    with pytest.raises(ConfigError, match="chunk_size"):
        TokenHead(chunk_size=0)


def test_several_targets_of_one_hidden_state_add_their_gradients() -> None:
    """In a prefix-shared tree the first tokens of all branches hang on the last token of the prefix."""
    hidden, weight, _, target = make()
    predictor = torch.tensor([3, 3, 3, 9, 0, 9])
    logprobs, _ = TokenHead(temperature=0.8, chunk_size=2)(hidden, weight, predictor, target[:6])
    expected = plain(hidden[predictor], weight, target[:6], 0.8, None)
    torch.testing.assert_close(logprobs, expected)
    gradients = torch.autograd.grad(weighted(logprobs), [hidden, weight])
    torch.testing.assert_close(gradients, torch.autograd.grad(weighted(expected), [hidden, weight]))
    torch.testing.assert_close(select_hidden(hidden, predictor), hidden[predictor])


@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.0625, None), (1.0, 5.0), (2.0, 3.0)])
def test_transformed_logits_take_a_path_that_is_exact(logit_scale: float, softcap: float | None) -> None:
    hidden, weight, bias, target = make()
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probabilities = torch.log_softmax(logits / 0.7, -1)
    expected = log_probabilities.gather(-1, target[:, None]).squeeze(-1)
    expected_gradients = torch.autograd.grad(weighted(expected), [hidden, weight, bias], retain_graph=True)
    expected_entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).detach()

    head = TokenHead(temperature=0.7, chunk_size=10, logit_scale=logit_scale, softcap=softcap)
    chunked = head(hidden, weight, torch.arange(NUM_TOKENS), target, bias=bias)
    whole = token_logprobs_from_logits(
        F.linear(hidden, weight, bias), target, temperature=0.7, logit_scale=logit_scale, softcap=softcap
    )
    for logprobs, entropy in (chunked, whole):
        torch.testing.assert_close(logprobs, expected)
        torch.testing.assert_close(entropy, expected_entropy)
        assert not entropy.requires_grad
        torch.testing.assert_close(torch.autograd.grad(weighted(logprobs), [hidden, weight, bias]), expected_gradients)


def test_forbidden_tokens_do_not_poison_the_entropy_of_whole_logits() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    logprobs, entropy = token_logprobs_from_logits(logits, torch.tensor([1]))
    torch.testing.assert_close(logprobs, -torch.log(torch.tensor([2.0])))
    torch.testing.assert_close(entropy, torch.log(torch.tensor([2.0])))


def test_no_tensor_of_all_logits_is_ever_made() -> None:
    """Every intermediate tensor of the chunked head, forward and backward, stays below the whole logits."""
    num_tokens, vocabulary, chunk_size = 128, 1000, 8
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        token_logprobs(hidden, weight, torch.arange(num_tokens), chunk_size=chunk_size)[0].sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 0 < largest <= chunk_size * vocabulary * 4 < num_tokens * vocabulary * 4 / 8


def test_the_head_pickles() -> None:
    head = TokenHead(temperature=0.5, softcap=30.0)
    assert pickle.loads(pickle.dumps(head)) == head
