"""Loss weights: the only place where a loss is divided.

The weights are computed once, with the whole global batch in view; a worker adds up `loss_weights * token_loss`.
However the batch is then cut into micro-batches, packed or spread over workers, the sum is the same loss.
"""

from typing import Literal

import torch
from torch import Tensor

from nemo_rl.errors import ConfigError, DataError

type Reduction = Literal["token_mean", "sequence_mean", "constant"]


def loss_weights(
    loss_mask: Tensor,
    cu_seqlens: Tensor,
    *,
    reduction: Reduction = "token_mean",
    valid: Tensor | None = None,
    max_response_length: int | None = None,
) -> Tensor:
    """Weigh every token of the global batch; m = loss_mask, 0 in sequences that are not valid.

    `token_mean`: m_t / sum(m). `sequence_mean`: m_t / (sum of m in its sequence * number of sequences with any), each
    sequence counts the same. `constant`: m_t / (number of valid sequences * max_response_length), no length bias
    (Liu et al., "Understanding R1-Zero-Like Training", 2025). The first two sum to 1.

    Args:
        loss_mask: bool [N], true on tokens that carry loss.
        cu_seqlens: int64 [B+1], borders of the sequences.
        reduction: as above.
        valid: bool [B], false for sequences left out (overlong, failed); None keeps all.
        max_response_length: tokens, for `constant` only.

    Returns:
        float32 [N], 0 where there is no loss.

    Raises:
        DataError: if no token of the global batch carries loss, the mask is not bool, or the shapes disagree.
        ConfigError: if `constant` is asked for without a positive `max_response_length`.
    """
    if loss_mask.dtype != torch.bool:
        raise DataError(f"the loss mask is {loss_mask.dtype}, but only bool marks tokens; pass the column `loss_mask`")
    lengths = cu_seqlens.diff()
    if int(cu_seqlens[-1]) != len(loss_mask) or (valid is not None and valid.shape != lengths.shape):
        raise DataError(
            f"loss weights were asked for {len(loss_mask)} tokens and validity of shape "
            f"{None if valid is None else tuple(valid.shape)}, but cu_seqlens describes {int(cu_seqlens[-1])} tokens "
            f"in {len(lengths)} sequences; pass columns of one batch"
        )
    valid = torch.ones_like(lengths, dtype=torch.bool) if valid is None else valid
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    mask = (loss_mask & valid[sequence]).double()
    per_sequence = torch.zeros(len(lengths), dtype=mask.dtype, device=mask.device).index_add_(0, sequence, mask)
    if not per_sequence.any():
        raise DataError(
            f"no token of the {len(lengths)} sequences in the global batch carries loss; check that responses are not "
            "empty and that not all of them are filtered out"
        )
    match reduction:
        case "token_mean":
            weights = mask / mask.sum()
        case "sequence_mean":
            weights = mask / (per_sequence.clamp(min=1)[sequence] * per_sequence.count_nonzero())
        case "constant":
            if max_response_length is None or max_response_length < 1:
                raise ConfigError(
                    f"reduction 'constant' divides by the longest possible response, but max_response_length is "
                    f"{max_response_length}; set it to the token budget of a response"
                )
            weights = mask / (valid.sum() * max_response_length)
    return weights.float()


def pair_weights(valid: Tensor) -> Tensor:
    """Weigh every preference pair of the global batch: 1 / number of valid pairs, 0 for the others.

    Args:
        valid: bool [P].

    Returns:
        float32 [P], summing to 1.

    Raises:
        DataError: if no pair is valid.
    """
    if not valid.any():
        raise DataError(f"none of the {len(valid)} preference pairs in the global batch is valid; check the data set")
    return valid.float() / valid.sum()
