"""Log-probabilities of tokens from hidden states: the only file that knows which position predicts which token.

The language-model head is the largest matrix product of a small model, and its logits [M, V] the largest tensor of a
training step. `token_logprobs` never builds them whole. Forward it walks over chunks of tokens and keeps one number per
token, the log-sum-exp; backward it walks over blocks of the vocabulary, where softmax = exp(logit - logsumexp) needs
nothing else, so every block of the weight's gradient is one complete matrix product (no running sum, hence no loss in
bfloat16) and only the small gradient of the hidden states is added up, in float32. Logits that all fit into the memory
of one chunk are kept for the backward pass instead of computed again.
"""

import importlib
import importlib.util
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Literal, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.truncation import WHOLE, Truncation, truncated_logits

_BUFFERS = 4
"""A chunk's memory is shared by logits, their exponentials, low-precision copies and the weight's gradient."""


type Reads = Literal["logprobs", "distribution", "values", "head_values"]
"""What an objective is given: `TokenOutputs`, `distillation.DistributionOutputs` or `value.ScalarOutputs`, which as
`head_values` have a gradient for the head alone."""


@dataclass(frozen=True, slots=True)
class TokenOutputs:
    """What the model says about the M loss tokens of a micro-batch.

    Attributes:
        policy_logprobs: float32 [M], with gradient.
        entropy: float32 [M] without gradient, of the next-token distribution that is sampled from.
        values: float32 [M] with gradient, the value before each token; None without a value head.
    """

    policy_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LogitHead:
    """A language-model head on its own: hidden states to whole logits.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        logit_scale: multiplies the raw logits.
        softcap: `cap * tanh(x / cap)` after the scale; None for no cap.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[m, H] -> logits [m, V], float32 (float64 for float64 weights)."""
        raw = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = raw.to(_accumulator(raw.dtype))
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def to(self, device: torch.device | str) -> "LogitHead":
        """The same head on a device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


@dataclass(frozen=True, slots=True)
class TokenHead:
    """How a model's last hidden states become log-probabilities; chooses the cheapest path that is exact.

    Attributes:
        temperature: divides the final logits, as it did when the tokens were sampled.
        chunk_size: all temporary tensors of the head take at most the memory of this many rows of logits [V] (with
            `softcap` or `truncation`, of a few times as many).
        logit_scale: multiplies the raw logits (Cohere's `logit_scale`, Granite's `1 / logits_scaling`).
        softcap: Gemma's `cap * tanh(x / cap)` after the scale; None for no cap.
        truncation: of the distribution that the tokens were sampled from.
        with_entropy: whether to compute the entropies too; NaN if not.
    """

    temperature: float = 1.0
    chunk_size: int = 256
    logit_scale: float = 1.0
    softcap: float | None = None
    truncation: Truncation = WHOLE
    with_entropy: bool = True

    def __post_init__(self) -> None:
        _check(self.temperature, self.chunk_size)

    def __call__(
        self, hidden: Tensor, weight: Tensor, predictor: Tensor, target: Tensor, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score `target[m]` with the hidden state at stream position `predictor[m]`.

        Args:
            hidden: [S, H], last hidden states of the stream (after the final norm).
            weight: [V, H], of the head.
            predictor: int64 [M], positions in the stream; repeats are allowed.
            target: int64 [M], token ids.
            bias: [V] or None.

        Returns:
            log-probabilities float32 [M] with gradient, entropies float32 [M] without.
        """
        rows = select_hidden(hidden, predictor)
        if self.softcap is None and self.truncation == WHOLE:
            return token_logprobs(
                rows,
                weight,
                target,
                temperature=self.temperature / self.logit_scale,
                chunk_size=self.chunk_size,
                bias=bias,
                with_entropy=self.with_entropy,
            )
        return self._plain(rows, weight, target, bias)

    def _plain(self, rows: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the plain formula chunk by chunk; autograd differentiates it and checkpointing drops its logits."""

        def score(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return token_logprobs_from_logits(
                F.linear(rows.to(weight.dtype), weight, bias),
                target,
                temperature=self.temperature,
                logit_scale=self.logit_scale,
                softcap=self.softcap,
                truncation=self.truncation,
                with_entropy=self.with_entropy,
            )

        chunks = [
            cast(tuple[Tensor, Tensor], checkpoint(score, *chunk, use_reentrant=False, preserve_rng_state=False))
            for chunk in zip(rows.split(self.chunk_size), target.split(self.chunk_size), strict=True)
        ]
        logprobs, entropies = zip(*chunks, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)


def select_hidden(hidden: Tensor, predictor: Tensor) -> Tensor:
    """Gather the hidden states [S, H] of the positions `predictor` int64 [M] (repeats add their gradients): [M, H]."""
    return hidden.index_select(0, predictor)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int = 256,
    bias: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute log softmax((hidden @ weight.T + bias) / temperature)[target] without ever holding all logits.

    The products run in the weight's dtype (autocast's under autocast), everything after them in float32 (float64 if the
    weight is). Differentiable once, with respect to `hidden`, `weight` and `bias`.

    Args:
        hidden: [M, H], row m predicts `target[m]` (see `select_hidden`).
        weight: [V, H].
        target: int64 [M].
        temperature: of the sampling distribution, positive.
        chunk_size: all temporary tensors together take at most the memory of `chunk_size` rows of logits.
        bias: [V] or None.
        with_entropy: whether to compute the entropies too; NaN if not.

    Returns:
        log-probabilities float32 [M] with gradient, entropies (nats) float32 [M] without.

    Raises:
        ConfigError: if the temperature or the chunk size is not positive.
    """
    _check(temperature, chunk_size)
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        logprobs, entropy = _ChunkedHead.apply(
            hidden, weight, bias, target, temperature, chunk_size, dtype, with_entropy
        )
    return logprobs, entropy


def token_logprobs_from_logits(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    truncation: Truncation = WHOLE,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Compute log softmax(cap * tanh(scale * logits / cap) / temperature)[target] from whole logits.

    With a truncation the softmax runs over the tokens that it keeps, and over the target: weights that have moved may
    not keep a token that was sampled before, and its log-probability must stay finite.

    Args:
        logits: [M, V], row m predicts `target[m]`; -inf marks tokens that cannot be sampled.
        target: int64 [M].
        temperature: of the sampling distribution, positive.
        logit_scale: multiplies the logits first.
        softcap: `cap`; None for none.
        truncation: of the distribution that the targets were sampled from.
        with_entropy: whether to compute the entropies too; NaN if not.

    Returns:
        log-probabilities float32 [M] with gradient, entropies (nats) float32 [M] without.

    Raises:
        ConfigError: if the temperature is not positive.
    """
    _check(temperature)
    scaled = logits.to(_accumulator(logits.dtype)) * logit_scale
    if softcap is not None:
        scaled = softcap * torch.tanh(scaled / softcap)
    scaled = scaled / temperature
    if truncation != WHOLE:
        scaled = truncated_logits(
            scaled, top_p=truncation.top_p, top_k=truncation.top_k, min_p=truncation.min_p, keep=target
        )
    log_probabilities = torch.log_softmax(scaled, dim=-1)
    chosen = log_probabilities.gather(-1, target[:, None]).squeeze(-1)
    if not with_entropy:
        return chosen, torch.full_like(chosen, torch.nan, requires_grad=False)
    return chosen, torch.special.entr(log_probabilities.detach().exp()).sum(-1)


class _Context(Protocol):
    """What the forward pass of the chunked head leaves for its backward pass."""

    @property
    def saved_tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]: ...
    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    temperature: float
    chunk_size: int
    dtype: torch.dtype


class _ChunkedHead(torch.autograd.Function):
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
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(target), dtype=_accumulator(dtype), device=hidden.device)
        log_sum = torch.empty_like(logprobs)
        entropy = torch.full_like(logprobs, torch.nan)
        matrix = weight.to(dtype)
        kernels = _kernels(hidden.device, dtype)
        cost = dtype.itemsize if kernels is not None else 2 * log_sum.itemsize  # of a logit, where no other is held
        keeps = any(ctx.needs_input_grad) and len(target) * cost <= chunk_size * log_sum.itemsize
        kept: Tensor | None = None
        num_rows = max(1, len(target) if keeps else chunk_size // _BUFFERS)
        for start in range(0, len(target), num_rows):
            rows = slice(start, start + num_rows)
            if kernels is not None:
                kept = _raw_logits(hidden[rows].to(dtype), matrix, bias)
                kernels.row_statistics(
                    kept,
                    target[rows],
                    temperature,
                    logprobs=logprobs[rows],
                    log_sums=log_sum[rows],
                    entropies=entropy[rows] if with_entropy else None,
                )
                continue
            logits = _logits(hidden[rows].to(dtype), matrix, bias, temperature)
            highest = logits.amax(-1, keepdim=True)
            chosen = logits.sub_(highest).gather(-1, target[rows, None]).squeeze(-1)
            exponentials = logits.exp() if with_entropy or keeps else logits.exp_()
            total = exponentials.sum(-1)
            log_total = total.log()
            logprobs[rows] = chosen - log_total
            log_sum[rows] = log_total if keeps else log_total + highest.squeeze(-1)  # what is kept is less the highest
            if with_entropy:
                entropy[rows] = log_total - exponentials.mul_(logits).sum(-1) / total
            kept = logits
        ctx.save_for_backward(hidden, weight, bias, target, log_sum, kept if keeps else None)
        ctx.temperature, ctx.chunk_size, ctx.dtype = temperature, chunk_size, dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Context, grad_logprobs: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, log_sum, kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_rest = ctx.needs_input_grad
        rows = hidden.to(ctx.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = torch.empty_like(bias) if bias is not None and needs_bias else None
        scale = (grad_logprobs / ctx.temperature)[:, None]
        kernels = _kernels(hidden.device, ctx.dtype)
        num_columns = max(1, ctx.chunk_size * len(weight) // max(1, _BUFFERS * len(target)))
        if kept is not None:
            num_columns = len(weight)
        with torch.autocast(weight.device.type, enabled=False):
            for start in range(0, len(weight), num_columns):
                block = slice(start, start + num_columns)
                matrix = weight[block].to(ctx.dtype)
                part = None if bias is None else bias[block]
                if kernels is None:
                    logits = _logits(rows, matrix, part, ctx.temperature) if kept is None else kept
                    grad = _grad_logits(logits, target - start, log_sum, scale)
                else:
                    logits = _raw_logits(rows, matrix, part) if kept is None else kept
                    grad = kernels.to_logit_gradient(
                        logits, target, log_sum, scale, ctx.temperature, first_column=start
                    )
                if grad_bias is not None:
                    grad_bias[block] = grad.sum(0, dtype=log_sum.dtype)
                grad = grad.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden += grad @ matrix
                if grad_weight is not None:
                    grad_weight[block] = grad.T @ rows
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _grad_logits(logits: Tensor, column: Tensor, log_sum: Tensor, scale: Tensor) -> Tensor:
    """Turn a block of logits [M, v] in place into scale * (onehot - softmax); targets outside [0, v) are elsewhere."""
    grad = logits.sub_(log_sum[:, None]).exp_().mul_(-scale)
    last = logits.shape[1] - 1
    inside = ((column >= 0) & (column <= last))[:, None]
    return grad.scatter_add_(1, column.clamp(0, last)[:, None], torch.where(inside, scale, 0.0))


def _logits(rows: Tensor, matrix: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Compute the logits [m, v] of rows [m, H] for matrix [v, H]: a fresh tensor that may be overwritten."""
    logits = _raw_logits(rows, matrix, bias).to(_accumulator(matrix.dtype))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _raw_logits(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, matrix, None if bias is None else bias.to(matrix.dtype))


def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """`objectives.softmax_kernels` where it runs: on a GPU, if Triton is installed."""
    if device.type != "cuda" or dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("nemo_rl.objectives.softmax_kernels")


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _check(temperature: float, chunk_size: int = 1) -> None:
    if not temperature > 0:
        raise ConfigError(
            f"the temperature of training log-probabilities is {temperature}, but greedy samples have no distribution "
            "to differentiate; sample and train with a temperature above 0"
        )
    if chunk_size < 1:
        raise ConfigError(f"logprob_chunk_size is {chunk_size}; it must be at least 1")
