"""Frozen weights in 4 or 8 bits, as QLoRA keeps them (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314).

A row of a weight is cut into blocks that have a scale, their largest magnitude, and whose numbers are the nearest of a
few multiples of it: 255 even steps for `int8`, and for `nf4` the 16 quantiles of a normal distribution that the paper
gives. Products, forward and backward, restore a weight in the dtype of their input and forget it again.
"""

import math
from functools import cache
from statistics import NormalDist
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_rl.errors import ModelError

type Format = Literal["nf4", "int8"]

_BLOCK = 64
"""Numbers that share a scale in `nf4`, as in the paper."""
_SMALLEST_BLOCK = 16


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained, so that its weight can be kept compressed; its name stays.

    Attributes:
        weight: [outputs, inputs], or if compressed int8 of that shape or two 4-bit numbers to a uint8.
        scales: bfloat16 [outputs, blocks], or None where the weight is whole.
        dtype: of the whole weight.
    """

    scales: nn.Parameter | None

    def __init__(self, layer: nn.Linear) -> None:
        """Take over weight and bias of `layer`, which may be one of this kind."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight.requires_grad_(False), layer.bias
        is_frozen = isinstance(layer, FrozenLinear)
        self.register_parameter("scales", layer.scales if is_frozen else None)
        self.dtype = layer.dtype if is_frozen else layer.weight.dtype

    def compress(self, form: Format) -> None:
        """Keep the weight in fewer bits from now on."""
        codes, scales = compress(self.weight.detach(), form)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    def whole(self) -> Tensor:
        """The weight that the layer computes with, [outputs, inputs]."""
        weight = self.weight.detach()
        return weight if self.scales is None else decompress(weight, self.scales.detach(), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        if self.scales is None:
            return super().forward(input)
        output = cast(Tensor, _Product.apply(input, self.weight, self.scales))
        return output if self.bias is None else output + self.bias  # pyright: ignore[reportUnnecessaryComparison]


def compress(weight: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Cut a weight [outputs, inputs] into blocks; see `FrozenLinear` for what is returned, codes and scales.

    Raises:
        ModelError: its rows do not divide into blocks for `nf4`.
    """
    outputs, inputs = weight.shape
    block = inputs if form == "int8" else math.gcd(inputs, _BLOCK)
    if block < _SMALLEST_BLOCK:
        raise ModelError(f"rows of {inputs} numbers do not divide into blocks for nf4; set lora_cfg.quantize to int8")
    blocks = weight.float().view(outputs, -1, block)
    scales = blocks.abs().amax(-1).clamp(min=1e-30).bfloat16()  # not 0: what is divided by it stays finite
    shares = (blocks / scales[..., None].float()).view(outputs, inputs)
    if form == "int8":
        return (shares * 127).round().clamp(-127, 127).to(torch.int8), scales
    values = _levels(weight.device)
    nearest = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return nearest[:, 0::2] << 4 | nearest[:, 1::2], scales


def decompress(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `compress` was given, nearly, in `dtype`."""
    if codes.dtype == torch.int8:
        shares = codes.to(dtype) / 127
    else:
        shares = F.embedding(codes.int(), _pairs(codes.device, dtype)).flatten(-2)
    return (shares.view(*scales.shape, -1) * scales[..., None].to(dtype)).view_as(shares)


@cache
def _levels(device: torch.device) -> Tensor:
    """The 16 values of NF4, float32, from -1 to 1: quantiles of the normal distribution, 7 below 0 and 8 above it."""
    outermost = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = [NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / 8) for i in range(8)]
    below = [-NormalDist().inv_cdf(outermost + (0.5 - outermost) * i / 7) for i in range(7)]
    return torch.tensor(sorted([*below, 0.0, *above]), device=device) / above[0]


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The two values that a byte stands for, [256, 2]."""
    values, byte = _levels(device).to(dtype), torch.arange(256, device=device)
    return torch.stack([values[byte >> 4], values[byte & 15]], -1)


class _Product(torch.autograd.Function):
    """x W^T with a compressed W; keeps no whole W for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, decompress(codes, scales, x.dtype))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.BackwardCFunction, gradient: Tensor
    ) -> tuple[Tensor, None, None]:
        codes, scales = cast("tuple[Tensor, Tensor]", ctx.saved_tensors)
        return gradient @ decompress(codes, scales, gradient.dtype), None, None
