"""Jagged columns: look them up, and go from tokens to whole sequences and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import DataError


def token_column(tokens: TokenBatch, name: str) -> Tensor:
    """Return the per-token column `name`, [M].

    Raises:
        DataError: the batch has none.
    """
    return _column(tokens.token_columns, name, "per-token", "with_columns")


def sequence_column(tokens: TokenBatch, name: str) -> Tensor:
    """Return the per-sequence column `name`, [B].

    Raises:
        DataError: the batch has none.
    """
    return _column(tokens.sequence_columns, name, "per-sequence", "with_sequence_columns")


def per_token(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Give every token the value of its sequence: [B], int64 [B+1] -> [M]."""
    return values.repeat_interleave(cu_seqlens.diff())


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Add up the tokens of each sequence: [M], int64 [B+1] -> [B], 0 for a sequence without a token.

    The sum runs in float64: a long answer's log-probability is thousands, the difference that trains it far below 1.
    """
    lengths = cu_seqlens.diff()
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(values))
    sums = torch.zeros(len(lengths), dtype=torch.float64, device=values.device)
    return sums.index_add(0, sequence, values.double()).to(values.dtype)


def sequence_means(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Average the tokens of each sequence: [M], int64 [B+1] -> [B], 0 for a sequence without a token."""
    return sequence_sums(values, cu_seqlens) / cu_seqlens.diff().clamp(min=1)


def _column(columns: Mapping[str, Tensor], name: str, kind: str, method: str) -> Tensor:
    try:
        return columns[name]
    except KeyError:
        known = ", ".join(sorted(columns)) or "none"
        raise DataError(
            f"the objective needs the {kind} column {name!r}, but the batch has {known}; add it with "
            f"`TokenBatch.{method}`"
        ) from None
