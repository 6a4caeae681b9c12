"""Log-probabilities of tokens from hidden states: the only file that knows which position predicts which token.

The language-model head is the largest matrix product of a small model, and its logits [M, V] the largest tensor of a
training step: `token_logprobs` never builds them whole. All of them work on a vocabulary that several ranks share
(`nemo_rl.objectives.vocabulary`), each with its own rows of the weight and of the bias.
"""

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_rl.errors import ConfigError
from nemo_rl.objectives.chunked_head import ChunkedHead, accumulator
from nemo_rl.objectives.truncation import WHOLE, Truncation, truncated_logits
from nemo_rl.objectives.vocabulary import UNDIVIDED, Vocabulary, shared_input, topk_logprobs, whole_logits

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
        weight: [V, H]; of a shared vocabulary this rank's rows.
        bias: [V] or None; likewise.
        logit_scale: multiplies the raw logits.
        softcap: `cap * tanh(x / cap)` after the scale; None for no cap.
        vocabulary: which tokens the rows are.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocabulary: Vocabulary = UNDIVIDED

    def __call__(self, hidden: Tensor) -> Tensor:
        """[m, H] -> logits [m, V] of all tokens on every rank, float32 (float64 for float64 weights)."""
        return whole_logits(self._columns(shared_input(hidden, self.vocabulary)), self.vocabulary)

    def topk(
        self, hidden: Tensor, k: int, *, temperature: float = 1.0, vocab_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """[m, H] -> log-probabilities [m, k] and ids; see `topk_logprobs`. The ranks exchange candidates alone."""
        with torch.no_grad():
            columns = self._columns(hidden) / temperature
        return topk_logprobs(columns, k, self.vocabulary, vocab_size=vocab_size)

    def _columns(self, hidden: Tensor) -> Tensor:
        """The logits of this rank's tokens."""
        raw = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = raw.to(accumulator(raw.dtype))
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
        vocabulary: which tokens the rows of the weight are.
    """

    temperature: float = 1.0
    chunk_size: int = 256
    logit_scale: float = 1.0
    softcap: float | None = None
    truncation: Truncation = WHOLE
    with_entropy: bool = True
    vocabulary: Vocabulary = UNDIVIDED

    def __post_init__(self) -> None:
        _check(self.temperature, self.chunk_size)

    def __call__(
        self, hidden: Tensor, weight: Tensor, predictor: Tensor, target: Tensor, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score `target[m]` with the hidden state at stream position `predictor[m]`.

        Args:
            hidden: [S, H], last hidden states of the stream (after the final norm).
            weight: [V, H], of the head; of a shared vocabulary this rank's rows, and so the bias.
            predictor: int64 [M], positions in the stream; repeats are allowed.
            target: int64 [M], token ids.
            bias: [V] or None.

        Returns:
            log-probabilities float32 [M] with gradient, entropies float32 [M] without.
        """
        return self.score(select_hidden(hidden, predictor), weight, target, bias=bias)

    def score(
        self, rows: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same for the hidden states [M, H] that predict the targets."""
        if self.softcap is None and self.truncation == WHOLE:
            return token_logprobs(
                rows,
                weight,
                target,
                temperature=self.temperature / self.logit_scale,
                chunk_size=self.chunk_size,
                bias=bias,
                with_entropy=self.with_entropy,
                vocabulary=self.vocabulary,
            )
        return self._plain(rows, weight, target, bias)

    def _plain(self, rows: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the plain formula chunk by chunk; autograd differentiates it and checkpointing drops its logits.

        Which tokens a truncation keeps depends on all of them, so the ranks of a shared vocabulary join each chunk.
        """
        rows = shared_input(rows, self.vocabulary)

        def score(rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return token_logprobs_from_logits(
                whole_logits(F.linear(rows.to(weight.dtype), weight, bias), self.vocabulary),
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
    vocabulary: Vocabulary = UNDIVIDED,
) -> tuple[Tensor, Tensor]:
    """Compute log softmax((hidden @ weight.T + bias) / temperature)[target] without ever holding all logits.

    The products run in the weight's dtype (autocast's under autocast), everything after them in float32 (float64 if the
    weight is). Differentiable once, with respect to `hidden`, `weight` and `bias`.

    The ranks of a shared vocabulary all give the same hidden states and targets and get the same results. They exchange
    a few numbers per token once, never logits; backward, the gradient of `hidden` is summed over them in here, and
    that of `weight` and `bias` is of this rank's own rows.

    Args:
        hidden: [M, H], row m predicts `target[m]` (see `select_hidden`).
        weight: [V, H]; of a shared vocabulary this rank's rows, and so the bias.
        target: int64 [M].
        temperature: of the sampling distribution, positive.
        chunk_size: all temporary tensors together take at most the memory of `chunk_size` rows of logits.
        bias: [V] or None.
        with_entropy: whether to compute the entropies too; NaN if not.
        vocabulary: which tokens the rows of the weight are.

    Returns:
        log-probabilities float32 [M] with gradient, entropies (nats) float32 [M] without.

    Raises:
        ConfigError: if the temperature or the chunk size is not positive.
    """
    _check(temperature, chunk_size)
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    with torch.autocast(device, enabled=False):
        logprobs, entropy = ChunkedHead.apply(
            hidden, weight, bias, target, temperature, chunk_size, dtype, with_entropy, vocabulary
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
    scaled = logits.to(accumulator(logits.dtype)) * logit_scale
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


def _check(temperature: float, chunk_size: int = 1) -> None:
    if not temperature > 0:
        raise ConfigError(
            f"the temperature of training log-probabilities is {temperature}, but greedy samples have no distribution "
            "to differentiate; sample and train with a temperature above 0"
        )
    if chunk_size < 1:
        raise ConfigError(f"logprob_chunk_size is {chunk_size}; it must be at least 1")
