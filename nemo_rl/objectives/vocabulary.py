"""A vocabulary that several ranks share: what a head must know to work on its own rows of the weight alone.

Every rank of the split holds the same hidden states, computes the same loss, and owns the gradient of its own rows of
the weight. So what enters the head has its gradient summed over the ranks (`shared_input`), and what leaves it whole
gives each rank back its own columns of the gradient (`whole_logits`).
"""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor


class Vocabulary(Protocol):
    """The tokens `start : start + v` that this rank's head scores, and what it asks of the ranks with the others.

    All ranks call the same methods in the same order. No method is differentiable.
    """

    @property
    def start(self) -> int: ...
    def sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of one shape over the ranks; the argument stays as it is."""
        ...

    def max(self, tensor: Tensor) -> Tensor:
        """The highest value of each element over the ranks; the argument stays as it is."""
        ...

    def gather(self, columns: Tensor) -> Tensor:
        """Put [m, w] of all t ranks, equally wide, side by side in their order: [m, t*w]."""
        ...

    def join(self, columns: Tensor) -> Tensor:
        """Put the columns [m, v] of all ranks' tokens together: [m, V]."""
        ...


@dataclass(frozen=True, slots=True)
class WholeVocabulary:
    """One rank has it all."""

    @property
    def start(self) -> int:
        """The first token."""
        return 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Nothing to add."""
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Nothing to compare with."""
        return tensor

    def gather(self, columns: Tensor) -> Tensor:
        """Nothing to gather."""
        return columns

    def join(self, columns: Tensor) -> Tensor:
        """Nothing to join."""
        return columns


UNDIVIDED = WholeVocabulary()
"""A head on one rank."""


def shared_input(hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Hand the hidden states [m, H], equal on all ranks, to a head that is split: its parts' gradients are summed."""
    return hidden if isinstance(vocabulary, WholeVocabulary) else cast(Tensor, _SharedInput.apply(hidden, vocabulary))


def whole_logits(columns: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Join the logits [m, v] of every rank's own tokens into [m, V], equal on all ranks; differentiable."""
    return columns if isinstance(vocabulary, WholeVocabulary) else cast(Tensor, _WholeLogits.apply(columns, vocabulary))


@torch.no_grad()
def topk_logprobs(
    columns: Tensor, k: int, vocabulary: Vocabulary = UNDIVIDED, *, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the k most likely tokens of each row; of other ranks only their k best candidates are looked at.

    Args:
        columns: [m, v], the logits of this rank's own tokens, divided by the temperature.
        k: at most the number of all tokens.
        vocabulary: which tokens those are.
        vocab_size: leave tokens from here on out, of the softmax too; None takes all.

    Returns:
        log-probabilities [m, k], likeliest first, and token ids int64 [m, k]; no gradient.
    """
    if vocab_size is not None:
        columns = columns[:, : max(0, vocab_size - vocabulary.start)]
    lowest = torch.finfo(columns.dtype).min
    best = columns.topk(min(k, columns.shape[1]), dim=-1)
    missing = k - best.values.shape[1]
    values = torch.nn.functional.pad(best.values, (0, missing), value=-torch.inf)
    highest = vocabulary.max(values[:, :1].clamp(min=lowest))
    log_sum = vocabulary.sum((columns - highest).exp().sum(-1, keepdim=True)).log() + highest
    ids = torch.nn.functional.pad(best.indices + vocabulary.start, (0, missing))
    found = vocabulary.gather(values).topk(k, dim=-1)
    return found.values - log_sum, vocabulary.gather(ids).gather(-1, found.indices)


class _Context(Protocol):
    """What a forward pass leaves for its backward pass."""

    vocabulary: Vocabulary
    size: int


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.vocabulary = vocabulary
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.vocabulary.sum(grad), None


class _WholeLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, columns: Tensor, vocabulary: Vocabulary) -> Tensor:
        ctx.vocabulary, ctx.size = vocabulary, columns.shape[1]
        return vocabulary.join(columns)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad.narrow(1, ctx.vocabulary.start, ctx.size), None
