"""Streams of a length that ranks can divide among them."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from nemo_rl.data.packing import SegmentTree, Stream


def pad_stream(stream: Stream, multiple: int) -> Stream:
    """Round the length of a stream up to a multiple, with a segment of its own that nothing else sees or reads."""
    length = len(stream.input_ids)
    missing = -length % multiple
    if not missing:
        return stream
    tree, added = stream.tree, torch.arange(missing)
    return replace(
        stream,
        input_ids=F.pad(stream.input_ids, (0, missing)),
        position_ids=torch.cat([stream.position_ids, added]),
        tree=SegmentTree(
            cu_seqlens_q=torch.cat([tree.cu_seqlens_q, tree.cu_seqlens_q[-1:] + missing]),
            cu_seqlens_k=torch.cat([tree.cu_seqlens_k, tree.cu_seqlens_k[-1:] + missing]),
            kv_index=torch.cat([tree.kv_index, length + added]),
        ),
    )
