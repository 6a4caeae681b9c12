"""KL estimates: values worked out by hand, sign, clamps and their gradients."""

import math

import pytest
import torch

from nemo_rl.objectives.kl import KLKind, kl_penalty


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [1.0, -1.0]),
        ("k2", [0.5, 0.5]),
        ("k3", [math.exp(-1) - 1 + 1, math.e - 1 - 1]),
    ],
)
def test_values_for_a_reference_below_and_above_the_policy(kind: KLKind, expected: list[float]) -> None:
    policy, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, 0.0])
    torch.testing.assert_close(kl_penalty(policy, reference, kind=kind), torch.tensor(expected))


@pytest.mark.parametrize(("kind", "slope"), [("k1", 1.0), ("k2", 1.0), ("k3", 1 - math.exp(-1))])
def test_minimising_the_penalty_pulls_the_policy_to_the_reference(kind: KLKind, slope: float) -> None:
    policy = torch.tensor([-1.0], requires_grad=True)
    kl_penalty(policy, torch.tensor([-2.0]), kind=kind).sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([slope]))


def test_expectation_under_the_policy_is_the_true_divergence() -> None:
    policy, reference = torch.log_softmax(torch.linspace(-1, 2, 100).sin().view(2, 50).double(), -1)
    exact = (policy.exp() * (policy - reference)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_penalty(policy, reference, kind=kind)).sum(), exact)


def test_clamps_bound_input_and_output_and_stop_the_gradient() -> None:
    policy = torch.tensor([-30.0, -1.0, -4.0], requires_grad=True)
    reference = torch.tensor([-1.0, -30.0, -1.0])
    k1 = kl_penalty(policy, reference, kind="k1", output_clamp=None)
    torch.testing.assert_close(k1, torch.tensor([-20.0, 20.0, -3.0]))
    k3 = kl_penalty(policy, reference, kind="k3")
    torch.testing.assert_close(k3, torch.tensor([10.0, 10.0, 10.0]))
    (gradient,) = torch.autograd.grad(k1.sum(), policy)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 1.0]))
    (gradient,) = torch.autograd.grad(k3.sum(), policy)
    torch.testing.assert_close(gradient, torch.zeros(3))
    unclamped = kl_penalty(policy, reference, kind="k1", input_clamp=None, output_clamp=None)
    torch.testing.assert_close(unclamped, torch.tensor([-29.0, 29.0, -3.0]))


def test_k3_of_nearly_equal_policies_keeps_its_digits() -> None:
    policy, difference = torch.tensor([-1.0]), torch.tensor([1e-3])
    actual = kl_penalty(policy, policy + difference, kind="k3")
    expected = torch.expm1((policy + difference - policy).double()) - (policy + difference - policy).double()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=0)
