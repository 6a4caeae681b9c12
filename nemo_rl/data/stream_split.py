"""Context parallelism: which tokens of a stream each of c ranks holds, equally many and with equal work.

The queries of a long segment differ in how many keys they see, so a stream is not cut into c pieces but into many, and
these are dealt out by their number of query-key pairs. Two pieces for each rank make the zigzag of ring attention: the
first and the last piece of a causal sequence cost as much as the two in its middle. A rank's run of queries within a
segment is a segment itself, whose ancestors include the segment's tokens before the run: what a rank has to attend is
again a segment tree.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_rl.data.packing import SegmentTree, Stream
from nemo_rl.data.padding import pad_stream

_BALANCED = 1.03
"""The busiest rank's pairs over the mean, at which no finer pieces are tried: each has to gather its keys anew."""

_FINEST = 16
"""Most pieces per rank."""


@dataclass(frozen=True, slots=True)
class StreamPart:
    """What one rank holds of a stream of S tokens.

    Attributes:
        input_ids: int64 [S/c].
        position_ids: int64 [S/c].
        tree: which keys its tokens see; `kv_index` counts the tokens of all ranks in rank order.
        num_pairs: query-key pairs that it computes.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree: SegmentTree
    num_pairs: int


@dataclass(frozen=True, slots=True)
class StreamSplit:
    """A stream over c ranks.

    Attributes:
        stream: all of it, S tokens, a multiple of c.
        places: int64 [c, S/c], ascending in each row: the stream positions of each rank's tokens.
    """

    stream: Stream
    places: Tensor

    @property
    def rank_order(self) -> Tensor:
        """int64 [S], where each stream position stands when the tokens of all ranks follow each other."""
        return self.places.flatten().argsort()

    def part(self, rank: int) -> StreamPart:
        """The share of one rank."""
        places, whole = self.places[rank], self.stream.tree
        segment = torch.searchsorted(whole.cu_seqlens_q, places, right=True) - 1
        starts = torch.ones_like(places, dtype=torch.bool)
        starts[1:] = (places.diff() != 1) | (segment.diff() != 0)
        first = starts.nonzero()[:, 0]
        cu_seqlens_q = torch.cat([first, torch.tensor([len(places)])])
        last = cu_seqlens_q[1:] - 1
        # a run sees its segment's keys up to its own last token
        begin = whole.cu_seqlens_k[segment[first]]
        end = whole.cu_seqlens_k[segment[first] + 1] - (whole.cu_seqlens_q[segment[first] + 1] - 1 - places[last])
        keys = [whole.kv_index[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
        tree = SegmentTree(
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=torch.cat([torch.zeros(1, dtype=torch.int64), (end - begin).cumsum(0)]),
            kv_index=self.rank_order[torch.cat(keys)],
        )
        num_pairs = int(_pairs(whole)[places].sum())
        return StreamPart(self.stream.input_ids[places], self.stream.position_ids[places], tree, num_pairs)


def split_stream(stream: Stream, num_parts: int, *, multiple: int = 1) -> StreamSplit:
    """Deal the tokens of a stream out to `num_parts` ranks; the same on every rank that asks.

    Args:
        stream: padded at its end where it cannot be divided.
        num_parts: c.
        multiple: of which S/c must be one, for ranks that divide their tokens further.
    """
    whole = pad_stream(stream, num_parts * multiple)
    pairs = _pairs(whole.tree)

    def excess(places: Tensor) -> float:
        load = pairs[places].sum(1)
        return float(load.max() * num_parts / load.sum())

    best, num_pieces = _deal(pairs, num_parts, 1), 2
    while excess(best) > _BALANCED and num_pieces <= min(_FINEST, len(pairs) // num_parts):
        best = min(best, _deal(pairs, num_parts, num_pieces), key=excess)
        num_pieces *= 2
    return StreamSplit(whole, best)


def _deal(pairs: Tensor, num_parts: int, num_pieces: int) -> Tensor:
    """Cut positions with these numbers of pairs [S] into pieces and give each rank `num_pieces`: [num_parts, S/c].

    Pieces differ by at most one token in length. They are dealt in rounds of equal length, the costliest first, and
    within a round the costliest goes to the rank that has least so far.
    """
    short, longer = divmod(len(pairs) // num_parts, num_pieces)
    lengths = [short + 1] * (longer * num_parts) + [short] * ((num_pieces - longer) * num_parts)
    pieces = torch.arange(len(pairs)).split(lengths)
    costs = [int(pairs[piece].sum()) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda piece: (-lengths[piece], -costs[piece]))
    load = [0] * num_parts
    held: list[list[Tensor]] = [[] for _ in range(num_parts)]
    for start in range(0, len(order), num_parts):
        least_first = sorted(range(num_parts), key=load.__getitem__)
        for rank, piece in zip(least_first, order[start : start + num_parts], strict=True):
            held[rank].append(pieces[piece])
            load[rank] += costs[piece]
    return torch.stack([torch.cat(own).sort().values for own in held])


def _pairs(tree: SegmentTree) -> Tensor:
    """How many keys each query sees, int64 [S]."""
    num_q = tree.cu_seqlens_q.diff()
    offset = torch.arange(int(tree.cu_seqlens_q[-1])) - tree.cu_seqlens_q[:-1].repeat_interleave(num_q)
    return offset + 1 + (tree.cu_seqlens_k.diff() - num_q).repeat_interleave(num_q)
