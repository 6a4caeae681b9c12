"""Train/inference importance weights: known answers of the four kinds and the figures before any bound."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_rl.errors import ConfigError
from nemo_rl.metrics import merge, scalars
from nemo_rl.objectives.corrections import Correction, importance_weights

WEIGHTS = torch.tensor([0.5, 4.0, 1.0, 0.5, 0.5, 3.0])
CU_SEQLENS = torch.tensor([0, 2, 2, 5, 6])  # the second sequence has no loss token
ROLLOUT = torch.full((6,), -2.0)
OLD = ROLLOUT + WEIGHTS.log()


def test_token_weights_are_truncated() -> None:
    weights, metrics = importance_weights(OLD, ROLLOUT, CU_SEQLENS, kind="token", high=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 2, 1, 0.5, 0.5, 2]))
    assert scalars(metrics) == pytest.approx(
        {
            "correction_weight_mean": 9.5 / 6,
            "correction_weight_max": 4.0,
            "correction_weight_ess": 9.5**2 / (6 * 26.75),
            "correction_share_clamped": 2 / 6,
        }
    )


def test_icepop_drops_tokens_outside_and_leaves_the_others() -> None:
    weights, metrics = importance_weights(OLD, ROLLOUT, CU_SEQLENS, kind="icepop", low=0.6, high=3.5)
    torch.testing.assert_close(weights, torch.tensor([0.0, 0, 1, 0, 0, 3]))
    assert scalars(metrics)["correction_share_dropped"] == pytest.approx(4 / 6)
    assert scalars(metrics)["correction_weight_mean"] == pytest.approx(9.5 / 6), "before dropping"


def test_sequence_weights_are_products() -> None:
    weights, metrics = importance_weights(OLD, ROLLOUT, CU_SEQLENS, kind="sequence", low=0.3, high=2.5)
    torch.testing.assert_close(weights, torch.tensor([2.0, 2, 0.3, 0.3, 0.3, 2.5]))
    figures = scalars(metrics)
    assert figures["correction_weight_mean"] == pytest.approx((2 + 0.25 + 3) / 3), "sequences without a token count not"
    assert figures["correction_weight_max"] == pytest.approx(3)
    assert figures["correction_share_clamped"] == pytest.approx(4 / 6)


def test_sequence_mask_goes_by_the_geometric_mean() -> None:
    """Geometric means: sqrt 2, 0.63, 3."""
    weights, metrics = importance_weights(OLD, ROLLOUT, CU_SEQLENS, kind="sequence_mask", low=0.7, high=2.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 4, 0, 0, 0, 0]))
    figures = scalars(metrics)
    assert figures["correction_weight_max"] == pytest.approx(3)
    assert figures["correction_weight_mean"] == pytest.approx((2**0.5 + 0.25 ** (1 / 3) + 3) / 3)
    assert figures["correction_share_dropped"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("kind", ["token", "sequence", "icepop", "sequence_mask"])
def test_equal_probabilities_need_no_correction(kind: Correction) -> None:
    policy = OLD.clone().requires_grad_()
    weights, metrics = importance_weights(policy, OLD, CU_SEQLENS, kind=kind, low=0.9, high=1.1)
    assert weights.tolist() == [1.0] * 6 and not weights.requires_grad
    assert scalars(metrics)["correction_weight_ess"] == 1
    nothing, empty = importance_weights(OLD[:0], ROLLOUT[:0], torch.tensor([0, 0]), kind=kind)
    assert nothing.shape == (0,) and not empty


def test_a_long_answers_product_is_bounded_but_logged_as_it_was() -> None:
    """10,000 tokens, each 10% likelier: e^953 is no float64, and the batch must not become NaN."""
    rollout = torch.full((10_000,), -1.0)
    weights, metrics = importance_weights(rollout + 0.0953, rollout, torch.tensor([0, 10_000]), kind="sequence", high=5)
    assert (weights == 5).all()
    figures = scalars(metrics)
    assert figures["correction_weight_max"] > 1e100 and all(math.isfinite(value) for value in figures.values())


def test_bounds_must_be_an_interval() -> None:
    with pytest.raises(ConfigError, match="low < high"):
        importance_weights(OLD, ROLLOUT, CU_SEQLENS, low=2.0, high=1.0)


@given(
    kind=st.sampled_from(["token", "sequence", "icepop", "sequence_mask"]),
    logs=st.lists(st.floats(-3, 3), min_size=6, max_size=6),
)
def test_whole_sequences_may_be_cut_into_any_micro_batches(kind: Correction, logs: list[float]) -> None:
    old = torch.tensor(logs, dtype=torch.float64)
    zeros = torch.zeros_like(old)
    whole, metrics = importance_weights(old, zeros, torch.tensor([0, 2, 3, 6]), kind=kind, low=0.5)
    first, of_first = importance_weights(old[:3], zeros[:3], torch.tensor([0, 2, 3]), kind=kind, low=0.5)
    last, of_last = importance_weights(old[3:], zeros[3:], torch.tensor([0, 3]), kind=kind, low=0.5)
    torch.testing.assert_close(torch.cat([first, last]), whole)
    assert scalars(merge([of_first, of_last])) == pytest.approx(scalars(metrics))
    if kind in ("token", "sequence"):
        assert (whole >= 0.5).all() and (whole <= 2.0).all()
