"""Compressed weights: the levels of the paper, errors as large as the steps, gradients of the restored weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nemo_rl.errors import ModelError
from nemo_rl.models.quantize import FrozenLinear, compress, decompress

WEIGHT = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
PUBLISHED = [
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
]
"""The data type NF4, appendix E of the paper."""


def test_nf4_has_the_published_levels_and_takes_the_nearest() -> None:
    levels = torch.tensor(PUBLISHED)
    assert torch.allclose(decompress(*compress(levels[None], "nf4"), torch.float32)[0], levels, atol=1e-6)
    codes, scales = compress(WEIGHT, "nf4")
    assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (96, 128), (96, 4))
    blocks = WEIGHT.view(96, 4, 64) / scales[..., None].float()
    nearest = levels[(blocks[..., None] - levels).abs().argmin(-1)] * scales[..., None].float()
    torch.testing.assert_close(decompress(codes, scales, torch.float32), nearest.view_as(WEIGHT), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_at_most_half_a_step_off(dtype: torch.dtype) -> None:
    codes, scales = compress(WEIGHT, "int8")
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, WEIGHT.shape, (96, 1))
    off = (decompress(codes, scales, dtype).float() - WEIGHT).abs() / scales.float()
    cut = WEIGHT.abs() == WEIGHT.abs().amax(1, keepdim=True)  # what the rounding of the scale leaves out of reach
    rounding = 0.0 if dtype == torch.float32 else 2**-7
    assert (off[~cut] <= 0.51 / 127 + rounding).all()
    assert (off[cut] <= 2**-8 + rounding).all()


@pytest.mark.parametrize(("form", "error"), [("nf4", 0.1), ("int8", 0.01)])
def test_a_normal_weight_comes_back_near(form: str, error: float) -> None:
    assert (decompress(*compress(WEIGHT, form), torch.float32) - WEIGHT).norm() < error * WEIGHT.norm()
    assert not decompress(*compress(torch.zeros(2, 64), form), torch.float32).any()


@pytest.mark.parametrize(("form", "bits"), [("nf4", 4.25), ("int8", 8.0625)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_compressed_layer_is_small_and_has_product_and_gradient_of_what_it_restores(
    form: str, bits: float, bias: bool
) -> None:
    layer = nn.Linear(256, 96, bias=bias)
    frozen = FrozenLinear(layer)
    assert torch.equal(frozen.whole(), layer.weight)
    frozen.compress(form)
    held = [frozen.weight, frozen.scales]
    assert sum(part.numel() * part.element_size() for part in held) == 96 * 256 * bits / 8
    assert not any(part.requires_grad for part in held)
    one, other = (torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    found, expected = frozen(one), F.linear(other, frozen.whole(), layer.bias)
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_rows_that_do_not_divide_into_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="rows of 24 numbers do not divide into blocks for nf4"):
        compress(torch.zeros(4, 24), "nf4")
