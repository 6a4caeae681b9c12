"""Packing: a micro-batch as the model sees it, one flat stream in which every shared prefix stands once.

The sequences of a micro-batch form a prefix tree (a radix tree over token ids). Each edge of the tree becomes one
*segment* of the stream. A segment attends to its ancestors and, causally, to itself, so the hidden state of a shared
token is computed once and its gradient is the sum over all sequences that run through it: exact, not an approximation.
Plain packing is the same tree without sharing.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from nemo_rl.data.batch import TokenBatch
from nemo_rl.errors import DataError

type TokenArray = np.ndarray[tuple[int], np.dtype[np.int64]]


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


@dataclass(slots=True)
class _Layout:
    """Segments in stream order, and for every sequence where its tokens stand."""

    segments: list[TokenArray] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    paths: list[TokenArray] = field(default_factory=list)
    where: dict[int, TokenArray] = field(default_factory=dict)
    length: int = 0

    def emit(self, tokens: TokenArray, start: int, ancestors: TokenArray) -> TokenArray:
        """Append a segment; return the stream positions of its ancestors and itself."""
        own = np.arange(self.length, self.length + len(tokens))
        path = np.concatenate([ancestors, own])
        self.segments.append(tokens)
        self.starts.append(start)
        self.paths.append(path)
        self.length += len(tokens)
        return path


def _common_prefix(sequences: Sequence[TokenArray], scan: int) -> int:
    """Length to which all sequences agree, given that they agree up to `scan`."""
    first, agreed = sequences[0], min(len(sequence) for sequence in sequences)
    for other in sequences[1:]:
        differs = np.flatnonzero(first[scan:agreed] != other[scan:agreed])
        if differs.size:
            agreed = scan + int(differs[0])
    return agreed


def _share(layout: _Layout, sequences: dict[int, TokenArray], min_shared: int) -> None:
    """Lay out the sequences as a prefix tree, depth first."""
    pending = [(sequences, 0, 0, np.arange(0))]
    while pending:
        # the members agree on all tokens before `scan`, of which the stream holds those before `start`, at `path`
        members, start, scan, path = pending.pop()
        end = _common_prefix(list(members.values()), scan)
        ending = [index for index, sequence in members.items() if len(sequence) == end]
        if end > start and (len(members) == len(ending) or end - start >= min_shared):
            path = layout.emit(next(iter(members.values()))[start:end], start, path)
            start = end
        if ending:  # at an edge too short to be shared with those that go on, the ones that stop get a copy
            tail = path if start == end else layout.emit(members[ending[0]][start:end], start, path)
            layout.where.update(dict.fromkeys(ending, tail))
        branches: dict[int, dict[int, TokenArray]] = {}
        for index, sequence in members.items():
            if len(sequence) > end:
                branches.setdefault(int(sequence[end]), {})[index] = sequence
        pending += [(branch, start, end, path) for branch in reversed(branches.values())]


def _lay_out(sequences: Sequence[TokenArray], *, share_prefixes: bool, min_shared: int) -> _Layout:
    nothing = np.arange(0)
    layout = _Layout(where={index: nothing for index, sequence in enumerate(sequences) if not len(sequence)})
    present = {index: sequence for index, sequence in enumerate(sequences) if len(sequence)}
    if not share_prefixes:
        layout.where.update({index: layout.emit(sequence, 0, nothing) for index, sequence in present.items()})
    elif present:
        _share(layout, present, min_shared)
    return layout


def _tree(layout: _Layout) -> SegmentTree:
    return SegmentTree(
        cu_seqlens_q=torch.tensor(np.cumsum([0] + [len(s) for s in layout.segments])),
        cu_seqlens_k=torch.tensor(np.cumsum([0] + [len(p) for p in layout.paths])),
        kv_index=torch.from_numpy(np.concatenate(layout.paths)),
    )


def _positions(layout: _Layout) -> Tensor:
    pieces = [np.arange(start, start + len(s)) for start, s in zip(layout.starts, layout.segments, strict=True)]
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
    layout = _lay_out([prompt.numpy() for prompt in prompts], share_prefixes=True, min_shared=min_shared)
    return PromptStream(
        input_ids=torch.from_numpy(np.concatenate(layout.segments)),
        position_ids=_positions(layout),
        tree=_tree(layout),
        where=tuple(torch.from_numpy(layout.where[i]) for i in range(len(prompts))),
    )


def _needed(batch: TokenBatch) -> tuple[list[TokenArray], list[TokenArray]]:
    """Per sequence: the tokens that must enter the model (up to the last one that predicts), and its loss positions."""
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
    inputs, wanted = _needed(batch)
    if not any(len(positions) for positions in wanted):
        raise DataError("no token of the micro-batch carries loss; drop such sequences before training on them")
    layout = _lay_out(inputs, share_prefixes=share_prefixes, min_shared=min_shared)
    starts = batch.cu_seqlens[:-1].tolist()
    token_index = torch.from_numpy(np.concatenate([start + w for start, w in zip(starts, wanted, strict=True)]))
    predictor = np.concatenate([layout.where[i][w - 1] for i, w in enumerate(wanted)])
    return Stream(
        input_ids=torch.from_numpy(np.concatenate(layout.segments)),
        position_ids=_positions(layout),
        tree=_tree(layout),
        predictor=torch.from_numpy(predictor),
        target=batch.token_ids[token_index],
        token_index=token_index,
    )


def micro_batches(
    batch: TokenBatch, *, max_tokens: int, share_prefixes: bool = True, min_shared: int = 8
) -> Iterator[TokenBatch]:
    """Cut a batch into consecutive parts whose streams hold at most `max_tokens` tokens each.

    Groups stay whole while they fit, so that what they share is computed once; a group beyond the budget is cut between
    its sequences, and one sequence beyond it goes alone. Sequences without a loss token are left out: they compute
    nothing.
    """
    inputs, wanted = _needed(batch)
    groups: dict[int, list[int]] = {}
    for index, group_id in enumerate(batch.group_ids.tolist()):
        if len(wanted[index]):
            groups.setdefault(group_id, []).append(index)

    def cost(indices: Sequence[int]) -> int:
        chosen = [inputs[i] for i in indices]
        return _lay_out(chosen, share_prefixes=share_prefixes, min_shared=min_shared).length

    pieces: list[tuple[list[int], int]] = []
    for group in groups.values():
        rest = group
        while rest:
            fitting = rest[: _num_fitting(rest, max_tokens, cost)]
            pieces.append((fitting, cost(fitting)))
            rest = rest[len(fitting) :]
    part: list[int] = []
    filled = 0
    for indices, tokens in pieces:
        if part and filled + tokens > max_tokens:
            yield batch.select(torch.tensor(part))
            part, filled = [], 0
        part += indices
        filled += tokens
    if part:
        yield batch.select(torch.tensor(part))


def _num_fitting(indices: Sequence[int], max_tokens: int, cost: Callable[[Sequence[int]], int]) -> int:
    """How many of the first sequences fit into the budget together, at least one; more sequences never cost less."""
    sizes = range(1, len(indices) + 1)
    return max(1, bisect_right(sizes, max_tokens, key=lambda size: cost(indices[:size])))
