"""The softmax of the language-model head as two Triton kernels: logits are read once forward, and once backward.

PyTorch's own operations walk over the same logits seven times forward and six times backward, which on a GPU takes
longer than the matrix products that make them. The formulas are those of `objectives.logprobs`.
"""

# pyright: reportUnknownParameterType=none, reportMissingParameterType=none, reportUntypedFunctionDecorator=none
import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
"""Logits of a row that a program holds at a time."""


@triton.jit
def _statistics_kernel(
    logits,
    target,
    logprobs,
    log_sums,
    entropies,
    num_columns,
    row_stride,
    temperature,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    highest = -1e30  # below every logit, and finite: the difference of two infinities would be NaN
    total = 0.0
    weighted = 0.0  # sum of exp(x - highest) * (x - highest)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < num_columns, other=float("-inf")).to(tl.float32) / temperature
        before, highest = highest, tl.maximum(highest, tl.max(x, 0))
        shrink = tl.exp(before - highest)
        power = tl.exp(x - highest)
        if WITH_ENTROPY:
            terms = tl.where(x == float("-inf"), 0.0, power * (x - highest))
            weighted = shrink * (weighted + (before - highest) * total) + tl.sum(terms, 0)
        total = shrink * total + tl.sum(power, 0)
    log_total = tl.log(total)
    chosen = tl.load(logits + tl.load(target + row)).to(tl.float32) / temperature
    tl.store(logprobs + row, chosen - highest - log_total)
    tl.store(log_sums + row, highest + log_total)
    if WITH_ENTROPY:
        tl.store(entropies + row, log_total - weighted / total)


@triton.jit
def _gradient_kernel(
    logits,
    target,
    log_sums,
    scales,
    first_column,
    num_columns,
    row_stride,
    temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * row_stride + column
    inside = column < num_columns
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32) / temperature
    probability = tl.exp(x - tl.load(log_sums + row))
    is_target = (tl.load(target + row) - first_column) == column
    gradient = tl.load(scales + row) * (tl.where(is_target, 1.0, 0.0) - probability)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def row_statistics(
    logits: Tensor, target: Tensor, temperature: float, *, logprobs: Tensor, log_sums: Tensor, entropies: Tensor | None
) -> None:
    """Score the target of each row, of softmax(logits / temperature).

    Args:
        logits: [m, V], in half or single precision; every row is contiguous.
        target: int64 [m].
        temperature: positive.
        logprobs: float32 [m], filled with the targets' log-probabilities.
        log_sums: float32 [m], filled with the logarithms of the sums of exponentials.
        entropies: float32 [m], filled with the entropies in nats, or None.
    """
    with torch.cuda.device_of(logits):
        _statistics_kernel[(len(logits),)](
            logits,
            target.contiguous(),
            logprobs,
            log_sums,
            entropies if entropies is not None else logprobs,
            logits.shape[1],
            logits.stride(0),
            temperature,
            WITH_ENTROPY=entropies is not None,
            BLOCK=_BLOCK,
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )


def to_logit_gradient(
    logits: Tensor, target: Tensor, log_sums: Tensor, scales: Tensor, temperature: float, *, first_column: int
) -> Tensor:
    """Turn a block of logits [m, v] in place into scale * (onehot - softmax), and return it.

    Args:
        logits: columns `first_column` and on of the whole logits, before the temperature; every row is contiguous.
        target: int64 [m], columns of the whole logits.
        log_sums: float32 [m], from `row_statistics`.
        scales: float32 [m] or [m, 1].
        temperature: the same as before.
        first_column: where the block begins.
    """
    with torch.cuda.device_of(logits):
        _gradient_kernel[(len(logits), triton.cdiv(logits.shape[1], _BLOCK))](
            logits,
            target.contiguous(),
            log_sums,
            scales.contiguous(),
            first_column,
            logits.shape[1],
            logits.stride(0),
            temperature,
            BLOCK=_BLOCK,
            num_warps=8,  # pyright: ignore[reportCallIssue]
        )
    return logits
