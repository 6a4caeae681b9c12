"""Packing: a micro-batch as the model sees it, one flat stream in which every shared prefix stands once.

A segment of the stream attends to its ancestors in the prefix tree and, causally, to itself, so the hidden state of a
shared token is computed once and its gradient is the sum over all sequences that run through it: exact, not an
approximation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.data.prefix_tree import PrefixTree, TokenArray
from nemo_rl.errors import DataError


@dataclass(frozen=True, slots=True)
class SegmentTree:
    """Which keys each query of a stream sees.

    Segment r holds the queries `cu_seqlens_q[r]:cu_seqlens_q[r+1]` of the stream (segments lie one after the other)
    and the keys `kv_index[cu_seqlens_k[r]:cu_seqlens_k[r+1]]`, its ancestors' and then its own, causal and aligned
    bottom-right.

    Attributes:
        cu_seqlens_q: int64 [R+1].
        cu_seqlens_k: int64 [R+1].
        kv_index: int64 [K], stream positions.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor


@dataclass(frozen=True, slots=True)
class Stream:
    """One micro-batch as the model sees it: S input tokens, of which M predictions are asked.

    Attributes:
        input_ids: int64 [S].
        position_ids: int64 [S], position within the sequence.
        tree: who attends to whom.
        predictor: int64 [M], the stream position whose hidden state predicts `target[m]`; in a plain sequence the token
            before, at a branch the last token of the shared prefix.
        target: int64 [M], token ids.
        token_index: int64 [M], where each target stands in the `TokenBatch` (ascending).
    """

    input_ids: Tensor
    position_ids: Tensor
    tree: SegmentTree
    predictor: Tensor
    target: Tensor
    token_index: Tensor


def _segment_tree(tree: PrefixTree) -> SegmentTree:
    return SegmentTree(
        cu_seqlens_q=torch.tensor(np.cumsum([0] + [len(s) for s in tree.segments])),
        cu_seqlens_k=torch.tensor(np.cumsum([0] + [len(p) for p in tree.paths])),
        kv_index=torch.from_numpy(np.concatenate(tree.paths)),
    )


def _positions(tree: PrefixTree) -> Tensor:
    pieces = [np.arange(start, start + len(s)) for start, s in zip(tree.starts, tree.segments, strict=True)]
    return torch.from_numpy(np.concatenate(pieces))


@dataclass(frozen=True, slots=True)
class PromptStream:
    """Prompts laid out for one forward pass; `where[i]` int64 [P_i] are the stream positions of prompt i's tokens."""

    input_ids: Tensor
    position_ids: Tensor
    tree: SegmentTree
    where: tuple[Tensor, ...]


def prompt_stream(prompts: Sequence[Tensor], *, min_shared: int = 1) -> PromptStream:
    """Lay out prompts (int64 [P_i] each) so that what any of them share, up to whole duplicates, is computed once."""
    tree = PrefixTree.of([prompt.numpy() for prompt in prompts], min_shared=min_shared)
    return PromptStream(
        input_ids=torch.from_numpy(np.concatenate(tree.segments)),
        position_ids=_positions(tree),
        tree=_segment_tree(tree),
        where=tuple(torch.from_numpy(tree.where[i]) for i in range(len(prompts))),
    )


def inputs_and_targets(batch: TokenBatch) -> tuple[list[TokenArray], list[TokenArray]]:
    """Per sequence: the tokens that must enter the model (up to the last one that predicts), and its loss positions.

    Raises:
        DataError: the first token of a sequence carries loss.
    """
    bounds = batch.cu_seqlens.tolist()
    tokens = batch.token_ids.numpy()
    mask = batch.token_columns["loss_mask"].numpy()
    inputs: list[TokenArray] = []
    targets: list[TokenArray] = []
    for begin, end in pairwise(bounds):
        wanted = np.flatnonzero(mask[begin:end])
        if wanted.size and wanted[0] == 0:
            raise DataError("the first token of a sequence cannot carry loss: nothing precedes it; clear its loss_mask")
        inputs.append(tokens[begin : begin + int(wanted[-1])] if wanted.size else tokens[begin:begin])
        targets.append(wanted)
    return inputs, targets


def build_stream(batch: TokenBatch, *, share_prefixes: bool = True, min_shared: int = 8) -> Stream:
    """Lay a batch (with a `loss_mask` column) out as one stream.

    Tokens after the last predicting one never enter the model. A run of at least `min_shared` tokens that several
    sequences have in common, beyond what they share already, enters it once; so does a sequence that stands twice.

    Raises:
        DataError: if no token carries loss, or the first token of a sequence does.
    """
    inputs, wanted = inputs_and_targets(batch)
    if not any(len(positions) for positions in wanted):
        raise DataError("no token of the micro-batch carries loss; drop such sequences before training on them")
    tree = PrefixTree.of(inputs, batch.group_ids.tolist(), share_prefixes=share_prefixes, min_shared=min_shared)
    starts = batch.cu_seqlens[:-1].tolist()
    token_index = torch.from_numpy(np.concatenate([start + w for start, w in zip(starts, wanted, strict=True)]))
    predictor = np.concatenate([tree.where[i][w - 1] for i, w in enumerate(wanted)])
    return Stream(
        input_ids=torch.from_numpy(np.concatenate(tree.segments)),
        position_ids=_positions(tree),
        tree=_segment_tree(tree),
        predictor=torch.from_numpy(predictor),
        target=batch.token_ids[token_index],
        token_index=token_index,
    )
