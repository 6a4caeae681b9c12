"""The chunked head: log-probabilities and entropies of a softmax whose logits [M, V] are never held.

Forward it walks over chunks of tokens and keeps one number per token, the log-sum-exp; backward it walks over blocks of
the vocabulary, where softmax = exp(logit - logsumexp) needs nothing else, so every block of the weight's gradient is
one complete matrix product (no running sum, hence no loss in bfloat16) and only the small gradient of the hidden states
is added up, in float32. Logits that all fit into the memory of one chunk are kept for the backward pass instead of
computed again. Of a vocabulary that several ranks share, each walks over its own tokens.
"""

import importlib
import importlib.util
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_rl.objectives.vocabulary import UNDIVIDED, Vocabulary

_BUFFERS = 4
"""A chunk's memory is shared by logits, their exponentials, low-precision copies and the weight's gradient."""


_ALIGNED = 64
"""Columns of a block are a multiple of it: tensor cores take rows that begin at odd addresses at half their speed."""


class _Context(Protocol):
    """What the forward pass of the chunked head leaves for its backward pass."""

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]: ...
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    temperature: float
    chunk_size: int
    dtype: torch.dtype
    vocabulary: Vocabulary
    kept: Tensor | None
    lowered: Tensor


class ChunkedHead(torch.autograd.Function):
    """Log-probability of each row's target and entropy of its distribution, as `token_logprobs` says."""

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        chunk_size: int,
        dtype: torch.dtype,
        with_entropy: bool,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.zeros(len(target), dtype=accumulator(dtype), device=hidden.device)
        log_sum = torch.full_like(logprobs, torch.finfo(logprobs.dtype).min)  # of a rank without tokens
        entropy = torch.full_like(logprobs, 0.0 if with_entropy else torch.nan)
        lowered = torch.zeros_like(logprobs)  # what is kept is less the highest
        matrix, column = weight.to(dtype), target - vocabulary.start
        kernels = _kernels(hidden.device, dtype)
        cost = dtype.itemsize if kernels is not None else 2 * log_sum.itemsize  # of a logit, where no other is held
        keeps = any(ctx.needs_input_grad) and len(target) * cost <= chunk_size * log_sum.itemsize
        kept: Tensor | None = None
        num_rows = max(1, len(target) if keeps else chunk_size // _BUFFERS)
        for start in range(0, len(target) if len(weight) else 0, num_rows):
            rows = slice(start, start + num_rows)
            if kernels is not None:
                kept = _raw_logits(hidden[rows].to(dtype), matrix, bias)
                kernels.row_statistics(
                    kept,
                    _within(column[rows], kept)[:, 0],
                    temperature,
                    logprobs=logprobs[rows],
                    log_sums=log_sum[rows],
                    entropies=entropy[rows] if with_entropy else None,
                )
                continue
            logits = _logits(hidden[rows].to(dtype), matrix, bias, temperature)
            highest = logits.amax(-1, keepdim=True)
            chosen = logits.sub_(highest).gather(-1, _within(column[rows], logits)).squeeze(-1)
            exponentials = logits.exp() if with_entropy or keeps else logits.exp_()
            total = exponentials.sum(-1)
            log_total = total.log()
            logprobs[rows] = chosen - log_total
            log_sum[rows] = log_total + highest.squeeze(-1)
            if with_entropy:
                entropy[rows] = log_total - exponentials.mul_(logits).sum(-1) / total
            if keeps:
                kept, lowered[rows] = logits, highest.squeeze(-1)
        if vocabulary != UNDIVIDED:
            is_own = (column >= 0) & (column < len(weight))
            logprobs, log_sum, entropy = _combined(logprobs, log_sum, entropy, is_own, vocabulary)
        ctx.save_for_backward(hidden, weight, bias, target, log_sum)
        ctx.kept, ctx.lowered = kept if keeps else None, lowered
        ctx.temperature, ctx.chunk_size, ctx.dtype, ctx.vocabulary = temperature, chunk_size, dtype, vocabulary
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Context, grad_logprobs: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_sum = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # overwritten below; a schedule that splits the backward pass asks twice
        if kept is not None:
            log_sum = log_sum - ctx.lowered
        needs_hidden, needs_weight, needs_bias, *_rest = ctx.needs_input_grad
        rows = hidden.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if bias is not None and needs_bias else None
        column, scale = target - ctx.vocabulary.start, (grad_logprobs / ctx.temperature)[:, None]
        kernels = _kernels(hidden.device, ctx.dtype)
        num_columns = ctx.chunk_size * len(weight) // max(1, _BUFFERS * len(target))
        num_columns = max(1, num_columns // _ALIGNED * _ALIGNED or num_columns)
        if kept is not None:
            num_columns = max(1, len(weight))
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, len(weight), num_columns):
                block = slice(start, start + num_columns)
                matrix = weight[block].to(ctx.dtype)
                part = None if bias is None else bias[block]
                if kernels is None:
                    logits = _logits(rows, matrix, part, ctx.temperature) if kept is None else kept
                    grad = _grad_logits(logits, column - start, log_sum, scale)
                else:
                    logits = _raw_logits(rows, matrix, part) if kept is None else kept
                    grad = kernels.to_logit_gradient(
                        logits, column, log_sum, scale, ctx.temperature, first_column=start
                    )
                if grad_bias is not None:
                    grad_bias[block] = grad.sum(0, dtype=log_sum.dtype)
                grad = grad.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden += grad @ matrix
                if grad_weight is not None:
                    grad_weight[block] = grad.T @ rows
        if grad_hidden is not None:
            grad_hidden = ctx.vocabulary.sum(grad_hidden).to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _combined(
    logprobs: Tensor, log_sum: Tensor, entropy: Tensor, is_own: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn what each rank says of the softmax over its own tokens into what holds for all, [M] each.

    With rank r's share s_r = exp(log_sum_r - log_sum) of the probability, a target's logprob is logprob_r + log s_r of
    the rank that owns it (bool [M] `is_own`), and the entropy is sum_r s_r (entropy_r - log s_r).
    """
    highest = vocabulary.max(log_sum)
    lift = log_sum - highest
    weight, chosen = lift.exp(), (logprobs + lift).where(is_own, 0.0)
    total, chosen, moment = vocabulary.sum(torch.stack([weight, chosen, weight * (entropy - lift)]))
    log_total = total.log()
    return chosen - log_total, highest + log_total, moment / total + log_total


def _grad_logits(logits: Tensor, column: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
    """Turn a block of logits [M, v] in place into scale * (onehot - softmax); targets outside [0, v) are elsewhere."""
    grad = logits.sub_(log_sum[:, None]).exp_().mul_(-scale)
    inside = ((column >= 0) & (column < logits.shape[1]))[:, None]
    return grad.scatter_add_(1, _within(column, logits), torch.where(inside, scale, 0.0))


def _within(column: Tensor, logits: Tensor) -> Tensor:
    """Columns [m] as an index [m, 1] of logits [m, v]; any for what is elsewhere."""
    return column.clamp(0, logits.shape[1] - 1)[:, None]


def _logits(rows: Tensor, matrix: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Compute the logits [m, v] of rows [m, H] for matrix [v, H]: a fresh tensor that may be overwritten."""
    logits = _raw_logits(rows, matrix, bias).to(accumulator(matrix.dtype))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _raw_logits(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, matrix, None if bias is None else bias.to(matrix.dtype))


def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`objectives.softmax_kernels` where it runs: on a GPU, if Triton is installed."""
    if device.type != "cuda" or dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("nemo_rl.objectives.softmax_kernels")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
