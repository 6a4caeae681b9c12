"""Loss weights: the definition of every reduction, what leaves the counts, and the errors."""

import pytest
import torch

from nemo_rl.errors import ConfigError, DataError
from nemo_rl.objectives.weights import Reduction, loss_weights, pair_weights

MASK = torch.tensor([False, True, True, True, False, True, False, False])
CU_SEQLENS = torch.tensor([0, 4, 6, 8])  # three sequences with 3, 1 and 0 loss tokens


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", [0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4, 0, 0]),
        ("sequence_mean", [0, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 2, 0, 0]),
        ("constant", [0, 1 / 30, 1 / 30, 1 / 30, 0, 1 / 30, 0, 0]),
    ],
)
def test_every_reduction_follows_its_definition(reduction: Reduction, expected: list[float]) -> None:
    weights = loss_weights(MASK, CU_SEQLENS, reduction=reduction, max_response_length=10)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected))


@pytest.mark.parametrize(("reduction", "expected"), [("token_mean", 1.0), ("sequence_mean", 1.0), ("constant", 1 / 20)])
def test_sequences_left_out_leave_the_counts(reduction: Reduction, expected: float) -> None:
    valid = torch.tensor([False, True, True])
    weights = loss_weights(MASK, CU_SEQLENS, reduction=reduction, valid=valid, max_response_length=10)
    torch.testing.assert_close(weights, torch.tensor([0, 0, 0, 0, 0, expected, 0, 0]))


def test_weights_of_a_large_batch_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4000, (500,), generator=generator)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    mask = torch.rand(int(cu_seqlens[-1]), generator=generator) < 0.6
    for reduction in ("token_mean", "sequence_mean"):
        total = loss_weights(mask, cu_seqlens, reduction=reduction).double().sum()
        torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_an_empty_global_batch_is_an_error() -> None:
    with pytest.raises(DataError, match="carries loss"):
        loss_weights(torch.zeros(8, dtype=torch.bool), CU_SEQLENS)
    with pytest.raises(DataError, match="carries loss"):
        loss_weights(MASK, CU_SEQLENS, valid=torch.tensor([False, False, True]))
    with pytest.raises(DataError, match="carries loss"):
        loss_weights(torch.zeros(0, dtype=torch.bool), torch.tensor([0]))


def test_the_advantages_cannot_pass_for_the_mask() -> None:
    """Zero advantages are tokens of the loss like any other; a mask that is not boolean is a mix-up."""
    with pytest.raises(DataError, match="bool"):
        loss_weights(torch.randn(8), CU_SEQLENS)


def test_columns_of_another_batch_are_an_error() -> None:
    with pytest.raises(DataError, match="one batch"):
        loss_weights(MASK[:-1], CU_SEQLENS)
    with pytest.raises(DataError, match="one batch"):
        loss_weights(MASK, CU_SEQLENS, valid=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize("max_response_length", [None, 0])
def test_constant_needs_the_response_budget(max_response_length: int | None) -> None:
    with pytest.raises(ConfigError, match="max_response_length"):
        loss_weights(MASK, CU_SEQLENS, reduction="constant", max_response_length=max_response_length)


def test_pairs_weigh_the_same() -> None:
    weights = pair_weights(torch.tensor([True, False, True, True]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0, 1, 1]) / 3)
    with pytest.raises(DataError, match="pairs"):
        pair_weights(torch.zeros(3, dtype=torch.bool))
