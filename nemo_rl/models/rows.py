"""Padded rows: how a model runs whose tokens are mixed by more than attention, such as a recurrent one."""

from itertools import groupby

import torch
from torch import Tensor, nn

from nemo_rl.data.packing import SegmentTree
from nemo_rl.models.attention import padded_runs


def run_rows(trunk: nn.Module, input_ids: Tensor, tree: SegmentTree) -> Tensor:
    """Run a model over every segment of a stream, each behind its ancestors in a row of its own, padded on the right.

    What segments share is computed once for each of them, so the stream should be laid out without sharing. Rows of
    unlike length do not meet in a batch: at most half of its tokens are padding.

    Args:
        trunk: a plain Transformers model.
        input_ids: int64 [S], on the trunk's device.
        tree: the segments.

    Returns:
        Last hidden states [S, H].
    """
    lengths, own = tree.cu_seqlens_k.diff(), tree.cu_seqlens_q.diff()
    states: list[Tensor] = []
    order: list[Tensor] = []
    for _, group in groupby(lengths.argsort().tolist(), key=lambda row: int(lengths[row]).bit_length()):
        rows = torch.tensor(list(group))
        width = int(lengths[rows].max())
        keys, real = padded_runs(tree.cu_seqlens_k[rows], lengths[rows], width)
        place = tree.kv_index[keys]
        batch, mask = input_ids[place.to(input_ids.device)], real.to(input_ids.device)
        output = trunk(input_ids=batch, attention_mask=mask.long(), use_cache=False).last_hidden_state
        asked = real & (torch.arange(width) >= (lengths - own)[rows, None])
        states.append(output[asked.to(output.device)])
        order.append(place[asked])
    return torch.cat(states)[torch.cat(order).argsort().to(input_ids.device)]
